package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// What nodes made of Containerd have in place of berth.

// socket is where the runtime serves, as the node sees it.
func (n *Node) socket() string {
	if n.c.parts == Containerd {
		return "/run/containerd/containerd.sock"
	}
	return "/run/berth/berth.sock"
}

func (n *Node) containerdConfig() string {
	return lab.ContainerdConfig{
		Root: "/var/lib/containerd", State: "/run/containerd", Socket: "/run/containerd/containerd.sock",
		CertsD: n.path("certs.d"), CNIBin: n.c.program("cni"), CNIConf: n.path("cni"), Runc: n.c.program("runc"),
	}.String()
}

// startContainerd starts containerd, and waits until it answers. It has no network before the node has a pod CIDR.
func (n *Node) startContainerd(ctx context.Context) error {
	p, err := n.start("containerd", nil, "containerd", "--config", n.path("containerd.toml"), "--log-level", "warn")
	if err != nil {
		return err
	}
	cri, err := n.dial(p.pid)
	if err != nil {
		return err
	}
	defer func() { _ = cri.Close() }()
	return p.ready(ctx, time.Minute, cri.Answers)
}

// dial connects to the node's runtime: its socket is in the mount namespace of a process of the node.
func (n *Node) dial(pid int) (*lab.Client, error) {
	return lab.Dial(fmt.Sprintf("unix:///proc/%d/root%s", pid, n.socket()))
}

// connect makes the node's network, once it has a pod CIDR: the configuration that containerd waits for, and the routes to other nodes'
// pods and theirs to this one's.
func (n *Node) connect(ctx context.Context) error {
	own := ""
	err := lab.Eventually(ctx, time.Minute, n.Name+" has a pod CIDR", func(ctx context.Context) (err error) {
		if own, err = n.podCIDR(ctx); err == nil && own == "" {
			err = errors.New("the controller manager has given it none")
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, other := range n.c.Nodes {
		if other == n || !network.Pinned(other.NetNS()) {
			continue // it makes both routes when it boots
		}
		cidr, err := other.podCIDR(ctx)
		if err != nil {
			return err
		}
		if cidr == "" {
			return fmt.Errorf("%s runs and has no pod CIDR", other.Name)
		}
		if err := errors.Join(n.route(ctx, cidr, other), other.route(ctx, own, n)); err != nil {
			return err
		}
	}
	return os.WriteFile(n.path("cni", "10-cluster.conflist"), fmt.Appendf(nil, `{
  "cniVersion": "1.0.0",
  "name": "cluster",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, own), 0o644)
}

// podCIDR is empty for a node that has none yet.
func (n *Node) podCIDR(ctx context.Context) (string, error) {
	cidr, err := n.c.Kubectl(ctx, "get", "node", n.Name, "--ignore-not-found", "--output", "jsonpath={.spec.podCIDR}")
	return strings.TrimSpace(cidr), err
}

func (n *Node) route(ctx context.Context, cidr string, to *Node) error {
	if out, err := n.Command(ctx, "ip", "route", "replace", cidr, "via", to.Address(), "dev", "eth0").CombinedOutput(); err != nil {
		return fmt.Errorf("%s: route to %s, the pods of %s: %w: %s", n.Name, cidr, to.Name, err, out)
	}
	return nil
}

// startKubeProxy makes the node's network and starts kube-proxy, and waits until Services are programmed.
func (n *Node) startKubeProxy(ctx context.Context) error {
	if err := n.connect(ctx); err != nil {
		return err
	}
	return n.startProxy(ctx, "kube-proxy", "kube-proxy")
}

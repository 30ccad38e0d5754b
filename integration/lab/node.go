package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Options say what is special about a node; the zero value serves most tests.
type Options struct {
	Endpoint string // use this CRI runtime instead of `berth serve`; default $BERTH_TEST_ENDPOINT
	// Containerd has the node run containerd with runc instead of `berth serve`, to compare; default $BERTH_TEST_CONTAINERD.
	Containerd bool
	Serve      []string                         // more arguments of `berth serve`
	Bin        string                           // directory of berth and berth-shim; default bin/ of the repository
	Tools      *Tools                           // default: all but the kubelet, built if need be
	Bare       bool                             // without a network configuration: the pod CIDR alone makes the network
	NetNS      string                           // of the runtime: a path; default this process's own
	Beside     bool                             // others have pods on this machine meanwhile; default $BERTH_LAB_SHARED
	Log        func(format string, args ...any) // what takes long is told here; may be nil
}

// Node is one node.
type Node struct {
	Dir      string // everything of the node lies below it
	Index    int    // 1 to 200, no other living node of this machine has it
	Tools    *Tools
	Registry string // HOST:PORT, once started
	Endpoint string // of the CRI: unix://...
	CRI      *Client
	Berth    *Process // nil when another runtime is used, or before StartBerth
	Kubelet  *Kubelet

	netns     string
	serve     []string
	bin       string
	claim     net.Listener
	processes []*Process // others, in the order of their start
	// containerd is one of them where the node runs that instead of `berth serve`.
	containerd *Process
	log        func(format string, args ...any)
	foreign    bool // another runtime than `berth serve`
	shared     bool // with others: not all its pods are the node's
	beside     bool // of others: not all that no pod owns is the node's
	bare       bool // the network is made of the pod CIDR
}

// New makes a node's directory, network configuration and cgroup; it starts nothing.
func New(o Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a node needs root: run the tests with sudo")
	}
	n := &Node{Tools: o.Tools, log: o.Log, bin: o.Bin, serve: o.Serve, Endpoint: o.Endpoint, bare: o.Bare, netns: o.NetNS}
	if n.Endpoint == "" && !o.Containerd {
		n.Endpoint = os.Getenv("BERTH_TEST_ENDPOINT")
	}
	n.shared = n.Endpoint != ""
	n.beside = o.Beside || os.Getenv("BERTH_LAB_SHARED") != ""
	n.foreign = n.shared || o.Containerd || os.Getenv("BERTH_TEST_CONTAINERD") != ""
	var err error
	if n.Tools == nil {
		if n.Tools, err = BuildTools(context.Background(), os.Stderr, "registry", "cni", "crictl", "busybox"); err != nil {
			return nil, err
		}
	}
	if n.bin == "" {
		root, err := RepoRoot()
		if err != nil {
			return nil, err
		}
		n.bin = filepath.Join(root, "bin")
	}
	if err := n.claimIndex(); err != nil {
		return nil, err
	}
	if n.Dir, err = os.MkdirTemp("", fmt.Sprintf("berth-lab%d-", n.Index)); err != nil {
		return nil, errors.Join(err, n.claim.Close())
	}
	if err := n.layout(); err != nil {
		return nil, errors.Join(fmt.Errorf("make node: %w", err), n.Close())
	}
	return n, nil
}

// claimIndex takes the lowest free index. An abstract socket holds it: the kernel frees it with the process, and there is
// no file to leave behind.
func (n *Node) claimIndex() error {
	for i := 1; i <= 200; i++ {
		l, err := net.Listen("unix", fmt.Sprintf("@berth-lab-%d", i))
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return err
		}
		n.Index, n.claim = i, l
		return nil
	}
	return errors.New("200 nodes live on this machine")
}

func (n *Node) logf(format string, args ...any) {
	if n.log != nil {
		n.log(format, args...)
	}
}

// Paths and names of a node.

// Root is the persistent root of `berth serve`.
func (n *Node) Root() string { return filepath.Join(n.Dir, "root") }

// Run is its run directory.
func (n *Node) Run() string { return filepath.Join(n.Dir, "run") }

// CertsD is its directory of registry configurations.
func (n *Node) CertsD() string { return filepath.Join(n.Dir, "certs.d") }

// CNIConf is its directory of network configurations.
func (n *Node) CNIConf() string { return filepath.Join(n.Dir, "cni") }

// CDIStatic and CDIDynamic are its directories of CDI specifications; what the second says wins. Tests make them.
func (n *Node) CDIStatic() string { return filepath.Join(n.Dir, "cdi-static") }

// CDIDynamic is the second of both.
func (n *Node) CDIDynamic() string { return filepath.Join(n.Dir, "cdi-dynamic") }

// NRISocket is where plugins of NRI reach its runtime.
func (n *Node) NRISocket() string { return filepath.Join(n.Dir, "nri", "nri.sock") }

// NRIPlugins is the directory of those that start with it.
func (n *Node) NRIPlugins() string { return filepath.Join(n.Dir, "nri-plugins") }

// Bridge is the name of its bridge.
func (n *Node) Bridge() string { return fmt.Sprintf("cni-bt%d", n.Index) }

// Network is the name of its CNI network.
func (n *Node) Network() string { return fmt.Sprintf("berth-lab%d", n.Index) }

// Subnet is its pod CIDR.
func (n *Node) Subnet() string { return fmt.Sprintf("10.91.%d.0/24", n.Index) }

// Cgroup is the path of the cgroup that pods made by this package and by its kubelet live in.
func (n *Node) Cgroup() string { return fmt.Sprintf("/berth-it%d", n.Index) }

// Conflist is the node's network configuration: bridge, host ports and bandwidth, all by the reference plugins.
func (n *Node) Conflist() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": %q,
  "plugins": [
    {"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}},
    {"type": "bandwidth", "capabilities": {"bandwidth": true}}
  ]
}
`, n.Network(), n.Bridge(), filepath.Join(n.Dir, "ipam"), n.Subnet())
}

func (n *Node) layout() error {
	// Root of a pod's own user namespace passes through it on its way to its root file system.
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		return err
	}
	for _, dir := range []string{"root", "run", "certs.d", "cni", "logs", "ipam", "manifests", "containerd", "kubelet"} {
		if err := os.Mkdir(filepath.Join(n.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	// The node's own resolver configuration: what this machine's says is of no account to a test.
	if err := os.WriteFile(filepath.Join(n.Dir, "resolv.conf"), []byte("nameserver 10.91.0.53\n"), 0o644); err != nil {
		return err
	}
	if !n.bare {
		if err := os.WriteFile(filepath.Join(n.CNIConf(), "10-lab.conflist"), []byte(n.Conflist()), 0o644); err != nil {
			return err
		}
	}
	// An own configuration of crictl keeps it from reading /etc/crictl.yaml.
	if err := os.WriteFile(filepath.Join(n.Dir, "crictl.yaml"), []byte("timeout: 60\n"), 0o644); err != nil {
		return err
	}
	if err := sharedMount(filepath.Join(n.Dir, "kubelet")); err != nil {
		return err
	}
	return makeCgroup(n.Cgroup())
}

// Close ends every process of the node, removes what they made, pods included, and tells what would not go.
func (n *Node) Close() error {
	var errs []error
	if n.Kubelet != nil {
		errs = append(errs, n.Kubelet.Stop())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute*patience())
	defer cancel()
	if n.Berth != nil && !n.Berth.Alive() {
		// It removes what it made better than force does. A test that ended with it dead may have broken it on purpose.
		if err := n.StartBerth(ctx); err != nil {
			n.logf("node %d is taken down by force: %v", n.Index, err)
		}
	}
	if n.CRI != nil && (n.foreign || n.Berth != nil && n.Berth.Alive()) {
		errs = append(errs, n.CRI.RemovePods(ctx, n.owns))
	}
	if n.CRI != nil {
		errs = append(errs, n.CRI.Close())
	}
	if n.Berth != nil {
		errs = append(errs, n.Berth.Stop())
	}
	for i := len(n.processes) - 1; i >= 0; i-- {
		errs = append(errs, n.processes[i].Stop())
	}
	if n.Dir != "" {
		errs = append(errs, n.sweep())
	}
	if n.claim != nil {
		errs = append(errs, n.claim.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close node %d: %w", n.Index, err)
	}
	return nil
}

// sweep removes what is left of the node by force: a failed test must not spoil the next one, nor this machine.
func (n *Node) sweep() error {
	errs := []error{killAll(n.processesLeft), unmountBelow(n.Dir), removeCgroup(n.Cgroup())}
	bridges, err := n.bridges()
	errs = append(errs, err)
	for _, link := range bridges {
		errs = append(errs, netlink.LinkDel(link))
	}
	errs = append(errs, n.sweepLogLinks(), n.sweepFirewall(), n.removeAddress())
	if os.Getenv("BERTH_KEEP") != "" {
		n.logf("BERTH_KEEP: the node's files stay in %s", n.Dir)
		return errors.Join(errs...)
	}
	return errors.Join(append(errs, os.RemoveAll(n.Dir))...)
}

// bridges are those of its networks: the one of its configuration, and any other that has an address of its pods'.
func (n *Node) bridges() ([]netlink.Link, error) {
	_, subnet, err := net.ParseCIDR(n.Subnet())
	if err != nil {
		return nil, err
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	var found []netlink.Link
	for _, l := range links {
		ours := l.Attrs().Name == n.Bridge()
		for _, a := range addrs {
			ours = ours || a.LinkIndex == l.Attrs().Index && subnet.Contains(a.IP)
		}
		if ours && l.Type() == "bridge" {
			found = append(found, l)
		}
	}
	return found, nil
}

// legacyLogs is where every kubelet puts links to the logs of its containers (a constant of Kubernetes).
const legacyLogs = "/var/log/containers"

// logLinks lists the kubelet's links to logs of this node.
func (n *Node) logLinks() ([]string, error) {
	entries, err := os.ReadDir(legacyLogs)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var links []string
	for _, e := range entries {
		path := filepath.Join(legacyLogs, e.Name())
		if target, err := os.Readlink(path); err == nil && strings.HasPrefix(target, n.Dir+"/") {
			links = append(links, path)
		}
	}
	return links, nil
}

func (n *Node) sweepLogLinks() error {
	links, err := n.logLinks()
	errs := []error{err}
	for _, link := range links {
		errs = append(errs, os.Remove(link))
	}
	return errors.Join(errs...)
}

package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
)

// Start makes a cluster, and returns when all its nodes are Ready. What was made until an error stays for Down, and for whoever wants to
// look at it.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	c, err := prepare(ctx, &o)
	if err != nil {
		return c, err
	}
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"certificates", func(context.Context) error { return c.certificates() }},
		{"cgroups", func(context.Context) error { return c.makeCgroups() }},
		{"bridge", c.setBridge},
		{"registry", func(ctx context.Context) error { return c.startRegistry(ctx, o.Tools) }},
		{"control plane", c.startControlPlane},
		{"rights of the nodes' programs", c.grant},
		{"nodes", c.startNodes},
	}
	for _, s := range steps {
		if err := s.do(ctx); err != nil {
			return c, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return c, nil
}

// prepare checks the options, and makes the cluster's directory.
func prepare(ctx context.Context, o *Options) (*Cluster, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	c := build(*o)
	if err := c.claim(ctx); err != nil {
		return nil, err
	}
	if err := c.programs(ctx, &o.Tools); err != nil {
		if _, stat := os.Lstat(c.path(stateFile)); stat != nil { // Down will not know what there is
			err = errors.Join(err, deleteLink(c.bridge()))
		}
		return nil, err
	}
	return c, nil
}

// claim makes the bridge, by which an index is one cluster's, before there is anything that Down acts on: it kills what is in the index's
// cgroup, and that of another cluster must not be.
func (c *Cluster) claim(ctx context.Context) error {
	left, err := processes(c.cgroup())
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("index: %d is another cluster's, of which %d processes run", c.Index, len(left))
	}
	if _, err := run(ctx, "ip", "link", "add", c.bridge(), "type", "bridge"); err != nil {
		return fmt.Errorf("index: %d is another cluster's, or its bridge cannot be made: %w", c.Index, err)
	}
	return nil
}

// programs makes the cluster's directory, with copies of all that runs from it.
func (c *Cluster) programs(ctx context.Context, t *Tools) error {
	if err := t.from(os.Getenv("K8S_BIN")); err != nil {
		return err
	}
	if err := t.build(ctx, c.parts); err != nil {
		return err
	}
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	programs, err := t.byName(root, c.parts)
	if err != nil {
		return err
	}
	for _, dir := range []string{"bin/cni", "logs", "ns"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := c.save(); err != nil {
		return err
	}
	for name, program := range programs {
		if err := copyProgram(program, c.program(name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, n := range c.Nodes {
		if err := n.files(); err != nil {
			return err
		}
	}
	// A namespace is pinned to a file only where mounts do not propagate.
	return errors.Join(unix.Mount(c.path("ns"), c.path("ns"), "", unix.MS_BIND, ""), unix.Mount("", c.path("ns"), "", unix.MS_PRIVATE, ""))
}

// build has build.sh make what is not named.
func (t *Tools) build(ctx context.Context, parts Parts) error {
	var missing []string
	into := map[string]*string{
		"etcd": &t.Etcd, "kube-apiserver": &t.APIServer, "kube-scheduler": &t.Scheduler, "kube-controller-manager": &t.ControllerManager,
		"kubelet": &t.Kubelet, "kubectl": &t.Kubectl, "registry": &t.Registry, "busybox": &t.Busybox,
	}
	if parts == Containerd {
		into["kube-proxy"], into["containerd"], into["cni"] = &t.KubeProxy, &t.Containerd, &t.CNI
	}
	for name, program := range into {
		if *program == "" {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	built, err := lab.BuildTools(ctx, os.Stderr, missing...)
	if err != nil {
		return err
	}
	for name, program := range map[string]string{
		"etcd": built.Etcd, "kube-apiserver": built.APIServer, "kube-scheduler": built.Scheduler, "kube-controller-manager": built.ControllerManager,
		"kubelet": built.Kubelet, "kubectl": built.Kubectl, "registry": built.Registry, "busybox": built.Busybox,
		"kube-proxy": built.KubeProxy, "containerd": built.Containerd, "cni": built.CNI,
	} {
		if into[name] != nil && *into[name] == "" {
			*into[name] = program
		}
	}
	return nil
}

func copyProgram(from, to string) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func (c *Cluster) setBridge(ctx context.Context) error {
	for _, command := range []string{
		"ip addr add " + c.HostAddress() + "/24 dev " + c.bridge(),
		"ip link set " + c.bridge() + " up",
	} {
		words := strings.Fields(command)
		if _, err := run(ctx, words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// grant gives berth's programs the rights of the manifests in examples/, in the way that docs/operations.md says. kube-proxy has a
// certificate, of a name to which the API server gives rights by itself.
func (c *Cluster) grant(ctx context.Context) error {
	if c.parts == Containerd {
		return nil
	}
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, "apply", "-f", filepath.Join(root, "examples/noderoutes/rbac.yaml")); err != nil {
		return err
	}
	manifest, err := os.ReadFile(filepath.Join(root, "examples/proxy/berth-proxy.yaml"))
	if err != nil {
		return err
	}
	// Nodes have berth proxy as a program here, not as a pod.
	var objects []string
	for _, object := range strings.Split(string(manifest), "\n---\n") {
		if !strings.Contains(object, "\nkind: DaemonSet\n") {
			objects = append(objects, object)
		}
	}
	if err := c.Apply(ctx, strings.Join(objects, "\n---\n")); err != nil {
		return err
	}
	var routes string
	err = lab.Eventually(ctx, time.Minute, "token of berth-node-routes", func(ctx context.Context) error {
		token, err := c.Kubectl(ctx, "--namespace", "kube-system", "get", "secret", "berth-node-routes", "--output", "jsonpath={.data.token}")
		if err == nil && token == "" {
			err = errors.New("the controller manager has not made it")
		}
		return err
	})
	if err != nil {
		return err
	}
	script := exec.CommandContext(ctx, "sh", filepath.Join(root, "examples/noderoutes/kubeconfig.sh"))
	script.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HOME="+c.Dir, "PATH="+c.path("bin")+":"+os.Getenv("PATH"))
	text, err := script.Output()
	if err != nil {
		return fmt.Errorf("examples/noderoutes/kubeconfig.sh: %w", err)
	}
	routes = string(text)
	token, err := c.Kubectl(ctx, "--namespace", "kube-system", "create", "token", "berth-proxy", "--duration", "8760h")
	if err != nil {
		return err
	}
	ca, err := c.Kubectl(ctx, "config", "view", "--raw", "--minify", "--output", "jsonpath={.clusters[0].cluster.certificate-authority-data}")
	if err != nil {
		return err
	}
	file := c.path("proxy.kubeconfig")
	if err := c.writeKubeconfig(file, ca, fmt.Sprintf("{token: %q}", strings.TrimSpace(token))); err != nil {
		return err
	}
	proxy, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := n.rights(routes, string(proxy)); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) startNodes(ctx context.Context) error {
	for _, n := range c.Nodes {
		if err := n.Start(ctx); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		if err := n.WaitReady(ctx, n.patience(2*time.Minute)); err != nil {
			return err
		}
	}
	c.logf("all nodes are Ready")
	return c.HostRoutes(ctx)
}

// WaitReady waits until the node is Ready, and has taken its pod CIDR.
func (n *Node) WaitReady(ctx context.Context, within time.Duration) error {
	return n.waitCondition(ctx, within, "True")
}

// WaitNotReady waits until the controllers have seen that the node is gone.
func (n *Node) WaitNotReady(ctx context.Context, within time.Duration) error {
	return n.waitCondition(ctx, within, "Unknown")
}

func (n *Node) waitCondition(ctx context.Context, within time.Duration, want string) error {
	return lab.Eventually(ctx, within, n.Name+" is Ready: "+want, func(ctx context.Context) error {
		text, err := n.c.Kubectl(ctx, "get", "node", n.Name, "--output", "json")
		if err != nil {
			return err
		}
		var node struct {
			Spec   struct{ PodCIDR string }
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		if err := json.Unmarshal([]byte(text), &node); err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type == "Ready" && c.Status != want {
				return fmt.Errorf("it is %s: %s", c.Status, c.Message)
			}
			if c.Type == "Ready" && node.Spec.PodCIDR != "" {
				return nil
			}
		}
		return errors.New("it has no condition Ready or no pod CIDR")
	})
}

// HostRoutes leads this machine to pods, for the API server's proxy and webhooks; they go with the bridge.
func (c *Cluster) HostRoutes(ctx context.Context) error {
	for _, n := range c.Nodes {
		cidr, err := c.Kubectl(ctx, "get", "node", n.Name, "--output", "jsonpath={.spec.podCIDR}")
		if err != nil {
			return err
		}
		if _, err := run(ctx, "ip", "route", "replace", cidr, "via", n.Address(), "dev", c.bridge()); err != nil {
			return err
		}
	}
	// By the first node, so that a Service answers on this machine as well.
	_, err := run(ctx, "ip", "route", "replace", c.ServiceCIDR(), "via", c.Nodes[0].Address(), "dev", c.bridge())
	return err
}

// Stop is Down for the cluster's directory.
func (c *Cluster) Stop() error { return Down(c.Dir) }

// Down ends the cluster whose directory that is, with all that runs on its nodes, and removes all that it has made. A cluster that is not there
// is no error; one that was left half made or half removed is removed.
func Down(dir string) error {
	c, err := Open(dir, nil)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			return kill(dir, (&Cluster{Dir: dir}).ofPrograms)
		}
		return fmt.Errorf("%s has no %s: it is no cluster's directory, or one that was made no further; remove it yourself", dir, stateFile)
	}
	if err != nil {
		return err
	}
	looks := []func() (map[int]bool, error){c.inCgroup, c.ofPrograms}
	for _, n := range c.Nodes {
		looks = append(looks, n.inside)
	}
	// With the namespaces would go what the rest is found by.
	if err := kill(dir, looks...); err != nil {
		return fmt.Errorf("take down %s: %w", dir, err)
	}
	var errs []error
	for _, n := range c.Nodes {
		errs = append(errs, n.unpin())
	}
	errs = append(errs, deleteLink(c.bridge()), unmount(c.path("ns")), removeCgroup(c.cgroup()), lab.RestoreSettings())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take down %s: %w", dir, err)
	}
	return os.RemoveAll(dir)
}

func removeCgroup(name string) error {
	if err := lab.RemoveCgroup(name); err != nil {
		return fmt.Errorf("cgroup %s: %w", name, err)
	}
	return nil
}

// deleteLink removes a link, if it is there.
func deleteLink(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) && !errors.As(err, new(netlink.LinkNotFoundError)) {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return nil
}

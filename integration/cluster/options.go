package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Options say what cluster is wanted.
type Options struct {
	Dir    string                           // where everything lies: DefaultDir, or a directory that is not there yet
	Index  int                              // of clusters side by side on this machine, 0 to 9: addresses and names have it
	Nodes  int                              // 1 to 9; default 2
	Log    func(format string, args ...any) // is told of each step; may be nil
	Tools  Tools                            // those that are empty are built
	Images bool                             // the registry starts with the lab's test images, else it is empty
	Parts  Parts                            // what nodes are made of; default Berth
	Disks  []int64                          // bytes of the disks that node-1, node-2 … have for /var; 0: a directory of this machine's
	VMs    int                              // how many nodes, the last ones, are virtual machines of integration/vm

	// More of the configurations of the kubelets of node-1, node-2 …, which wins over the cluster's own.
	Kubelets []map[string]any

	// More arguments, which win over the cluster's own.
	APIServer, ControllerManager []string
}

// DefaultDir is where `make cluster` has its cluster.
const DefaultDir = "/var/lib/berth-cluster"

// Parts are what makes the pods and the Services of nodes.
type Parts string

const (
	// Berth is `berth serve` with node routes, and `berth proxy`.
	Berth Parts = "berth"
	// Containerd is what berth is compared with: containerd with runc and the reference CNI plugins, routes between the nodes, and
	// kube-proxy in mode nftables.
	Containerd Parts = "containerd"
)

// Tools are the programs of a cluster.
type Tools struct {
	Etcd, APIServer, Scheduler, ControllerManager, Kubelet, Kubectl string
	Registry, Busybox                                               string
	Kubeadm                                                         string // for Machines; never built

	// For nodes made of Containerd: a program, and the directories that build.sh has made of the targets containerd and cni.
	KubeProxy, Containerd, CNI string
}

// Cluster is one that was started.
type Cluster struct {
	Dir   string
	Index int
	Nodes []*Node

	log      func(format string, args ...any)
	images   bool
	parts    Parts
	disks    []int64
	kubelets []map[string]any // for their files, which are made once
	vms      int
	moreArgs map[string][]string
}

// Node is one of its nodes.
type Node struct {
	Name string
	c    *Cluster
	n    int // from 1 on

	units map[string]*process // of StartUnit
}

// state is what Down needs to know, and Open.
type state struct {
	Index, Nodes int
	Images       bool
	Parts        Parts
	Disks        []int64
	VMs          int
	MoreArgs     map[string][]string
}

// Check gives options their defaults, and says what Start would refuse before it makes anything.
func (o *Options) Check() error {
	if err := o.check(); err != nil {
		return err
	}
	if _, err := os.Lstat(o.Dir); err == nil {
		return fmt.Errorf("%s is there already: take the cluster down first (make cluster-down)", o.Dir)
	}
	return new(Tools).from(os.Getenv("K8S_BIN"))
}

func (o *Options) check() error {
	switch {
	case os.Geteuid() != 0:
		return errors.New("a cluster needs root")
	case o.Nodes == 0:
		o.Nodes = 2
	}
	if o.Parts == "" {
		o.Parts = Berth
	}
	switch {
	case o.Parts != Berth && o.Parts != Containerd:
		return fmt.Errorf("parts: %q is neither %s nor %s", o.Parts, Berth, Containerd)
	case o.Parts == Containerd && !o.Images:
		return fmt.Errorf("images: nodes made of %s need the lab's test images, of which pause is one", Containerd)
	case o.Nodes < 1 || o.Nodes > 9:
		return fmt.Errorf("nodes: %d is not 1 to 9", o.Nodes)
	case len(o.Disks) > o.Nodes:
		return fmt.Errorf("disks: there are %d for %d nodes", len(o.Disks), o.Nodes)
	case len(o.Kubelets) > o.Nodes:
		return fmt.Errorf("kubelets: there are %d for %d nodes", len(o.Kubelets), o.Nodes)
	case o.VMs < 0 || o.VMs > o.Nodes:
		return fmt.Errorf("vms: %d is not 0 to %d, the number of nodes", o.VMs, o.Nodes)
	case o.VMs > 0 && o.Parts != Berth:
		return fmt.Errorf("vms: nodes in virtual machines are made of %s, not of %s", Berth, o.Parts)
	case o.Index < 0 || o.Index > 9:
		return fmt.Errorf("index: %d is not 0 to 9", o.Index)
	case !filepath.IsAbs(o.Dir) || filepath.Clean(o.Dir) != o.Dir || o.Dir == "/" || strings.ContainsAny(o.Dir, " \t\n\\'\""):
		return fmt.Errorf("dir: %q is no absolute path without blanks and quotes", o.Dir)
	}
	return nil
}

func build(o Options) *Cluster {
	c := &Cluster{Dir: o.Dir, Index: o.Index, log: o.Log, images: o.Images, parts: o.Parts, disks: o.Disks, kubelets: o.Kubelets, vms: o.VMs, moreArgs: map[string][]string{
		"kube-apiserver": o.APIServer, "kube-controller-manager": o.ControllerManager,
	}}
	for n := 1; n <= o.Nodes; n++ {
		c.Nodes = append(c.Nodes, &Node{Name: fmt.Sprintf("node-%d", n), c: c, n: n})
	}
	return c
}

// Open is the cluster whose directory that is.
func Open(dir string, log func(string, ...any)) (*Cluster, error) {
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, stateFile), err)
	}
	c := build(Options{Dir: dir, Index: s.Index, Nodes: s.Nodes, Log: log, Images: s.Images, Parts: s.Parts, Disks: s.Disks, VMs: s.VMs})
	c.moreArgs = s.MoreArgs
	return c, nil
}

const stateFile = "cluster.json"

func (c *Cluster) save() error {
	text, err := json.Marshal(state{c.Index, len(c.Nodes), c.images, c.parts, c.disks, c.vms, c.moreArgs})
	if err != nil {
		return err
	}
	return os.WriteFile(c.path(stateFile), text, 0o600)
}

func (c *Cluster) logf(format string, args ...any) {
	if c.log != nil {
		c.log(format, args...)
	}
}

func (c *Cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.Dir}, parts...)...)
}

// Kubeconfig is the file of an administrator.
func (c *Cluster) Kubeconfig() string { return c.path("kubeconfig") }

// Addresses and names of a cluster.

// HostAddress is this machine's on the bridge: that of the API server and of the registry.
func (c *Cluster) HostAddress() string { return fmt.Sprintf("10.101.%d.1", c.Index) }

// Registry is the registry's HOST:PORT, plain HTTP.
func (c *Cluster) Registry() string { return c.HostAddress() + ":5000" }

// PodCIDR is the range of addresses of pods.
func (c *Cluster) PodCIDR() string { return fmt.Sprintf("10.%d.0.0/16", 110+c.Index) }

// ServiceCIDR is that of Services.
func (c *Cluster) ServiceCIDR() string { return fmt.Sprintf("10.%d.0.0/16", 120+c.Index) }

func (c *Cluster) server() string   { return "https://" + c.HostAddress() + ":6443" }
func (c *Cluster) loopback() string { return fmt.Sprintf("127.101.%d.1", c.Index) }
func (c *Cluster) dns() string      { return fmt.Sprintf("10.%d.0.10", 120+c.Index) }
func (c *Cluster) bridge() string   { return fmt.Sprintf("berth-cl%d", c.Index) }
func (c *Cluster) cgroup() string   { return fmt.Sprintf("/berth-cluster%d", c.Index) }

// Address is the node's.
func (n *Node) Address() string { return fmt.Sprintf("10.101.%d.%d", n.c.Index, 10+n.n) }

// Cgroup is that of all that runs on the node.
func (n *Node) Cgroup() string { return n.cgroup() }

// CertsD is the directory of hosts.toml that leads its pulls to the registry.
func (n *Node) CertsD() string { return n.path("certs.d") }

// Disk is how many bytes the node's own disk has; 0: it has none.
func (n *Node) Disk() int64 {
	if n.n > len(n.c.disks) {
		return 0
	}
	return n.c.disks[n.n-1]
}

// NetNS is the path of its network namespace.
func (n *Node) NetNS() string { return n.ns("net") }

func (n *Node) ns(kind string) string { return n.c.path("ns", n.Name+"."+kind) }
func (n *Node) link() string          { return fmt.Sprintf("berth-cl%d-%d", n.c.Index, n.n) }
func (n *Node) cgroup() string        { return n.c.cgroup() + "/" + n.Name }
func (n *Node) path(parts ...string) string {
	return n.c.path(append([]string{n.Name}, parts...)...)
}

// programs are where the cluster has its own copies: what is built anew meanwhile is not what runs, and nodes see them whatever else
// they do not see.
func (c *Cluster) program(name string) string { return c.path("bin", name) }

// byName are the programs of which a cluster has copies, by their names there.
func (t Tools) byName(root string, parts Parts) (map[string]string, error) {
	programs := map[string]string{
		"etcd": t.Etcd, "kube-apiserver": t.APIServer, "kube-scheduler": t.Scheduler, "kube-controller-manager": t.ControllerManager,
		"kubelet": t.Kubelet, "kubectl": t.Kubectl, "registry": t.Registry, "busybox": t.Busybox,
	}
	if t.Kubeadm != "" {
		programs["kubeadm"] = t.Kubeadm
	}
	if parts == Berth {
		programs["berth"], programs["berth-shim"] = filepath.Join(root, "bin/berth"), filepath.Join(root, "bin/berth-shim")
		return programs, nil
	}
	programs["kube-proxy"] = t.KubeProxy
	for into, dir := range map[string]string{"": t.Containerd, "cni": t.CNI} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			programs[filepath.Join(into, e.Name())] = filepath.Join(dir, e.Name())
		}
	}
	return programs, nil
}

// from takes what a directory has of the programs of Kubernetes.
func (t *Tools) from(dir string) error {
	if dir == "" {
		return nil
	}
	for name, into := range map[string]*string{
		"etcd": &t.Etcd, "kube-apiserver": &t.APIServer, "kube-scheduler": &t.Scheduler, "kube-controller-manager": &t.ControllerManager,
		"kubelet": &t.Kubelet, "kubectl": &t.Kubectl,
	} {
		program := filepath.Join(dir, name)
		if info, err := os.Stat(program); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			return fmt.Errorf("K8S_BIN=%s: there is no program %s", dir, name)
		}
		*into = program
	}
	return nil
}

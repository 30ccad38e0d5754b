package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// Processes are those of the node, its daemons' and its pods', by process id with their command lines.
func (n *Node) Processes() (map[int]string, error) { return named(n.inCgroup) }

// named are processes with their command lines.
func named(look func() (map[int]bool, error)) (map[int]string, error) {
	pids, err := look()
	if err != nil {
		return nil, err
	}
	found := map[int]string{}
	for pid := range pids {
		words, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || len(words) == 0 {
			continue // ended meanwhile
		}
		found[pid] = strings.TrimSpace(strings.ReplaceAll(string(words), "\x00", " "))
	}
	return found, nil
}

// runs says whether a daemon of the node's does, in the node's cgroup or as somebody has started it on the node.
func (n *Node) runs(d daemon) (bool, error) {
	if n.VM() {
		return n.runsInMachine(d)
	}
	all, err := named(n.inside)
	for _, command := range all {
		if strings.HasPrefix(command, d.command) {
			return true, nil
		}
	}
	return false, err
}

// kubelet is the process id of the node's kubelet, which is in all the node's namespaces.
func (n *Node) kubelet() (int, error) {
	all, err := named(n.inside)
	if err != nil {
		return 0, err
	}
	for pid, name := range all {
		if strings.HasPrefix(name, n.c.program("kubelet")+" ") {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("%s has no kubelet", n.Name)
}

// CRI connects to the node's runtime.
func (n *Node) CRI() (*lab.Client, error) {
	pid, err := n.kubelet()
	if err != nil {
		return nil, err
	}
	return n.dial(pid)
}

// Snapshot looks at all that pods can leave on the node: processes, cgroups, links, mounts (pinned namespaces are some), rules with a
// pod's address, sandboxes and containers that the runtime knows, its records, leases of addresses and what the kubelet has of pods.
func (n *Node) Snapshot(ctx context.Context) (lab.Snapshot, error) {
	s := lab.Snapshot{}
	for _, look := range []func(context.Context, lab.Snapshot) error{n.lookProcesses, n.lookKernel, n.lookRuntime, n.lookFiles} {
		if err := look(ctx, s); err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	return s, nil
}

func (n *Node) lookProcesses(_ context.Context, s lab.Snapshot) error {
	all, err := n.Processes()
	for pid, name := range all {
		s[fmt.Sprintf("process %d: %.120s", pid, name)] = true
	}
	return errors.Join(err, s.LookCgroups(n.cgroup()))
}

// lookKernel asks the node itself. Its bridge stays, and so do rules about all of its pods. Mounts elsewhere than in its own directories are copies
// of this machine's, which go with those that others unmount.
func (n *Node) lookKernel(ctx context.Context, s lab.Snapshot) error {
	cmd := n.Command(ctx, "sh", "-euc", `
		ip -o link show type veth | sed 's/^[0-9]*: /link /; s/[@:].*//'
		ip -o link show type ifb | sed 's/^[0-9]*: /link /; s/[@:].*//'
		awk -v dir="$0" '$5 ~ "^/(run|tmp|var)(/|$)" || index($5, dir) == 1 { print "mount", $5 }' /proc/self/mountinfo
		nft list ruleset | sed 's/^[[:blank:]]*/rule /'`, n.c.Dir)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("links, mounts and rules: %w", err)
	}
	pod := regexp.MustCompile(regexp.QuoteMeta(strings.TrimSuffix(n.c.PodCIDR(), "0.0/16")) + `\d+\.\d+([^/.\d]|$)`)
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "rule ") || pod.MatchString(line) {
			s[line] = true
		}
	}
	return nil
}

func (n *Node) lookRuntime(ctx context.Context, s lab.Snapshot) error {
	cri, err := n.CRI()
	if err != nil {
		return err
	}
	defer func() { _ = cri.Close() }()
	pods, err := cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		s["sandbox "+p.Id] = true
	}
	ctrs, err := cri.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}
	for _, c := range ctrs.Containers {
		s["container "+c.Id] = true
	}
	return nil
}

// recorded are what has one entry for each pod or container: of the kubelet, and of containerd and the CNI plugins.
var recorded = map[Parts][]string{
	Berth: {"/var/lib/kubelet/pods/*", "/var/log/pods/*", "/var/log/containers/*"},
	Containerd: {
		"/var/lib/kubelet/pods/*", "/var/log/pods/*", "/var/log/containers/*",
		"/run/containerd/io.containerd.runtime.v2.task/k8s.io/*", "/run/containerd/io.containerd.grpc.v1.cri/*/*", "/run/containerd/s/*", "/run/containerd/fifo/*",
		"/var/lib/containerd/io.containerd.runtime.v2.task/k8s.io/*", "/var/lib/containerd/io.containerd.grpc.v1.cri/*/*",
		"/var/lib/cni/networks/cluster/[0-9]*", "/var/lib/cni/results/*",
	},
}

func (n *Node) lookFiles(_ context.Context, s lab.Snapshot) error {
	pid, err := n.kubelet()
	if err != nil {
		return err
	}
	root := fmt.Sprintf("/proc/%d/root", pid)
	for _, pattern := range recorded[n.c.parts] {
		found, err := filepath.Glob(root + pattern)
		if err != nil {
			return err
		}
		for _, path := range found {
			s["file "+strings.TrimPrefix(path, root)] = true
		}
	}
	if n.c.parts != Berth {
		return nil
	}
	return s.LookBerth(root+"/var/lib/berth", root+"/run/berth")
}

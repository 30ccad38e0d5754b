package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

// Machines makes what a cluster is made of, and no cluster: the registry, and nodes on which nothing runs yet, for who makes a cluster of
// them in another way. A node has the programs in /usr/local/bin, and an /etc of its own, without what this machine's has of berth and
// Kubernetes.
func Machines(ctx context.Context, o Options) (*Cluster, error) {
	c, err := prepare(ctx, &o)
	if err != nil {
		return c, err
	}
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"cgroups", func(context.Context) error { return c.makeCgroups() }},
		{"bridge", c.setBridge},
		{"registry", func(ctx context.Context) error { return c.startRegistry(ctx, o.Tools) }},
		{"nodes", c.bootMachines},
	} {
		if err := s.do(ctx); err != nil {
			return c, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return c, nil
}

func (c *Cluster) bootMachines(ctx context.Context) error {
	for _, n := range c.Nodes {
		for _, dir := range []string{"etc", "etc.work"} {
			if err := os.Mkdir(n.path(dir), 0o755); err != nil {
				return err
			}
		}
		if err := n.boot(ctx); err != nil {
			return err
		}
		if out, err := n.Command(ctx, "rm", "-rf", "/etc/berth", "/etc/cni", "/etc/kubernetes", "/etc/default/kubelet").CombinedOutput(); err != nil {
			return fmt.Errorf("/etc of %s: %w: %s", n.Name, err, out)
		}
	}
	return nil
}

// Adopt takes the administrator's kubeconfig of the cluster that was made of the machines: Kubectl, and all that asks for Nodes, use it.
func (c *Cluster) Adopt(kubeconfig string) error {
	return os.WriteFile(c.Kubeconfig(), []byte(kubeconfig), 0o600)
}

// ReadFile is a file of the node's.
func (n *Node) ReadFile(ctx context.Context, path string) (string, error) {
	out, err := n.Command(ctx, "cat", path).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", n.Name, err, out)
	}
	return string(out), nil
}

// WriteFile writes one, which only root may read, and the directories above it.
func (n *Node) WriteFile(ctx context.Context, path, text string) error {
	cmd := n.Command(ctx, "sh", "-euc", `mkdir -p "${0%/*}"; umask 077; cat > "$0"`, path)
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", n.Name, err, out)
	}
	return nil
}

// StartUnit starts the program of a unit of examples/systemd, berth or kubelet, by its EnvironmentFile and ExecStart, and waits until it
// answers: nodes have no init system.
func (n *Node) StartUnit(ctx context.Context, name string) error {
	probe, ok := map[string]func(context.Context) error{"berth": n.runtimeAnswers, "kubelet": n.kubeletHealthy}[name]
	if !ok {
		return fmt.Errorf("unit %q is neither berth nor kubelet", name)
	}
	root, err := lab.RepoRoot()
	if err != nil {
		return err
	}
	script, err := unitScript(filepath.Join(root, "examples/systemd", name+".service"))
	if err != nil {
		return err
	}
	settings, err := lab.HoldSettings() // see StartKubelet
	if err != nil {
		return err
	}
	defer func() { _ = settings.Close() }()
	p, err := n.c.start(n.Name+"'s "+name, n.cgroup()+"/system", n.c.path("logs", n.Name+"."+name+".log"), n.enter(), []*os.File{settings}, "/bin/sh", "-ec", script)
	if err != nil {
		return err
	}
	if n.units == nil {
		n.units = map[string]*process{}
	}
	n.units[name] = p
	return p.ready(ctx, 2*time.Minute, probe)
}

// unitScript does in a shell what these two lines of a unit say.
func unitScript(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var script strings.Builder
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", " ")) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "EnvironmentFile":
			fmt.Fprintf(&script, "if [ -f %[1]s ]; then . %[1]s; fi\n", strings.TrimPrefix(value, "-"))
		case "ExecStart":
			fmt.Fprintf(&script, "exec %s\n", value)
			return script.String(), nil
		}
	}
	return "", fmt.Errorf("%s has no ExecStart", file)
}

// StopUnit ends what StartUnit has started, and waits for that.
func (n *Node) StopUnit(ctx context.Context, name string) error {
	p := n.units[name]
	if p == nil {
		return fmt.Errorf("%s runs no unit %q", n.Name, name)
	}
	if err := syscall.Kill(p.pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s outlives SIGTERM: %w", p.name, ctx.Err())
	}
}

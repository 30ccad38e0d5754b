package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// StartBerth starts `berth serve` with the node's own roots, socket and network, and connects to it. Environment entries
// (NAME=VALUE) arm fail points. It returns once the runtime answers and says that its network is ready; on a bare
// node, whose network waits for a pod CIDR, once it answers.
//
// Where the node runs containerd instead, that is started; where it uses another runtime that is there
// (BERTH_TEST_ENDPOINT), it only connects to it.
func (n *Node) StartBerth(ctx context.Context, env ...string) error {
	return n.startBerth(ctx, env, (*Client).Ready)
}

// StartBerthUnready is StartBerth on a node whose network is not ready: it returns once the runtime answers.
func (n *Node) StartBerthUnready(ctx context.Context) error {
	return n.startBerth(ctx, nil, (*Client).Answers)
}

func (n *Node) startBerth(ctx context.Context, env []string, probe func(*Client, context.Context) error) error {
	if n.foreign && !n.shared {
		return n.startContainerd(ctx)
	}
	if n.foreign {
		if n.CRI != nil {
			return nil
		}
		var err error
		n.CRI, err = Dial(n.Endpoint)
		return err
	}
	if n.Berth != nil && n.Berth.Alive() {
		return errors.New("berth serve runs already")
	}
	program := filepath.Join(n.bin, "berth")
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("%w: run `make build` first", err)
	}
	socket := filepath.Join(n.Dir, "berth.sock")
	args := append([]string{
		"serve",
		"--root", n.Root(), "--run", n.Run(), "--socket", socket,
		"--certs-d", n.CertsD(), "--cni-conf", n.CNIConf(), "--cni-bin", n.Tools.CNI,
		"--cdi-spec-dirs", n.CDIStatic() + ":" + n.CDIDynamic(), "--cadvisor-socket", n.ContainerdSocket(),
		"--nri-socket", n.NRISocket(), "--nri-plugins", n.NRIPlugins(), "--nri-config", n.NRIPlugins(),
		"--cgroup-driver", "cgroupfs", // the node's cgroup is none of systemd's
	}, n.serve...)
	p, err := StartIn(n.netns, "berth serve", filepath.Join(n.Dir, "berth.log"), env, program, args...)
	if err != nil {
		return err
	}
	n.Berth, n.Endpoint = p, "unix://"+socket
	if n.CRI == nil {
		if n.CRI, err = Dial(n.Endpoint); err != nil {
			return errors.Join(err, p.Kill())
		}
	}
	if n.bare {
		probe = (*Client).Answers
	}
	return p.ready(ctx, 2*time.Minute, func(ctx context.Context) error { return probe(n.CRI, ctx) })
}

// Foreign tells whether the node uses another runtime than `berth serve`.
func (n *Node) Foreign() bool { return n.foreign }

// KillBerth ends `berth serve` with SIGKILL.
func (n *Node) KillBerth() error {
	if n.Berth == nil {
		return errors.New("berth serve was not started")
	}
	return n.Berth.Kill()
}

// AdminSocket is where operators' tools reach its daemon.
func (n *Node) AdminSocket() string { return filepath.Join(n.Run(), "admin", "admin.sock") }

// Tool is the command of a tool, such as `berth images list`, that asks the node's daemon.
func (n *Node) Tool(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(n.bin, "berth"), append(args, "--run", n.Run())...)
}

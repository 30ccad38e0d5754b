package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/berth-run/berth/integration/testimages"
)

// startContainerd starts containerd with runc on the node's images, network and cgroup, so that a test can ask it the same
// as `berth serve`. It is configured as a distribution does; what is changed is where things lie.
func (n *Node) startContainerd(ctx context.Context) error {
	if n.containerd != nil && n.containerd.Alive() {
		return nil
	}
	if n.Tools.Containerd == "" {
		t, err := BuildTools(ctx, os.Stderr, "containerd")
		if err != nil {
			return err
		}
		n.Tools.Containerd = t.Containerd
	}
	file := filepath.Join(n.Dir, "containerd.toml")
	if err := os.WriteFile(file, []byte(n.containerdConfig()), 0o644); err != nil {
		return err
	}
	// It finds its shim in PATH, which finds runc there.
	env := []string{"PATH=" + n.Tools.Containerd + ":" + os.Getenv("PATH")}
	p, err := start("containerd", filepath.Join(n.Dir, "containerd.log"), env,
		filepath.Join(n.Tools.Containerd, "containerd"), "--config", file, "--log-level", "warn")
	if err != nil {
		return err
	}
	n.containerd, n.Endpoint = p, "unix://"+n.ContainerdSocket()
	n.processes = append(n.processes, p)
	if n.CRI == nil {
		if n.CRI, err = Dial(n.Endpoint); err != nil {
			return err
		}
	}
	return p.ready(ctx, time.Minute, n.CRI.Ready)
}

// Containerd is the process of the node's containerd; nil where it runs something else.
func (n *Node) Containerd() *Process { return n.containerd }

// ContainerdSocket is where the node's containerd serves, or `berth serve` answers what cAdvisor asks of containerd. The
// node's kubelet sees it at /run/containerd/containerd.sock.
func (n *Node) ContainerdSocket() string { return filepath.Join(n.containerdRun(), "containerd.sock") }

func (n *Node) containerdRun() string { return filepath.Join(n.Dir, "containerd") }

func (n *Node) containerdConfig() string {
	return ContainerdConfig{
		Root: filepath.Join(n.Dir, "containerd-root"), State: filepath.Join(n.Dir, "containerd-state"), Socket: n.ContainerdSocket(),
		CertsD: n.CertsD(), CNIBin: n.Tools.CNI, CNIConf: n.CNIConf(), Runc: filepath.Join(n.Tools.Containerd, "runc"),
	}.String()
}

// ContainerdConfig says where a node's containerd has its things. All else is as distributions configure it. Its shim it finds in PATH.
type ContainerdConfig struct {
	Root, State, Socket string
	CertsD              string // directory of registry configurations
	CNIBin, CNIConf     string // directories of plugins and of networks
	Runc                string // program
}

// String is the file.
func (c ContainerdConfig) String() string {
	return fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
  address = %q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = %q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [%q]
  conf_dir = %q
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = %q
  SystemdCgroup = false
`, c.Root, c.State, c.Socket, testimages.Pause, c.CertsD, c.CNIBin, c.CNIConf,
		c.Runc)
}

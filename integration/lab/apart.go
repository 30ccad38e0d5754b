package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// containerdDir is where a kubelet's cAdvisor looks for containerd: no option of the kubelet leads it elsewhere.
const containerdDir = "/run/containerd"

// sharedMount makes a directory a mount of its own whose mounts are seen in all mount namespaces of this machine.
func sharedMount(dir string) error {
	if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts of %s: %w", dir, err)
	}
	return nil
}

// startApart starts a program in a mount namespace of its own, where /run/containerd is the node's directory: nodes side by
// side each have a containerd there, or what answers for it. Mounts below the kubelet's directory are seen by all.
func (n *Node) startApart(name, log, program string, args ...string) (*Process, error) {
	if err := os.MkdirAll(containerdDir, 0o711); err != nil {
		return nil, err
	}
	p, err := prepare(name, log, nil, program, args...)
	if err != nil {
		return nil, err
	}
	return p.startElsewhere(n.apart)
}

// startElsewhere starts a program where enter has led the thread that starts it.
func (p *Process) startElsewhere(enter func() error) (*Process, error) {
	started := make(chan error)
	go func() {
		// The thread is in the other namespace for good, and has to live as long as the program, whose parent-death signal
		// comes when it ends.
		_ = thread.Throwaway(func() error {
			err := enter()
			if err == nil {
				err = p.cmd.Start()
			}
			started <- err
			if err == nil {
				p.wait()
			}
			return nil
		})
	}()
	if err := p.begun(<-started); err != nil {
		return nil, err
	}
	return p, nil
}

func (n *Node) apart() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	// Where the mount that holds the directory is shared, as systemd makes it, ours would be seen outside.
	for dir := containerdDir; ; dir = filepath.Dir(dir) {
		err := unix.Mount("", dir, "", unix.MS_PRIVATE, "")
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINVAL) || dir == "/" {
			return fmt.Errorf("make the mount of %s private: %w", dir, err)
		}
	}
	if err := unix.Mount(n.containerdRun(), containerdDir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", n.containerdRun(), containerdDir, err)
	}
	return nil
}

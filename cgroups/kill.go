package cgroups

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// killWait bounds how long Kill waits for the last process to end: one that waits for a dead disk or network file
// system does not die.
var killWait = 10 * time.Second

// Kill sends SIGKILL to every process of p and of the cgroups below it, and returns when none is left. It returns an
// error of the class errdefs.ErrFailedPrecondition, which names the survivors, when some do not die within ten seconds.
// A cgroup that does not exist has no processes.
func Kill(p Path) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	return l.kill(p)
}

func (l *layout) kill(p Path) error {
	deadline := time.Now().Add(killWait)
	for pass := 0; ; pass++ {
		pids, err := l.processes(p)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		if slices.Contains(pids, os.Getpid()) {
			return fmt.Errorf("kill cgroup %s: this process is in it: %w", p, errdefs.ErrFailedPrecondition)
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("kill cgroup %s: processes %v do not die: %w", p, pids, errdefs.ErrFailedPrecondition)
		}
		l.killAtOnce(p)
		// Where that is not available, a process that forks faster than we read has to be held still.
		thaw := l.freezeV1(p, pass >= 3)
		for chunk := range slices.Chunk(pids, 256) { // each holds a descriptor
			if err := l.killEach(p, chunk, thaw, deadline); err != nil {
				return fmt.Errorf("kill cgroup %s: %w", p, err)
			}
		}
	}
}

// killAtOnce uses cgroup.kill (Linux 5.14), which also takes what is being forked. It is there on hybrid machines too,
// in the hierarchy without controllers. Its failure is not an error: killEach follows.
func (l *layout) killAtOnce(p Path) {
	if root, ok := l.mounts[""]; ok {
		_ = cgroups.WriteFile(filepath.Join(root, string(p)), "cgroup.kill", "1")
	}
}

// freezeV1 freezes p if asked to, and returns how to thaw it, whoever has frozen it: on v1 a frozen process does not die of
// SIGKILL. That it cannot be held still is no error: the next pass tries again.
func (l *layout) freezeV1(p Path, freeze bool) (thaw func()) {
	if l.v2 || l.dir(p, "freezer") == "" {
		return func() {}
	}
	if freeze {
		_ = l.setFrozen(p, cgroups.Frozen)
	}
	return func() {
		_ = l.setFrozen(p, cgroups.Thawed)
		// Those below are held still on their own account, too: a privileged container's process may freeze itself.
		_ = filepath.WalkDir(l.dir(p, "freezer"), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				_ = cgroups.WriteFile(path, "freezer.state", string(cgroups.Thawed))
			}
			return nil // it may have gone
		})
	}
}

// setFrozen holds every process of p and of the cgroups below it still, or lets them go on, and returns when that is so.
func (l *layout) setFrozen(p Path, state cgroups.FreezerState) error {
	m, err := l.manager(p, &cgroups.Resources{SkipDevices: true})
	if err != nil {
		return err
	}
	return m.Freeze(state)
}

// killEach kills those of pids that are still in p and waits for their end. An id may be reused between reading it and
// signalling it; so it is held by a pidfd, and signalled only if it is listed again after that.
func (l *layout) killEach(p Path, pids []int, thaw func(), deadline time.Time) error {
	type held struct{ pid, fd int }
	var fds []held
	defer func() {
		for _, h := range fds {
			_ = unix.Close(h.fd)
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		switch {
		case err == nil:
			fds = append(fds, held{pid, fd})
		case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			// It has ended, or is a thread of a process that is listed elsewhere (threaded cgroups).
		default:
			thaw()
			return fmt.Errorf("hold process %d: %w", pid, err)
		}
	}
	members, err := l.processes(p)
	if err != nil {
		thaw()
		return err
	}
	var wait []unix.PollFd
	for _, h := range fds {
		if _, ok := slices.BinarySearch(members, h.pid); !ok {
			continue
		}
		if err := unix.PidfdSendSignal(h.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			thaw()
			return fmt.Errorf("process %d: %w", h.pid, err)
		}
		wait = append(wait, unix.PollFd{Fd: int32(h.fd), Events: unix.POLLIN})
	}
	thaw()
	for len(wait) > 0 {
		left := time.Until(deadline)
		if left <= 0 {
			return nil // Kill says which are left
		}
		if _, err := unix.Poll(wait, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for processes: %w", err)
		}
		wait = slices.DeleteFunc(wait, func(f unix.PollFd) bool { return f.Revents != 0 })
	}
	return nil
}

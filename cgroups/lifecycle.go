package cgroups

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"
)

// sandboxShares is what the kubelet counts for a sandbox: the least the kernel knows.
const sandboxShares = 2

// CreateSandbox makes the cgroup of a pod's shim, with the least CPU weight and without limits of its own: the pod's
// cgroup above it has those. It succeeds where the cgroup is there already, and takes back what it made on error. Of a
// scope of systemd nothing is there before [AddProcess] puts its first process into it.
func CreateSandbox(p Path) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	if _, ok := p.Scope(); ok {
		return nil
	}
	return l.createSandbox(p)
}

func (l *layout) createSandbox(p Path) error {
	r := &cgroups.Resources{
		CpuShares:   sandboxShares,
		CpuWeight:   cgroups.ConvertCPUSharesToCgroupV2Value(sandboxShares),
		SkipDevices: true,
	}
	m, err := l.manager(p, r)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", p, err)
	}
	existed := Exists(p)
	if err = m.Apply(-1); err == nil {
		err = m.Set(r)
	}
	for _, dir := range l.dirs(p) {
		// The library leaves out the devices hierarchy of v1 when it is to set no rules there.
		if err == nil {
			err = os.MkdirAll(dir, 0o755)
		}
	}
	if err != nil {
		err = fmt.Errorf("create cgroup %s: %w", p, err)
		if !existed {
			err = errors.Join(err, Remove(p))
		}
	}
	return err
}

// AddProcess moves a process into p in every hierarchy. The error is of the class errdefs.ErrNotFound when the process
// or the cgroup does not exist.
func AddProcess(p Path, pid int) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	if pid <= 0 {
		// 0 would be the caller itself.
		return fmt.Errorf("move process %d to cgroup %s: %w", pid, p, errdefs.ErrInvalidArgument)
	}
	if s, ok := p.Scope(); ok {
		if err := startScope(s, pid); err != nil {
			return err
		}
		// On v1 systemd knows some of the controllers only.
		if err := l.createSandbox(p); err != nil {
			return err
		}
	}
	for _, dir := range l.dirs(p) {
		if err := cgroups.WriteCgroupProc(dir, pid); err != nil {
			if gone(err) || errors.Is(err, unix.ESRCH) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
			}
			return fmt.Errorf("move process %d to cgroup %s: %w", pid, p, err)
		}
	}
	return nil
}

// Entrances are the ways into p that do not have the kernel hold still all forks of the machine, for which it waits for 7 to
// 15 ms when [AddProcess] moves a process: on v1, files that a thread writes a 0 to, about itself; and a directory of the unified
// hierarchy, for a process to be cloned into (CLONE_INTO_CGROUP), which is "" where there is none. ok is false where there are no
// such ways, as into a scope of systemd.
func Entrances(p Path) (tasks []string, unified string, ok bool) {
	l, err := at(p)
	if _, scope := p.Scope(); err != nil || scope {
		return nil, "", false
	}
	root, hybrid := l.mounts[""]
	if hybrid {
		unified = filepath.Join(root, string(p))
	}
	for _, dir := range l.dirs(p) {
		if dir != unified {
			tasks = append(tasks, filepath.Join(dir, "tasks"))
		}
	}
	return tasks, unified, true
}

// Verify returns an error of the class errdefs.ErrFailedPrecondition unless the process is in p, in every hierarchy
// (CVE-2025-47291: a container that ran in the root cgroup, with no limits).
func Verify(p Path, pid int) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	for _, dir := range l.dirs(p) {
		pids, err := cgroups.GetPids(dir)
		if err != nil && !gone(err) {
			return fmt.Errorf("cgroup %s: %w", p, err)
		}
		if !slices.Contains(pids, pid) {
			return fmt.Errorf("process %d is not in cgroup %s: %w", pid, dir, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Exists says whether p is there in any hierarchy, so that there is something to remove.
func Exists(p Path) bool {
	l, err := at(p)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(l.dirs(p), exists)
}

func exists(dir string) bool {
	st, err := os.Stat(dir)
	return err == nil && st.IsDir()
}

// Processes lists the processes of p and of all cgroups below it. It is empty where p does not exist.
func Processes(p Path) ([]int, error) {
	l, err := at(p)
	if err != nil {
		return nil, err
	}
	return l.processes(p)
}

// processes takes all hierarchies together: on v1 a privileged container can move its processes in one of them.
func (l *layout) processes(p Path) ([]int, error) {
	var all []int
	for _, dir := range l.dirs(p) {
		pids, err := cgroups.GetAllPids(dir)
		if err != nil && !gone(err) {
			return nil, fmt.Errorf("processes of cgroup %s: %w", p, err)
		}
		all = append(all, pids...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// removeWait bounds how long Remove waits for processes that are about to vanish: the kernel lets a process that was
// killed, and even reaped, hold its cgroup for a moment.
const removeWait = time.Second

// Remove removes p and all cgroups below it, in every hierarchy. It returns nil where p does not exist, and an error of
// the class errdefs.ErrFailedPrecondition while processes are in it.
func Remove(p Path) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	if s, ok := p.Scope(); ok {
		if err := l.removeScope(p, s); err != nil {
			return err
		}
	}
	left := l.dirs(p)
	deadline := time.Now().Add(removeWait)
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		var errs []error
		left = slices.DeleteFunc(left, func(dir string) bool {
			err := removeTree(dir)
			if err != nil {
				errs = append(errs, err)
			}
			return err == nil
		})
		if len(left) == 0 {
			return nil
		}
		err := errors.Join(errs...)
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", p, err)
		}
		if time.Now().After(deadline) {
			pids, _ := l.processes(p) // only to say more
			return fmt.Errorf("remove cgroup %s with processes %v: %w: %w", p, pids, err, errdefs.ErrFailedPrecondition)
		}
		time.Sleep(delay) // the kernel does not tell on v1 when the last one has left
	}
}

// removeScope has systemd forget a scope without processes. One that has some stays: systemd would end them.
func (l *layout) removeScope(p Path, s Scope) error {
	if !systemd.IsRunningSystemd() {
		return nil // the node was started with another init since
	}
	deadline := time.Now().Add(removeWait)
	for delay := time.Millisecond; ; delay = min(2*delay, 50*time.Millisecond) {
		pids, err := l.processes(p)
		switch {
		case err != nil:
			return err
		case len(pids) == 0:
			return stopScope(s)
		case time.Now().After(deadline):
			return fmt.Errorf("remove cgroup %s with processes %v: %w", p, pids, errdefs.ErrFailedPrecondition)
		}
		time.Sleep(delay) // as in Remove
	}
}

// removeTree removes children first: rmdir refuses a cgroup that has some, with EBUSY.
func removeTree(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	entries, readErr := os.ReadDir(dir)
	switch {
	case errors.Is(readErr, os.ErrNotExist):
		return nil // rmdir says EROFS, not ENOENT, on a read-only mount
	case readErr != nil:
		return readErr
	}
	children := false
	for _, e := range entries {
		if e.IsDir() {
			children = true
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if children {
		err = unix.Rmdir(dir)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

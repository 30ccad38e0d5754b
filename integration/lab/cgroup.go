package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/cgroups"
)

// cgroupMounts lists the roots of all cgroup hierarchies: one on v2, one for each controller on v1.
func cgroupMounts() ([]string, error) {
	mounts, err := mountTable()
	if err != nil {
		return nil, err
	}
	var roots []string
	for _, m := range mounts {
		if (m.fstype == "cgroup" || m.fstype == "cgroup2") && strings.HasPrefix(m.point, "/sys/fs/cgroup") {
			roots = append(roots, m.point)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted at /sys/fs/cgroup")
	}
	return roots, nil
}

// makeCgroup makes a cgroup in every hierarchy, ready for children: a new cpuset of v1 is empty until it is given cpus and
// memory nodes, and v2 hands controllers down only where it is told to.
func makeCgroup(name string) error {
	roots, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, root := range roots {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			have, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil || strings.TrimSpace(string(have)) != "" || !exists(filepath.Join(dir, "cpuset.sched_load_balance")) {
				continue // not a cpuset of v1, or set already
			}
			above, err := os.ReadFile(filepath.Join(root, file))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), above, 0o644); err != nil {
				return fmt.Errorf("cpuset %s: %w", dir, err)
			}
		}
		controllers, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			continue // v1
		}
		for _, c := range strings.Fields(string(controllers)) {
			// A controller that cannot be delegated here is one the tests do without.
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
		}
	}
	return nil
}

// cgroupDirs lists the directories of a cgroup and all below it, deepest first, in all hierarchies.
func cgroupDirs(name string) ([]string, error) {
	roots, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		err := filepath.WalkDir(filepath.Join(root, name), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // gone while we looked
			}
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	for i, j := 0, len(dirs)-1; i < j; i, j = i+1, j-1 {
		dirs[i], dirs[j] = dirs[j], dirs[i]
	}
	return dirs, nil
}

// removeCgroup removes a cgroup and all below it from every hierarchy. Their processes are gone already, or on their way.
func removeCgroup(name string) error {
	var last error
	for try := 0; try < 50; try++ {
		dirs, err := cgroupDirs(name)
		if err != nil {
			return err
		}
		last = nil
		for _, dir := range dirs {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				last = err
			}
		}
		if last == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond) // the kernel lets go of a cgroup a moment after its last process
	}
	return last
}

// MakeCgroup makes a cgroup in every hierarchy, ready for children; those above it are there.
func MakeCgroup(name string) error { return makeCgroup(name) }

// RemoveCgroup removes a cgroup, and all below it, that a test has had the runtime make as the parent of a pod's.
func RemoveCgroup(name string) error { return removeCgroup(name) }

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// RemoveDefaultParent takes away the cgroup of pods that name no parent, where nobody is in it: berth leaves it for the next.
func RemoveDefaultParent() {
	roots, err := cgroupMounts()
	if err != nil {
		return
	}
	for _, root := range roots {
		_ = syscall.Rmdir(filepath.Join(root, cgroups.DefaultParent)) // not there, or somebody's
	}
}

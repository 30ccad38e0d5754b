package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/berth-run/berth/integration/lab"
)

// tracked is the hierarchy by which processes are found: the only one on cgroup v2, that of pids on v1, which each pod is in.
func tracked() (string, error) {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "/sys/fs/cgroup", nil
	}
	if _, err := os.Stat("/sys/fs/cgroup/pids/cgroup.procs"); err != nil {
		return "", errors.New("neither cgroup v2 nor the controller pids of v1 is mounted at /sys/fs/cgroup")
	}
	return "/sys/fs/cgroup/pids", nil
}

// procsFile is where a process moves itself into a cgroup; on v2 one that holds processes has nothing below.
func procsFile(cgroup string) (string, error) {
	top, err := tracked()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(top, cgroup)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	return filepath.Join(dir, "cgroup.procs"), nil
}

// makeCgroups makes the cluster's cgroup and those of its nodes.
func (c *Cluster) makeCgroups() error {
	names := []string{c.cgroup()}
	for _, n := range c.Nodes {
		names = append(names, n.cgroup())
	}
	for _, name := range names {
		if err := lab.MakeCgroup(name); err != nil {
			return fmt.Errorf("cgroup %s: %w", name, err)
		}
	}
	return nil
}

// processes are all those in a cgroup and below.
func processes(cgroup string) (map[int]bool, error) {
	top, err := tracked()
	if err != nil {
		return nil, err
	}
	found := map[int]bool{}
	err = filepath.WalkDir(filepath.Join(top, cgroup), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			return nil // gone meanwhile
		}
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
			return nil
		}
		for _, word := range strings.Fields(string(text)) {
			if pid, err := strconv.Atoi(word); err == nil && pid > 1 {
				found[pid] = true
			}
		}
		return err
	})
	return found, err
}

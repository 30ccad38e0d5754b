package cluster

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
)

// namespaces are those of a node's own.
var namespaces = []string{"mnt", "net", "uts"}

// kill kills all processes that the looks find, until they find none. A look is taken again and again: what is killed last may have started another.
func kill(of string, looks ...func() (map[int]bool, error)) error {
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		left := map[int]bool{}
		for _, look := range looks {
			found, err := look()
			if err != nil {
				return err
			}
			maps.Copy(left, found)
		}
		if len(left) == 0 {
			return nil
		}
		if left[os.Getpid()] {
			return fmt.Errorf("this very process, %d, is one of %s: run it outside of its nodes", os.Getpid(), of)
		}
		if time.Since(began) > 30*time.Second {
			return fmt.Errorf("%s: %d processes outlive SIGKILL: %v", of, len(left), slices.Sorted(maps.Keys(left)))
		}
		for pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
	}
}

func (c *Cluster) inCgroup() (map[int]bool, error) { return processes(c.cgroup()) }
func (n *Node) inCgroup() (map[int]bool, error)    { return processes(n.cgroup()) }

// inside are the processes in a namespace of the node. A shell on the node, and what was started in it, is in no cgroup of the cluster's.
func (n *Node) inside() (map[int]bool, error) {
	links := map[string]string{}
	for _, kind := range namespaces {
		if !network.Pinned(n.ns(kind)) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(n.ns(kind), &st); err != nil {
			return nil, fmt.Errorf("%s: %w", n.ns(kind), err)
		}
		links[kind] = fmt.Sprintf("%s:[%d]", kind, st.Ino)
	}
	return processesWhose(func(proc string) bool {
		for kind, want := range links {
			if link, err := os.Readlink(filepath.Join(proc, "ns", kind)); err == nil && link == want { // an error: it has ended
				return true
			}
		}
		return false
	})
}

// ofPrograms are the processes of the cluster's programs, wherever somebody has started them.
func (c *Cluster) ofPrograms() (map[int]bool, error) {
	return processesWhose(func(proc string) bool {
		program, err := os.Readlink(filepath.Join(proc, "exe"))
		return err == nil && strings.HasPrefix(program, c.path("bin")+"/")
	})
}

// processesWhose are those whose directory in /proc is such.
func processesWhose(is func(proc string) bool) (map[int]bool, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	found := map[int]bool{}
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid > 1 && is(filepath.Join("/proc", e.Name())) {
			found[pid] = true
		}
	}
	return found, nil
}

// Sweep removes what is left of an index whose cluster's directory is gone: cgroups, and processes in them. An index that has its bridge is a
// cluster's, whose directory Down is to be given.
func Sweep(index int) error {
	c := build(Options{Index: index})
	if _, err := os.Lstat("/sys/class/net/" + c.bridge()); err == nil {
		return fmt.Errorf("index: %d has the link %s: it is a cluster's whose directory is another (BERTH_CLUSTER_DIR), or was removed by hand (ip link delete %[2]s)", index, c.bridge())
	}
	if err := errors.Join(kill(c.cgroup(), c.inCgroup), removeCgroup(c.cgroup())); err != nil {
		return fmt.Errorf("index %d: %w", index, err)
	}
	return nil
}

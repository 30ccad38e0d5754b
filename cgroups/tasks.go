package cgroups

import (
	"os"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Tasks is what the processes of a cgroup have open.
type Tasks struct {
	Processes       uint64
	FileDescriptors uint64
	Sockets         uint64 // of FileDescriptors
}

// tasksController is the hierarchy of v1 where processes are counted: one that exec'd processes have no cgroups of their
// own in.
const tasksController = "pids"

// CountProcesses counts the processes of p and of all cgroups below it. It is 0 where p does not exist.
func CountProcesses(p Path) (uint64, error) {
	pids, err := tasksOf(p)
	return uint64(len(pids)), err
}

// ReadTasks looks at every descriptor of every process of p: it is not for every few seconds. A process that ends
// meanwhile is left out.
func ReadTasks(p Path) (Tasks, error) {
	pids, err := tasksOf(p)
	t := Tasks{Processes: uint64(len(pids))}
	for _, pid := range pids {
		t.look("/proc/" + strconv.Itoa(pid) + "/fd")
	}
	return t, err
}

func tasksOf(p Path) ([]int, error) {
	l, err := at(p)
	if err != nil {
		return nil, err
	}
	pids, err := cgroups.GetAllPids(l.dir(p, tasksController))
	if err != nil && !gone(err) {
		return nil, statsError(p, err)
	}
	return pids, nil
}

func (t *Tasks) look(dir string) {
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close() //nolint:errcheck // opened for reading
	target := make([]byte, len("socket:"))
	for {
		names, err := d.Readdirnames(512)
		for _, name := range names {
			t.FileDescriptors++
			if n, err := unix.Readlinkat(int(d.Fd()), name, target); err == nil && strings.HasPrefix(string(target[:n]), "socket:") {
				t.Sockets++
			}
		}
		if err != nil {
			return
		}
	}
}

package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// killed is the wait status of a process that a signal ended.
func killed(sig unix.Signal) unix.WaitStatus { return unix.WaitStatus(sig) }

// A scope whose last process has ended is gone at once, and its count with it: the pod's slice has what is missing.
func TestKillsOfAScopeThatIsGone(t *testing.T) {
	slice := t.TempDir()
	write := func(dir string, kills int) string {
		path := filepath.Join(slice, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("low 0\noom 9\noom_kill %d\noom_group_kill 0\n", kills)
		if err := os.WriteFile(filepath.Join(path, "memory.events"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("", 3) // before the pod had a container
	s := &Server{containers: map[string]*container{}}
	add := func(id, dir, slice string) *container {
		c := &container{req: CreateRequest{ID: id, MemoryDir: dir, Slice: slice}, shim: s}
		c.state.Status = Running
		s.containers[id] = c
		return c
	}
	s.kills.begin(filepath.Join(slice, "a"))
	a := add("a", filepath.Join(slice, "a"), "pod.slice") // has no directory
	b := add("b", write("b", 2), "pod.slice")
	write("", 3+2)
	for _, tc := range []struct {
		all    int
		status unix.WaitStatus
		want   uint64
	}{
		{5, killed(unix.SIGKILL), 0}, // all are of b
		{6, killed(unix.SIGKILL), 1},
		{9, killed(unix.SIGKILL), 1}, // or of other pods, where a slice has several
		{6, killed(unix.SIGTERM), 0},
		{6, unix.WaitStatus(0), 0},
		{4, killed(unix.SIGKILL), 0}, // less than is known of: never below zero
	} {
		write("", tc.all)
		if got := s.oomKills(a, tc.status); got != tc.want {
			t.Errorf("%d in the slice, status %#x: %d kills, want %d", tc.all, tc.status, got, tc.want)
		}
	}
	write("", 6)
	if got := s.oomKills(b, unix.WaitStatus(0)); got != 2 {
		t.Errorf("the count of a scope that is there: %d", got)
	}
	// What a container that is gone had counts for none that comes later.
	b.state.Status, b.state.OOMKills = Exited, 3
	if got := s.oomKills(a, killed(unix.SIGKILL)); got != 0 {
		t.Errorf("kills of one that has exited are told twice: %d", got)
	}
	c := add("c", filepath.Join(slice, "c"), "") // no scope: its directory is removed by nobody but berth
	if got := s.oomKills(c, killed(unix.SIGKILL)); got != 0 {
		t.Errorf("a cgroup without systemd: %d", got)
	}
}

package cgroups

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// testParent is where the tests of this process make their cgroups.
var (
	testParent = fmt.Sprintf("/berth-test-%d", os.Getpid())
	count      atomic.Int64
)

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Geteuid() == 0 {
		if err := Remove(Path(testParent)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes cgroups")
	}
}

// newPath is the path of a cgroup that is gone again after the test.
func newPath(t *testing.T) Path {
	t.Helper()
	needRoot(t)
	p, err := Join(testParent, fmt.Sprintf("%064x", count.Add(1)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Kill(p); err != nil {
			t.Error(err)
		}
		if err := Remove(p); err != nil {
			t.Error(err)
		}
	})
	return p
}

func newCgroup(t *testing.T) Path {
	t.Helper()
	p := newPath(t)
	if err := CreateSandbox(p); err != nil {
		t.Fatal(err)
	}
	return p
}

func layoutOf(t *testing.T) *layout {
	t.Helper()
	l, err := host()
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// file is one on v1 and another on v2; it is skipped where the machine has no such controller.
func file(t *testing.T, p Path, controller, v1, v2 string) string {
	t.Helper()
	l := layoutOf(t)
	name := v1
	if l.v2 {
		name = v2
	}
	dir := l.dir(p, controller)
	if dir == "" || !fileExists(dir+"/"+name) {
		t.Skipf("no %s here", name)
	}
	return dir + "/" + name
}

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// process is one that a test has started. It is reaped when it ends, so that a Kill can see its end.
type process struct {
	pid int
	end chan error
}

// start runs a shell script in p, until the test ends at the latest.
func start(t *testing.T, p Path, script string) process {
	t.Helper()
	cmd := exec.Command("sh", "-c", "read go; "+script)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	proc := process{cmd.Process.Pid, make(chan error, 1)}
	if err := AddProcess(p, proc.pid); err != nil {
		t.Error(err)
	}
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Error(err)
	}
	reaped := make(chan struct{})
	go func() {
		proc.end <- cmd.Wait()
		close(reaped)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has mostly ended
		<-reaped
	})
	if t.Failed() {
		t.FailNow()
	}
	return proc
}

// left lists the directories of p that are there.
func left(t *testing.T, p Path) []string {
	t.Helper()
	var dirs []string
	for _, dir := range layoutOf(t).dirs(p) {
		if exists(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// child makes a cgroup below p in every hierarchy.
func child(t *testing.T, p Path, name string) Path {
	t.Helper()
	c := p + "/" + Path(name)
	for _, dir := range layoutOf(t).dirs(c) {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // v1 wants them before there are processes
			if parent := filepath.Dir(dir) + "/" + f; !layoutOf(t).v2 && fileExists(parent) {
				if err := os.WriteFile(dir+"/"+f, []byte(read(t, parent)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return c
}

func ptr[T any](v T) *T { return &v }

func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(data), ") Z ") && syscall.Kill(pid, 0) == nil
}

package cgroups

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestSandboxHasTheLeastWeight(t *testing.T) {
	p := newCgroup(t)
	l := layoutOf(t)
	if dirs := left(t, p); len(dirs) != len(l.roots) {
		t.Errorf("made in %v, not in all of %v", dirs, l.roots)
	}
	want := "2"
	if l.v2 {
		want = "1"
	}
	if got := read(t, file(t, p, "cpu", "cpu.shares", "cpu.weight")); got != want {
		t.Errorf("weight %s, want %s", got, want)
	}
	if err := CreateSandbox(p); err != nil {
		t.Errorf("again: %v", err)
	}
	if Version() == 2 != l.v2 {
		t.Errorf("version %d", Version())
	}
}

func TestLifecycle(t *testing.T) {
	p := newPath(t)
	if Exists(p) {
		t.Fatal("exists")
	}
	if pids, err := Processes(p); err != nil || len(pids) != 0 {
		t.Errorf("processes of nothing: %v, %v", pids, err)
	}
	if err := errors.Join(Kill(p), Remove(p)); err != nil {
		t.Errorf("kill and remove nothing: %v", err)
	}
	if err := AddProcess(p, os.Getpid()); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("AddProcess: %v", err)
	}
	if err := CreateSandbox(p); err != nil {
		t.Fatal(err)
	}
	cmd := start(t, p, "sleep 60")
	pids, err := Processes(p)
	if err != nil || !slices.Contains(pids, cmd.pid) {
		t.Errorf("processes %v, %v, want %d", pids, err, cmd.pid)
	}
	if err := Verify(p, cmd.pid); err != nil {
		t.Error(err)
	}
	begin := time.Now()
	if err := Remove(p); !errors.Is(err, errdefs.ErrFailedPrecondition) || !Exists(p) {
		t.Errorf("Remove with a process in it: %v", err)
	}
	if d := time.Since(begin); d > 5*removeWait {
		t.Errorf("Remove took %v", d)
	}
	if err := Kill(p); err != nil {
		t.Error(err)
	}
	if err := Remove(p); err != nil || Exists(p) {
		t.Errorf("Remove: %v, left %v", err, left(t, p))
	}
}

// CVE-2025-47291: the path is checked once the process runs.
func TestCVE_2025_47291_VerifyFindsAProcessElsewhere(t *testing.T) {
	p, other := newCgroup(t), newCgroup(t)
	cmd := start(t, other, "sleep 60")
	if err := Verify(p, cmd.pid); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("process elsewhere: %v", err)
	}
	if err := Verify(p, os.Getpid()); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("this process: %v", err)
	}
	if err := Remove(newPath(t)); err != nil {
		t.Error(err)
	}
	if err := Verify(newPath(t), cmd.pid); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("no cgroup: %v", err)
	}
	// In all hierarchies but one.
	l := layoutOf(t)
	if l.v2 {
		return
	}
	if err := AddProcess(p, cmd.pid); err != nil {
		t.Fatal(err)
	}
	pid := []byte(strconv.Itoa(cmd.pid))
	if err := os.WriteFile(l.dir(other, "memory")+"/cgroup.procs", pid, 0); err != nil {
		t.Fatal(err)
	}
	if err := Verify(p, cmd.pid); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("other memory cgroup: %v", err)
	}
}

func TestAddProcessThatIsGone(t *testing.T) {
	p := newCgroup(t)
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if err := AddProcess(p, cmd.Process.Pid); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v", err)
	}
	for _, pid := range []int{0, -1} {
		if err := AddProcess(p, pid); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%d: %v", pid, err)
		}
	}
}

func TestRemoveTakesChildren(t *testing.T) {
	p := newCgroup(t)
	child(t, child(t, p, "a"), "b")
	child(t, p, "c")
	if err := Remove(p); err != nil || len(left(t, p)) != 0 {
		t.Errorf("%v, left %v", err, left(t, p))
	}
}

// A hierarchy in which it is gone already (a crash in the middle of Remove) does not stop the others.
func TestRemoveOfWhatIsLeft(t *testing.T) {
	p := newCgroup(t)
	dirs := left(t, p)
	if err := os.Remove(dirs[0]); err != nil {
		t.Fatal(err)
	}
	if len(dirs) > 1 && !Exists(p) {
		t.Error("Exists is false while some of it is there")
	}
	if err := Remove(p); err != nil || Exists(p) {
		t.Errorf("%v, left %v", err, left(t, p))
	}
}

func TestCreateSandboxUndoes(t *testing.T) {
	p := newCgroup(t)
	// A file of the kernel where a directory should be.
	bad := p + "/cgroup.procs"
	if err := CreateSandbox(bad); err == nil {
		t.Error("made a cgroup in the place of a file")
	}
	for _, dir := range left(t, bad) {
		t.Errorf("left %s", dir)
	}
}

func TestKillTakesAllOfIt(t *testing.T) {
	p := newCgroup(t)
	sub := child(t, child(t, p, "a"), "b")
	// Nothing there dies of anything but SIGKILL, and the children have left their session.
	const script = `trap '' TERM INT HUP; for i in 1 2 3 4 5; do setsid sh -c 'trap "" TERM; while :; do sleep 1; done' & done; wait`
	start(t, p, script)
	start(t, sub, script)
	neighbour := start(t, newCgroup(t), "sleep 60")
	waitFor(t, func() bool { pids, _ := Processes(p); return len(pids) >= 12 })
	pids, err := Processes(p)
	if err != nil {
		t.Fatal(err)
	}
	if err := Kill(p); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if alive(pid) {
			t.Errorf("process %d runs", pid)
		}
	}
	if pids, err := Processes(p); len(pids) != 0 || err != nil {
		t.Errorf("%v, %v", pids, err)
	}
	if !alive(neighbour.pid) {
		t.Error("a process of another cgroup was killed")
	}
}

// Without cgroup.kill (before Linux 5.14, or v1 without the unified hierarchy), processes that fork all the time have to
// be caught one by one.
func TestKillWithoutCgroupKill(t *testing.T) {
	p := newCgroup(t)
	l := *layoutOf(t)
	if l.v2 {
		t.Skip("v2 has it wherever this is tested")
	}
	l.mounts = map[string]string{}
	for controller, dir := range layoutOf(t).mounts {
		if controller != "" {
			l.mounts[controller] = dir
		}
	}
	if err := Update(p, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(200))}}); err != nil {
		t.Fatal(err)
	}
	start(t, p, `f() { while :; do (exec sleep 0.01) & (exec sleep 0.02) & wait; done; }; for i in 1 2 3 4 5 6 7 8; do f & done; wait`)
	waitFor(t, func() bool { pids, _ := Processes(p); return len(pids) >= 10 })
	if err := l.kill(p); err != nil {
		t.Error(err)
	}
	if pids, err := Processes(p); len(pids) != 0 || err != nil {
		t.Errorf("%v, %v", pids, err)
	}
}

// Who is frozen (by a checkpoint that died, say) dies all the same.
func TestKillOfAFrozenCgroup(t *testing.T) {
	p := newCgroup(t)
	l := layoutOf(t)
	start(t, p, "sleep 60")
	state, value := l.dir(p, "freezer")+"/freezer.state", "FROZEN"
	if l.v2 {
		state, value = l.dir(p, "")+"/cgroup.freeze", "1"
	}
	if err := os.WriteFile(state, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
	if err := Kill(p); err != nil {
		t.Error(err)
	}
}

// One that may write to its cgroup, on v1, can freeze itself in another below it.
func TestKillOfAFrozenCgroupBelow(t *testing.T) {
	p := newCgroup(t)
	l := layoutOf(t)
	if l.v2 || l.dir(p, "freezer") == "" {
		t.Skip("this machine has no freezer of v1")
	}
	sleeps := start(t, p, "sleep 60")
	below := l.dir(p, "freezer") + "/below"
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, write := range [][2]string{{"/cgroup.procs", strconv.Itoa(sleeps.pid)}, {"/freezer.state", "FROZEN"}} {
		if err := os.WriteFile(below+write[0], []byte(write[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := Kill(p); err != nil {
		t.Error(err)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for i := 0; !ok(); i++ {
		if i == 3000 {
			t.Fatal("it does not happen")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestKillRefusesItsOwnCgroup(t *testing.T) {
	p := newCgroup(t)
	l := layoutOf(t)
	controller := "pids"
	if l.v2 {
		controller = ""
	}
	all, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	self := []byte(strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(l.dir(p, "pids")+"/cgroup.procs", self, 0); err != nil {
		t.Fatal(err)
	}
	err = Kill(p)
	if back := os.WriteFile(l.mounts[controller]+all[controller]+"/cgroup.procs", self, 0); back != nil {
		t.Fatal(back)
	}
	if !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("%v", err)
	}
}

func TestKillNamesWhoDoesNotDie(t *testing.T) {
	p := newCgroup(t)
	cmd := start(t, p, "sleep 60")
	defer func(d time.Duration) { killWait = d }(killWait)
	killWait = 0 // as if it had been waited for
	if err := Kill(p); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), strconv.Itoa(cmd.pid)) {
		t.Errorf("%v", err)
	}
}

// Who takes the entrances is in all hierarchies, as if it had been moved.
func TestEntrances(t *testing.T) {
	p := newCgroup(t)
	tasks, unified, ok := Entrances(p)
	if !ok || layoutOf(t).v2 != (len(tasks) == 0) {
		t.Fatalf("entrances are %q, %q, %v", tasks, unified, ok)
	}
	cmd := exec.Command("sh", append([]string{"-c", `for file; do echo 0 > "$file"; done; echo in; exec sleep 60`, "sh"}, tasks...)...)
	if unified != "" {
		dir, err := os.Open(unified)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	if _, err := out.Read(make([]byte, 2)); err != nil {
		t.Fatal(err)
	}
	if err := Verify(p, cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	if _, _, ok := Entrances("/berth.slice/berth-" + Path(strings.Repeat("a", 64)) + ".scope"); ok {
		t.Error("a scope of systemd is entered without systemd")
	}
}

package cgroups

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// headless is set in the environment of a process that is to end its first thread and go on.
const headless = "BERTH_TEST_HEADLESS"

func init() {
	if os.Getenv(headless) == "" {
		return
	}
	// Package initialisation runs on the first thread.
	runtime.LockOSThread()
	go func() {
		time.Sleep(time.Hour)
		os.Exit(0)
	}()
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

// A process whose first thread has ended looks like a zombie; it still runs, and is killed.
func TestKillOfAProcessWithoutItsFirstThread(t *testing.T) {
	p := newCgroup(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), headless+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := AddProcess(p, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	stat := "/proc/" + strconv.Itoa(cmd.Process.Pid) + "/stat"
	for deadline := time.Now().Add(time.Minute); ; {
		text, err := os.ReadFile(stat)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("its first thread does not end: %s", text)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := Kill(p); err != nil {
		t.Error(err)
	}
	select {
	case <-ended: //nolint:errcheck // only that it ended
	case <-time.After(time.Minute):
		t.Error("it still runs")
		_ = cmd.Process.Kill()
	}
}

func TestFreeze(t *testing.T) {
	p := newCgroup(t)
	l := layoutOf(t)
	if !l.v2 && l.dir(p, "freezer") == "" {
		t.Skip("this machine has no freezer")
	}
	cmd := exec.Command("sh", "-c", "while :; do echo x; done")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if err := AddProcess(p, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if err := Freeze(p); err != nil {
		t.Fatal(err)
	}
	// What is in the pipe can be read, and then nothing comes: it is still.
	buf := make([]byte, 1<<20)
	for {
		_ = r.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := r.Read(buf); err != nil {
			break
		}
	}
	if err := Thaw(p); err != nil {
		t.Fatal(err)
	}
	_ = r.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := r.Read(buf); err != nil {
		t.Errorf("does not go on: %v", err)
	}
	if err := Freeze(Path("/berth-no-such")); err == nil {
		t.Error("a cgroup that is not there is frozen")
	}
}

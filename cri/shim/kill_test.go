package shim

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
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

// A process whose first thread has ended is a zombie by its stat file, and runs: it is alive, and killed with the others.
func TestAProcessWithoutItsFirstThreadIsAlive(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), headless+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	reaped := false
	defer func() {
		if !reaped {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	stat := "/proc/" + strconv.Itoa(pid) + "/stat"
	for deadline := time.Now().Add(time.Minute); runs(stat); {
		if time.Now().After(deadline) {
			t.Fatal("its first thread does not end")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if !alive(pid) {
		t.Error("is taken for dead")
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	reaped = true
	if status, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool }); !ok || !status.Signaled() {
		t.Errorf("ends with %v", err)
	}
	if alive(pid) {
		t.Error("is alive after it was reaped")
	}
}

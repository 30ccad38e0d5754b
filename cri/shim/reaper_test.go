package shim

import (
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A pid is somebody else's once its process has been waited for.
func TestReapedChildrenAreNotSignalled(t *testing.T) {
	r := &reaper{waiting: map[int]func(unix.WaitStatus){}}
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	start := func() (pid int, ended chan unix.WaitStatus) {
		ended = make(chan unix.WaitStatus, 1)
		pid, err := r.start(func() (int, error) {
			return syscall.ForkExec(sleep, []string{"sleep", "1000"}, &syscall.ProcAttr{})
		}, func(s unix.WaitStatus) { ended <- s })
		if err != nil {
			t.Fatal(err)
		}
		return pid, ended
	}
	pid, ended := start()
	if err := r.kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var status unix.WaitStatus
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		r.reap()
		select {
		case status = <-ended:
		default:
			if time.Now().After(deadline) {
				t.Fatal("the child does not end")
			}
			continue
		}
		break
	}
	if status.Signal() != unix.SIGTERM {
		t.Errorf("status %v", status)
	}
	// As if another process had got the pid: this one is no child that the reaper waits for.
	other, err := syscall.ForkExec(sleep, []string{"sleep", "1000"}, &syscall.ProcAttr{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.kill(other, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(other, unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(other, &status, 0, nil); err != nil || status.Signal() != unix.SIGINT {
		t.Errorf("the other process: %v, %v", status, err)
	}
}

package shim

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/proctest"
)

// A process whose first thread has ended is a zombie by its stat file, and runs: it is alive, and killed with the others.
func TestAProcessWithoutItsFirstThreadIsAlive(t *testing.T) {
	pid, ended := proctest.Headless(t)
	if !alive(pid) {
		t.Error("is taken for dead")
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case state := <-ended:
		if status, ok := state.Sys().(interface{ Signaled() bool }); !ok || !status.Signaled() {
			t.Errorf("ends with %v", state)
		}
	case <-time.After(time.Minute):
		t.Fatal("does not end")
	}
	if alive(pid) {
		t.Error("is alive after it was reaped")
	}
}

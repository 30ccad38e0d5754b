package cgroups

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"

	"github.com/berth-run/berth/internal/proctest"
)

// A process whose first thread has ended looks like a zombie; it still runs, and is killed.
func TestKillOfAProcessWithoutItsFirstThread(t *testing.T) {
	p := newCgroup(t)
	pid, ended := proctest.Headless(t)
	if err := AddProcess(p, pid); err != nil {
		t.Fatal(err)
	}
	if err := Kill(p); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("it still runs")
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
	if err := l.setFrozen(p, cgroups.Frozen); err != nil {
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
	if err := l.setFrozen(p, cgroups.Thawed); err != nil {
		t.Fatal(err)
	}
	_ = r.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := r.Read(buf); err != nil {
		t.Errorf("does not go on: %v", err)
	}
}

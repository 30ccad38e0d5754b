package main

import (
	"context"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTurns(t *testing.T) {
	ctx := t.Context()
	room := make(turns, 1)
	first, err := room.take(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	late, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := room.take(late, time.Hour); err == nil {
		t.Error("one that is killed while it waits has its turn")
	}
	var began atomic.Bool
	second := make(chan func())
	go func() {
		done, err := room.take(ctx, time.Hour)
		if err != nil {
			t.Error(err)
		}
		began.Store(true)
		second <- done
	}()
	if began.Load() {
		t.Error("the second has not waited for the first")
	}
	first()
	first() // as it is when an exec has started, and then ends
	(<-second)()
	if len(room) != 0 {
		t.Errorf("%d at it, after all have ended", len(room))
	}

	if _, err := room.take(ctx, time.Millisecond); err != nil { // hangs
		t.Fatal(err)
	}
	done, err := room.take(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	done()
}

func TestUntilExit(t *testing.T) {
	cmd := exec.Command("sleep", "0.1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	untilExit(cmd.Process.Pid)
	pid, err := unix.Wait4(cmd.Process.Pid, nil, unix.WNOHANG, nil)
	if pid != cmd.Process.Pid || err != nil {
		t.Errorf("it has not ended: %d, %v", pid, err)
	}
	untilExit(cmd.Process.Pid) // is no more
}

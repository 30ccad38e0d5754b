package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
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

// A start that fails leaves no child behind, and harms none that another start has on the same thread.
func TestWithoutStrays(t *testing.T) {
	if _, err := os.Stat("/proc/thread-self/children"); err != nil {
		t.Skip(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	other := exec.Command("sleep", "86400")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = other.Process.Kill(), other.Wait() }()
	stray := exec.Command("sleep", "86400")
	fails := errors.New("killed")
	err := withoutStrays(func() error { return errors.Join(stray.Start(), fails) })
	if !errors.Is(err, fails) || stray.Process == nil {
		t.Fatalf("%v", err)
	}
	deadline := time.Now().Add(time.Minute)
	for parent(stray.Process.Pid) == os.Getpid() {
		if time.Now().After(deadline) {
			t.Fatal("the stray is still there")
		}
		time.Sleep(time.Millisecond)
	}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", other.Process.Pid)); err != nil || bytes.Contains(stat, []byte(") Z ")) {
		t.Errorf("the other has gone, too: %s, %v", stat, err)
	}
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

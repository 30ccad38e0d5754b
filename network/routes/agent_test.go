package routes

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Turned off, a daemon removes what it has noted, and nothing where it has noted nothing: that is another daemon's.
func TestOffRemovesWhatWasNoted(t *testing.T) {
	h := newHost(t)
	h.apply(Auto, nearNode, farNode)
	note := filepath.Join(t.TempDir(), "noderoutes")
	off := func() {
		h.do(func() error {
			a, err := Start(Options{Mode: Off, Note: note})
			if err != nil {
				return err
			}
			return a.Close()
		})
	}
	off()
	h.wantState("without a note", slices.Concat(nearState, ends, farState)...)
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	off()
	h.wantState("with a note")
	if _, err := os.Stat(note); !os.IsNotExist(err) {
		t.Errorf("the note: %v", err)
	}
}

// Where there are no descriptors left the kernel is not asked for news, and nothing stays of trying.
func TestNewsThatCannotBeHadLeaveNothing(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	a := &Agent{log: slog.New(slog.DiscardHandler)}
	was := runtime.NumGoroutine()
	none := before
	none.Cur = 3
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	var err error
	for range 50 {
		err = a.watchKernelOnce(t.Context(), make(chan struct{}, 1))
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("the error is %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	if now := runtime.NumGoroutine(); now > was+5 {
		t.Errorf("%d goroutines, of %d before", now, was)
	}
}

package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A container may have more variables than a message has room for: its probes failed for ever.
func TestExecOfALongProcess(t *testing.T) {
	ours, theirs, err := ExecSocketpair()
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		served <- ServeExec(theirs, func(_ context.Context, req ExecRequest, files []*os.File, started func(int)) (int, error) {
			_, err := files[1].Write(req.Process)
			n := len(files)
			started(os.Getpid())
			return n, err
		})
	}()
	s, err := NewExecServer(ours)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{10, maxInline - 2, maxInline, MaxMessage, 4 << 20} {
		process, err := json.Marshal(strings.Repeat("x", size))
		if err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(r)
			got <- b
		}()
		e, err := s.Start(context.Background(), ExecRequest{Process: process}, null, w, null)
		_, _ = w.Close(), null.Close()
		if err != nil {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if code, err := e.Wait(context.Background()); code != 3 || err != nil {
			t.Errorf("%d bytes: it gets %d files, not 3 (%v)", size, code, err)
		}
		if b := <-got; !bytes.Equal(b, process) {
			t.Errorf("%d bytes: %d of %d arrive", size, len(b), len(process))
		}
		_ = r.Close()
	}
	s.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// An error quotes the command. One that had no room in a message was never answered, and the call waited for ever.
func TestExecErrorsAreAlwaysAnswered(t *testing.T) {
	ours, theirs, err := ExecSocketpair()
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		served <- ServeExec(theirs, func(context.Context, ExecRequest, []*os.File, func(int)) (int, error) {
			return 0, errors.New("no such file: " + strings.Repeat("\x01", MaxMessage))
		})
	}()
	s, err := NewExecServer(ours)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if _, err := s.Start(ctx, ExecRequest{}); err == nil || !strings.HasPrefix(err.Error(), "no such file: ") {
		t.Errorf("the error is %.40q", err)
	}
	s.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// An exec server that is stopped held its callers, and at last, with its socket full, the lock that all of them need.
func TestExecServerThatIsStuckIsGivenUp(t *testing.T) {
	ours, theirs, err := ExecSocketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(theirs)
	s, err := NewExecServer(ours)
	if err != nil {
		t.Fatal(err)
	}
	s.patience = 50 * time.Millisecond
	process, err := json.Marshal(strings.Repeat("x", 8<<10))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for !s.Gone() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
		if _, err := s.Start(ctx, ExecRequest{Process: process}); err == nil {
			t.Error("an exec that nobody has started")
		}
		cancel()
		if time.Since(began) > 10*time.Second {
			t.Fatal("it is never given up")
		}
	}
}

// One that waits for an exec which neither starts nor can be killed serves the others meanwhile.
func TestExecServerThatWaitsIsNotGivenUp(t *testing.T) {
	ours, theirs, err := ExecSocketpair()
	if err != nil {
		t.Fatal(err)
	}
	hang := make(chan struct{})
	served := make(chan error, 1)
	go func() {
		served <- ServeExec(theirs, func(_ context.Context, req ExecRequest, _ []*os.File, started func(int)) (int, error) {
			if req.ID == "hangs" {
				<-hang
			}
			started(1)
			return 0, nil
		})
	}()
	s, err := NewExecServer(ours)
	if err != nil {
		t.Fatal(err)
	}
	s.patience = 200 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Millisecond)
	defer cancel()
	if _, err := s.Start(ctx, ExecRequest{ID: "hangs"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it ends with %v", err)
	}
	time.Sleep(2 * s.patience)
	e, err := s.Start(context.Background(), ExecRequest{ID: "runs"})
	if err != nil {
		t.Fatal(err)
	}
	if code, err := e.Wait(context.Background()); code != 0 || err != nil {
		t.Errorf("%d, %v", code, err)
	}
	close(hang)
	s.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

package routes

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
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

// Two daemons of one node have routes of one kind, links and a table of one name: one of both keeps them, and the other says who
// does.
func TestOneDaemonKeepsTheRoutes(t *testing.T) {
	h := newHost(t)
	log := &strings.Builder{}
	daemon := func() *Agent {
		return &Agent{
			opts: Options{Mode: Auto, Network: func() ([]netip.Prefix, string) { return ownCIDRs(), "" }, Note: filepath.Join(t.TempDir(), "noderoutes")},
			log:  slog.New(slog.NewTextHandler(log, nil)), stop: func() {},
		}
	}
	sync := func(a *Agent) (ok bool) {
		h.do(func() error {
			ok = a.sync()
			return nil
		})
		return ok
	}
	one, two := daemon(), daemon()
	for range 2 {
		if !sync(one) {
			t.Errorf("the first: %+v", one.State())
		}
	}
	h.apply(Auto, nearNode, farNode)
	all := slices.Concat(nearState, ends, farState)
	for range 3 {
		if sync(two) {
			t.Error("the second has the routes, too")
		}
	}
	if s := two.State(); !strings.Contains(s.Problem, "another berth serve of this node keeps them") || !strings.HasSuffix(s.Problem, fmt.Sprint(": process ", os.Getpid())) {
		t.Errorf("the second: %+v", s)
	}
	if n := strings.Count(log.String(), "node routes are left to another daemon"); n != 1 {
		t.Errorf("said %d times: %s", n, log)
	}
	// It had some, and is to have none any more, or those of its network's own.
	for what, f := range map[string]func(*Agent) error{
		"off":       func(a *Agent) error { return a.remove("off") },
		"a network": func(a *Agent) error { a.leaveAlone("10-calico.conflist"); return nil },
	} {
		if err := two.note(); err != nil {
			t.Fatal(err)
		}
		h.do(func() error { return f(two) })
		h.wantState(what, all...)
		if two.noted() {
			t.Errorf("%s: the note stays", what)
		}
	}
	if err := one.Close(); err != nil {
		t.Fatal(err)
	}
	if !sync(two) {
		t.Errorf("the first has ended: %+v", two.State())
	}
	if err := two.Close(); err != nil {
		t.Fatal(err)
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

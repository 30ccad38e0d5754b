package step

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// trace is a stack whose steps write down what they do, and whose journal is kept.
type trace struct {
	mu      sync.Mutex
	done    []string
	journal [][]string
	Stack
}

func newTrace() *trace {
	t := &trace{}
	t.Call, t.Owner = "Call", "owner"
	t.Save = func(begun []string) error {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.journal = append(t.journal, begun)
		return nil
	}
	return t
}

func (t *trace) log(s string) {
	t.mu.Lock()
	t.done = append(t.done, s)
	t.mu.Unlock()
}

func (t *trace) step(name string, err, undo error) Step {
	return Step{
		Name: name,
		Do:   func(context.Context) error { t.log(name); return err },
		Undo: func(context.Context) error { t.log("-" + name); return undo },
	}
}

func (t *trace) check(test *testing.T, want string) {
	test.Helper()
	if got := strings.Join(t.done, " "); got != want {
		test.Errorf("done: %s\nwant: %s", got, want)
	}
}

func TestFailureUndoesInReverseAndTheFailedStepToo(t *testing.T) {
	tr := newTrace()
	ctx, boom := context.Background(), errors.New("boom")
	err := tr.Run(ctx, tr.step("a", nil, nil), tr.step("b", nil, nil), tr.step("c", boom, nil), tr.step("d", nil, nil))
	if !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "c: ") {
		t.Errorf("error is %v", err)
	}
	if err := tr.Unwind(ctx); err != nil {
		t.Error(err)
	}
	tr.check(t, "a b c -c -b -a")
	if len(tr.Begun()) != 0 {
		t.Errorf("begun: %v", tr.Begun())
	}
}

func TestStepIsInTheJournalBeforeItIsDone(t *testing.T) {
	tr := newTrace()
	st := tr.step("a", nil, nil)
	st.Do = func(context.Context) error {
		if len(tr.journal) != 1 || !slices.Equal(tr.journal[0], []string{"a"}) {
			t.Errorf("journal is %v when the step is done", tr.journal)
		}
		return nil
	}
	if err := tr.Run(context.Background(), st); err != nil {
		t.Error(err)
	}
}

func TestNothingIsDoneThatCannotBeNoted(t *testing.T) {
	tr := newTrace()
	full := errors.New("disk full")
	tr.Save = func([]string) error { return full }
	if err := tr.Run(context.Background(), tr.step("a", nil, nil)); !errors.Is(err, full) {
		t.Errorf("error is %v", err)
	}
	tr.check(t, "")
	if len(tr.Begun()) != 0 {
		t.Errorf("begun: %v", tr.Begun())
	}
}

func TestFailedUndoStaysAndTheOthersAreUndone(t *testing.T) {
	tr := newTrace()
	ctx, stuck := context.Background(), errors.New("stuck")
	if err := tr.Run(ctx, tr.step("a", nil, nil), tr.step("b", nil, stuck), tr.step("c", nil, nil)); err != nil {
		t.Fatal(err)
	}
	if err := tr.Unwind(ctx); !errors.Is(err, stuck) || !strings.Contains(err.Error(), "undo b") {
		t.Errorf("error is %v", err)
	}
	tr.check(t, "a b c -c -b -a")
	if !slices.Equal(tr.Begun(), []string{"b"}) || !slices.Equal(tr.journal[len(tr.journal)-1], []string{"b"}) {
		t.Errorf("begun: %v, journal: %v", tr.Begun(), tr.journal)
	}
}

func TestUnwindIgnoresThatTheCallerHasGone(t *testing.T) {
	tr := newTrace()
	ctx, cancel := context.WithCancel(context.Background())
	st := tr.step("a", nil, nil)
	st.Undo = func(ctx context.Context) error { tr.log("-a"); return ctx.Err() }
	if err := tr.Run(ctx, st); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := tr.Unwind(ctx); err != nil {
		t.Error(err)
	}
	tr.check(t, "a -a")
}

func TestRunAllTellsTheCauseAndEndsTheOthers(t *testing.T) {
	tr := newTrace()
	boom := errors.New("boom")
	waits := tr.step("waits", nil, nil)
	waits.Do = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	err := tr.RunAll(context.Background(), waits, tr.step("fails", boom, nil))
	if !errors.Is(err, boom) || errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	if got := tr.Begun(); !slices.Equal(got, []string{"waits", "fails"}) {
		t.Errorf("begun: %v", got)
	}
}

func TestHangingStepIsLeftBehindAndUndoneWhenItReturns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newTrace()
		ctx, back := context.Background(), make(chan struct{})
		st := tr.step("hangs", nil, nil)
		st.Timeout = time.Second
		st.Do = func(context.Context) error { <-back; return nil }
		start := time.Now()
		err := tr.Run(ctx, tr.step("a", nil, nil), st)
		if !errors.Is(err, ErrLeftBehind) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "hangs") {
			t.Errorf("error is %v", err)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("the caller waited for %s", took)
		}
		if err := tr.Unwind(ctx); !errors.Is(err, ErrLeftBehind) {
			t.Errorf("undo under way: %v", err)
		}
		tr.check(t, "a -a")
		if !slices.Equal(tr.Begun(), []string{"hangs"}) {
			t.Errorf("begun: %v", tr.Begun())
		}
		close(back)
		synctest.Wait()
		if err := tr.Unwind(ctx); err != nil {
			t.Error(err)
		}
		tr.check(t, "a -a -hangs")
	})
}

func TestResumedStepsAreUndone(t *testing.T) {
	tr := newTrace()
	tr.Resume(tr.step("a", nil, nil), tr.step("b", nil, nil))
	if err := tr.Unwind(context.Background()); err != nil {
		t.Error(err)
	}
	tr.check(t, "-b -a")
}

func TestObserverIsToldEveryEnd(t *testing.T) {
	tr := newTrace()
	var events []Event
	tr.Observe = func(e Event) { events = append(events, e) }
	boom := errors.New("boom")
	_ = tr.Run(context.Background(), tr.step("a", nil, nil), Step{Name: "b", Do: func(context.Context) error { return boom }})
	_ = tr.Unwind(context.Background())
	var got []string
	for _, e := range events {
		s := e.Call + "." + e.Step
		if e.Undo {
			s += " undo"
		}
		if e.Err != nil {
			s += " failed"
		}
		got = append(got, s)
	}
	if want := []string{"Call.a", "Call.b failed", "Call.a undo"}; !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
}

func TestFailPointKillsExactlyThere(t *testing.T) {
	if os.Getenv("STEP_TEST_CHILD") != "" {
		tr := newTrace()
		_ = tr.Run(context.Background(), tr.step("a", nil, nil), tr.step("b", nil, nil))
		_ = tr.Unwind(context.Background())
		os.Exit(0)
	}
	list := t.TempDir() + "/points"
	run := func(env ...string) error {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFailPointKillsExactlyThere$")
		cmd.Env = append(os.Environ(), append(env, "STEP_TEST_CHILD=1")...)
		return cmd.Run()
	}
	if err := run(EnvList + "=" + list); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	points := strings.Fields(string(data))
	want := []string{"Call.a.before", "Call.a.after", "Call.b.before", "Call.b.after", "Call.b.undo-before", "Call.b.undo-after", "Call.a.undo-before", "Call.a.undo-after"}
	if !slices.Equal(points, want) {
		t.Errorf("points %v, want %v", points, want)
	}
	for i, p := range points {
		reached := t.TempDir() + "/points"
		var exit *exec.ExitError
		if err := run(EnvKill+"="+p, EnvList+"="+reached); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("%s: the process ended with %v", p, err)
		}
		data, _ := os.ReadFile(reached)
		if got := strings.Fields(string(data)); !slices.Equal(got, points[:i+1]) {
			t.Errorf("%s: passed %v", p, got)
		}
	}
	if err := run(EnvKill + "=Call.c.before"); err != nil {
		t.Errorf("a point that is not there: %v", err)
	}
}

// A journal is written once for steps that follow each other: each writing is a file on a disk.
func TestStepsThatFollowEachOtherAreNotedAtOnce(t *testing.T) {
	tr := newTrace()
	ctx, boom := context.Background(), errors.New("boom")
	if err := tr.Run(ctx, tr.step("a", nil, nil), tr.step("b", nil, nil)); err != nil {
		t.Error(err)
	}
	if len(tr.journal) != 1 || !slices.Equal(tr.journal[0], []string{"a", "b"}) {
		t.Errorf("journal: %v", tr.journal)
	}
	// Those that are not begun after an error are not undone, but one that was begun before is, whoever names it again.
	if err := tr.Run(ctx, tr.step("c", boom, nil), tr.step("a", nil, nil), tr.step("d", nil, nil)); !errors.Is(err, boom) {
		t.Errorf("error is %v", err)
	}
	if got := tr.Begun(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("begun: %v", got)
	}
	if err := tr.Unwind(ctx); err != nil {
		t.Error(err)
	}
	tr.check(t, "a b c -c -b -a")
	if last := tr.journal[len(tr.journal)-1]; len(last) != 0 {
		t.Errorf("journal: %v", last)
	}
}

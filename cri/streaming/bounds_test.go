package streaming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	testclock "k8s.io/utils/clock/testing"
	"k8s.io/utils/exec"

	"github.com/berth-run/berth/cri/pods"
)

func TestConnectionsBeyondTheLimitAreClosed(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newListener(inner, 2)
	defer l.Close()
	accepted := make(chan net.Conn, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	connect := func() net.Conn {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	connect()
	first := <-accepted
	connect()
	<-accepted
	third := connect()
	if err := third.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := third.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the third connection: %v, want it closed", err)
	}
	_ = first.Close()
	_ = first.Close() // closing twice must not count twice
	connect()
	select {
	case <-accepted:
	case <-time.After(5 * time.Second):
		t.Error("a place that became free was not given away")
	}
}

func TestBucket(t *testing.T) {
	now := time.Unix(0, 0)
	b := &bucket{rate: 10, burst: 3, level: 3, now: func() time.Time { return now }}
	for range 3 {
		if !b.wait(t.Context(), 0) {
			t.Fatal("a full bucket makes wait")
		}
		b.take()
	}
	if b.wait(t.Context(), 0) {
		t.Error("an empty bucket does not make wait")
	}
	now = now.Add(100 * time.Millisecond)
	if !b.wait(t.Context(), 0) {
		t.Error("not filled at its rate")
	}
	now = now.Add(time.Hour)
	for range 4 {
		b.take()
	}
	if b.wait(t.Context(), 0) {
		t.Error("filled beyond its burst")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if b.wait(ctx, time.Hour) {
		t.Error("waits for a client that is gone")
	}
}

// The library asserts the type: a wrapped exit code would be an internal error to kubectl.
func TestExitErrorIsNotWrapped(t *testing.T) {
	s := &sessions{life: t.Context(), log: slog.New(slog.DiscardHandler), runtime: &fake{
		exec: func(_ context.Context, _ string, cmd []string, _ pods.Streams) (int, error) { return len(cmd), nil },
	}}
	run := func(cmd ...string) error {
		return s.Exec(t.Context(), "abc", cmd, nil, nil, nil, false, nil)
	}
	if err := run(); err != nil {
		t.Errorf("exit code 0: %v", err)
	}
	exit, ok := run("a", "b").(exec.ExitError) //nolint:errorlint // so does the library
	if !ok || !exit.Exited() || exit.ExitStatus() != 2 {
		t.Errorf("%v", exit)
	}
}

func TestSizesWithoutTerminalAreDroppedAndBlockNobody(t *testing.T) {
	in := make(chan remotecommand.TerminalSize)
	st, done := asked{}.streams(t.Context(), nil, nil, nil, false, in)
	if st.Resize != nil {
		t.Error("a session without a terminal is resized")
	}
	for range 3 {
		select {
		case in <- remotecommand.TerminalSize{Width: 1, Height: 1}:
		case <-time.After(5 * time.Second):
			t.Fatal("nobody reads the sizes")
		}
	}
	done()
}

func TestTokensAreTakenOnceAndForgotten(t *testing.T) {
	now := testclock.NewFakePassiveClock(time.Unix(0, 0))
	tk := newTokens()
	tk.clock = now
	tk.put("a", asked{stdin: true})
	if a, ok := tk.peek("a"); !ok || !a.stdin {
		t.Errorf("peek: %+v %t", a, ok)
	}
	if a, ok := tk.take("a"); !ok || !a.stdin {
		t.Errorf("take: %+v %t", a, ok)
	}
	if _, ok := tk.take("a"); ok {
		t.Error("taken twice")
	}
	tk.put("b", asked{})
	now.SetTime(now.Now().Add(tokenTTL + 1))
	if _, ok := tk.take("b"); ok {
		t.Error("taken late")
	}
	for i := range 3 * maxTokens {
		tk.put(fmt.Sprint(i), asked{})
	}
	if n := len(tk.live); n > maxTokens {
		t.Errorf("%d tokens are kept", n)
	}
	now.SetTime(now.Now().Add(tokenTTL + 1))
	tk.put("fresh", asked{stdout: true})
	if n := len(tk.live); n != 1 {
		t.Errorf("%d tokens are kept of one that lives", n)
	}
}

package streaming

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	testclock "k8s.io/utils/clock/testing"

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

func TestStatusOfASession(t *testing.T) {
	s := &sessions{life: t.Context(), log: slog.New(slog.DiscardHandler), runtime: &fake{
		exec: func(_ context.Context, _ string, cmd []string, _ pods.Streams) (int, error) {
			if len(cmd) == 3 {
				return 0, errors.New("no such program")
			}
			return 100 * len(cmd), nil
		},
	}}
	for _, tc := range []struct {
		cmd               []string
		structured, plain string
	}{
		{nil, `{"status":"Success"}`, ""},
		{
			[]string{"a"},
			`{"status":"Failure","message":"command terminated with non-zero exit code: exit code 100","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"100"}]}}`,
			"command terminated with non-zero exit code: exit code 100",
		},
		{[]string{"a", "b", "c"}, `{"status":"Failure","message":"no such program","reason":"InternalError","code":500}`, "no such program"},
	} {
		got := statusOf(s.run(t.Context(), request{kind: execKind, id: "abc", cmd: tc.cmd}, pods.Streams{}))
		if s := string(got.text(true)); s != tc.structured {
			t.Errorf("%q: %s", tc.cmd, s)
		}
		if s := string(got.text(false)); s != tc.plain {
			t.Errorf("%q: %s", tc.cmd, s)
		}
	}
}

func TestTokensAreTakenOnceAndForgotten(t *testing.T) {
	now := testclock.NewFakePassiveClock(time.Unix(0, 0))
	tk := newTokens()
	tk.clock = now
	put := func(id string) string {
		t.Helper()
		token, err := tk.put(request{kind: execKind, id: id})
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	a := put("a")
	if r, ok := tk.take(a); !ok || r.id != "a" {
		t.Errorf("take: %+v %t", r, ok)
	}
	if _, ok := tk.take(a); ok {
		t.Error("taken twice")
	}
	late := put("late")
	now.SetTime(now.Now().Add(time.Minute + 1))
	if _, ok := tk.take(late); ok {
		t.Error("taken after a minute")
	}
	for range 1000 {
		put("many")
	}
	if _, err := tk.put(request{kind: attachKind}); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("the token after a thousand: %v", err)
	}
	now.SetTime(now.Now().Add(time.Minute + 1))
	put("fresh")
	if n := len(tk.live); n != 1 {
		t.Errorf("%d tokens are kept of one that lives", n)
	}
}

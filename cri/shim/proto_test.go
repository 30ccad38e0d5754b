package shim

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func connPair(t testing.TB) (*conn, *conn) {
	t.Helper()
	a, b, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	ca, err := newConn(a)
	if err != nil {
		t.Fatal(err)
	}
	cb, err := newConn(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ca.Close(); _ = cb.Close() })
	return ca, cb
}

func TestMessagesCarryDescriptors(t *testing.T) {
	a, b := connPair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := a.send(Request{Verb: VerbAttach, ID: "x", Stdout: true}, w); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	var req Request
	files, err := b.receive(&req)
	if err != nil || len(files) != 1 || req.ID != "x" || !req.Stdout {
		t.Fatalf("got %+v with %d files: %v", req, len(files), err)
	}
	if _, err := files[0].WriteString("hi"); err != nil {
		t.Fatal(err)
	}
	_ = files[0].Close()
	if got, err := io.ReadAll(r); err != nil || string(got) != "hi" {
		t.Errorf("through the descriptor came %q, %v", got, err)
	}
}

func TestMessageWithoutBound(t *testing.T) {
	a, b := connPair(t)
	if err := a.send(Request{Verb: strings.Repeat("x", MaxMessage)}); err == nil {
		t.Error("a message over the limit was sent")
	}
	fd, err := fdOf(a.f)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	if err := unix.Sendmsg(fd, make([]byte, MaxMessage+1), nil, nil, unix.MSG_DONTWAIT); err != nil {
		t.Skip("the kernel itself refuses:", err)
	}
	var req Request
	if _, err := b.receive(&req); err == nil {
		t.Error("a message over the limit was taken")
	}
}

func TestTooManyDescriptorsAreClosed(t *testing.T) {
	a, b := connPair(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	before := openFiles(t)
	if err := a.send(Request{Verb: VerbCreate}, slices.Repeat([]*os.File{null}, maxFiles+1)...); err != nil {
		t.Fatal(err)
	}
	var req Request
	if _, err := b.receive(&req); err == nil {
		t.Error("one descriptor too many was taken")
	}
	if err := a.send(Request{Verb: VerbCreate}, slices.Repeat([]*os.File{null}, maxFiles)...); err != nil {
		t.Fatal(err)
	}
	if files, err := b.receive(&req); err != nil || len(files) != maxFiles {
		t.Errorf("%d descriptors came: %v", len(files), err)
	} else {
		closeAll(files)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestClosedPeerIsEOF(t *testing.T) {
	a, b := connPair(t)
	_ = a.Close()
	var req Request
	if _, err := b.receive(&req); !errors.Is(err, io.EOF) {
		t.Errorf("error is %v, want EOF", err)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"Verb":"create","Create":{"ID":"a","Bundle":"/b","Terminal":true}}`))
	f.Add([]byte(`{"Verb":"kill","ID":"a","Signal":-1,"All":true}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &Server{containers: map[string]*container{}, making: map[string]chan struct{}{}, quit: make(chan struct{})}
		var req Request
		if decode(data, &req) != nil || req.Verb == VerbCreate && req.Create != nil || req.Verb == VerbShutdown {
			return // those start processes, or end the shim
		}
		var res Response
		if err := s.handle(req, nil, &res); err == nil {
			t.Errorf("%s succeeded without a container", data)
		}
	})
}

func FuzzResponse(f *testing.F) {
	f.Add([]byte(`{"State":{"ID":"a","Status":"exited","ExitCode":137,"Exited":"2026-01-02T03:04:05Z"}}`))
	f.Add([]byte(`{"Error":"x","Code":"not found"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r Response
		_ = decode(data, &r)
		var e ExecResponse
		_ = decode(data, &e)
		var s State
		_ = decode(data, &s)
	})
}

func FuzzExitFile(f *testing.F) {
	f.Add([]byte(`{"ID":"a","ExitCode":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(dir+"/"+ExitFile, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if s, err := ReadExit(dir); err == nil && s == nil {
			t.Error("neither a state nor an error")
		}
	})
}

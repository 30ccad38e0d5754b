package streaming

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	gorilla "github.com/gorilla/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/berth-run/berth/cri/pods"
)

// echo writes its input to its output, and how much it was to its standard error.
func echo(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
	n, err := io.Copy(st.Stdout, st.Stdin)
	if err == nil && st.Stderr != nil {
		_, err = fmt.Fprint(st.Stderr, n)
	}
	return 0, err
}

func execURL(t *testing.T, s *Server, stdin bool) string {
	t.Helper()
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"x"}, Stdin: stdin, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetUrl()
}

// gorillaDial connects with a client that can send messages in fragments.
func gorillaDial(t *testing.T, at, protocol string) *gorilla.Conn {
	t.Helper()
	d := gorilla.Dialer{Subprotocols: []string{protocol}, WriteBufferSize: 1 << 10}
	ws, resp, err := d.DialContext(t.Context(), "ws"+strings.TrimPrefix(at, "http"), nil)
	if err != nil {
		t.Fatalf("%v: %+v", err, resp)
	}
	t.Cleanup(func() { _ = ws.Close() })
	return ws
}

// gorillaRead returns what each channel said until the server closed, and how it did.
func gorillaRead(ws *gorilla.Conn) (map[byte][]byte, error) {
	out := map[byte][]byte{}
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			return out, err
		}
		if len(data) > 0 {
			out[data[0]] = append(out[data[0]], data[1:]...)
		}
	}
}

// A message may come in many frames, with others between them, and be larger than what is kept of it.
func TestWebSocketMessagesInFragments(t *testing.T) {
	s := listen(t, &fake{exec: echo})
	for _, protocol := range []string{remotecommand.StreamProtocolV5Name} {
		ws := gorillaDial(t, execURL(t, s, true), protocol)
		big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB, a thousand frames
		go func() {
			_ = ws.WriteMessage(gorilla.BinaryMessage, append([]byte{0}, big...))
			_ = ws.WriteControl(gorilla.PingMessage, []byte("x"), time.Now().Add(time.Minute))
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{0})        // nothing
			_ = ws.WriteMessage(gorilla.BinaryMessage, nil)              // not even a channel
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{77, 1, 2}) // no channel of ours
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{0, '!'})
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{255})    // closes nothing
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{255, 9}) // nor does this
			_ = ws.WriteMessage(gorilla.BinaryMessage, []byte{255, 0})
		}()
		got, err := gorillaRead(ws)
		if !gorilla.IsCloseError(err, gorilla.CloseNormalClosure) {
			t.Errorf("%s: ended with %v", protocol, err)
		}
		if sha256.Sum256(got[1]) != sha256.Sum256(append(big, '!')) {
			t.Errorf("%s: %d bytes of %d came back", protocol, len(got[1]), len(big)+1)
		}
		if !strings.Contains(string(got[3]), "Success") {
			t.Errorf("%s: %q", protocol, got[3])
		}
	}
}

func TestWebSocketBase64(t *testing.T) {
	s := listen(t, &fake{exec: func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		in := make([]byte, 5)
		if _, err := io.ReadFull(st.Stdin, in); err != nil {
			return 0, err
		}
		fmt.Fprintf(st.Stdout, "got %s", in)
		return 3, nil
	}})
	for protocol, want := range map[string]string{
		"v4.base64.channel.k8s.io": `"message":"3"`, "base64.channel.k8s.io": "exit code 3",
	} {
		ws := gorillaDial(t, execURL(t, s, true), protocol)
		for _, m := range []string{"0" + base64.StdEncoding.EncodeToString([]byte("he")), "0!!", "0" + base64.StdEncoding.EncodeToString([]byte("llo"))} {
			if err := ws.WriteMessage(gorilla.TextMessage, []byte(m)); err != nil {
				t.Fatal(err)
			}
		}
		got := map[byte]string{}
		for {
			_, data, err := ws.ReadMessage()
			if err != nil {
				break
			}
			text, err := base64.StdEncoding.DecodeString(string(data[1:]))
			if err != nil {
				t.Fatalf("%q: %v", data, err)
			}
			got[data[0]] += string(text)
		}
		if got['1'] != "got hello" || !strings.Contains(got['3'], want) {
			t.Errorf("%s: %q", protocol, got)
		}
	}
}

func TestWebSocketProtocolsThatNobodySpeaks(t *testing.T) {
	s := listen(t, &fake{exec: echo})
	d := gorilla.Dialer{Subprotocols: []string{"v9.channel.k8s.io"}}
	ws, resp, err := d.DialContext(t.Context(), "ws"+strings.TrimPrefix(execURL(t, s, true), "http"), nil)
	if err == nil {
		_ = ws.Close()
		t.Fatal("a session began")
	}
	if resp == nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("%v: %+v", err, resp)
	}
}

// What a command said last reaches its client also where that still sends: bytes that nobody reads any more make the kernel
// cut a connection that is closed.
func TestLastWordsReachAClientThatStillSends(t *testing.T) {
	s := listen(t, &fake{exec: func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		if _, err := st.Stdin.Read(make([]byte, 1)); err != nil {
			return 0, err
		}
		_, _ = st.Stdout.Write(bytes.Repeat([]byte("x"), 1<<20))
		return 3, nil
	}})
	block := make([]byte, 32<<10)
	for range 10 {
		ws := gorillaDial(t, execURL(t, s, true), remotecommand.StreamProtocolV5Name)
		go func() {
			for ws.WriteMessage(gorilla.BinaryMessage, block) == nil {
			}
		}()
		got, _ := gorillaRead(ws)
		_ = ws.Close()
		if len(got[1]) != 1<<20 || !strings.Contains(string(got[3]), `"message":"3"`) {
			t.Fatalf("websocket: %d bytes, %q", len(got[1]), got[3])
		}
		c := dial(t, execURL(t, s, true), "v4.channel.k8s.io")
		errors := open(t, c, "streamType", "error")
		stdin, stdout := open(t, c, "streamType", "stdin"), open(t, c, "streamType", "stdout")
		open(t, c, "streamType", "stderr")
		go func() {
			for {
				if _, err := stdin.Write(block); err != nil {
					return
				}
			}
		}()
		out, _ := io.ReadAll(stdout)
		if e := readExit(t, errors); len(out) != 1<<20 || e.Reason != "NonZeroExitCode" {
			t.Fatalf("SPDY: %d bytes, %+v", len(out), e)
		}
		_ = c.Close()
	}
}

func TestIdleSessionsAreCut(t *testing.T) {
	s, err := Listen(t.Context(), Options{Log: slog.New(slog.DiscardHandler), Idle: 300 * time.Millisecond, Runtime: &fake{
		attach: func(ctx context.Context, _ string, _ pods.Streams) error { <-ctx.Done(); return ctx.Err() },
		forward: func(ctx context.Context, _ string, _ int32, _ io.ReadWriteCloser) error {
			<-ctx.Done()
			return ctx.Err()
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	a := func() string {
		resp, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetUrl()
	}
	ended := make(chan string, 3)
	go func() {
		c := dial(t, a(), "v4.channel.k8s.io")
		errors := open(t, c, "streamType", "error")
		open(t, c, "streamType", "stdout")
		_, _ = io.ReadAll(errors)
		ended <- "SPDY"
	}()
	go func() {
		_, _ = gorillaRead(gorillaDial(t, a(), remotecommand.StreamProtocolV5Name))
		ended <- "websocket"
	}()
	go func() {
		resp, err := s.PortForward(&cri.PortForwardRequest{PodSandboxId: "pod"})
		if err != nil {
			t.Error(err)
			return
		}
		c := dial(t, resp.GetUrl(), "portforward.k8s.io")
		open(t, c, "streamType", "error", "port", "80", "requestID", "1")
		data := open(t, c, "streamType", "data", "port", "80", "requestID", "1")
		_, _ = io.ReadAll(data)
		ended <- "port-forward"
	}()
	left := map[string]bool{"SPDY": true, "websocket": true, "port-forward": true}
	for range 3 {
		select {
		case kind := <-ended:
			delete(left, kind)
		case <-time.After(30 * time.Second):
			t.Fatalf("not cut: %v", left)
		}
	}
}

// A message costs the same memory whatever its length.
func TestHugeMessagesAreNotKept(t *testing.T) {
	s := listen(t, &fake{attach: func(ctx context.Context, _ string, st pods.Streams) error {
		_, err := io.Copy(io.Discard, st.Stdin)
		return err
	}})
	resp, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	ws := gorillaDial(t, resp.GetUrl(), remotecommand.StreamProtocolV5Name)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const size = 48 << 20
	w, err := ws.NextWriter(gorilla.BinaryMessage)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 64<<10)
	for range size / len(block) {
		if _, err := w.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ws.WriteMessage(gorilla.BinaryMessage, []byte{255, 0}); err != nil {
		t.Fatal(err)
	}
	_, _ = gorillaRead(ws)
	runtime.ReadMemStats(&after)
	if kept := after.TotalAlloc - before.TotalAlloc; kept > size/8 {
		t.Errorf("%d bytes were allocated for a message of %d", kept, size)
	}
}

// Whatever a client says after the handshake, its session ends with it and nothing breaks.
func FuzzWebSocketFrames(f *testing.F) {
	mask := func(op byte, payload ...byte) []byte { // a masked frame with a mask of zeros
		return append([]byte{op, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
	}
	f.Add(mask(0x82, 0, 'h', 'i'), false)
	f.Add(append(mask(0x02, 0, 'h'), mask(0x80, 'i')...), false)
	f.Add(mask(0x82, 255, 0), false)
	f.Add(mask(0x81, '0', 'a', 'G', 'k', '='), true)
	f.Add(mask(0x88, 3, 232), false)
	f.Add(mask(0x89, 'p'), true)
	f.Add([]byte{0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 9}, false)
	f.Add(mask(0x82, append([]byte{4}, `{"Width":80,"Height":24}`...)...), false)
	f.Fuzz(func(t *testing.T, frames []byte, text bool) {
		protocol := remotecommand.StreamProtocolV5Name
		if text {
			protocol = "v4.base64.channel.k8s.io"
		}
		client, server := net.Pipe()
		var got bytes.Buffer
		s := &sessions{life: t.Context(), idle: time.Minute, log: slog.New(slog.DiscardHandler), runtime: &fake{
			exec: func(ctx context.Context, _ string, _ []string, st pods.Streams) (int, error) {
				var sizes sync.WaitGroup
				sizes.Go(func() {
					for range st.Resize {
					}
				})
				_, _ = io.Copy(&got, st.Stdin)
				<-ctx.Done()
				sizes.Wait()
				return 0, nil
			},
		}}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/exec/x", nil)
		for k, v := range map[string]string{
			"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
			"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": protocol,
		} {
			r.Header.Set(k, v)
		}
		done := make(chan struct{})
		go func() {
			s.remoteWebSocket(pipeWriter{httptest.NewRecorder(), server}, r, request{kind: execKind, id: "abc", asked: asked{stdin: true, stdout: true, tty: true}})
			close(done)
		}()
		var answers sync.WaitGroup
		answers.Go(func() { _, _ = io.Copy(io.Discard, client) })
		_ = client.SetWriteDeadline(time.Now().Add(10 * time.Second))
		_, _ = client.Write(frames)
		_ = client.Close()
		select {
		case <-done:
		case <-time.After(30 * time.Second):
			t.Fatal("the session goes on without its client")
		}
		answers.Wait()
		if got.Len() > len(frames) {
			t.Errorf("%d bytes of stdin came out of %d", got.Len(), len(frames))
		}
	})
}

// pipeWriter is an answer whose connection can be taken over.
type pipeWriter struct {
	*httptest.ResponseRecorder
	conn net.Conn
}

func (w pipeWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return w.conn, bufio.NewReadWriter(bufio.NewReader(w.conn), bufio.NewWriter(w.conn)), nil
}

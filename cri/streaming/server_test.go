package streaming

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/berth-run/berth/cri/pods"
)

// fake runs sessions by functions of a test.
type fake struct {
	exec    func(ctx context.Context, id string, cmd []string, s pods.Streams) (int, error)
	attach  func(ctx context.Context, id string, s pods.Streams) error
	forward func(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error
}

func (f *fake) Exec(ctx context.Context, id string, cmd []string, s pods.Streams) (int, error) {
	return f.exec(ctx, id, cmd, s)
}

func (f *fake) Attach(ctx context.Context, id string, s pods.Streams) error {
	return f.attach(ctx, id, s)
}

func (f *fake) PortForward(ctx context.Context, id string, port int32, stream io.ReadWriteCloser) error {
	return f.forward(ctx, id, port, stream)
}

func listen(t *testing.T, f *fake) *Server {
	t.Helper()
	s, err := Listen(t.Context(), Options{Runtime: f, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// dial upgrades to SPDY as the kubelet does.
func dial(t *testing.T, at, protocol string) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, at, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func open(t *testing.T, c httpstream.Connection, headers ...string) httpstream.Stream {
	t.Helper()
	h := http.Header{}
	for i := 0; i < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	st, err := c.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// exit is what the error stream of v4 says.
type exit struct {
	Status, Reason string
	Details        struct {
		Causes []struct{ Reason, Message string }
	}
}

func readExit(t *testing.T, r io.Reader) exit {
	t.Helper()
	data, err := io.ReadAll(r)
	var e exit
	if err != nil || json.Unmarshal(data, &e) != nil {
		t.Fatalf("error stream: %q %v", data, err)
	}
	return e
}

func TestExecOverSPDYTellsTheExitCode(t *testing.T) {
	s := listen(t, &fake{exec: func(_ context.Context, id string, cmd []string, st pods.Streams) (int, error) {
		if id != "abc" || len(cmd) != 2 || cmd[1] != "7" || st.TTY || st.Stderr == nil || st.Resize != nil {
			return 0, fmt.Errorf("called with %q %q %+v", id, cmd, st)
		}
		in, err := io.ReadAll(st.Stdin)
		if err != nil {
			return 0, err
		}
		fmt.Fprintf(st.Stdout, "got %s", in)
		fmt.Fprint(st.Stderr, "oops")
		return 7, nil
	}})
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"exit", "7"}, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.GetUrl(), "v4.channel.k8s.io")
	errors := open(t, c, "streamType", "error")
	stdin, stdout, stderr := open(t, c, "streamType", "stdin"), open(t, c, "streamType", "stdout"), open(t, c, "streamType", "stderr")
	if _, err := io.WriteString(stdin, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(stdout)
	errOut, _ := io.ReadAll(stderr)
	if string(out) != "got hello" || string(errOut) != "oops" {
		t.Errorf("stdout %q, stderr %q", out, errOut)
	}
	e := readExit(t, errors)
	if e.Status != "Failure" || e.Reason != "NonZeroExitCode" || len(e.Details.Causes) != 1 || e.Details.Causes[0].Message != "7" {
		t.Errorf("%+v", e)
	}
}

func TestExecSuccessAndFailure(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{{nil, "Success"}, {fmt.Errorf("no such container"), "Failure"}} {
		s := listen(t, &fake{exec: func(context.Context, string, []string, pods.Streams) (int, error) { return 0, tc.err }})
		resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"true"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, resp.GetUrl(), "v4.channel.k8s.io")
		errors := open(t, c, "streamType", "error")
		open(t, c, "streamType", "stdout")
		if e := readExit(t, errors); e.Status != tc.want || e.Reason == "NonZeroExitCode" {
			t.Errorf("%v: %+v", tc.err, e)
		}
	}
}

func TestTerminalSizes(t *testing.T) {
	got := make(chan pods.TerminalSize, 10)
	s := listen(t, &fake{exec: func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		if !st.TTY || st.Stderr != nil {
			return 0, fmt.Errorf("%+v", st)
		}
		for size := range st.Resize {
			got <- size
		}
		return 0, nil
	}})
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"sh"}, Tty: true, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.GetUrl(), "v4.channel.k8s.io")
	errors := open(t, c, "streamType", "error")
	open(t, c, "streamType", "stdout")
	resize := open(t, c, "streamType", "resize")
	for _, size := range []string{`{"Width":0,"Height":0}`, `{"Width":80,"Height":24}`, `{"Width":90,"Height":0}`, `{"Width":132,"Height":43}`} {
		if _, err := io.WriteString(resize, size); err != nil {
			t.Fatal(err)
		}
	}
	if err := resize.Close(); err != nil {
		t.Fatal(err)
	}
	if e := readExit(t, errors); e.Status != "Success" {
		t.Errorf("%+v", e)
	}
	close(got)
	var sizes []pods.TerminalSize
	for s := range got {
		sizes = append(sizes, s)
	}
	if len(sizes) != 2 || sizes[0] != (pods.TerminalSize{Width: 80, Height: 24}) || sizes[1] != (pods.TerminalSize{Width: 132, Height: 43}) {
		t.Errorf("%v", sizes)
	}
}

func TestPortForwardOverSPDY(t *testing.T) {
	s := listen(t, &fake{forward: func(_ context.Context, id string, port int32, stream io.ReadWriteCloser) error {
		_, err := fmt.Fprintf(stream, "%s:%d", id, port)
		return err
	}})
	resp, err := s.PortForward(&cri.PortForwardRequest{PodSandboxId: "pod"})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.GetUrl(), "portforward.k8s.io")
	for i, port := range []string{"80", "8080"} {
		id := fmt.Sprint(i)
		open(t, c, "streamType", "error", "port", port, "requestID", id)
		data := open(t, c, "streamType", "data", "port", port, "requestID", id)
		if got, _ := io.ReadAll(data); string(got) != "pod:"+port {
			t.Errorf("port %s: %q", port, got)
		}
	}
}

func wsDial(t *testing.T, at, protocol string) *websocket.Conn {
	t.Helper()
	u, err := url.Parse(at)
	if err != nil {
		t.Fatal(err)
	}
	u.Scheme = "ws"
	cfg, err := websocket.NewConfig(u.String(), "http://localhost/")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Protocol = []string{protocol}
	ws, err := cfg.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ws.Close() })
	return ws
}

// wsRead returns what each channel said until the server closed.
func wsRead(ws *websocket.Conn) map[byte]string {
	out := map[byte]string{}
	for {
		var data []byte
		if err := websocket.Message.Receive(ws, &data); err != nil {
			return out
		}
		if len(data) > 0 {
			out[data[0]] += string(data[1:])
		}
	}
}

// The library passes a stream for every channel of a WebSocket. A stdin that was not asked for reads as an end of input,
// which would close that of a container with stdin_once.
func TestWebSocketSessionsHaveOnlyTheStreamsAskedFor(t *testing.T) {
	f := &fake{}
	f.exec = func(_ context.Context, _ string, _ []string, st pods.Streams) (int, error) {
		if st.Stdin != nil || st.Stderr != nil || st.Resize != nil {
			return 0, fmt.Errorf("not asked for: %+v", st)
		}
		fmt.Fprint(st.Stdout, "hello")
		return 3, nil
	}
	f.attach = func(_ context.Context, _ string, st pods.Streams) error {
		if st.Stdout != nil || st.Stderr != nil || st.Stdin == nil {
			return fmt.Errorf("not asked for: %+v", st)
		}
		return nil
	}
	s := listen(t, f)
	for _, protocol := range []string{"v4.channel.k8s.io", "v5.channel.k8s.io"} {
		e, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"x"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		got := wsRead(wsDial(t, e.GetUrl(), protocol))
		if got[1] != "hello" || !strings.Contains(got[3], `"message":"3"`) {
			t.Errorf("%s: exec: %q", protocol, got)
		}
		a, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdin: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := wsRead(wsDial(t, a.GetUrl(), protocol)); !strings.Contains(got[3], "Success") {
			t.Errorf("%s: attach: %q", protocol, got)
		}
		if code := get(t, e.GetUrl()); code != http.StatusNotFound {
			t.Errorf("%s: a replay: %d", protocol, code)
		}
	}
}

func get(t *testing.T, at string) int {
	t.Helper()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get(at)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// A token is used once, for what it was given for, and nothing is ever redirected.
func TestCVE_2020_8559_NoRedirectsAndTokensOnce(t *testing.T) {
	s := listen(t, &fake{exec: func(context.Context, string, []string, pods.Streams) (int, error) { return 0, nil }})
	base := "http://" + s.Addr().String()
	url := func() string {
		resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"x"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(resp.GetUrl(), base+"/exec/") {
			t.Fatalf("url %q", resp.GetUrl())
		}
		return resp.GetUrl()
	}
	used := url()
	c := dial(t, used, "v4.channel.k8s.io")
	errors := open(t, c, "streamType", "error")
	open(t, c, "streamType", "stdout")
	readExit(t, errors)
	for name, at := range map[string]string{
		"replay":            used,
		"guess":             base + "/exec/AAAAAAAA",
		"exec token, other": strings.Replace(url(), "/exec/", "/attach/", 1),
		"root":              base + "/",
		"double slash":      strings.Replace(url(), "/exec/", "//exec/", 1),
		"dot segments":      strings.Replace(url(), "/exec/", "/x/../exec/", 1),
		"encoded":           strings.Replace(url(), "/exec/", "/exec%2F", 1),
		"trailing slash":    url() + "/",
		"pprof":             base + "/debug/pprof/",
	} {
		if code := get(t, at); code != http.StatusNotFound {
			t.Errorf("%s: %d", name, code)
		}
	}
	req, err := http.NewRequest(http.MethodPut, url(), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("PUT: %d", resp.StatusCode)
	}
}

func TestGuessingIsSlowedDown(t *testing.T) {
	s := listen(t, &fake{exec: func(context.Context, string, []string, pods.Streams) (int, error) { return 0, nil }})
	base := "http://" + s.Addr().String()
	var wg sync.WaitGroup
	start := time.Now()
	for i := range 8 {
		wg.Go(func() {
			for j := range 50 {
				if code := get(t, fmt.Sprintf("%s/exec/%08d", base, i*50+j)); code != http.StatusNotFound {
					t.Errorf("%d", code)
				}
			}
		})
	}
	wg.Wait()
	// 400 guesses: 200 at once, the others at 100 a second.
	if took := time.Since(start); took < time.Second {
		t.Errorf("400 guesses took only %s", took)
	}
	resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"x"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.GetUrl(), "v4.channel.k8s.io") // waits its turn, and is served
	errors := open(t, c, "streamType", "error")
	open(t, c, "streamType", "stdout")
	readExit(t, errors)
}

func TestHugeHeadersAreRefused(t *testing.T) {
	s := listen(t, &fake{})
	req, err := http.NewRequest(http.MethodGet, "http://"+s.Addr().String()+"/exec/AAAAAAAA", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X", strings.Repeat("x", 64<<10))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return // cut off while it was sending: as good
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("%d", resp.StatusCode)
	}
}

// A client that vanishes ends the context of its session, also where nothing is read or written.
func TestCVE_2022_23471_SessionsEndWithTheirClient(t *testing.T) {
	const sessions = 100
	var began, going atomic.Int64
	s := listen(t, &fake{attach: func(ctx context.Context, _ string, _ pods.Streams) error {
		began.Add(1)
		going.Add(1)
		defer going.Add(-1)
		<-ctx.Done()
		return ctx.Err()
	}})
	before := runtime.NumGoroutine()
	for range sessions {
		resp, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdout: true, Tty: true})
		if err != nil {
			t.Fatal(err)
		}
		// The client's own library keeps goroutines, so this is done by hand: upgrade, then go.
		u, err := url.Parse(resp.GetUrl())
		if err != nil {
			t.Fatal(err)
		}
		raw, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(raw, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nOrigin: http://x\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n", u.Path, u.Host)
		if line, err := bufio.NewReader(raw).ReadString('\n'); err != nil || !strings.Contains(line, "101") {
			t.Fatalf("upgrade: %q %v", line, err)
		}
		_ = raw.Close()
	}
	counted := func() int { s.listener.mu.Lock(); defer s.listener.mu.Unlock(); return len(s.listener.conns) }
	deadline := time.Now().Add(10 * time.Second)
	for (runtime.NumGoroutine() > before+5 || counted() > 0 || going.Load() > 0) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if n := runtime.NumGoroutine(); n > before+5 {
		t.Errorf("%d goroutines before, %d after", before, n)
	}
	if n := counted(); n != 0 {
		t.Errorf("%d connections are still counted", n)
	}
	// Some clients are gone before their session begins.
	if b, g := began.Load(), going.Load(); b < sessions/10 || g != 0 {
		t.Errorf("of %d sessions %d began and %d go on without a client", sessions, b, g)
	}
}

func TestCloseCutsSessions(t *testing.T) {
	began, ended := make(chan struct{}), make(chan struct{})
	s, err := Listen(t.Context(), Options{Log: slog.New(slog.DiscardHandler), Runtime: &fake{
		attach: func(ctx context.Context, _ string, _ pods.Streams) error {
			close(began)
			<-ctx.Done()
			close(ended)
			return nil
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := s.Attach(&cri.AttachRequest{ContainerId: "abc", Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, resp.GetUrl(), "v4.channel.k8s.io")
	open(t, c, "streamType", "error")
	open(t, c, "streamType", "stdout")
	<-began
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("the session goes on")
	}
}

func TestOnlyLoopbackAddresses(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", ":0", "10.0.0.1:0", "localhost", "[::]:0"} {
		if s, err := Listen(t.Context(), Options{Runtime: &fake{}, Addr: addr, Log: slog.New(slog.DiscardHandler)}); err == nil {
			t.Errorf("%s is listened on", addr)
			_ = s.Close()
		}
	}
}

// A command on a terminal is hung up on; one without goes on until the server stops.
func TestExecWithoutItsClient(t *testing.T) {
	for _, tty := range []bool{true, false} {
		t.Run(fmt.Sprint("tty=", tty), func(t *testing.T) {
			began, ended := make(chan struct{}), make(chan struct{})
			s, err := Listen(t.Context(), Options{Log: slog.New(slog.DiscardHandler), Runtime: &fake{
				exec: func(ctx context.Context, _ string, _ []string, _ pods.Streams) (int, error) {
					close(began)
					<-ctx.Done()
					close(ended)
					return 0, nil
				},
			}})
			if err != nil {
				t.Fatal(err)
			}
			resp, err := s.Exec(&cri.ExecRequest{ContainerId: "abc", Cmd: []string{"sleep"}, Stdout: true, Tty: tty})
			if err != nil {
				t.Fatal(err)
			}
			c := dial(t, resp.GetUrl(), "v4.channel.k8s.io")
			open(t, c, "streamType", "error")
			open(t, c, "streamType", "stdout")
			if tty {
				open(t, c, "streamType", "resize")
			}
			<-began
			over := func(wait time.Duration) bool {
				select {
				case <-ended:
					return true
				case <-time.After(wait):
					return false
				}
			}
			if over(100 * time.Millisecond) {
				t.Fatal("the session ended under its client")
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if tty && !over(10*time.Second) {
				t.Error("a terminal goes on without its client")
			}
			if !tty && over(200*time.Millisecond) {
				t.Error("a command was killed with its client")
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if !over(10 * time.Second) {
				t.Error("the session goes on without the server")
			}
		})
	}
}

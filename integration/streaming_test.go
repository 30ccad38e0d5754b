//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// streamingWait is how long a session may take that should take a second: machines are loaded.
const streamingWait = 2 * time.Minute

// transports are the ways in which kubectl, crictl and other clients speak with a runtime, by their own library.
var transports = []struct {
	name     string
	closes   bool // stdin can be closed by itself
	executor func(address string) (remotecommand.Executor, error)
}{
	{"SPDY", true, func(address string) (remotecommand.Executor, error) { return spdyExecutor(http.MethodPost, address) }},
	{"SPDY by GET", true, func(address string) (remotecommand.Executor, error) { return spdyExecutor(http.MethodGet, address) }},
	{"WebSocket v5", true, func(address string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutor(&rest.Config{Host: address}, http.MethodGet, address)
	}},
	{"WebSocket v4", false, func(address string) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{Host: address}, http.MethodGet, address, "v4.channel.k8s.io")
	}},
}

func spdyExecutor(method, address string) (remotecommand.Executor, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	return remotecommand.NewSPDYExecutor(&rest.Config{Host: address}, method, u)
}

// streamingPod is a pod with one container that sleeps.
type streamingPod struct {
	*lab.Node
	config  *runtimeapi.PodSandboxConfig
	podID   string
	sleeper string
}

func newStreamingPod(t *testing.T, n *lab.Node) *streamingPod {
	t.Helper()
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	p := &streamingPod{Node: n, config: n.Pod("streaming")}
	p.podID, err = n.CRI.RunPod(ctx, p.config)
	must(t, err)
	t.Cleanup(func() {
		if err := n.CRI.RemovePod(context.Background(), p.podID); err != nil {
			t.Error(err)
		}
	})
	p.sleeper = p.start(t, lab.Sleeper("sleeper"))
	return p
}

func (p *streamingPod) start(t *testing.T, c *runtimeapi.ContainerConfig) string {
	t.Helper()
	id, err := p.CRI.Start(t.Context(), p.podID, p.config, c)
	must(t, err)
	return id
}

// execURL asks for an exec with the streams that options have.
func (p *streamingPod) execURL(ctx context.Context, o remotecommand.StreamOptions, cmd ...string) (string, error) {
	resp, err := p.CRI.RuntimeServiceClient.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: p.sleeper, Cmd: cmd, Stdin: o.Stdin != nil, Stdout: o.Stdout != nil, Stderr: o.Stderr != nil, Tty: o.Tty,
	})
	return resp.GetUrl(), err
}

// exec runs a command through one of the transports.
func (p *streamingPod) exec(ctx context.Context, way func(string) (remotecommand.Executor, error), o remotecommand.StreamOptions, cmd ...string) error {
	address, err := p.execURL(ctx, o, cmd...)
	if err != nil {
		return err
	}
	e, err := way(address)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, o)
}

func (p *streamingPod) attach(ctx context.Context, id string, way func(string) (remotecommand.Executor, error), o remotecommand.StreamOptions) error {
	resp, err := p.CRI.Attach(ctx, &runtimeapi.AttachRequest{
		ContainerId: id, Stdin: o.Stdin != nil, Stdout: o.Stdout != nil, Stderr: o.Stderr != nil, Tty: o.Tty,
	})
	if err != nil {
		return err
	}
	e, err := way(resp.Url)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, o)
}

// noise is bytes that no buffer compresses and no order hides, the same for the same seed.
func noise(seed byte, n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
}

// TestStreaming has the clients of Kubernetes' own library exec, attach and forward ports.
func TestStreaming(t *testing.T) {
	p := newStreamingPod(t, newNode(t))
	within := func(t *testing.T) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), streamingWait)
		t.Cleanup(cancel)
		return ctx
	}
	for _, way := range transports {
		t.Run(way.name, func(t *testing.T) {
			t.Run("exit codes", func(t *testing.T) { p.exitCodes(t, within(t), way.executor) })
			if way.name == "SPDY by GET" {
				return // the same from here on
			}
			t.Run("32 MB each way", func(t *testing.T) { p.bothWays(t, within(t), way.executor, way.closes) })
			t.Run("terminal", func(t *testing.T) { p.terminal(t, within(t), way.executor) })
			if way.closes {
				t.Run("stdin_once", func(t *testing.T) { p.stdinOnce(t, within(t), way.executor) })
			}
			t.Run("a background child", func(t *testing.T) { p.backgroundChild(t, within(t), way.executor) })
		})
	}
	t.Run("a command goes on without its client", func(t *testing.T) { p.goesOn(t, within(t)) })
	t.Run("attach again", func(t *testing.T) { p.attachAgain(t, within(t)) })
	t.Run("attach of many, one of them slow", func(t *testing.T) { p.slowReader(t, within(t)) })
	t.Run("a tree of files", func(t *testing.T) { p.tree(t, within(t)) })
	t.Run("port-forward", func(t *testing.T) { p.forward(t, within(t)) })
}

// bothWays sends 32 MB through a command and back.
func (p *streamingPod) bothWays(t *testing.T, ctx context.Context, way func(string) (remotecommand.Executor, error), closes bool) {
	const size = 32 << 20
	want := sha256.New()
	_, err := io.Copy(want, noise(1, size))
	must(t, err)
	got, errs := sha256.New(), &bytes.Buffer{}
	cmd := []string{"cat"}
	if !closes {
		cmd = []string{"head", "-c", fmt.Sprint(size)}
	}
	must(t, p.exec(ctx, way, remotecommand.StreamOptions{Stdin: noise(1, size), Stdout: got, Stderr: errs}, cmd...))
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) || errs.Len() > 0 {
		t.Errorf("what came back is not what was sent: %x, want %x; stderr %q", got.Sum(nil), want.Sum(nil), errs)
	}
}

func (p *streamingPod) exitCodes(t *testing.T, ctx context.Context, way func(string) (remotecommand.Executor, error)) {
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "exit 255": 255, "kill -9 $$": 137, "kill -TERM $$": 143} {
		var out, errs bytes.Buffer
		err := p.exec(ctx, way, remotecommand.StreamOptions{Stdout: &out, Stderr: &errs}, "sh", "-c", "echo out; echo err >&2; "+script)
		var exit exec.CodeExitError
		switch {
		case want == 0 && err != nil:
			t.Errorf("%s: %v", script, err)
		case want != 0 && (!errors.As(err, &exit) || exit.Code != want):
			t.Errorf("%s: %v, want exit code %d", script, err, want)
		}
		if out.String() != "out\n" || errs.String() != "err\n" {
			t.Errorf("%s: stdout %q, stderr %q", script, out.String(), errs.String())
		}
	}
	err := p.exec(ctx, way, remotecommand.StreamOptions{Stdout: io.Discard}, "/no/such/program")
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("a program that is not there: %v", err)
	}
}

// sizes is a queue of terminal sizes.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// terminal resizes a terminal. A size of 0 is none.
func (p *streamingPod) terminal(t *testing.T, ctx context.Context, way func(string) (remotecommand.Executor, error)) {
	q := make(sizes, 4)
	q <- remotecommand.TerminalSize{Width: 0, Height: 0}
	q <- remotecommand.TerminalSize{Width: 100, Height: 30}
	in, typed := io.Pipe()
	defer typed.Close()
	read, out := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- p.exec(ctx, way, remotecommand.StreamOptions{Stdin: in, Stdout: out, Tty: true, TerminalSizeQueue: q}, "sh", "-c", `
			until [ "$(stty size)" = "30 100" ]; do sleep 0.1; done; echo first
			until [ "$(stty size)" = "43 132" ]; do sleep 0.1; done; echo second
			test -t 0 && test -t 1 && test -t 2 && read -r line && echo "got $line"; exit 3`)
		_ = out.Close()
	}()
	var seen strings.Builder
	buf := make([]byte, 1<<10)
	step := 0
	for {
		n, err := read.Read(buf)
		seen.Write(buf[:n])
		switch text := seen.String(); {
		case step == 0 && strings.Contains(text, "first"):
			q <- remotecommand.TerminalSize{Width: 132, Height: 0}
			q <- remotecommand.TerminalSize{Width: 132, Height: 43}
			step++
		case step == 1 && strings.Contains(text, "second"):
			_, werr := io.WriteString(typed, "hello\n")
			must(t, werr)
			step++
		}
		if err != nil {
			break
		}
	}
	close(q)
	var exit exec.CodeExitError
	if err := <-done; !errors.As(err, &exit) || exit.Code != 3 || !strings.Contains(seen.String(), "got hello") {
		t.Errorf("%v, after %q", err, seen.String())
	}
}

// stdinOnce attaches to a container whose stdin ends with its first client.
func (p *streamingPod) stdinOnce(t *testing.T, ctx context.Context, way func(string) (remotecommand.Executor, error)) {
	c := lab.Sh(fmt.Sprintf("once-%d", time.Now().UnixNano()), "cat; echo end")
	c.Stdin, c.StdinOnce = true, true
	id := p.start(t, c)
	var out bytes.Buffer
	must(t, p.attach(ctx, id, way, remotecommand.StreamOptions{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: io.Discard}))
	if out.String() != "hello\nend\n" {
		t.Errorf("%q", out.String())
	}
	status, err := p.CRI.WaitExit(ctx, id, soon)
	must(t, err)
	if status.ExitCode != 0 {
		t.Errorf("exit code %d", status.ExitCode)
	}
}

// backgroundChild leaves a process behind that holds the output.
func (p *streamingPod) backgroundChild(t *testing.T, ctx context.Context, way func(string) (remotecommand.Executor, error)) {
	var out bytes.Buffer
	must(t, p.exec(ctx, way, remotecommand.StreamOptions{Stdout: &out, Stderr: io.Discard}, "sh", "-c", "sleep 100000 & echo done"))
	if out.String() != "done\n" {
		t.Errorf("%q", out.String())
	}
}

func (p *streamingPod) goesOn(t *testing.T, ctx context.Context) {
	for i, way := range transports {
		began, out := io.Pipe()
		left, leave := context.WithCancel(ctx)
		done := make(chan error, 1)
		file := fmt.Sprintf("/tmp/went-on-%d", i)
		go func() {
			done <- p.exec(left, way.executor, remotecommand.StreamOptions{Stdout: out}, "sh", "-c", "echo began; while [ ! -e "+file+".go ]; do sleep 0.1; done; yes | head -c 1000000; echo x > "+file)
		}()
		_, err := io.ReadFull(began, make([]byte, len("began\n")))
		must(t, err)
		leave()
		<-done //nolint:errcheck // only that it ended
		_ = began.Close()
		_, err = p.CRI.Exec(ctx, p.sleeper, "touch", file+".go")
		must(t, err)
		must(t, lab.Eventually(ctx, soon, way.name+": the command ends", func(ctx context.Context) error {
			_, err := p.CRI.Exec(ctx, p.sleeper, "cat", file)
			return err
		}))
	}
}

// attachAgain attaches twice, one after the other, to a container whose stdin stays open.
func (p *streamingPod) attachAgain(t *testing.T, ctx context.Context) {
	c := lab.Sh("again", "while read -r line; do echo got $line; done")
	c.Stdin = true
	id := p.start(t, c)
	for _, way := range transports {
		read, out := io.Pipe()
		attached, leave := context.WithCancel(ctx)
		in, typed := io.Pipe()
		done := make(chan error, 1)
		go func() {
			done <- p.attach(attached, id, way.executor, remotecommand.StreamOptions{Stdin: in, Stdout: out, Stderr: io.Discard})
		}()
		_, err := fmt.Fprintf(typed, "%s\n", way.name)
		must(t, err)
		got := make([]byte, len("got "+way.name+"\n"))
		if _, err := io.ReadFull(read, got); err != nil || string(got) != "got "+way.name+"\n" {
			t.Errorf("%s: %q %v", way.name, got, err)
		}
		leave()
		_, _ = typed.Close(), read.Close()
		<-done //nolint:errcheck // only that it ended
	}
	status, err := p.CRI.ContainerState(ctx, id)
	must(t, err)
	if status.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after its clients went the container is %v", status.State)
	}
}

// gated is a reader that has begun to read, and then does not until it is let go on.
type gated struct {
	began, open chan struct{}
	once        sync.Once
	n           int
}

func (g *gated) Write(p []byte) (int, error) {
	g.once.Do(func() { close(g.began) })
	<-g.open
	g.n += len(p)
	return len(p), nil
}

// slowReader attaches five clients that read and one that does not. The others are never sent more than is kept for each, so
// that none of them is behind; the slow one is cut off, and neither they nor the log wait for it.
func (p *streamingPod) slowReader(t *testing.T, ctx context.Context) {
	const rounds, lines, length = 80, 4096, 64 // 256 KiB a round, 20 MiB
	c := lab.Sh("many", `while read -r n count; do yes "$(printf %063d $n)" | head -n $count; done`)
	c.Stdin = true
	id := p.start(t, c)
	ctx, leave := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer leave()

	slow := &gated{began: make(chan struct{}), open: make(chan struct{})}
	slowEnded := make(chan struct{})
	all.Go(func() {
		defer close(slowEnded)
		_ = p.attach(ctx, id, transports[0].executor, remotecommand.StreamOptions{Stdout: slow})
	})
	readers := make([]*bufio.Reader, 5)
	for i := range readers {
		r, w := io.Pipe()
		defer r.Close()
		readers[i] = bufio.NewReader(r)
		all.Go(func() {
			err := p.attach(ctx, id, transports[i%len(transports)].executor, remotecommand.StreamOptions{Stdout: w})
			_ = w.CloseWithError(err)
		})
	}
	in, typed := io.Pipe()
	defer typed.Close()
	all.Go(func() { _ = p.attach(ctx, id, transports[2].executor, remotecommand.StreamOptions{Stdin: in}) })

	// Lines of 0 are written until each client has seen one: then all are attached.
	attached := make(chan int, len(readers))
	for i, r := range readers {
		go func() {
			_, _ = r.Peek(length)
			attached <- i
		}()
	}
	began := slow.began
	for waiting := len(readers) + 1; waiting > 0; {
		_, err := io.WriteString(typed, "0 1\n")
		must(t, err)
		select {
		case <-attached:
			waiting--
		case <-began:
			began = nil
			waiting--
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%d clients are not attached", waiting)
		}
	}
	zero := fmt.Sprintf("%063d\n", 0)
	for n := 1; n <= rounds; n++ {
		_, err := fmt.Fprintf(typed, "%d %d\n", n, lines)
		must(t, err)
		want := fmt.Sprintf("%063d\n", n)
		for i, r := range readers {
			for got := 0; got < lines; {
				line, err := r.ReadString('\n')
				if line == zero && n == 1 {
					continue
				}
				if err != nil || line != want {
					t.Fatalf("round %d, reader %d, line %d: %q %v", n, i, got, line, err)
				}
				got++
			}
		}
	}
	must(t, lab.Eventually(ctx, soon, "the log has everything", func(context.Context) error {
		log, err := lab.Log(p.config, c)
		if err != nil {
			return err
		}
		count := 0
		for _, line := range log {
			if line.Text+"\n" != zero {
				count++
			}
		}
		if count != rounds*lines {
			return fmt.Errorf("%d lines, want %d", count, rounds*lines)
		}
		return nil
	}))
	close(slow.open) // it reads what was kept for it, and its end
	select {
	case <-slowEnded:
	case <-ctx.Done():
		t.Fatal("the slow client is attached still")
	}
	t.Logf("the client that did not read got %d of %d bytes", slow.n, rounds*lines*length)
	if slow.n >= rounds*lines*length {
		t.Error("somebody kept everything for the client that did not read")
	}
}

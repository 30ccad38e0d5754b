package streaming

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"

	"github.com/berth-run/berth/cri/pods"
)

// Runtime is what sessions are run by: *pods.Manager, or what a test puts in its place. A session's context ends with its
// client, but for Exec without a terminal (see there); all end with the server.
type Runtime interface {
	Exec(ctx context.Context, id string, cmd []string, s pods.Streams) (exitCode int, err error)
	Attach(ctx context.Context, id string, s pods.Streams) error
	PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error
}

// sessions translates between the library's streams and ours.
type sessions struct {
	life    context.Context // of the server
	runtime Runtime
	log     *slog.Logger
}

var _ streaming.Runtime = (*sessions)(nil)

// Exec runs a command. Like a shell, a command on a terminal is hung up on when its client goes; one without goes on, as
// people who run migrations through `kubectl exec` count on, and its output is dropped. A non-zero exit code is an error of the type that the library looks for, which it must not find
// wrapped (remotecommand.ServeExec asserts the type).
func (s *sessions) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	st, done := askedOf(ctx).streams(ctx, in, out, errOut, tty, resize)
	defer done()
	if !tty {
		ctx = s.life
	}
	code, err := s.runtime.Exec(ctx, id, cmd, st)
	if err != nil && ctx.Err() != nil {
		return nil // there is nobody to tell
	}
	if err != nil {
		s.log.Info("exec session failed", "id", id, "err", err)
		return err
	}
	if code != 0 {
		return exec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

// Attach connects to the streams of a container's init until it exits or the client leaves.
func (s *sessions) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	st, done := askedOf(ctx).streams(ctx, in, out, errOut, tty, resize)
	defer done()
	if err := s.runtime.Attach(ctx, id, st); err != nil && ctx.Err() == nil { // to leave is how most clients end it
		s.log.Info("attach session failed", "id", id, "err", err)
		return err
	}
	return nil
}

// PortForward copies between a stream and a port of a pod.
func (s *sessions) PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	if err := s.runtime.PortForward(ctx, sandboxID, port, stream); err != nil {
		s.log.Info("port-forward failed", "sandbox", sandboxID, "port", port, "err", err)
		return err
	}
	return nil
}

// streams translates the ends of a session. done ends the resizing and must be called.
func (a asked) streams(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) (st pods.Streams, done func()) {
	st.TTY = tty
	if a.stdin {
		st.Stdin = in
	}
	if a.stdout {
		st.Stdout = out
	}
	if a.stderr && !tty { // one terminal, one stream
		st.Stderr = errOut
	}
	if resize == nil {
		return st, func() {}
	}
	sizes := make(chan pods.TerminalSize)
	if tty {
		st.Resize = sizes
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { resizes(ctx, resize, sizes, tty) })
	return st, func() { cancel(); wg.Wait() }
}

// resizes passes sizes on. Those of 0 are what some clients send first, before they know. A session without a terminal has
// its sizes read and dropped, since the connection's other streams would wait behind them.
func resizes(ctx context.Context, in <-chan remotecommand.TerminalSize, out chan<- pods.TerminalSize, tty bool) {
	defer close(out)
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-in:
			if !ok {
				return
			}
			if !tty || size.Width == 0 || size.Height == 0 {
				continue
			}
			select {
			case out <- pods.TerminalSize(size):
			case <-ctx.Done():
				return
			}
		}
	}
}

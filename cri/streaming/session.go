package streaming

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

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

// sessions runs what clients have come for.
type sessions struct {
	life    context.Context // of the server
	runtime Runtime
	idle    time.Duration
	log     *slog.Logger
}

// run runs the command of a request, or attaches to its container. The error is for the client; a non-zero
// exit code is an exec.CodeExitError.
//
// Like a shell, a command on a terminal is hung up on when its client goes; one without goes on, as people who run
// migrations through `kubectl exec` count on, and its output is dropped.
func (s *sessions) run(ctx context.Context, req request, st pods.Streams) error {
	if req.kind == attachKind {
		err := s.runtime.Attach(ctx, req.id, st)
		if err != nil && ctx.Err() != nil {
			return nil // to leave is how most clients end it
		}
		if err != nil {
			s.log.Info("attach session failed", "id", req.id, "error", err)
		}
		return err
	}
	life := ctx
	if !st.TTY {
		life = s.life
	}
	code, err := s.runtime.Exec(life, req.id, req.cmd, st)
	switch {
	case err != nil && life.Err() != nil:
		return nil // there is nobody to tell
	case err != nil:
		s.log.Info("exec session failed", "id", req.id, "error", err)
		return err
	case code != 0:
		return exec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

// forward copies between a stream and a port of a pod.
func (s *sessions) forward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	if err := s.runtime.PortForward(ctx, sandboxID, port, stream); err != nil && ctx.Err() == nil {
		s.log.Info("port-forward failed", "sandbox", sandboxID, "port", port, "error", err)
		return err
	}
	return nil
}

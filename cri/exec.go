package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
)

// maxOutput bounds what ExecSync returns of both streams together. The interface allows 16 MiB for each, but the kubelet's
// client takes a whole message of 16 MiB at most (CVE-2022-1708 is what happens without a bound).
const maxOutput = maxMessage - 64<<10

// ExecSync runs a command in a running container and waits for it. A non-zero exit code is an answer; a timeout is
// DeadlineExceeded, which is what makes a probe fail.
func (s *Server) ExecSync(ctx context.Context, req *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	if err := checkCommand("cmd", req.GetCmd()); err != nil {
		return nil, err
	}
	timeout, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	c, err := s.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	start := time.Now()
	stdout, stderr, exitCode, err := s.pods.ExecSync(ctx, c.ID, req.GetCmd(), timeout)
	if err != nil {
		return nil, execError(err, ctx.Err() != nil, timeout, time.Since(start))
	}
	stdout, stderr = bound(stdout, stderr, maxOutput)
	return &cri.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: exitCode}, nil
}

// Exec returns the URL at which a client can run a command in a running container, once.
func (s *Server) Exec(_ context.Context, req *cri.ExecRequest) (*cri.ExecResponse, error) {
	if err := checkStreams(req.GetTty(), req.GetStdin(), req.GetStdout(), req.GetStderr()); err != nil {
		return nil, err
	}
	if err := checkCommand("cmd", req.GetCmd()); err != nil {
		return nil, err
	}
	c, err := s.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return s.streaming.Exec(&cri.ExecRequest{
		ContainerId: c.ID, Cmd: req.GetCmd(), Tty: req.GetTty(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(),
	})
}

// Attach returns the URL at which a client can reach the streams of a running container, once.
func (s *Server) Attach(_ context.Context, req *cri.AttachRequest) (*cri.AttachResponse, error) {
	if err := checkStreams(req.GetTty(), req.GetStdin(), req.GetStdout(), req.GetStderr()); err != nil {
		return nil, err
	}
	c, err := s.running(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	return s.streaming.Attach(&cri.AttachRequest{
		ContainerId: c.ID, Tty: req.GetTty(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(),
	})
}

// PortForward returns the URL at which a client can reach ports of a pod, once. Over SPDY the ports come later, with each
// stream.
func (s *Server) PortForward(_ context.Context, req *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	if err := checkID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := checkPorts(req.GetPort()); err != nil {
		return nil, err
	}
	sb, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !sb.Ready {
		return nil, fmt.Errorf("pod_sandbox_id: %q: the sandbox is not ready: %w", req.GetPodSandboxId(), errdefs.ErrFailedPrecondition)
	}
	return s.streaming.PortForward(&cri.PortForwardRequest{PodSandboxId: sb.ID, Port: req.GetPort()})
}

// running looks a container up that must run.
func (s *Server) running(id string) (*pods.Container, error) {
	if err := checkID("container_id", id); err != nil {
		return nil, err
	}
	c, err := s.pods.Container(id)
	if err != nil {
		return nil, err
	}
	return c, mustRun(id, c.State)
}

func mustRun(id string, state cri.ContainerState) error {
	if state == cri.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	return fmt.Errorf("container_id: %q: the container is %s, it must be %s: %w",
		id, state, cri.ContainerState_CONTAINER_RUNNING, errdefs.ErrFailedPrecondition)
}

// execError keeps DeadlineExceeded for what the kubelet takes it for: the command's own timeout has passed, the probe has
// failed and a liveness probe kills the container. A deadline of ours that passed on the way there says nothing about the
// container.
func execError(err error, callerGone bool, timeout, took time.Duration) error {
	if !errors.Is(err, context.DeadlineExceeded) || callerGone || (timeout > 0 && took >= timeout) {
		return err
	}
	return fmt.Errorf("exec: %s: %w", err, errdefs.ErrUnavailable)
}

// bound cuts both outputs so that together they have max bytes at most. Standard error, which says what went wrong, may
// keep up to half of that; neither gives up room that the other does not use.
func bound(stdout, stderr []byte, max int) ([]byte, []byte) {
	if len(stdout)+len(stderr) <= max {
		return stdout, stderr
	}
	half := max / 2
	switch {
	case len(stderr) <= half:
		return stdout[:max-len(stderr)], stderr
	case len(stdout) <= half:
		return stdout, stderr[:max-len(stdout)]
	}
	return stdout[:half], stderr[:half]
}

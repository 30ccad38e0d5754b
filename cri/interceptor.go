package cri

import (
	"context"
	"fmt"
	"log/slog"
	"path"
	"runtime/debug"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// slow is how long a call may take before its end is logged as a warning.
const slow = 10 * time.Second

// waits are the calls that last as long as their caller asked for, or as a registry takes.
var waits = map[string]bool{"StopContainer": true, "ExecSync": true, "PullImage": true, "GetContainerEvents": true}

// interceptor is what happens around every call: a number in the log lines, the error's code, and panics.
type interceptor struct {
	log   *slog.Logger
	last  atomic.Uint64
	now   func() time.Time
	under underWay // calls
}

func (i *interceptor) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	end := i.under.begin()
	defer end()
	done := i.begin(ctx, info.FullMethod, req)
	defer func() {
		if p := recover(); p != nil {
			resp, err = nil, i.panicked(info.FullMethod, p)
		}
		err = toStatus(err)
		done(err)
	}()
	return handle(ctx, req)
}

func (i *interceptor) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	done := i.begin(ss.Context(), info.FullMethod, nil)
	defer func() {
		if p := recover(); p != nil {
			err = i.panicked(info.FullMethod, p)
		}
		err = toStatus(err)
		done(err)
	}()
	return handle(srv, ss)
}

// panicked logs a panic with its stack and answers what a client needs to find that line.
func (i *interceptor) panicked(method string, p any) error {
	i.log.Error("panic in a call", "call", path.Base(method), "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return status.Errorf(codes.Internal, "%s: internal error, see the log of berth", path.Base(method))
}

// begin logs the start of a call; what it returns logs the end.
func (i *interceptor) begin(ctx context.Context, method string, req any) (done func(error)) {
	start, call := i.now(), path.Base(method)
	log := i.log.With("call", call, "req", i.last.Add(1)).With(subject(req)...)
	log.DebugContext(ctx, "call begins")
	return func(err error) {
		took := i.now().Sub(start)
		level, attrs := verdict(call, took, status.Code(err)), []any{"took", took}
		if err != nil {
			attrs = append(attrs, "code", status.Code(err).String(), "error", status.Convert(err).Message())
		}
		log.Log(ctx, level, "call ends", attrs...)
	}
}

// verdict says how loud the end of a call is in the log. The caller's mistakes and what every client expects now and then
// (an id that is gone, a call that is not implemented) are its own business; berth's failures and slowness are ours. So is an
// image that cannot be had: a pod waits for it.
func verdict(call string, took time.Duration, c codes.Code) slog.Level {
	if call == "PullImage" && (c == codes.NotFound || c == codes.FailedPrecondition) {
		return slog.LevelWarn
	}
	switch c {
	case codes.OK, codes.NotFound, codes.Unimplemented, codes.Canceled:
		if took >= slow && !waits[call] {
			return slog.LevelWarn
		}
		return slog.LevelDebug
	case codes.InvalidArgument, codes.FailedPrecondition, codes.AlreadyExists:
		return slog.LevelInfo
	case codes.DeadlineExceeded:
		if waits[call] {
			return slog.LevelInfo
		}
		return slog.LevelWarn
	case codes.Internal, codes.DataLoss:
		return slog.LevelError
	default:
		return slog.LevelWarn
	}
}

// subject is what a request is about, for the log: ids and names, never the contents, which hold environments and
// passwords.
func subject(req any) []any {
	switch r := req.(type) {
	case *cri.RunPodSandboxRequest:
		m := r.GetConfig().GetMetadata()
		return []any{"pod", podName(m), "attempt", m.GetAttempt()}
	case *cri.CreateContainerRequest:
		m := r.GetConfig().GetMetadata()
		return []any{"sandbox", brief(r.GetPodSandboxId(), maxValue), "container", brief(m.GetName(), maxValue), "attempt", m.GetAttempt()}
	case *cri.PullImageRequest:
		about := []any{"image", brief(r.GetImage().GetImage(), maxValue)}
		if m := r.GetSandboxConfig().GetMetadata(); m != nil {
			about = append(about, "pod", podName(m))
		}
		return about
	case interface{ GetContainerId() string }:
		return []any{"id", brief(r.GetContainerId(), maxValue)}
	case interface{ GetPodSandboxId() string }:
		return []any{"sandbox", brief(r.GetPodSandboxId(), maxValue)}
	case interface{ GetImage() *cri.ImageSpec }:
		return []any{"image", brief(r.GetImage().GetImage(), maxValue)}
	}
	return nil
}

func podName(m *cri.PodSandboxMetadata) string {
	return brief(m.GetNamespace()+"/"+m.GetName(), maxValue)
}

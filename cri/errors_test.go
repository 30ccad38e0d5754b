package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestErrorsBecomeCodes(t *testing.T) {
	plain := errors.New("disk on fire")
	for _, tc := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"no class", plain, codes.Unknown},
		{"invalid", errdefs.ErrInvalidArgument, codes.InvalidArgument},
		{"not found", errdefs.ErrNotFound, codes.NotFound},
		{"exists", errdefs.ErrAlreadyExists, codes.AlreadyExists},
		{"state", errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
		{"unavailable", errdefs.ErrUnavailable, codes.Unavailable},
		{"exhausted", errdefs.ErrResourceExhausted, codes.ResourceExhausted},
		{"a full disk", &os.PathError{Op: "mkdir", Path: "/", Err: unix.ENOSPC}, codes.ResourceExhausted},
		{"denied", errdefs.ErrPermissionDenied, codes.PermissionDenied},
		{"not implemented", errdefs.ErrNotImplemented, codes.Unimplemented},
		{"deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
		{"canceled", context.Canceled, codes.Canceled},
		{"wrapped", fmt.Errorf("a: %w", fmt.Errorf("b: %w", errdefs.ErrNotFound)), codes.NotFound},
		{"joined", errors.Join(plain, errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{"class before a context on the way", fmt.Errorf("%w: %w", errdefs.ErrUnavailable, context.DeadlineExceeded), codes.Unavailable},
		{"what the caller can mend comes first", errors.Join(errdefs.ErrNotFound, errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{"already a status", status.Error(codes.ResourceExhausted, "x"), codes.ResourceExhausted},
		{"wrapped status", fmt.Errorf("exec: %w", status.Error(codes.OutOfRange, "x")), codes.OutOfRange},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := toStatus(fmt.Errorf("while testing: %w", tc.err))
			if status.Code(got) != tc.want {
				t.Errorf("code %s, want %s", status.Code(got), tc.want)
			}
		})
	}
	if toStatus(nil) != nil {
		t.Error("no error became one")
	}
	if got := status.Convert(toStatus(fmt.Errorf("start x: %w", plain))).Message(); got != "start x: disk on fire" {
		t.Errorf("text changed to %q", got)
	}
}

// The kubelet strips "rpc error: …" from Unknown only, then looks for the prefix.
func TestUnreachableRegistryIsTheKubeletsClass(t *testing.T) {
	err := toStatus(pullError(fmt.Errorf("pull x: %w: connection refused", errdefs.ErrUnavailable)))
	if status.Code(err) != codes.Unknown {
		t.Errorf("code %s", status.Code(err))
	}
	if got, want := status.Convert(err).Message(), "RegistryUnavailable: pull x: unavailable: connection refused"; got != want {
		t.Errorf("text %q, want %q", got, want)
	}
	for _, other := range []error{errdefs.ErrNotFound, context.Canceled, errdefs.ErrInvalidArgument} {
		if got := pullError(other); !errors.Is(got, other) {
			t.Errorf("%v became %v", other, got)
		}
	}
	if pullError(nil) != nil {
		t.Error("no error became one")
	}
}

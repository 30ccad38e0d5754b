package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// classes maps the sentinels of all packages below to gRPC codes. The first one that is in an error's chain counts, since
// an error may join several: what a caller can act upon comes first, and a class that somebody attached comes before a
// context that ended somewhere on the way.
var classes = []struct {
	is   error
	code codes.Code
}{
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{unix.ENOSPC, codes.ResourceExhausted},
	{unix.EDQUOT, codes.ResourceExhausted},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrUnauthenticated, codes.Unauthenticated},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
	{errdefs.ErrConflict, codes.Aborted},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrInternal, codes.Internal},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// toStatus turns any error into one with a gRPC code and the same text. It is the only place where that happens; what
// has no class is Unknown, whose text the kubelet shows as it is.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	// An error that is a status already came from a library that speaks gRPC (cri-streaming) or was made here on purpose.
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	return status.Error(code(err), brief(err.Error(), maxText))
}

// maxText bounds the text of an error, in bytes: it may quote what was asked for, and goes into the log as well.
const maxText = 8 << 10

// brief is the beginning of a text.
func brief(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

func code(err error) codes.Code {
	for _, c := range classes {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return codes.Unknown
}

// invalid is an InvalidArgument that names the field and its value.
func invalid(field string, value any, why string, args ...any) error {
	if s, ok := value.(string); ok {
		value = brief(s, maxValue)
	}
	return fmt.Errorf("%s: %#v: %s: %w", field, value, fmt.Sprintf(why, args...), errdefs.ErrInvalidArgument)
}

// maxValue bounds a value in an error or in the log, in bytes. No id and no name of Kubernetes' is as long.
const maxValue = 256

// missing is an InvalidArgument that names a field which must be set.
func missing(field string) error {
	return fmt.Errorf("%s: missing: %w", field, errdefs.ErrInvalidArgument)
}

// pullError gives the errors of PullImage the shape by which the kubelet tells classes: it matches a prefix of the text,
// and strips "rpc error: …" only from Unknown. So an unreachable registry is Unknown with that prefix; any other code
// would hide it (pkg/kubelet/images, pkg/kubelet/images/image_manager.go).
func pullError(err error) error {
	if err != nil && code(err) == codes.Unavailable {
		return status.Error(codes.Unknown, "RegistryUnavailable: "+err.Error())
	}
	return err
}

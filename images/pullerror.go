package images

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// ErrRegistryUnavailable is in the chain of the error of a pull whose registry could not be reached, or was not fit to
// answer. The error's text begins with "RegistryUnavailable: ", which the kubelet shows as the reason; it must reach it
// with the gRPC code Unknown.
var ErrRegistryUnavailable = errors.New("RegistryUnavailable")

// pullError is the end of a failed pull: a text without secrets, and a class. What it wraps are classes only: errors of
// the network that look like a context's would be taken for the caller's.
type pullError struct {
	text  string
	class []error
}

func (e *pullError) Error() string   { return e.text }
func (e *pullError) Unwrap() []error { return e.class }

var queries = regexp.MustCompile(`(https?://[^\s"?]+)\?[^\s"]*`)

// explain turns what went wrong into what is told.
func (p *pull) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("pull %s: %w", p.named, ctx.Err())
	}
	text := strings.Join(append([]string{err.Error()}, p.src.allNotes()...), "; ")
	e := &pullError{text: fmt.Sprintf("pull %s: %s", p.named, p.src.redact(text))}
	status, hasStatus := errors.AsType[remoteerrors.ErrUnexpectedStatus](err)
	_, isURL := errors.AsType[*url.Error](err)
	netErr, isNet := errors.AsType[net.Error](err)
	if _, ok := netErr.(syscall.Errno); ok {
		isNet = false // of any system call: those of the network's are in errors of its own
	}
	_, isTransfer := errors.AsType[*transferError](err)
	_, isBusy := errors.AsType[*busyError](err)
	switch {
	case errors.Is(err, errRedirect), errors.Is(err, errTooLong):
		e.class = []error{errdefs.ErrFailedPrecondition}
	case errors.Is(err, docker.ErrInvalidAuthorization), hasStatus && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden):
		e.class = []error{errdefs.ErrPermissionDenied}
	case isBusy, hasStatus && status.StatusCode >= 500, errors.Is(err, errTooSlow):
		e.class = []error{ErrRegistryUnavailable}
	case errdefs.IsInvalidArgument(err):
		e.class = []error{errdefs.ErrInvalidArgument}
	case errdefs.IsNotFound(err):
		e.class = []error{errdefs.ErrNotFound}
	case errdefs.IsResourceExhausted(err), isFull(err):
		e.class = []error{errdefs.ErrResourceExhausted}
	case errors.Is(err, errImage):
		e.class = []error{errImage}
	case errors.Is(err, errContent):
		e.class = []error{errdefs.ErrDataLoss}
	case isURL, isNet, isTransfer:
		e.class = []error{ErrRegistryUnavailable}
	}
	if errors.Is(e, ErrRegistryUnavailable) {
		e.text = ErrRegistryUnavailable.Error() + ": " + e.text
	}
	return e
}

package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images"
)

// classes are what errors can be asked for on the client's side, too, with the status of an answer.
var classes = []struct {
	name   string
	status int
	class  error
}{
	{"InvalidArgument", http.StatusBadRequest, errdefs.ErrInvalidArgument},
	{"NotFound", http.StatusNotFound, errdefs.ErrNotFound},
	{"InUse", http.StatusConflict, errInUse},
	{"PermissionDenied", http.StatusForbidden, errdefs.ErrPermissionDenied},
	{"ResourceExhausted", http.StatusInsufficientStorage, errdefs.ErrResourceExhausted},
	{"ResourceExhausted", http.StatusInsufficientStorage, unix.ENOSPC},
	{"ResourceExhausted", http.StatusInsufficientStorage, unix.EDQUOT},
	{"DataLoss", http.StatusInternalServerError, errdefs.ErrDataLoss},
	{"FailedPrecondition", http.StatusPreconditionFailed, errdefs.ErrFailedPrecondition},
	{"RegistryUnavailable", http.StatusBadGateway, images.ErrRegistryUnavailable},
	{"Canceled", http.StatusServiceUnavailable, context.Canceled},
}

// errInUse says that something is not removed because something else needs it.
var errInUse = errors.New("in use")

// Error is an error of the daemon as it travels.
type Error struct {
	Text  string `json:"text"`
	Class string `json:"class,omitempty"`
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Is has errors.Is find the class.
func (e *Error) Is(target error) bool {
	for _, c := range classes {
		if c.name == e.Class && target == c.class {
			return true
		}
	}
	return false
}

// wire makes an error ready to travel, with the status of its answer.
func wire(err error) (*Error, int) {
	for _, c := range classes {
		if errors.Is(err, c.class) {
			return &Error{Text: err.Error(), Class: c.name}, c.status
		}
	}
	return &Error{Text: err.Error()}, http.StatusInternalServerError
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

package spec

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
)

// An Error says which field of the request cannot be had, and why. Its text is made for the event that a user reads, so
// the class is not part of it: ask with errors.Is.
type Error struct {
	Field string // as the CRI names it, from the request down: config.linux.security_context.run_as_user.value
	Value string // as given, quoted if it is text, shortened
	Why   string // "is outside 0..2147483647"
	class error
}

func (e *Error) Error() string {
	if e.Value == "" {
		return e.Field + ": " + e.Why
	}
	return e.Field + ": " + e.Value + " " + e.Why
}

// Unwrap returns the class, a sentinel of github.com/containerd/errdefs.
func (e *Error) Unwrap() error { return e.class }

// invalid is the error of a request that can never work.
func invalid(field string, value any, why string, args ...any) error {
	return &Error{field, show(value), fmt.Sprintf(why, args...), errdefs.ErrInvalidArgument}
}

// missing is invalid for a field without a value.
func missing(field, why string, args ...any) error {
	return &Error{Field: field, Why: fmt.Sprintf(why, args...), class: errdefs.ErrInvalidArgument}
}

// unmet is the error of a request that this host, or this pod, cannot satisfy.
func unmet(field string, value any, why string, args ...any) error {
	return &Error{field, show(value), fmt.Sprintf(why, args...), errdefs.ErrFailedPrecondition}
}

// show renders a value for an error: text quoted (which escapes control characters) and no longer than a line.
func show(value any) string {
	const most = 120
	switch v := value.(type) {
	case nil:
		return ""
	case string:
		if len(v) > most {
			return fmt.Sprintf("%q… (%d bytes)", v[:most], len(v))
		}
		return fmt.Sprintf("%q", v)
	default:
		return fmt.Sprint(v)
	}
}

// controls says whether s holds a control character. Such a character ends a line of a file that somebody writes
// (CVE-2022-4318), hides in a log, or forges a second key (CVE-2022-0811).
func controls(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }

// plain refuses control characters.
func plain(field, value string) error {
	if controls(value) {
		return invalid(field, value, "contains a control character")
	}
	return nil
}

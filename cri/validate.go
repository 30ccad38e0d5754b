package cri

import (
	"math"
	"strings"
	"time"
)

// maxID bounds what is taken for an id. Ids have 64 digits; names of images that clients pass as ids are shorter than
// this, too.
const maxID = 1024

// checkID refuses what cannot be an id or a prefix of one.
func checkID(field, id string) error {
	switch {
	case id == "":
		return missing(field)
	case len(id) > maxID:
		return invalid(field, id, "an id has at most 64 digits")
	case strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' }):
		return invalid(field, id, "an id has hexadecimal digits only")
	}
	return nil
}

// maxArgument is what Linux takes in one argument (MAX_ARG_STRLEN), without its final NUL.
const maxArgument = 128<<10 - 1

// checkCommand refuses a command that cannot be executed.
func checkCommand(field string, cmd []string) error {
	if len(cmd) == 0 || cmd[0] == "" {
		return missing(field)
	}
	for _, arg := range cmd {
		if len(arg) > maxArgument {
			return invalid(field, arg, "an argument holds %d bytes at most", maxArgument)
		}
		if strings.ContainsRune(arg, 0) {
			return invalid(field, arg, "an argument cannot hold a NUL byte")
		}
	}
	return nil
}

// seconds turns a number of seconds into a duration. What is longer than a duration can say (292 years) is that long.
func seconds(field string, n int64) (time.Duration, error) {
	if n < 0 {
		return 0, invalid(field, n, "a number of seconds cannot be negative")
	}
	if n > math.MaxInt64/int64(time.Second) {
		return math.MaxInt64, nil
	}
	return time.Duration(n) * time.Second, nil
}

// checkStreams holds the rules of Exec and Attach for the streams of a session: a terminal has no separate stderr, and a
// session without any stream has no purpose.
func checkStreams(tty, stdin, stdout, stderr bool) error {
	if tty && stderr {
		return invalid("stderr", stderr, "a session with a terminal (tty) has no stderr of its own")
	}
	if !stdin && !stdout && !stderr {
		return invalid("stdin, stdout, stderr", false, "at least one stream must be asked for")
	}
	return nil
}

// checkPorts refuses what is not a port.
func checkPorts(ports []int32) error {
	for _, p := range ports {
		if p < 1 || p > math.MaxUint16 {
			return invalid("port", p, "a port is a number from 1 to 65535")
		}
	}
	return nil
}

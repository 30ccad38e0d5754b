package shim

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAwaitByte(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(t *testing.T, flags int) int {
		t.Helper()
		fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	// writes is an init's part after its fifo was opened.
	writes := func(t *testing.T, b []byte) {
		t.Helper()
		fd := open(t, unix.O_WRONLY)
		if len(b) > 0 {
			if _, err := unix.Write(fd, b); err != nil {
				t.Error(err)
			}
		}
		_ = unix.Close(fd)
	}
	for _, tc := range []struct {
		name  string
		alive func(t *testing.T, asked int) bool
		ok    bool
		asked int
	}{
		{"starts at once", func(t *testing.T, _ int) bool { return true }, true, 0},
		{"starts while it is asked for", func(t *testing.T, _ int) bool { writes(t, []byte("0")); return true }, true, 1},
		{"starts and ends while it is asked for", func(t *testing.T, _ int) bool { writes(t, []byte("0")); return false }, true, 1},
		{"is slow", func(t *testing.T, asked int) bool {
			if asked == 3 {
				writes(t, []byte("0"))
			}
			return asked < 3
		}, true, 3},
		{"ends", func(*testing.T, int) bool { return false }, false, 1},
		{"ends with its fifo open", func(t *testing.T, _ int) bool { writes(t, nil); return false }, false, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fd := open(t, unix.O_RDONLY)
			defer unix.Close(fd)
			if tc.asked == 0 {
				writes(t, []byte("0"))
			}
			asked := 0
			err := awaitByte(fd, func() bool { asked++; return tc.alive(t, asked) })
			var state *Error
			if tc.ok && err != nil || !tc.ok && (!errors.As(err, &state) || state.Code != CodeState) {
				t.Errorf("error is %v", err)
			}
			if asked != tc.asked {
				t.Errorf("asked %d times, not %d", asked, tc.asked)
			}
		})
	}
}

package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path that fits into sockaddr_un with its final NUL (unix(7)).
const maxSocketPath = 107

// ErrInUse says that another process listens on a socket.
var ErrInUse = errors.New("another process listens on it")

// Listen makes a unix socket at path that root alone can connect to: mode 0600 from the instant it exists, in a directory
// of mode 0700 that is made where it is missing (CVE-2020-15257: whoever reaches the socket is root on the node). A socket
// that nobody listens on any more is replaced; one that somebody listens on, or a file that is no socket, is an error.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, fmt.Errorf("socket %q: not an absolute path", path)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket %s: the path has %d bytes, the kernel takes %d at most: choose a shorter one", path, len(path), maxSocketPath)
	}
	if err := privateDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// A mode set on the socket before bind is the mode of the file that bind makes (unix_bind in net/unix/af_unix.c). An
		// umask would do the same, but it is the whole process's, whose other goroutines make files meanwhile.
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return os.NewSyscallError("fchmod", err)
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	if err := checkMode(path); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// privateDir makes dir with mode 0700 where it is missing. A directory that is there must not be writable for others:
// they could put a socket of their own in the place of ours.
func privateDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err == nil || !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return fmt.Errorf("directory %s has mode %04o, others can replace what is in it: chmod it to 0700", dir, info.Mode().Perm())
	}
	return nil
}

// removeStale removes the socket that an earlier process left behind.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: a file that is not a socket is there: remove it or choose another path", path)
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		return errors.Join(fmt.Errorf("socket %s: %w: stop it or choose another path", path, ErrInUse), c.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("socket %s: cannot tell whether somebody listens on it: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket %s: remove the one left behind: %w", path, err)
	}
	return nil
}

func checkMode(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("socket %s: %w", path, err)
	}
	if p := info.Mode().Perm(); p&0o077 != 0 {
		return fmt.Errorf("socket %s: has mode %04o, not 0600", path, p)
	}
	return nil
}

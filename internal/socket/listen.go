package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen makes a unix socket at path that root alone can connect to: mode 0600 from the instant it exists. A socket that
// nobody listens on any more is replaced; one that somebody listens on ([ErrInUse]), or a file that is no socket, is an
// error. Closing the listener removes the socket, unless another program has put its own there by then.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	l, err := listen(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l, nil
}

func listen(ctx context.Context, path string) (net.Listener, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	if err := Prepare(ctx, path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the one left behind: %w", err)
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
	inner, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	l := &listener{UnixListener: inner.(*net.UnixListener)}
	l.SetUnlinkOnClose(false)
	if l.file, err = Made(path); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if p := l.file.info.Mode().Perm(); p&0o077 != 0 {
		return nil, errors.Join(fmt.Errorf("has mode %04o, not 0600", p), l.Close())
	}
	return l, nil
}

// listener removes its socket once, and no other.
type listener struct {
	*net.UnixListener
	file File
	once sync.Once
}

// Close implements net.Listener.
func (l *listener) Close() (err error) {
	l.once.Do(func() { err = l.file.Remove(l.Addr().String()) })
	return errors.Join(err, l.UnixListener.Close())
}

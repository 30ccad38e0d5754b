package nri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is the file that plugins connect to. The library removes whatever is at the path that it is given, and gives the
// file the mode of the umask. So it is given a path in a directory that nobody else can enter, and the file is moved from
// there to where plugins look for it once it is as it should be.
type socket struct {
	path string
	own  fs.FileInfo // the file that was published
}

// maxSocketPath is the longest path that fits into sockaddr_un with its final NUL (unix(7)).
const maxSocketPath = 107

func newSocket(path string) (*socket, error) {
	s := &socket{path: path}
	switch {
	case !filepath.IsAbs(path):
		return nil, fmt.Errorf("nri: socket %q is not an absolute path", path)
	case len(s.private()) > maxSocketPath:
		return nil, fmt.Errorf("nri: socket %s: the path has %d bytes, %d are the most: choose a shorter one", path, len(path), len(path)-len(s.private())+maxSocketPath)
	}
	return s, nil
}

func (s *socket) privateDir() string {
	return filepath.Join(filepath.Dir(s.path), ".berth."+filepath.Base(s.path))
}
func (s *socket) private() string { return filepath.Join(s.privateDir(), "s") }

// prepare makes the private directory, unless somebody listens where plugins would look for us.
func (s *socket) prepare() error {
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("nri: socket %s: directory has mode %04o, others can replace what is in it: chmod it to 0700", s.path, info.Mode().Perm())
	}
	switch info, err := os.Lstat(s.path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("nri: socket %s: a file that is not a socket is there: remove it or choose another path", s.path)
	default:
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, err := new(net.Dialer).DialContext(ctx, "unix", s.path)
		if err == nil {
			return errors.Join(fmt.Errorf("nri: socket %s: another runtime listens on it: stop it or choose another path", s.path), c.Close())
		}
		if !errors.Is(err, syscall.ECONNREFUSED) { // full, or not ours to see
			return fmt.Errorf("nri: socket %s: cannot tell whether a runtime listens on it: %w", s.path, err)
		}
	}
	if err := os.RemoveAll(s.privateDir()); err != nil {
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	}
	if err := os.Mkdir(s.privateDir(), 0o700); err != nil {
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	}
	return nil
}

// publish moves the socket, which the library listens on by now, to where plugins look for it, in the place of one that a
// runtime has left behind.
func (s *socket) publish() error {
	err := os.Chmod(s.private(), 0o600)
	if err == nil {
		s.own, err = os.Lstat(s.private())
	}
	if err == nil {
		err = os.Rename(s.private(), s.path)
	}
	if err != nil {
		return fmt.Errorf("nri: socket %s: %w", s.path, err)
	}
	return os.Remove(s.privateDir())
}

// remove takes away what prepare and publish have made, and nothing that somebody else has put in its place.
func (s *socket) remove() error {
	err := os.RemoveAll(s.privateDir())
	if s.own == nil {
		return err
	}
	if now, serr := os.Lstat(s.path); serr == nil && os.SameFile(now, s.own) {
		err = errors.Join(err, unix.Unlink(s.path))
	}
	s.own = nil
	return err
}

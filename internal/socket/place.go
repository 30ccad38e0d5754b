package socket

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that fits into sockaddr_un with its final NUL (unix(7)).
const maxPath = 107

// ErrInUse says that another process listens on a socket.
var ErrInUse = errors.New("another process listens on it")

// answers is how long whoever listens on a socket may take to be found out.
const answers = time.Second

// CheckPath refuses a path that no socket can have: one that is not absolute, or too long for the kernel.
func CheckPath(path string) error {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return errors.New("not an absolute path")
	}
	if len(path) > maxPath {
		return fmt.Errorf("the path has %d bytes, the kernel takes %d at most: choose a shorter one", len(path), maxPath)
	}
	return nil
}

// Prepare sees to it that a socket can be made at path: its directory, which is made with mode 0700 where it is missing,
// must not be writable for others, and nobody may listen there, which is [ErrInUse]. A socket that was left behind stays:
// to remove it, or to put another in its place, is the caller's.
func Prepare(ctx context.Context, path string) error {
	if err := privateDir(filepath.Dir(path)); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("a file that is not a socket is there: remove it or choose another path")
	}
	d := net.Dialer{Timeout: answers}
	c, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		return errors.Join(fmt.Errorf("%w: stop it or choose another path", ErrInUse), c.Close())
	}
	if !errors.Is(err, unix.ECONNREFUSED) { // its queue is full, or it is not ours to see
		return fmt.Errorf("cannot tell whether somebody listens on it: %w", err)
	}
	return nil
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

// File is the file of a socket that this process has made. The zero value is none.
type File struct{ info fs.FileInfo }

// Made remembers the file that is at path.
func Made(path string) (File, error) {
	info, err := os.Lstat(path)
	return File{info}, err
}

// Remove removes the file from path, where it was moved to or made, unless something else is there by now.
func (f File) Remove(path string) error {
	if f.info == nil {
		return nil
	}
	now, err := os.Lstat(path)
	if err != nil || !os.SameFile(now, f.info) {
		return nil //nolint:nilerr // gone already
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

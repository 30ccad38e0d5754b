package images

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Prepared root file systems can be on another file system than the images (KEP-4191), so that what containers write and
// what images take is not the same space. Nothing is renamed from the one to the other: each has a tmp and a trash of its
// own. ROOT/rootfs is then a link that leads there, by which a start with other options sees what it would leave behind.

// writablePath is a path in the directory of root file systems.
func (s *Store) writablePath(parts ...string) string {
	return filepath.Join(append([]string{s.writable}, parts...)...)
}

// makeWritable makes the directories of root file systems, and says that they are there. Where an earlier start has left
// root file systems elsewhere, whose containers may run, the error is errdefs.ErrFailedPrecondition.
func makeWritable(root, writable string) error {
	link := filepath.Join(root, rootfsDir)
	want := filepath.Join(writable, rootfsDir)
	is := link
	if to, err := os.Readlink(link); err == nil {
		is = to
	}
	if is != want {
		if err := leaveWritable(is, link); err != nil {
			return err
		}
	}
	if err := makeDir(writable, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{rootfsDir, tmpDir, trashDir} {
		if err := makeDir(filepath.Join(writable, dir), 0o700); err != nil {
			return err
		}
	}
	if want == link {
		return nil
	}
	if err := os.Symlink(want, link); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// leaveWritable gives up the place where root file systems were, which must be empty.
func leaveWritable(is, link string) error {
	left, err := os.ReadDir(is)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("writable layers of %d containers are in %s: start with these as they were, and remove their pods first: %w", len(left), is, errdefs.ErrFailedPrecondition)
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// makeDir makes a directory of a mode, whatever the umask and whatever it had.
func makeDir(path string, mode os.FileMode) error {
	if err := os.MkdirAll(path, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

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
// own. ROOT/rootfs is then a link that leads there, by which a start with other options sees what it would leave behind, and one
// without that file system what is not mounted.

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
		if err := stillThere(is, link); err != nil {
			return err
		}
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
	if err := os.Symlink(want, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return noteBoot(link)
}

// stillThere refuses to go on without the root file systems of containers that may run on them: their layers would be held
// by nothing. After a reboot nothing runs, and a disk that is lost or empty then keeps no node from its start.
func stillThere(is, link string) error {
	if _, err := os.Stat(is); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	boot, err := bootID()
	if err != nil {
		return err
	}
	if noted, err := os.ReadFile(link + bootExt); err != nil || string(noted) != boot {
		return nil
	}
	return fmt.Errorf("writable layers of containers were in %s, which is not there: mount its file system, or remove %s if that is lost: %w", is, link, errdefs.ErrFailedPrecondition)
}

// bootExt is a file beside the link, which says in which boot it led somewhere.
const bootExt = ".boot"

func noteBoot(link string) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	if noted, err := os.ReadFile(link + bootExt); err == nil && string(noted) == boot {
		return nil
	}
	// A disk that is full keeps no node from its start.
	if err := os.WriteFile(link+bootExt, []byte(boot), 0o600); err != nil && !isFull(err) {
		return err
	}
	return nil
}

func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(id), err
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

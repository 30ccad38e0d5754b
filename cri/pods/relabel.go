package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// relabelWithin is how long relabelling the volumes of a container may take. The kubelet gives up before, and asks again;
// what is done by then needs only be read.
const relabelWithin = 10 * time.Minute

// relabelDepth bounds the depth of a volume's directories, each of which is open while what is below is relabelled.
const relabelDepth = 1000

// contextXattr is where a file has its SELinux context.
const contextXattr = "security.selinux"

// relabelling is one walk through a volume.
type relabelling struct {
	ctx   context.Context
	label string
}

// relabelTree gives a file, or a directory with all that is below, an SELinux context; where they have it they are not
// written to. The root comes last, so that one that has it says that all below have, unless somebody has added others since:
// with once that is taken for granted.
//
// Containers may change the tree meanwhile. So it is walked by descriptors: no link is followed, and nothing is reached that
// is not below the root. root is a path without links.
func relabelTree(ctx context.Context, root, label string, once bool) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, root, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return &os.PathError{Op: "openat2", Path: root, Err: err}
	}
	defer unix.Close(fd)
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	if once {
		if has, err := fileContext(unix.Getxattr, self); err == nil && has == label {
			return nil
		}
	}
	r := relabelling{ctx, label}
	if err := r.below(fd, ".", root, 0); err != nil && !errors.Is(err, errNoDirectory) {
		return err
	}
	return r.set(unix.Getxattr, unix.Setxattr, self, root)
}

var errNoDirectory = errors.New("is not a directory")

// below relabels what is below a directory. at is its name for errors.
func (r relabelling) below(parent int, name, at string, depth int) error {
	if depth > relabelDepth {
		return fmt.Errorf("%s is more than %d directories deep", at, relabelDepth)
	}
	fd, err := unix.Openat(parent, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOENT):
		return errNoDirectory
	case err != nil:
		return &os.PathError{Op: "open", Path: at, Err: err}
	}
	dir := os.NewFile(uintptr(fd), at)
	defer dir.Close()
	here := fmt.Sprintf("/proc/self/fd/%d/", fd)
	for {
		if err := r.ctx.Err(); err != nil {
			return fmt.Errorf("%s: %w", at, context.Cause(r.ctx))
		}
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			child := filepath.Join(at, name)
			if err := r.below(fd, name, child, depth+1); err != nil && !errors.Is(err, errNoDirectory) {
				return err
			}
			if err := r.set(unix.Lgetxattr, unix.Lsetxattr, here+name, child); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// set gives one file the context, unless it has it, has gone, or is on a file system that has none of its own.
func (r relabelling) set(get func(string, string, []byte) (int, error), set func(string, string, []byte, int) error, path, at string) error {
	if has, err := fileContext(get, path); err == nil && has == r.label {
		return nil
	}
	err := set(path, contextXattr, []byte(r.label), 0)
	if err == nil || errors.Is(err, unix.ENOTSUP) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return &os.PathError{Op: "set " + contextXattr, Path: at, Err: err}
}

func fileContext(get func(string, string, []byte) (int, error), path string) (string, error) {
	buf := make([]byte, 4096)
	n, err := get(path, contextXattr, buf)
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(buf[:n]), "\x00"), nil
}

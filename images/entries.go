package images

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directory makes a directory, or gives one that is there its attributes.
func (a *applier) directory(parent int, base, name string, hdr *tar.Header) error {
	err := unix.Mkdirat(parent, base, 0o700)
	hides := false
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			// A file, or a whiteout, took the place of what lies below; the directory that replaces it is empty.
			hides = true
			a.replaced = a.replaced || !isWhiteout(&st)
			if err := unix.Unlinkat(parent, base, 0); err != nil {
				return err
			}
			if err := unix.Mkdirat(parent, base, 0o700); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if hides {
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			return fmt.Errorf("mark opaque: %w", err)
		}
	}
	a.bytes += 4096
	delete(a.implicit, name)
	return a.dirMeta(fd, name, hdr)
}

// dirMeta gives a directory the owner, mode and attributes of its entry, and keeps the times for the end.
func (a *applier) dirMeta(fd int, name string, hdr *tar.Header) error {
	if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if err := unix.Fchmod(fd, uint32(hdr.Mode)&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	if err := setXattrs(func() string { return fmt.Sprintf("/proc/self/fd/%d", fd) }, hdr); err != nil {
		return err
	}
	access, mod := entryTimes(hdr)
	a.times[name] = dirTimes{access, mod, a.entries}
	return nil
}

// setDirTimes sets the times of directories when nothing is made in them any more.
func (a *applier) setDirTimes() error {
	names := slices.SortedFunc(maps.Keys(a.times), func(x, y string) int { return cmp.Compare(a.times[x].entry, a.times[y].entry) })
	for _, name := range names {
		t := a.times[name]
		fd, err := a.openInside(name)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			continue // a later entry replaced it
		}
		if err != nil {
			return fmt.Errorf("directory %s: %w", quote(name), err)
		}
		err = unix.UtimesNanoAt(fd, ".", []unix.Timespec{t.access, t.mod}, 0)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("times of %s: %w", quote(name), err)
		}
	}
	return nil
}

// opaque makes a directory hide what is below it in lower layers, and nothing of its own layer, wherever among the
// entries it says so.
func (a *applier) opaque(dir string) error {
	if dir == "" {
		a.opaqueRoot = true
		return nil
	}
	fd, err := a.parent(dir)
	if err != nil {
		return err
	}
	if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("mark opaque: %w", err)
	}
	return nil
}

// whiteout hides a name of lower layers: by overlayfs's character device 0:0, or, where this layer has a directory of
// that name, by making it opaque. What else this layer has under the name stays (image-spec, layer.md).
func (a *applier) whiteout(dir, base string) error {
	if base == "" || base == "." || base == ".." {
		return fmt.Errorf("whiteout of %q", base)
	}
	parent, err := a.parent(dir)
	if err != nil {
		return err
	}
	err = unix.Mknodat(parent, base, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	delete(a.implicit, path.Join(dir, base)) // what it would take its attributes from is gone
	if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
		return fmt.Errorf("mark opaque: %w", err)
	}
	return nil
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// keepXattr says which extended attributes of a layer are kept. overlayfs's own would let a layer redirect or hide what
// is below (and do so even as user.* under userxattr); labels of LSMs are the node's to give.
func keepXattr(name string) bool {
	switch {
	case name == "security.capability":
		return true
	case strings.HasPrefix(name, "user.overlay."):
		return false
	case strings.HasPrefix(name, "user."):
		return true
	case name == "system.posix_acl_access", name == "system.posix_acl_default":
		return true
	}
	return false
}

// setXattrs sets attributes through a path whose last element is not followed, or a magic link of ours.
func setXattrs(where func() string, hdr *tar.Header) error {
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || !keepXattr(name) {
			continue
		}
		set, at := unix.Lsetxattr, where()
		if strings.Count(at, "/") == 4 { // /proc/self/fd/N
			set = unix.Setxattr
		}
		err := set(at, name, []byte(value), 0)
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") {
			continue // the file system has none, or not on this kind of file
		}
		if err != nil {
			return fmt.Errorf("attribute %s: %w", quote(name), err)
		}
	}
	return nil
}

func hasXattrs(hdr *tar.Header) bool {
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, xattrRecord) {
			return true
		}
	}
	return false
}

func setTimes(parent int, base string, hdr *tar.Header) error {
	access, mod := entryTimes(hdr)
	if err := unix.UtimesNanoAt(parent, base, []unix.Timespec{access, mod}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

// setFileTimes sets the times of an open file.
func setFileTimes(fd int, access, mod unix.Timespec) error {
	times := [2]unix.Timespec{access, mod}
	// futimens(3), which the package has not: no name to look up.
	if _, _, errno := unix.Syscall6(unix.SYS_UTIMENSAT, uintptr(fd), 0, uintptr(unsafe.Pointer(&times)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("times: %w", errno)
	}
	return nil
}

// entryTimes are an entry's times, within what file systems can store.
func entryTimes(hdr *tar.Header) (access, mod unix.Timespec) {
	mod = timespec(hdr.ModTime)
	access = mod
	if hdr.AccessTime.After(hdr.ModTime) {
		access = timespec(hdr.AccessTime)
	}
	return access, mod
}

func timespec(t time.Time) unix.Timespec {
	const latest = 1<<34 - 1<<31 - 1 // ext4's with 256-byte inodes
	sec := t.Unix()
	if t.IsZero() || sec < 0 {
		return unix.Timespec{}
	}
	if sec > latest {
		return unix.Timespec{Sec: latest}
	}
	return unix.Timespec{Sec: sec, Nsec: int64(t.Nanosecond())}
}

// inherit is inheritDirs for a staged layer, once.
func (l *stagedLayer) inherit(ctx context.Context, below []*os.File) error {
	if err := l.finishing.take(ctx); err != nil {
		return err
	}
	defer l.finishing.give()
	if l.inherited {
		return nil
	}
	err := inheritDirs(ctx, l.root, l.implicit, below)
	l.inherited = err == nil
	return err
}

// inheritDirs gives the implicit directories of a layer the attributes that they have in the layers below, top first.
func inheritDirs(ctx context.Context, l *os.File, implicit []string, below []*os.File) error {
	for _, name := range implicit {
		if err := ctx.Err(); err != nil {
			return err
		}
		if name == "" && len(below) > 0 {
			if err := copyMeta(int(l.Fd()), int(below[0].Fd())); err != nil {
				return err
			}
			continue
		}
		if name == "" {
			continue
		}
		to, hidden, err := walk(l, name)
		if err != nil {
			return fmt.Errorf("directory %s: %w", quote(name), err)
		}
		if to < 0 {
			continue
		}
		for _, lower := range below {
			if hidden {
				break
			}
			var from int
			from, hidden, err = walk(lower, name)
			if err == nil && from >= 0 {
				err = copyMeta(to, from)
				unix.Close(from)
				hidden = true
			}
			if err != nil {
				unix.Close(to)
				return fmt.Errorf("directory %s: %w", quote(name), err)
			}
		}
		unix.Close(to)
	}
	return nil
}

// walk opens a directory of a layer without following links; -1 if the layer has none of that name. hidden tells
// whether the layer hides what lower ones have there: by a whiteout, another kind of file, or an opaque directory.
func walk(root *os.File, name string) (fd int, hidden bool, err error) {
	fd, err = unix.Openat(int(root.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, false, err
	}
	for _, part := range strings.Split(name, "/") {
		next, err := unix.Openat(fd, part, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		switch {
		case errors.Is(err, unix.ENOENT):
			return -1, hidden, nil
		case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
			return -1, true, nil
		case err != nil:
			return -1, hidden, err
		}
		fd = next
		value := make([]byte, 1)
		if n, err := unix.Fgetxattr(fd, opaqueXattr, value); err == nil && n == 1 && value[0] == 'y' {
			hidden = true
		}
	}
	return fd, hidden, nil
}

// copyMeta copies owner, mode, times and the attributes that layers may have from one directory to another.
func copyMeta(to, from int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	names := make([]byte, 64<<10)
	n, err := unix.Flistxattr(from, names)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		return err
	}
	for _, name := range strings.Split(string(names[:max(n, 0)]), "\x00") {
		if !keepXattr(name) {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Fgetxattr(from, name, value)
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(to, name, value[:n], 0); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(to, ".", []unix.Timespec{st.Atim, st.Mtim}, 0)
}

package images

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// A tree record says what a layer's directory is like, as it was when it had been unpacked: verification walks the directory
// again and compares. It is made by a walk, not from the archive, so that nothing of how entries of an archive replace
// each other has to be known to compare.

// treeEntry is one file of a layer.
type treeEntry struct {
	// Path is relative; "" is the layer's root.
	Path     string
	Mode     uint32 // with its type
	UID, GID uint32
	// Size is a regular file's.
	Size      int64
	Sec, Nsec int64 // of its last change
	Rdev      uint64
	// Target is a symbolic link's.
	Target string
	// Same is the path of an earlier entry that is the same file.
	Same   string
	Xattrs []treeXattr
	// Sum is that of the content (xxhash), where the layer has no tape that knows it.
	Sum uint64
}

type treeXattr struct{ Name, Value string }

// differs says in what two entries of one path differ; "" if they do not.
func (e *treeEntry) differs(is *treeEntry) string {
	switch {
	case e.Mode&unix.S_IFMT != is.Mode&unix.S_IFMT:
		return "is another kind of file"
	case e.Mode != is.Mode:
		return fmt.Sprintf("has mode %#o instead of %#o", is.Mode&0o7777, e.Mode&0o7777)
	case e.UID != is.UID || e.GID != is.GID:
		return fmt.Sprintf("belongs to %d:%d instead of %d:%d", is.UID, is.GID, e.UID, e.GID)
	case e.Size != is.Size:
		return fmt.Sprintf("has %d bytes instead of %d", is.Size, e.Size)
	case e.Target != is.Target:
		return fmt.Sprintf("leads to %s instead of %s", quote(is.Target), quote(e.Target))
	case e.Same != is.Same:
		return fmt.Sprintf("is linked to %s instead of %s", quote(is.Same), quote(e.Same))
	case e.Rdev != is.Rdev:
		return "is another device"
	case !slices.Equal(e.Xattrs, is.Xattrs):
		return "has other attributes"
	case e.Sum != is.Sum:
		return "has other content"
	case e.Sec != is.Sec || e.Nsec != is.Nsec:
		return "was changed later"
	}
	return ""
}

// treeWalk goes through a layer's directory in a fixed order.
type treeWalk struct {
	ctx context.Context
	// sums: read the files, too.
	sums  bool
	visit func(*treeEntry) error
	// bare: what is no directory has no attributes, which are not asked for then.
	bare bool

	// What was seen: blocks in bytes, and inodes, each once however often it is linked.
	bytes, inodes uint64

	linked map[uint64]string
	buf    []byte
}

func (w *treeWalk) walk(root *os.File) error {
	w.linked = map[uint64]string{}
	fd, err := unix.Openat(int(root.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: root.Name(), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return err
	}
	return w.directory(os.NewFile(uintptr(fd), root.Name()), "", &st)
}

func (w *treeWalk) directory(dir *os.File, name string, st *unix.Stat_t) error {
	defer dir.Close()
	if err := w.entry(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), -1, name, st); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("read directory %s: %w", quote(name), err)
	}
	slices.Sort(names)
	for _, base := range names {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		below := path.Join(name, base)
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("stat %s: %w", quote(below), err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if err := w.entry(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), base), int(dir.Fd()), below, &st); err != nil {
				return err
			}
			continue
		}
		fd, err := unix.Openat(int(dir.Fd()), base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", quote(below), err)
		}
		if err := w.directory(os.NewFile(uintptr(fd), base), below, &st); err != nil {
			return err
		}
	}
	return nil
}

// entry describes one file. at is a path to it that follows no link of the layer's, parent the directory it is in.
func (w *treeWalk) entry(at string, parent int, name string, st *unix.Stat_t) error {
	e := &treeEntry{
		Path: name, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Sec: int64(st.Mtim.Sec), Nsec: int64(st.Mtim.Nsec),
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := w.linked[st.Ino]; ok {
			e.Same = first
			return w.visit(e)
		}
		w.linked[st.Ino] = name
	}
	w.bytes += uint64(st.Blocks) * 512
	w.inodes++
	switch kind {
	case unix.S_IFREG:
		e.Size = st.Size
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = uint64(st.Rdev)
	case unix.S_IFLNK:
		n, err := unix.Readlinkat(parent, path.Base(name), w.scratch())
		if err != nil {
			return fmt.Errorf("read link %s: %w", quote(name), err)
		}
		e.Target = string(w.buf[:n])
	}
	if kind == unix.S_IFDIR || !w.bare {
		var err error
		if e.Xattrs, err = w.xattrs(at, kind == unix.S_IFDIR); err != nil {
			return fmt.Errorf("attributes of %s: %w", quote(name), err)
		}
	}
	if w.sums && kind == unix.S_IFREG {
		fd, err := unix.Openat(parent, path.Base(name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", quote(name), err)
		}
		f := os.NewFile(uintptr(fd), name)
		defer f.Close()
		if e.Sum, err = w.sum(f); err != nil {
			return fmt.Errorf("read %s: %w", quote(name), err)
		}
	}
	return w.visit(e)
}

// sum is that of a file's blocks that are not zero, so that it neither depends on which of the others are holes, nor takes
// the time that a hole of a hundred gigabytes would.
func (w *treeWalk) sum(f *os.File) (uint64, error) {
	const block = 4096
	sum := xxhash.New()
	for at := int64(0); ; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return sum.Sum64(), nil
		}
		if err != nil {
			return 0, err
		}
		if err := w.ctx.Err(); err != nil {
			return 0, err
		}
		at = data &^ (block - 1)
		n, err := f.ReadAt(w.scratch(), at)
		if err != nil && err != io.EOF {
			return 0, err
		}
		for chunk := w.buf[:n]; len(chunk) > 0; chunk = chunk[min(block, len(chunk)):] {
			if b := chunk[:min(block, len(chunk))]; !isZero(b) {
				_, _ = sum.Write(binary.LittleEndian.AppendUint64(nil, uint64(at)))
				_, _ = sum.Write(b)
			}
			at += block
		}
		if n == 0 {
			return sum.Sum64(), nil // the file became shorter
		}
	}
}

// scratch is a buffer for what is used before the next thing is read.
func (w *treeWalk) scratch() []byte {
	if w.buf == nil {
		w.buf = make([]byte, 128<<10)
	}
	return w.buf
}

// xattrs returns the attributes of a file that unpacking gave it. Labels are the node's to give and to change.
func (w *treeWalk) xattrs(at string, follow bool) ([]treeXattr, error) {
	list, get := unix.Llistxattr, unix.Lgetxattr
	if follow { // at is a magic link to the directory itself
		list, get = unix.Listxattr, unix.Getxattr
	}
	n, err := list(at, w.scratch())
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil || n == 0 {
		return nil, err
	}
	var attrs []treeXattr
	for _, name := range strings.Split(strings.TrimSuffix(string(w.buf[:n]), "\x00"), "\x00") {
		if strings.HasPrefix(name, "security.") && name != "security.capability" {
			continue
		}
		n, err := get(at, name, w.buf)
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, treeXattr{name, string(w.buf[:n])})
	}
	slices.SortFunc(attrs, func(a, b treeXattr) int { return strings.Compare(a.Name, b.Name) })
	return attrs, nil
}

// contextReader reads until its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

// Read implements io.Reader.
func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// writeTree records what a layer's directory is like, in a file that must not be there yet, and returns the blocks (in
// bytes) and inodes that the directory takes. bare says that what is no directory was given no attributes.
func writeTree(ctx context.Context, root *os.File, to string, sums, bare bool) (bytes, inodes uint64, err error) {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	z, err := newRecordWriter(f)
	if err != nil {
		return 0, 0, err
	}
	enc := gob.NewEncoder(z)
	w := &treeWalk{ctx: ctx, sums: sums, bare: bare && !passesACLs(root), visit: func(e *treeEntry) error { return enc.Encode(e) }}
	if err := w.walk(root); err != nil {
		return 0, 0, errors.Join(err, z.Close())
	}
	if err := z.Close(); err != nil {
		return 0, 0, err
	}
	return w.bytes, w.inodes, f.Close()
}

// passesACLs tells whether what is made in a directory is given attributes by the kernel: access control lists (acl(5)).
func passesACLs(dir *os.File) bool {
	_, err := unix.Fgetxattr(int(dir.Fd()), "system.posix_acl_default", nil)
	return !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP)
}

// newRecordWriter compresses a record. Layers are recorded side by side, each with as little memory as there is to be.
func newRecordWriter(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(1<<20))
}

// compareTree walks a layer's directory and tells what is not as recorded, in the order of the walk. sums says whether the record has sums of contents that are to be compared, too.
func compareTree(ctx context.Context, root *os.File, record io.Reader, sums bool, tell func(path, what string)) error {
	z, err := zstd.NewReader(record, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer z.Close()
	dec := gob.NewDecoder(bufio.NewReader(z))
	next := func() (*treeEntry, error) {
		e := new(treeEntry)
		err := dec.Decode(e)
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("record: %w", err)
		}
		if !sums {
			e.Sum = 0
		}
		return e, nil
	}
	want, err := next()
	if err != nil {
		return err
	}
	w := &treeWalk{ctx: ctx, sums: sums}
	w.visit = func(is *treeEntry) error {
		for want != nil && walksBefore(want.Path, is.Path) {
			tell(want.Path, "is missing")
			if want, err = next(); err != nil {
				return err
			}
		}
		if want == nil || want.Path != is.Path {
			tell(is.Path, "is not of the layer")
			return nil
		}
		if what := want.differs(is); what != "" {
			tell(is.Path, what)
		}
		want, err = next()
		return err
	}
	if err := w.walk(root); err != nil {
		return err
	}
	for want != nil {
		tell(want.Path, "is missing")
		if want, err = next(); err != nil {
			return err
		}
	}
	return nil
}

// walksBefore tells whether a walk comes to a before b: a directory comes before what is in it, and names of one directory
// come in the order of their bytes.
func walksBefore(a, b string) bool {
	if a == b {
		return false
	}
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) < 0
}

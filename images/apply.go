package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sys/unix"
)

// applier unpacks one layer's tar stream into an empty directory that nobody else can enter, in the form that overlayfs
// reads. All names are resolved by the kernel inside that directory (openat2, RESOLVE_IN_ROOT), so that no entry, link
// or order of them reaches outside. containerd's pkg/archive resolves in user space, fails on whiteouts of files of the
// same layer, turns ids of 2^32 into root's, keeps overlayfs's user attributes and writes holes out.
type applier struct {
	root  *os.File
	limit bounds

	bytes, inodes uint64
	entries       int64
	opaqueRoot    bool
	rootSeen      bool
	implicit      map[string]bool
	order         []string            // of implicit
	tape          *tape               // what is recorded of the archive, if anything is
	replaced      bool                // an entry took the place of an earlier one: the tree has not all that the archive has
	times         map[string]dirTimes // of directories, set at the end: files made in them change them
	parentName    string              // the directory last used, and
	parentFD      int                 // its descriptor; -1 for none
	buf           []byte
	attrs         bool // an entry has attributes
}

type dirTimes struct {
	access, mod unix.Timespec
	entry       int64 // its number: of two names that lead to one directory the later one's times hold
}

const (
	whiteout      = ".wh."
	whiteoutMeta  = ".wh..wh."
	whiteoutOpq   = ".wh..wh..opq"
	opaqueXattr   = "trusted.overlay.opaque"
	xattrRecord   = "SCHILY.xattr."
	maxPath       = 4096
	maxName       = 255
	resolveInside = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV
)

func newApplier(root *os.File, limit bounds) *applier {
	return &applier{root: root, limit: limit, implicit: map[string]bool{}, times: map[string]dirTimes{}, parentFD: -1, buf: make([]byte, 128<<10)}
}

func (a *applier) close() { a.forgetParent() }

// implicitDirs are the directories that have no entry in the layer, parents first. Their owner, mode and attributes are
// those of the layer below, which is not known here.
func (a *applier) implicitDirs() []string {
	var dirs []string
	if !a.rootSeen {
		dirs = append(dirs, "")
	}
	for _, name := range a.order {
		if a.implicit[name] {
			dirs = append(dirs, name)
		}
	}
	return dirs
}

// apply reads the archive to its end.
func (a *applier) apply(ctx context.Context, r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if a.tape != nil {
			a.tape.content(hdr)
		}
		if err := a.charge(hdr); err != nil {
			return fmt.Errorf("entry %s: %w", quote(hdr.Name), err)
		}
		a.attrs = a.attrs || hasXattrs(hdr)
		if err := a.entry(ctx, hdr, tr); err != nil {
			return fmt.Errorf("entry %s: %w", quote(hdr.Name), err)
		}
	}
	return a.setDirTimes()
}

// charge counts an entry, and its logical size, before anything is made of it.
func (a *applier) charge(hdr *tar.Header) error {
	if err := a.count(); err != nil {
		return err
	}
	if hdr.Size > 0 && isRegular(hdr.Typeflag) {
		// Rounded up as file systems do; a hole counts, so that a small archive cannot claim without end.
		a.bytes += (uint64(hdr.Size) + 4095) &^ 4095
		if a.bytes > uint64(max(a.limit.bytes, 0)) {
			return fmt.Errorf("with it the layer has %d bytes: %w", a.bytes, a.limit.tooLarge())
		}
	}
	return nil
}

func (a *applier) count() error {
	a.inodes++
	if a.entries++; a.entries > a.limit.entries {
		return fmt.Errorf("layer has more than %d entries (maxLayerEntries): %w", a.limit.entries, errdefs.ErrResourceExhausted)
	}
	return a.take(amount{inodes: 1})
}

// take asks for space before something is made.
func (a *applier) take(want amount) error {
	if a.limit.take == nil {
		return nil
	}
	return a.limit.take(want)
}

func isRegular(t byte) bool {
	return t == tar.TypeReg || t == 0 || t == tar.TypeCont || t == tar.TypeGNUSparse
}

// entry makes one entry.
func (a *applier) entry(ctx context.Context, hdr *tar.Header, r io.Reader) error {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if len(hdr.Name) > maxPath {
		return fmt.Errorf("path of %d bytes: %w", len(hdr.Name), unix.ENAMETOOLONG)
	}
	if hdr.Uid < 0 || hdr.Gid < 0 || int64(hdr.Uid) >= math.MaxUint32 || int64(hdr.Gid) >= math.MaxUint32 {
		// 2^32 would become root's, and 2^32-1 means "leave as it is" to chown.
		return fmt.Errorf("owner %d:%d is no id of Linux", hdr.Uid, hdr.Gid)
	}
	name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
	if name == "" {
		if hdr.Typeflag != tar.TypeDir {
			return nil // the root is a directory and stays one
		}
		a.rootSeen = true
		return a.dirMeta(int(a.root.Fd()), "", hdr)
	}
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	if len(base) > maxName {
		return fmt.Errorf("name of %d bytes: %w", len(base), unix.ENAMETOOLONG)
	}
	for _, part := range strings.Split(dir, "/") {
		if strings.HasPrefix(part, whiteoutMeta) {
			return nil // inside of what AUFS keeps for itself
		}
		if strings.HasPrefix(part, whiteout) {
			return fmt.Errorf("%q is the name of a whiteout, not of a directory", part)
		}
	}
	switch {
	case base == whiteoutOpq:
		return a.opaque(dir)
	case strings.HasPrefix(base, whiteoutMeta):
		return nil // such as .wh..wh.plnk of AUFS
	case strings.HasPrefix(base, whiteout):
		return a.whiteout(dir, strings.TrimPrefix(base, whiteout))
	}
	parent, err := a.parent(dir)
	if err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeDir {
		return a.directory(parent, base, name, hdr)
	}
	if err := a.make(ctx, parent, base, hdr, r); err != nil {
		return err
	}
	delete(a.times, name)
	delete(a.implicit, name)
	return nil
}

// make makes what is not a directory, replacing what is there: of several entries the last wins.
func (a *applier) make(ctx context.Context, parent int, base string, hdr *tar.Header, r io.Reader) error {
	mode := uint32(hdr.Mode) & 0o7777
	switch {
	case isRegular(hdr.Typeflag):
		return a.file(ctx, parent, base, hdr, r)
	case hdr.Typeflag == tar.TypeSymlink:
		if len(hdr.Linkname) >= maxPath {
			return fmt.Errorf("link of %d bytes: %w", len(hdr.Linkname), unix.ENAMETOOLONG)
		}
		if err := a.replacing(parent, base, func() error { return unix.Symlinkat(hdr.Linkname, parent, base) }); err != nil {
			return err
		}
	case hdr.Typeflag == tar.TypeLink:
		return a.hardLink(parent, base, hdr.Linkname)
	case hdr.Typeflag == tar.TypeChar, hdr.Typeflag == tar.TypeBlock:
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return fmt.Errorf("device number %d:%d is none of Linux", hdr.Devmajor, hdr.Devminor)
		}
		if hdr.Typeflag == tar.TypeChar && hdr.Devmajor == 0 && hdr.Devminor == 0 {
			return errors.New("character device 0:0 would be a whiteout to overlayfs")
		}
		kind := uint32(unix.S_IFCHR)
		if hdr.Typeflag == tar.TypeBlock {
			kind = unix.S_IFBLK
		}
		dev := int(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)))
		if err := a.replacing(parent, base, func() error { return unix.Mknodat(parent, base, kind|0o600, dev) }); err != nil {
			return err
		}
	case hdr.Typeflag == tar.TypeFifo:
		if err := a.replacing(parent, base, func() error { return unix.Mknodat(parent, base, unix.S_IFIFO|0o600, 0) }); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown type %q", hdr.Typeflag)
	}
	if err := unix.Fchownat(parent, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if hdr.Typeflag != tar.TypeSymlink {
		if err := unix.Fchmodat(parent, base, mode, 0); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	if err := setXattrs(func() string { return fmt.Sprintf("/proc/self/fd/%d/%s", parent, base) }, hdr); err != nil {
		return err
	}
	return setTimes(parent, base, hdr)
}

// file makes a regular file. It is made as it should be, and then only mended where it is not: owner and mode mostly are
// right, and setting them again costs as much as making the file.
func (a *applier) file(ctx context.Context, parent int, base string, hdr *tar.Header, r io.Reader) error {
	mode := uint32(hdr.Mode) & 0o7777
	var fd int
	err := a.replacing(parent, base, func() (err error) {
		fd, err = unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		return err
	})
	if err != nil {
		return err
	}
	if err := a.fill(ctx, fd, mode, hdr, r); err != nil {
		unix.Close(fd)
		return err
	}
	return unix.Close(fd)
}

// fill gives a file that was just made its content and what else it should have.
func (a *applier) fill(ctx context.Context, fd int, mode uint32, hdr *tar.Header, r io.Reader) error {
	if err := a.copy(ctx, fd, hdr, r); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if int64(st.Uid) != int64(hdr.Uid) || int64(st.Gid) != int64(hdr.Gid) {
		if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
		st.Mode = 0 // which may have dropped setuid bits and capabilities
	}
	if st.Mode&0o7777 != mode || st.Mode == 0 {
		if err := unix.Fchmod(fd, mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	if err := setXattrs(func() string { return fmt.Sprintf("/proc/self/fd/%d", fd) }, hdr); err != nil {
		return err
	}
	access, mod := entryTimes(hdr)
	return setFileTimes(fd, access, mod)
}

// copy writes a file's content. Blocks of zeros of a sparse entry become holes.
func (a *applier) copy(ctx context.Context, fd int, hdr *tar.Header, r io.Reader) error {
	sparse := isSparse(hdr)
	var at int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := 0, error(nil)
		for n < len(a.buf) && err == nil {
			var m int
			m, err = r.Read(a.buf[n:])
			n += m
		}
		if err := a.take(amount{bytes: int64(n)}); err != nil {
			return err
		}
		for chunk := a.buf[:n]; len(chunk) > 0; {
			block := chunk
			if sparse {
				block = chunk[:min(len(chunk), 4096)]
			}
			if !sparse || !isZero(block) {
				if werr := writeAll(fd, block, at); werr != nil {
					return werr
				}
			}
			at += int64(len(block))
			chunk = chunk[len(block):]
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if sparse {
		return unix.Ftruncate(fd, at)
	}
	return nil
}

func writeAll(fd int, p []byte, at int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		p, at = p[n:], at+int64(n)
	}
	return nil
}

func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// zeros is a block of a hole. Comparing with it is many times faster than a loop, and a small archive can claim much.
var zeros [4096]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

// hardLink links to a file of this layer. The name is resolved inside; a symlink at its end is linked itself.
func (a *applier) hardLink(parent int, base, target string) error {
	if len(target) >= maxPath {
		return fmt.Errorf("link of %d bytes: %w", len(target), unix.ENAMETOOLONG)
	}
	name := strings.TrimPrefix(path.Clean("/"+target), "/")
	if name == "" {
		return errors.New("hard link to the root directory")
	}
	dir, last := path.Split(name)
	tfd, err := a.openInside(strings.TrimSuffix(dir, "/"))
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(target), err)
	}
	defer unix.Close(tfd)
	var st, here unix.Stat_t
	if err := unix.Fstatat(tfd, last, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("hard link to %s: %w", quote(target), err)
	}
	if isWhiteout(&st) || st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return fmt.Errorf("hard link to %s, which is not a file of this layer", quote(target))
	}
	if unix.Fstatat(parent, base, &here, unix.AT_SYMLINK_NOFOLLOW) == nil && here.Ino == st.Ino && here.Dev == st.Dev {
		return nil // onto itself: removing what is there would remove the target
	}
	return a.replacing(parent, base, func() error { return unix.Linkat(tfd, last, parent, base, 0) })
}

// replacing runs create, and once more after removing what is in its way.
func (a *applier) replacing(parent int, base string, create func() error) error {
	err := create()
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	if err := a.remove(parent, base); err != nil {
		return err
	}
	return create()
}

// remove deletes an earlier entry of this layer, with all below it.
func (a *applier) remove(parent int, base string) error {
	a.replaced = true
	err := unix.Unlinkat(parent, base, 0)
	if errors.Is(err, unix.EISDIR) {
		return os.RemoveAll(fmt.Sprintf("/proc/self/fd/%d/%s", parent, base))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// parent returns a descriptor of a directory, making what is missing of it. It is valid until the next call.
func (a *applier) parent(dir string) (int, error) {
	if a.parentFD >= 0 && a.parentName == dir {
		return a.parentFD, nil
	}
	a.forgetParent()
	fd, err := a.openInside(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		fd, err = a.makeParents(dir)
	}
	if err != nil {
		return -1, fmt.Errorf("directory %s: %w", quote(dir), err)
	}
	a.parentName, a.parentFD = dir, fd
	return fd, nil
}

func (a *applier) forgetParent() {
	if a.parentFD >= 0 {
		unix.Close(a.parentFD)
	}
	a.parentName, a.parentFD = "", -1
}

// openInside opens a directory. Symbolic links, absolute ones too, and ".." stay inside.
func (a *applier) openInside(dir string) (int, error) {
	if dir == "" {
		dir = "."
	}
	for {
		fd, err := unix.Openat2(int(a.root.Fd()), dir, &unix.OpenHow{
			Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolveInside,
		})
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		return fd, err
	}
}

// makeParents makes a directory and those above it. Links that lead to what is not there yet are followed as far as
// there are any, inside: the layer below may have their targets.
func (a *applier) makeParents(dir string) (int, error) {
	full, err := securejoin.SecureJoin(a.root.Name(), dir)
	if err != nil {
		return -1, err
	}
	rel := strings.Trim(strings.TrimPrefix(full, a.root.Name()), "/")
	cur, err := a.openInside("")
	if err != nil {
		return -1, err
	}
	var name string
	for _, part := range strings.Split(rel, "/") {
		if part == "" {
			continue
		}
		name = path.Join(name, part)
		next, err := a.makeParent(cur, part, name)
		unix.Close(cur)
		if err != nil {
			return -1, err
		}
		cur = next
	}
	return cur, nil
}

func (a *applier) makeParent(parent int, base, name string) (int, error) {
	err := unix.Mkdirat(parent, base, 0o755)
	hides := false
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return -1, err
		}
		if isWhiteout(&st) {
			hides = true
			if err := unix.Unlinkat(parent, base, 0); err != nil {
				return -1, err
			}
			err = unix.Mkdirat(parent, base, 0o755)
		}
	}
	made := err == nil
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if !made {
		return fd, nil
	}
	if err := a.count(); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if err := unix.Fchmod(fd, 0o755); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if hides {
		if err := unix.Fsetxattr(fd, opaqueXattr, []byte("y"), 0); err != nil {
			unix.Close(fd)
			return -1, err
		}
	} else if !a.implicit[name] {
		a.implicit[name] = true
		a.order = append(a.order, name)
	}
	return fd, nil
}

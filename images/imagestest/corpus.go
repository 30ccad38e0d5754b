package imagestest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// HostileLayer is a layer that tries to get out, or that others have been known to unpack wrongly.
type HostileLayer struct {
	Name string
	Tar  []byte
	// Refused: it must not unpack.
	Refused bool
	// Entry is the name, or how it begins, of the entry that it is refused for; "" where it is none in particular.
	Entry string
	// Check, if not nil, looks at the directory that it was unpacked to.
	Check func(root string) error
}

// Corpus returns the hostile layers. outside is the path of a directory that they try to reach; the root that they are
// unpacked to should lie beside it.
func Corpus(outside string) []HostileLayer {
	up := "../" + filepath.Base(outside)
	long := strings.Repeat("n", 256)
	var chain []Entry
	for i := range 300 {
		chain = append(chain, Symlink(fmt.Sprintf("l%d", i), fmt.Sprintf("l%d", i+1)))
	}
	var opaques []Entry
	opaques = append(opaques, Dir("d"), File("d/f", "x"))
	for range 2000 {
		opaques = append(opaques, File("d/.wh..wh..opq", ""))
	}
	return []HostileLayer{
		{Name: "dotdot", Tar: Tar(File("../dotdot", "x"), File("../../../../etc/dotdot", "x")), Check: all(isFile("dotdot"), isFile("etc/dotdot"))},
		{Name: "absolute", Tar: Tar(File(outside+"/etc/passwd", "x")), Check: isFile(outside + "/etc/passwd")},
		{Name: "dotdot inside", Tar: Tar(File("a/../../b", "x")), Check: isFile("b")},
		{Name: "root replaced by file", Tar: Tar(File(".", "x"), Symlink("//", "x").With(func(h *tar.Header) { h.Name = "//." }), File("f", "y")), Check: isFile("f")},
		{Name: "root replaced by symlink", Tar: Tar(Symlink(".", outside), Symlink("a/..", outside), File("etc/passwd", "x")), Check: isFile("etc/passwd")},
		{Name: "root's own mode", Tar: Tar(Dir(".").Mode(0o711).Owner(7, 8)), Check: hasMode(".", unix.S_IFDIR|0o711, 7, 8)},

		{Name: "symlink parent, absolute", Tar: Tar(Symlink("a", outside), File("a/etc/passwd", "x")), Check: isFile(outside + "/etc/passwd")},
		{Name: "symlink parent, relative", Tar: Tar(Symlink("a", up), File("a/etc/passwd", "x")), Check: isFile(filepath.Base(outside) + "/etc/passwd")},
		{Name: "symlink parent, to root", Tar: Tar(Symlink("a", "/"), File("a/f", "x")), Check: isFile("f")},
		{Name: "symlink parent, dangling", Tar: Tar(Symlink("var/run", "/run"), File("var/run/f", "x")), Check: isFile("run/f")},
		{Name: "directory by two names", Tar: Tar(Symlink("a", "/"), Dir("b").With(at(5)), Dir("a/b").With(at(6)), Dir("c").With(at(7))), Check: all(hasTime("b", 6), hasTime("c", 7))},
		{Name: "symlink chain, short", Tar: Tar(Symlink("a", "b"), Symlink("b", "../../c"), Dir("c"), File("a/f", "x")), Check: isFile("c/f")},
		{Name: "symlink chain of 300", Tar: Tar(append(chain, Dir("l300"), File("l0/f", "x"))...), Refused: true, Entry: "l0/f"},
		{Name: "symlink loop", Tar: Tar(Symlink("a", "b"), Symlink("b", "a"), File("a/f", "x")), Refused: true, Entry: "a/f"},
		{Name: "symlink overwritten by file", Tar: Tar(Symlink("a", outside+"/etc/passwd"), File("a", "x")), Check: isFile("a")},
		{Name: "symlink overwritten by dir", Tar: Tar(Symlink("a", outside), Dir("a"), File("a/f", "x")), Check: all(isDir("a"), isFile("a/f"))},
		{Name: "dir overwritten by symlink", Tar: Tar(Dir("a"), File("a/g", "x"), Symlink("a", outside), File("a/etc/passwd", "x")), Check: all(isLink("a", outside), isFile(outside+"/etc/passwd"))},
		{Name: "chmod through symlink", Tar: Tar(Symlink("a", outside+"/etc/passwd").Mode(0o4777).Owner(5, 5)), Check: isLink("a", outside+"/etc/passwd")},
		{Name: "attributes through symlink", Tar: Tar(Symlink("a", outside+"/tool").Xattr("user.x", "y")), Check: isLink("a", outside+"/tool")},
		{Name: "whiteout through symlink", Tar: Tar(Symlink("a", outside), File("a/.wh.tool", "")), Check: isWhiteout(outside + "/tool")},
		{Name: "opaque through symlink", Tar: Tar(Symlink("a", up+"/dir"), File("a/.wh..wh..opq", "")), Check: isOpaque(filepath.Base(outside) + "/dir")},

		{Name: "hard link to ..", Tar: Tar(HardLink("a", up+"/etc/passwd")), Refused: true, Entry: "a"},
		{Name: "hard link, absolute", Tar: Tar(HardLink("a", outside+"/etc/shadow")), Refused: true, Entry: "a"},
		{Name: "hard link through symlink", Tar: Tar(Symlink("s", outside+"/etc"), HardLink("a", "s/shadow")), Refused: true, Entry: "a"},
		{Name: "hard link to symlink, then written", Tar: Tar(Symlink("s", outside+"/etc/passwd"), HardLink("a", "s"), File("a", "x")), Check: all(isLink("s", outside+"/etc/passwd"), isFile("a"))},
		{Name: "hard link to symlink", Tar: Tar(Symlink("s", "t"), HardLink("a", "s")), Check: isLink("a", "t")},
		{Name: "hard link to root", Tar: Tar(HardLink("a", "/")), Refused: true, Entry: "a"},
		{Name: "hard link to directory", Tar: Tar(Dir("d"), HardLink("a", "d")), Refused: true, Entry: "a"},
		{Name: "hard link to nothing", Tar: Tar(HardLink("a", "b")), Refused: true, Entry: "a"},
		{Name: "hard link to itself", Tar: Tar(File("a", "x"), HardLink("a", "./a")), Check: isFile("a")},
		{Name: "hard link to whiteout", Tar: Tar(File(".wh.w", ""), HardLink("a", "w")), Refused: true, Entry: "a"},
		{Name: "hard link", Tar: Tar(File("d/a", "x"), HardLink("b", "/d/a")), Check: isFile("b")},

		{Name: "file, then its whiteout", Tar: Tar(File("f", "x"), File(".wh.f", "")), Check: isFile("f")},
		{Name: "whiteout, then its file", Tar: Tar(File(".wh.f", ""), File("f", "x")), Check: isFile("f")},
		{Name: "whiteout twice", Tar: Tar(File(".wh.f", ""), File(".wh.f", "")), Check: isWhiteout("f")},
		{Name: "whiteout, then its dir", Tar: Tar(File(".wh.d", ""), Dir("d"), File("d/f", "x")), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "whiteout, then a file below", Tar: Tar(File(".wh.d", ""), File("d/f", "x")), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "dir, then its whiteout", Tar: Tar(Dir("d"), File("d/f", "x"), File(".wh.d", "")), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "opaque first", Tar: Tar(File("d/.wh..wh..opq", ""), File("d/f", "x")), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "opaque last", Tar: Tar(Dir("d"), File("d/f", "x"), File("d/.wh..wh..opq", "")), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "opaque 2000 times", Tar: Tar(opaques...), Check: all(isFile("d/f"), isOpaque("d"))},
		{Name: "aufs plnk", Tar: Tar(Dir(".wh..wh.plnk"), File(".wh..wh.plnk/1.2", "x"), File(".wh..wh.aufs", "")), Check: isEmpty("")},
		{Name: "whiteout of nothing", Tar: Tar(File("d/.wh.", "")), Refused: true, Entry: "d/.wh."},
		{Name: "whiteout of .", Tar: Tar(File("d/.wh..", "")), Refused: true, Entry: "d/.wh.."},
		{Name: "whiteout of ..", Tar: Tar(File("d/.wh...", "")), Refused: true, Entry: "d/.wh..."},
		{Name: "whiteout as directory", Tar: Tar(File(".wh.d/f", "x")), Refused: true, Entry: ".wh.d/f"},
		{Name: "char 0:0", Tar: Tar(Char("c", 0, 0)), Refused: true, Entry: "c"},

		{Name: "overlay attributes", Tar: Tar(
			File("f", "x").Xattr("trusted.overlay.redirect", "/etc").Xattr("user.overlay.redirect", "/etc").Xattr("trusted.other", "z").Xattr("user.mine", "kept"),
			Dir("d").Xattr("trusted.overlay.opaque", "y").Xattr("user.overlay.opaque", "y"),
			File("g", "x").Xattr("security.selinux", "system_u:object_r:shadow_t:s0").Xattr("security.ima", "z"),
		), Check: all(hasXattrs("f", "user.mine"), hasXattrs("d"), hasXattrs("g"))},
		{Name: "file capability", Tar: Tar(File("f", "x").Mode(0o755).Xattr("security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")), Check: hasXattrs("f", "security.capability")},

		{Name: "devices", Tar: Tar(Char("null", 1, 3), Block("sda", 8, 0), Fifo("p")), Check: all(hasMode("null", unix.S_IFCHR|0o666, 0, 0), hasMode("sda", unix.S_IFBLK|0o660, 0, 0), hasMode("p", unix.S_IFIFO|0o644, 0, 0))},
		{Name: "device number beyond Linux", Tar: Tar(Char("c", 1<<20, 1)), Refused: true, Entry: "c"},
		{Name: "setuid and sticky", Tar: Tar(File("su", "x").Mode(0o4755), File("sg", "x").Mode(0o2755).Owner(3, 4), Dir("t").Mode(0o1777)), Check: all(hasMode("su", unix.S_IFREG|0o4755, 0, 0), hasMode("sg", unix.S_IFREG|0o2755, 3, 4), hasMode("t", unix.S_IFDIR|0o1777, 0, 0))},
		{Name: "uid 2^31", Tar: Tar(File("f", "x").Owner(1<<31, 1<<31)), Check: hasMode("f", unix.S_IFREG|0o644, 1<<31, 1<<31)},
		{Name: "uid 2^32-1", Tar: Tar(File("f", "x").Owner(1<<32-1, 0)), Refused: true, Entry: "f"},
		{Name: "uid 2^32", Tar: Tar(File("f", "x").Owner(1<<32, 0)), Refused: true, Entry: "f"},
		{Name: "gid 2^32", Tar: Tar(Dir("d").Owner(0, 1<<32)), Refused: true, Entry: "d"},
		{Name: "uid -1", Tar: Tar(Symlink("f", "x").With(func(h *tar.Header) { h.Uid, h.Format = -1, tar.FormatGNU })), Refused: true, Entry: "f"},

		{Name: "file, then a directory", Tar: Tar(File("a", "x"), Dir("a"), File("a/f", "y")), Check: isFile("a/f")},
		{Name: "file, then one below", Tar: Tar(File("a", "x"), File("a/f", "y")), Refused: true, Entry: "a/f"},
		{Name: "directory, then a file", Tar: Tar(File("a/b/c", "x"), File("a", "y")), Check: isFile("a")},
		{Name: "duplicates", Tar: Tar(File("a", "one"), File("a", "two")), Check: contains("a", "two")},
		{Name: "name of 256", Tar: Tar(File(long, "x")), Refused: true, Entry: long},
		{Name: "path of 5000", Tar: Tar(File(strings.Repeat("d/", 2500)+"f", "x")), Refused: true, Entry: strings.Repeat("d/", 150)},
		{Name: "unknown type", Tar: Tar(File("f", "").With(func(h *tar.Header) { h.Typeflag = 'Z' })), Refused: true, Entry: "f"},
		{Name: "sparse", Tar: Tar(GNUSparse("f", 400<<20, 300<<20, "data")), Check: isSparse("f", 400<<20)},
		{Name: "cut off in a header", Tar: Tar(File("f", "x"))[:100], Refused: true},
		{Name: "cut off in a file", Tar: Tar(File("f", strings.Repeat("x", 4000)))[:2048], Refused: true, Entry: "f"},
		{Name: "no archive", Tar: []byte(strings.Repeat("not a tar archive. ", 100)), Refused: true},
		{Name: "empty archive", Tar: Tar(), Check: isEmpty("")},
		{Name: "no bytes", Tar: []byte{}, Check: isEmpty("")},
	}
}

// GNUSparse is a sparse file of the old GNU kind: size bytes, all zero but for data at offset at.
func GNUSparse(name string, size, at int64, data string) Entry {
	h := make([]byte, 512)
	octal := func(off, n int, v int64) { copy(h[off:], fmt.Sprintf("%0*o\x00", n-1, v)) }
	copy(h, name)
	octal(100, 8, 0o644)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, int64(len(data)))
	octal(136, 12, Epoch.Unix())
	h[156] = tar.TypeGNUSparse
	copy(h[257:], "ustar  \x00")
	octal(386, 12, at)
	octal(398, 12, int64(len(data)))
	octal(410, 12, size) // by this empty piece GNU tar knows the end
	octal(422, 12, 0)
	octal(483, 12, size)
	copy(h[148:], "        ")
	var sum int64
	for _, b := range h {
		sum += int64(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	body := make([]byte, (len(data)+511)/512*512)
	copy(body, data)
	return Entry{Header: tar.Header{Name: name}, Raw: append(h, body...)}
}

type check = func(root string) error

func all(checks ...check) check {
	return func(root string) error {
		var errs []error
		for _, c := range checks {
			errs = append(errs, c(root))
		}
		return errors.Join(errs...)
	}
}

func stat(root, name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
		return st, fmt.Errorf("%s: %w", name, err)
	}
	return st, nil
}

func isKind(name string, kind uint32) check {
	return func(root string) error {
		st, err := stat(root, name)
		if err == nil && st.Mode&unix.S_IFMT != kind {
			err = fmt.Errorf("%s has mode %o", name, st.Mode)
		}
		return err
	}
}

func isFile(name string) check { return isKind(name, unix.S_IFREG) }
func isDir(name string) check  { return isKind(name, unix.S_IFDIR) }

func isLink(name, to string) check {
	return func(root string) error {
		got, err := os.Readlink(filepath.Join(root, name))
		if err == nil && got != to {
			err = fmt.Errorf("%s leads to %q, not %q", name, got, to)
		}
		return err
	}
}

func isWhiteout(name string) check {
	return func(root string) error {
		st, err := stat(root, name)
		if err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0) {
			err = fmt.Errorf("%s is no whiteout: mode %o, device %x", name, st.Mode, st.Rdev)
		}
		return err
	}
}

func isOpaque(name string) check {
	return func(root string) error {
		value := make([]byte, 8)
		n, err := unix.Lgetxattr(filepath.Join(root, name), "trusted.overlay.opaque", value)
		if err != nil || string(value[:n]) != "y" {
			return fmt.Errorf("%s is not opaque: %w", name, err)
		}
		return nil
	}
}

func isEmpty(name string) check {
	return func(root string) error {
		entries, err := os.ReadDir(filepath.Join(root, name))
		if err == nil && len(entries) != 0 {
			err = fmt.Errorf("%s has %v", name, entries)
		}
		return err
	}
}

func hasMode(name string, mode, uid, gid uint32) check {
	return func(root string) error {
		st, err := stat(root, name)
		if err == nil && (st.Mode != mode || st.Uid != uid || st.Gid != gid) {
			err = fmt.Errorf("%s: mode %o, owner %d:%d; want %o, %d:%d", name, st.Mode, st.Uid, st.Gid, mode, uid, gid)
		}
		return err
	}
}

// at sets the time of an entry, in seconds since 1970.
func at(sec int64) func(*tar.Header) {
	return func(h *tar.Header) { h.ModTime = time.Unix(sec, 0) }
}

func hasTime(name string, sec int64) check {
	return func(root string) error {
		st, err := stat(root, name)
		if err == nil && st.Mtim.Sec != sec {
			err = fmt.Errorf("%s has the time %d, want %d", name, st.Mtim.Sec, sec)
		}
		return err
	}
}

func hasXattrs(name string, want ...string) check {
	return func(root string) error {
		if got := Xattrs(filepath.Join(root, name)); strings.Join(got, " ") != strings.Join(want, " ") {
			return fmt.Errorf("%s has the attributes %q, want %q", name, got, want)
		}
		return nil
	}
}

func contains(name, want string) check {
	return func(root string) error {
		data, err := fs.ReadFile(os.DirFS(root), name)
		if err == nil && string(data) != want {
			err = fmt.Errorf("%s has %q, want %q", name, data, want)
		}
		return err
	}
}

func isSparse(name string, size int64) check {
	return func(root string) error {
		st, err := stat(root, name)
		if err == nil && (st.Size != size || st.Blocks*512 > size/4) {
			err = fmt.Errorf("%s: size %d in %d bytes on disk", name, st.Size, st.Blocks*512)
		}
		return err
	}
}

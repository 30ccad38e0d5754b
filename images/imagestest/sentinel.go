package imagestest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Sentinel is a tree that nothing under test may touch.
type Sentinel struct {
	Dir  string
	hash string
}

// NewSentinel makes a tree of files, directories and links of several owners and modes in dir, which must not exist.
func NewSentinel(t testing.TB, dir string) *Sentinel {
	t.Helper()
	for _, d := range []string{"", "etc", "dir", "dir/empty"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"etc/passwd": 0o644, "etc/shadow": 0o600, "dir/file": 0o640, "tool": 0o755} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("sentinel "+name), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("etc/passwd", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	s := &Sentinel{Dir: dir}
	s.hash = TreeHash(t, dir)
	return s
}

// Check fails the test if anything in the tree has changed.
func (s *Sentinel) Check(t testing.TB) {
	t.Helper()
	if now := TreeHash(t, s.Dir); now != s.hash {
		t.Errorf("the tree outside was changed: hash %s, was %s", now, s.hash)
	}
}

// TreeHash hashes names, kinds, modes, owners, links, devices, times of change, attributes and contents of a tree.
func TreeHash(t testing.TB, dir string) string {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(h, "%q %o %d:%d %x %d %d.%d\n", rel, st.Mode, st.Uid, st.Gid, st.Rdev, st.Nlink, st.Mtim.Sec, st.Mtim.Nsec)
		for _, name := range Xattrs(path) {
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "  %q=%q\n", name, value[:n])
		}
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "  -> %q\n", to)
		case d.Type().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "  %x\n", sha256.Sum256(data))
		}
		return nil
	})
	if err != nil {
		t.Fatalf("hash of %s: %v", dir, err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Xattrs returns the names of the extended attributes of a file, sorted; none where there are none to be had.
func Xattrs(path string) []string {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return nil
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	return names
}

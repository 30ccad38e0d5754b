package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// Unpackers whose trees are compared on well-formed layers. Where they differ on purpose, the layers or what is compared
// leave it out; this is the whole list.
//
// Of all three:
//   - directories without an entry get the attributes of the layer below when an image is pulled, not here (see
//     inheritDirs), so that of them only the kind is compared;
//   - times before 1970 and access times: we and containerd bound the first, and nobody keeps the second alike.
//
// Of containerd's pkg/archive:
//   - the root directory's own entry, which it ignores;
//   - attributes outside of user. and security.capability, and those of overlayfs: it keeps them, we do not;
//   - sparse files of the GNU kind, which it refuses, and of the PAX kind, whose holes it writes out;
//   - a file and its whiteout in one layer, .wh..wh.plnk, owners of 2^32 and more: see imagestest.Corpus;
//   - owners of whiteouts;
//   - a directory in the place of a file of the same layer: ours is opaque, since the file had hidden what is below.
//
// Of GNU tar:
//   - whiteouts, which it takes for files;
//   - absolute symbolic links, and those with "..", which it makes last: nothing can be below them, their directories get
//     the time of then, and -P would follow them out;
//   - a directory with two entries: of its owner, mode, time and attributes it takes some from the first.
type unpacker struct {
	name     string
	features imagestest.Features
	blocks   bool // holes are compared
	root     bool
	unpack   func(t testing.TB, dir string, data []byte)
}

var unpackers = []unpacker{
	{
		name: "containerd", features: imagestest.Features{Whiteouts: true, AbsoluteLinks: true, Again: true, Implicit: true},
		unpack: func(t testing.TB, dir string, data []byte) {
			if _, err := archive.Apply(context.Background(), dir, bytes.NewReader(data), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)); err != nil {
				t.Fatalf("containerd's archive.Apply: %v", err)
			}
		},
	},
	{
		name: "tar", features: imagestest.Features{Replaced: true, Holes: true, Implicit: true}, blocks: true, root: true,
		unpack: func(t testing.TB, dir string, data []byte) {
			cmd := exec.Command("tar", "--extract", "--file=-", "--directory="+dir, "--same-permissions", "--same-owner", "--numeric-owner",
				"--xattrs", "--xattrs-include=*", "--delay-directory-restore", "--warning=no-timestamp")
			cmd.Stdin = bytes.NewReader(data)
			cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("tar: %v: %s", err, out)
			}
		},
	},
}

// compare unpacks one generated layer twice.
func (u unpacker) compare(t testing.TB, seed uint64) {
	entries := imagestest.RandomLayer(seed, u.features)
	if u.root {
		entries = append([]imagestest.Entry{imagestest.Dir(".").Mode(0o751).Owner(3, 4)}, entries...)
	}
	data := imagestest.Tar(entries...)
	base := t.TempDir()
	theirs := filepath.Join(base, "theirs")
	if err := os.Mkdir(theirs, 0o755); err != nil {
		t.Fatal(err)
	}
	u.unpack(t, theirs, data)
	a, ours, err := applyTar(t, base, data, defaultBounds)
	if err != nil {
		t.Fatalf("seed %d: refused: %v", seed, err)
	}
	implicit := a.implicitDirs()
	want, got := u.describe(t, theirs, implicit), u.describe(t, ours, implicit)
	for name, line := range want {
		if got[name] != line {
			t.Errorf("seed %d: %q:\n  ours %s\n  %s %s", seed, name, got[name], u.name, line)
		}
	}
	for name, line := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("seed %d: %q: only ours has it: %s", seed, name, line)
		}
	}
}

// describe lists all of a tree that the comparison is about.
func (u unpacker) describe(t testing.TB, dir string, implicit []string) map[string]string {
	t.Helper()
	tree, first := map[string]string{}, map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(strings.TrimPrefix(path, dir), "/")
		if name == "" && !u.root {
			return nil
		}
		if d.IsDir() && slices.Contains(implicit, name) {
			tree[name] = "directory"
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		if isWhiteout(&st) {
			tree[name] = "whiteout"
			return nil
		}
		line := fmt.Sprintf("mode %o owner %d:%d device %x time %d.%09d", st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		if first[st.Ino] == "" {
			first[st.Ino] = name
		}
		line += fmt.Sprintf(" same as %q", first[st.Ino])
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" leads to %q", to)
		case d.Type().IsRegular():
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" size %d sum %.8x", st.Size, sha256.Sum256(content))
			if u.blocks {
				line += fmt.Sprintf(" blocks %d", st.Blocks)
			}
		}
		value := make([]byte, 64<<10)
		for _, attr := range imagestest.Xattrs(path) {
			if n, err := unix.Lgetxattr(path, attr, value); err == nil && (keepXattr(attr) || attr == opaqueXattr && u.features.Whiteouts) {
				line += fmt.Sprintf(" %s=%q", attr, value[:n])
			}
		}
		tree[name] = line
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// FuzzLayersAsOthersUnpackThem compares what we make of well-formed layers with what containerd and GNU tar make of them.
func FuzzLayersAsOthersUnpackThem(f *testing.F) {
	needRoot(f)
	for seed := range uint64(60) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		unpackers[seed%2].compare(t, seed)
	})
}

package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

var defaultBounds = bounds{bytes: DefaultMaxLayerBytes, entries: DefaultMaxLayerEntries}

// applyTar unpacks an archive to base/root.
func applyTar(t testing.TB, base string, data []byte, limit bounds) (*applier, string, error) {
	t.Helper()
	path := filepath.Join(base, "root")
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	root, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	a := newApplier(root, limit)
	defer a.close()
	return a, path, a.apply(context.Background(), bytes.NewReader(data))
}

// TestHostileLayers covers CVE-2021-32760, CVE-2025-47290, CVE-2021-29136, CVE-2020-10696, CVE-2026-50163 and the table of
// layers of the security research: whatever a layer says, nothing beside its own directory changes.
func TestHostileLayers(t *testing.T) {
	needRoot(t)
	names := map[string]bool{}
	for _, c := range imagestest.Corpus("/outside") {
		if names[c.Name] {
			t.Errorf("two cases are called %q", c.Name)
		}
		names[c.Name] = true
	}
	for i := range imagestest.Corpus("/outside") {
		base := t.TempDir()
		outside := filepath.Join(base, "outside")
		c := imagestest.Corpus(outside)[i]
		t.Run(c.Name, func(t *testing.T) {
			sentinel := imagestest.NewSentinel(t, outside)
			_, root, err := applyTar(t, base, c.Tar, defaultBounds)
			sentinel.Check(t)
			if c.Refused && err == nil {
				t.Error("unpacked, want it refused")
			}
			if !c.Refused && err != nil {
				t.Errorf("refused: %v", err)
			}
			if c.Refused && err != nil && c.Entry != "" && !strings.Contains(err.Error(), `entry "`+c.Entry) {
				t.Errorf("it is refused for the entry %q, of which there is nothing in: %v", c.Entry, err)
			}
			if c.Check != nil && err == nil {
				if err := c.Check(root); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestHostileLayersThroughPull has each of them come from a registry: a refused one leaves no image and no layer.
func TestHostileLayersThroughPull(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	outside := filepath.Join(s.root, tmpDir, "outside")
	sentinel := imagestest.NewSentinel(t, outside)
	for i, c := range imagestest.Corpus(outside) {
		if len(c.Tar) == 0 {
			continue
		}
		reg.Push("hostile", fmt.Sprint(i), imagestest.NewImage(imagestest.GzipLayer(c.Tar)))
		img, err := s.Pull(context.Background(), fmt.Sprintf("%s/hostile:%d", reg.Host(), i), nil)
		sentinel.Check(t)
		if c.Refused {
			if err == nil {
				t.Errorf("%s: pulled, want it refused", c.Name)
			} else if !errdefs.IsFailedPrecondition(err) && !errdefs.IsResourceExhausted(err) {
				t.Errorf("%s: %v: want it said that the image is at fault", c.Name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
		} else if c.Check != nil {
			if err := c.Check(s.path(layersDir, img.Layers[0].dir())); err != nil {
				t.Errorf("%s: %v", c.Name, err)
			}
		}
	}
	left, err := os.ReadDir(s.path(tmpDir))
	if err != nil || len(left) != 1 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

// TestSparseFilesOfTar has GNU tar write holes in each way that it knows.
func TestSparseFilesOfTar(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{8192, 1 << 20, 300 << 20} {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Truncate(400<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range []string{"--format=gnu", "--format=posix --sparse-version=0.0", "--format=posix --sparse-version=0.1", "--format=posix --sparse-version=1.0"} {
		t.Run(form, func(t *testing.T) {
			data, err := exec.Command("tar", append(strings.Fields(form), "-S", "-c", "-C", dir, "holes")...).Output()
			if err != nil {
				t.Fatal(err)
			}
			if len(data) > 64<<10 {
				t.Fatalf("an archive of %d bytes", len(data))
			}
			a, root, err := applyTar(t, t.TempDir(), data, defaultBounds)
			if err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			got, err := os.ReadFile(filepath.Join(root, "holes"))
			if err = errors.Join(err, unix.Lstat(filepath.Join(root, "holes"), &st)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("another content, of %d bytes", len(got))
			}
			if st.Blocks*512 > 64<<10 {
				t.Errorf("%d bytes on disk", st.Blocks*512)
			}
			if a.bytes < 400<<20 {
				t.Errorf("counted as %d bytes: a small archive could claim without end", a.bytes)
			}
		})
	}
}

// TestUnpackingIsLinear: GHSA-rp3h-jf77-q9p4: a layer costs what its entries cost, whatever is in its directories. Ten times as
// many take about ten times as long.
func TestUnpackingIsLinear(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		small   int
		archive func(n int) []byte
	}{
		"opaque marks in a full directory": {1000, func(n int) []byte {
			tree := []imagestest.Entry{imagestest.Dir("d")}
			for i := range n {
				tree = append(tree, imagestest.File(fmt.Sprintf("d/f%d", i), ""))
			}
			mark := imagestest.File("d/.wh..wh..opq", "").With(func(h *tar.Header) { h.Format = tar.FormatUSTAR })
			data := imagestest.Tar(tree...)
			data = append(data[:len(data)-1024], bytes.Repeat(imagestest.Tar(mark)[:512], n)...)
			return append(data, make([]byte, 1024)...)
		}},
		"files": {5000, func(n int) []byte {
			entries := make([]imagestest.Entry, n)
			for i := range entries {
				entries[i] = imagestest.File(fmt.Sprintf("%d/f%d", i/1000, i), "")
			}
			return imagestest.Tar(entries...)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cost := func(n int) time.Duration {
				data, base := c.archive(n), memoryDisk(t, "size=1g")
				before := processorTime(t)
				_, root, err := applyTar(t, base, data, defaultBounds)
				took := processorTime(t) - before
				if err != nil {
					t.Fatal(err)
				}
				files, err := filepath.Glob(filepath.Join(root, "*/f*"))
				if err != nil || len(files) != n {
					t.Errorf("%d files, %v; want %d", len(files), err, n)
				}
				return took
			}
			cost(c.small) // the first pays for what all use
			small, large := min(cost(c.small), cost(c.small)), cost(10*c.small)
			t.Logf("%d: %v, %d: %v", c.small, small, 10*c.small, large)
			if large > 30*small {
				t.Errorf("%d entries take %v, ten times as many %v", c.small, small, large)
			}
		})
	}
}

// processorTime is what this process has had so far: others do not make it longer.
func processorTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func TestLayerBounds(t *testing.T) {
	needRoot(t)
	var many []imagestest.Entry
	for i := range 20 {
		many = append(many, imagestest.File(fmt.Sprintf("f%d", i), ""))
	}
	deep := imagestest.File(strings.Repeat("d/", 100)+"f", "")
	for name, c := range map[string]struct {
		tar   []byte
		limit bounds
	}{
		"entries":            {imagestest.Tar(many...), bounds{bytes: 1 << 30, entries: 10}},
		"implicit parents":   {imagestest.Tar(deep), bounds{bytes: 1 << 30, entries: 10}},
		"bytes":              {imagestest.Tar(imagestest.File("f", strings.Repeat("x", 100_000))), bounds{bytes: 50_000, entries: 10}},
		"sparse, 4 bytes":    {imagestest.Tar(imagestest.GNUSparse("f", 8<<30-1, 0, "data")), bounds{bytes: 1 << 30, entries: 10}},
		"many small ones":    {imagestest.Tar(many...), bounds{bytes: 1 << 30, entries: 19}},
		"no space on device": {imagestest.Tar(imagestest.File("f", "x")), bounds{bytes: -1, entries: 10}},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := applyTar(t, t.TempDir(), c.tar, c.limit)
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("got %v, want ErrResourceExhausted", err)
			}
		})
	}
}

// TestBombs: what unpacks to more than is allowed is stopped, and costs neither memory nor time.
func TestBombs(t *testing.T) {
	needRoot(t)
	zeros := make([]byte, 64<<20)
	bomb := append(imagestest.Tar(imagestest.File("f", "x")), zeros...) // after the end of the archive
	for name, blob := range map[string][]byte{"gzip": imagestest.Gzip(bomb), "zstd": imagestest.Zstd(bomb)} {
		t.Run(name, func(t *testing.T) {
			root, err := os.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			l := &stagedLayer{root: root}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := time.Now()
			err = l.fill(context.Background(), bytes.NewReader(blob), digest.FromBytes(bomb), bounds{bytes: 1 << 20, entries: 10})
			if !errdefs.IsResourceExhausted(err) || time.Since(start) > 5*time.Second {
				t.Errorf("got %v after %v, want ErrResourceExhausted", err, time.Since(start))
			}
			runtime.ReadMemStats(&after)
			if made := after.TotalAlloc - before.TotalAlloc; made > 24<<20 {
				t.Errorf("it took %d MiB", made>>20)
			}
		})
	}
}

func TestCompressedForms(t *testing.T) {
	needRoot(t)
	tar := imagestest.Tar(imagestest.File("f", strings.Repeat("content ", 1000)))
	half := len(tar) / 2
	skippable := []byte{0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 'j', 'u', 'n', 'k'}
	for name, c := range map[string]struct {
		blob []byte
		ok   bool
	}{
		"plain":                      {tar, true},
		"gzip":                       {imagestest.Gzip(tar), true},
		"gzip, two members":          {append(imagestest.Gzip(tar[:half]), imagestest.Gzip(tar[half:])...), true},
		"gzip, garbage after":        {append(imagestest.Gzip(tar), "garbage"...), false},
		"gzip, cut off":              {imagestest.Gzip(tar)[:40], false},
		"zstd":                       {imagestest.Zstd(tar), true},
		"zstd, two frames":           {append(imagestest.Zstd(tar[:half]), imagestest.Zstd(tar[half:])...), true},
		"zstd, skippable first":      {append(bytes.Clone(skippable), imagestest.Zstd(tar)...), true},
		"zstd, skippable last":       {append(imagestest.Zstd(tar), skippable...), true},
		"zstd, cut off":              {imagestest.Zstd(tar)[:40], false},
		"zstd, window of 2 GiB":      {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 1, 0, 0}, false},
		"zstd, unknown dictionary":   {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0x21, 0x07, 0, 1, 0, 0}, false},
		"bzip2 is none of the three": {append([]byte("BZh91AY&SY"), make([]byte, 600)...), false},
	} {
		t.Run(name, func(t *testing.T) {
			root, err := os.Open(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			l := &stagedLayer{root: root}
			err = l.fill(context.Background(), bytes.NewReader(c.blob), digest.FromBytes(tar), defaultBounds)
			if c.ok && err != nil {
				t.Error(err)
			}
			if !c.ok && !errors.Is(err, errImage) {
				t.Errorf("got %v, want it refused as the image's fault", err)
			}
		})
	}
}

func TestWrongDiffIDIsRefused(t *testing.T) {
	needRoot(t)
	root, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	l := &stagedLayer{root: root}
	err = l.fill(context.Background(), bytes.NewReader(imagestest.Gzip(imagestest.Tar())), digest.FromString("else"), defaultBounds)
	if !errors.Is(err, errImage) || !strings.Contains(err.Error(), "diff id") {
		t.Errorf("got %v", err)
	}
}

// TestNoDecompressorFromPath: a program called unpigz or igzip in PATH does not get to see a layer.
func TestNoDecompressorFromPath(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	mark := filepath.Join(dir, "ran")
	for _, name := range []string{"unpigz", "igzip", "gzip", "zstd", "tar"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\ntouch "+mark+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x")), imagestest.ZstdLayer(imagestest.Tar(imagestest.File("g", "x")))))
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(mark); !os.IsNotExist(err) {
		t.Errorf("a program from PATH ran: %v", err)
	}
}

// TestDirectoryTimesAndInheritedModes: directories keep the times of their entries though files are made in them, and
// those without an entry look as in the layers below.
func TestDirectoryTimesAndInheritedModes(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(
		imagestest.Layer(imagestest.Dir(".").Mode(0o751), imagestest.Dir("d").Mode(0o700).Owner(11, 12).Xattr("user.k", "v"), imagestest.Dir("d/e").Mode(0o2770), imagestest.Dir("gone").Mode(0o700), imagestest.Dir("hidden/x").Mode(0o700)),
		imagestest.Layer(imagestest.File(".wh.gone", ""), imagestest.File("hidden/.wh..wh..opq", "")),
		imagestest.Layer(imagestest.File("d/e/f", "x"), imagestest.File("gone/f", "x"), imagestest.File("hidden/x/f", "x")),
	))
	img, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
	if err != nil {
		t.Fatal(err)
	}
	top := s.path(layersDir, img.Layers[2].dir())
	for name, want := range map[string]os.FileMode{".": 0o751, "d": 0o700, "d/e": 0o770 | os.ModeSetgid, "gone": 0o755, "hidden": 0o755, "hidden/x": 0o755} {
		st, err := os.Stat(filepath.Join(top, name))
		if err != nil || st.Mode() != want|os.ModeDir {
			t.Errorf("%s: %v, %v; want %v", name, st.Mode(), err, want)
		}
	}
	for _, name := range []string{"d", "d/e"} {
		st, err := os.Stat(filepath.Join(top, name))
		if err != nil || !st.ModTime().Equal(imagestest.Epoch) {
			t.Errorf("%s: time %v, %v", name, st.ModTime(), err)
		}
	}
}

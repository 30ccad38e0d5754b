package images

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/step"
)

func mustVerify(t *testing.T, s *Store, o VerifyOptions) *Report {
	t.Helper()
	r, err := s.Verify(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// wantWhole fails the test if a thorough verification finds anything.
func wantWhole(t *testing.T, s *Store) {
	t.Helper()
	r := mustVerify(t, s, VerifyOptions{Deep: true})
	for _, f := range r.Findings {
		t.Errorf("found %s", f)
	}
	if len(r.Unverifiable) > 0 {
		t.Errorf("without records: %v", r.Unverifiable)
	}
}

// richLayer has a file of each kind.
func richLayer() imagestest.LayerBlob {
	return imagestest.Layer(
		imagestest.Dir("etc").Mode(0o750).Owner(3, 4), imagestest.File("etc/passwd", "root:x:0:0").Xattr("user.mine", "v"),
		imagestest.File("bin/tool", strings.Repeat("tool ", 4000)).Mode(0o4755), imagestest.HardLink("bin/twin", "bin/tool"),
		imagestest.Symlink("link", "etc/passwd"), imagestest.Char("null", 1, 3), imagestest.Fifo("pipe"), imagestest.File("empty", ""),
		imagestest.File("etc/.wh.hosts", ""), imagestest.File("var/.wh..wh..opq", ""), imagestest.File("var/x", "y"),
		imagestest.GNUSparse("sparse", 1<<20, 1<<19, "data"), imagestest.File("odd\n\xff name", "z"),
	)
}

// TestVerifyFindsDamage: containerd#5854, #12302, harvester#4434, podman#8005. Whatever is done to a layer is found and said
// by its path; from then on the image is not there for a kubelet, cannot be mounted, and is told to be damaged; and the
// next pull fetches that layer and no other.
func TestVerifyFindsDamage(t *testing.T) {
	keep := func(path string, f func() error) error { // with the times that it had
		var st unix.Stat_t
		if err := errors.Join(unix.Lstat(path, &st), f()); err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
	}
	for name, c := range map[string]struct {
		path   string
		damage func(path string) error
		what   string
		deep   bool // only a thorough look finds it
	}{
		"truncated":        {"bin/tool", func(p string) error { return os.Truncate(p, 0) }, "has 0 bytes instead of 20000", false},
		"missing":          {"etc/passwd", os.Remove, "is missing", false},
		"missing with all": {"etc", os.RemoveAll, "is missing", false},
		"added":            {"etc/evil", func(p string) error { return os.WriteFile(p, nil, 0o644) }, "is not of the layer", false},
		"mode":             {"bin/tool", func(p string) error { return os.Chmod(p, 0o755) }, "has mode 0755 instead of 04755", false},
		"owner":            {"etc", func(p string) error { return os.Chown(p, 1, 4) }, "belongs to 1:4 instead of 3:4", false},
		"attribute":        {"etc/passwd", func(p string) error { return unix.Removexattr(p, "user.mine") }, "has other attributes", false},
		"opaque mark":      {"var", func(p string) error { return unix.Removexattr(p, opaqueXattr) }, "has other attributes", false},
		"whiteout":         {"etc/hosts", os.Remove, "is missing", false},
		"time":             {"empty", func(p string) error { return os.Chtimes(p, time.Time{}, time.Now()) }, "was changed later", false},
		"link":             {"link", func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/shadow", p)) }, `leads to "/etc/shadow"`, false},
		"kind":             {"empty", func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o644)) }, "is another kind of file", false},
		"hard link":        {"bin/tool", func(p string) error { return errors.Join(os.Remove(p), os.WriteFile(p, nil, 0o755)) }, "is another kind of file", false},
		"device": {"null", func(p string) error {
			return errors.Join(os.Remove(p), unix.Mknod(p, unix.S_IFCHR|0o666, 0x105), os.Chmod(p, 0o666))
		}, "is another device", false},
		"bit":                {"bin/tool", func(p string) error { return keep(p, func() error { return overwrite(p, 4097) }) }, "has other content", true},
		"bit in sparse file": {"sparse", func(p string) error { return keep(p, func() error { return overwrite(p, 10) }) }, "has other content", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "1")), richLayer()))
			img := mustPull(t, s, reg.Host()+"/a:b")
			wantWhole(t, s)
			if err := c.damage(s.path(layersDir, img.Layers[1].dir(), c.path)); err != nil {
				t.Fatal(err)
			}
			if c.deep {
				if r := mustVerify(t, s, VerifyOptions{}); r.Damaged() {
					t.Errorf("a quick look found %v: it is meant to read no contents", r.Findings)
				}
			}
			r := mustVerify(t, s, VerifyOptions{Deep: c.deep})
			if !r.Damaged() {
				t.Fatal("nothing found")
			}
			said := false
			for _, f := range r.Findings {
				t.Logf("found %s", f)
				right := f.Kind == FoundLayer && f.Layer == img.Layers[1] && len(f.Images) == 1 && f.Images[0] == img.ID
				if !right {
					t.Errorf("found %+v", f)
				}
				said = said || strings.HasPrefix(f.Path, c.path) && strings.Contains(f.What, c.what)
			}
			if name == "hard link" {
				said = len(r.Findings) > 0 // which of the two names is told depends on their order
			}
			if !said {
				t.Errorf("not said: %s %s", c.path, c.what)
			}
			wantMended(t, s, reg, reg.Host()+"/a:b", img, 1)
		})
	}
}

func overwrite(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("!"), at)
	return errors.Join(err, f.Close())
}

// wantMended: an image with one damaged layer is not there, until a pull fetches that layer alone.
func wantMended(t *testing.T, s *Store, reg *imagestest.Registry, ref string, img *Image, layer int) {
	t.Helper()
	if _, err := s.Image(ref); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("damaged image: %v, want it not found because it is damaged", err)
	}
	if n := len(s.Images()); n != 0 {
		t.Errorf("%d images are listed", n)
	}
	if err := s.Prepare("k", img.ID, nil); !errors.Is(err, errDamaged) || !errdefs.IsDataLoss(err) {
		t.Errorf("prepare: %v, want it said that the image is damaged", err)
	}
	before := reg.Count("GET", "/blobs/")
	again := mustPull(t, s, ref)
	if n := reg.Count("GET", "/blobs/") - before; again.ID != img.ID || n != 1 {
		t.Errorf("%d blobs fetched for %s, want one layer of %s", n, again.ID, img.ID)
	}
	wantWhole(t, s)
	if dir := s.path(layersDir, img.Layers[layer].dir()); !gone(dir) {
		t.Errorf("%s is still there", dir)
	}
	target := mountPoint(t)
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(context.Background(), "k", target)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(target, "below")); err != nil {
		t.Error(err)
	}
	if err := errors.Join(s.Unmount(target), s.Release("k"), s.Remove(context.Background(), ref)); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func gone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}

// TestContainerd11390_DamageFoundOnMount: containerd#11390, #8878, moby#52411. A layer that is gone is found when a container is made, or
// when its image is pulled though it is there; the error says so, and the next pull mends it.
func TestContainerd11390_DamageFoundOnMount(t *testing.T) {
	for _, how := range []string{"mount", "view", "pull"} {
		t.Run(how, func(t *testing.T) {
			s := openStore(t)
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "1")), imagestest.Layer(imagestest.File("f", "2"))))
			ref := reg.Host() + "/a:b"
			img := mustPull(t, s, ref)
			target := mountPoint(t)
			if err := s.Prepare("k", img.ID, nil); err != nil {
				t.Fatal(err)
			}
			if err := os.RemoveAll(s.path(layersDir, img.Layers[1].dir())); err != nil {
				t.Fatal(err)
			}
			var err error
			switch how {
			case "mount":
				err = s.Mount(context.Background(), "k", target)
			case "view":
				err = s.MountView(context.Background(), img.ID, target, nil)
			case "pull":
				if err := s.Release("k"); err != nil {
					t.Fatal(err)
				}
				mustPull(t, s, ref)
				wantWhole(t, s)
				return
			}
			if !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "pull the image again") || !strings.Contains(err.Error(), string(img.Layers[1])) {
				t.Errorf("got %v, want it said which layer is damaged and what to do", err)
			}
			if err := s.Release("k"); err != nil {
				t.Fatal(err)
			}
			wantMended(t, s, reg, ref, img, 1)
		})
	}
}

// TestRepairOfALayerInUse: the directory that a container's root file system is mounted from stays until it is released,
// also over a restart, and what is made meanwhile is made from the new one.
func TestRepairOfALayerInUse(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "right"))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	old, mended := mountPoint(t), mountPoint(t)
	if err := errors.Join(s.Prepare("old", img.ID, nil), s.Mount(context.Background(), "old", old)); err != nil {
		t.Fatal(err)
	}
	first := s.path(layersDir, img.Layers[0].dir())
	if err := overwrite(filepath.Join(first, "f"), 0); err != nil {
		t.Fatal(err)
	}
	r := mustVerify(t, s, VerifyOptions{Deep: true, Repair: true})
	if len(r.Findings) == 0 || r.Damaged() {
		t.Fatalf("found %v, want it repaired", r.Findings)
	}
	wantWhole(t, s)
	read := func(at, want string) {
		t.Helper()
		if data, err := os.ReadFile(filepath.Join(at, "f")); err != nil || string(data) != want {
			t.Errorf("%q, %v; want %q", data, err, want)
		}
	}
	read(old, "!ight")
	if err := errors.Join(s.Prepare("new", img.ID, nil), s.Mount(context.Background(), "new", mended)); err != nil {
		t.Fatal(err)
	}
	read(mended, "right")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	read(old, "!ight")
	read(mended, "right")
	wantWhole(t, s)
	if err := errors.Join(s.Unmount(old), s.Release("old")); err != nil {
		t.Fatal(err)
	}
	if !gone(first) {
		t.Error("the damaged directory stays when nothing is mounted from it")
	}
	read(mended, "right")
	if err := errors.Join(s.Unmount(mended), s.Release("new"), s.Remove(context.Background(), string(img.ID))); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestRetiredLayersGoBetweenChanges: beside one, it could be the blob that was just put in its place that goes.
func TestRetiredLayersGoBetweenChanges(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "right"))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	first := s.path(layersDir, img.Layers[0].dir())
	if err := errors.Join(s.Prepare("k", img.ID, nil), overwrite(filepath.Join(first, "f"), 0)); err != nil {
		t.Fatal(err)
	}
	if r := mustVerify(t, s, VerifyOptions{Deep: true, Repair: true}); len(r.Findings) == 0 || r.Damaged() {
		t.Fatalf("found %v, want it repaired", r.Findings)
	}
	s.change.Lock()
	released := make(chan error, 1)
	go func() { released <- s.Release("k") }()
	waitFor(t, "the root file system is given up", func() bool { return len(s.Keys()) == 0 })
	select {
	case err := <-released:
		t.Errorf("released beside a change: %v", err)
		released <- err
	case <-time.After(100 * time.Millisecond):
	}
	if gone(first) {
		t.Error("the directory went beside a change")
	}
	s.change.Unlock()
	if err := <-released; err != nil || !gone(first) {
		t.Errorf("after the change: %v, the directory is gone: %v", err, gone(first))
	}
}

// TestRepairFetchesJustWhatIsBroken, and says what it cannot.
func TestRepairFetchesJustWhatIsBroken(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	var layers []imagestest.LayerBlob
	for i := range 5 {
		layers = append(layers, imagestest.Layer(imagestest.File(fmt.Sprint(i), "x")))
	}
	reg.Push("a", "b", imagestest.NewImage(layers...))
	img := mustPull(t, s, reg.Host()+"/a:b")
	damage := func() {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(s.path(layersDir), s.layers[img.Layers[3]].dirName(img.Layers[3]), "3")); err != nil {
			t.Fatal(err)
		}
	}
	damage()
	before := reg.Count("GET", "/blobs/")
	r := mustVerify(t, s, VerifyOptions{Repair: true})
	if n := reg.Count("GET", "/blobs/") - before; len(r.Findings) == 0 || r.Damaged() || n != 1 {
		t.Errorf("%v, %d blobs fetched; want one layer", r.Findings, n)
	}
	damage()
	reg.RequireBasic("u", "p")
	r = mustVerify(t, s, VerifyOptions{Repair: true})
	if !r.Damaged() || !strings.Contains(r.Findings[0].Error, "401") && !strings.Contains(r.Findings[0].Error, "authorization") {
		t.Errorf("%+v, want it said why it could not be repaired", r.Findings)
	}
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", &Auth{Username: "u", Password: "p"}); err != nil {
		t.Error(err)
	}
	wantWhole(t, s)
}

// TestVerifyFindsBrokenRecords: what lies beside the layers.
func TestVerifyFindsBrokenRecords(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(s *Store, img *Image) error
		kind   string
	}{
		"tree lost":        {func(s *Store, i *Image) error { return os.Remove(s.path(recordsDir, i.Layers[0].dir()+treeExt)) }, FoundLayer},
		"tree changed":     {func(s *Store, i *Image) error { return overwrite(s.path(recordsDir, i.Layers[0].dir()+treeExt), 20) }, FoundLayer},
		"tape changed":     {func(s *Store, i *Image) error { return overwrite(s.path(recordsDir, i.Layers[0].dir()+tapeExt), 20) }, FoundLayer},
		"tape lost":        {func(s *Store, i *Image) error { return os.Remove(s.path(recordsDir, i.Layers[0].dir()+tapeExt)) }, FoundLayer},
		"blob changed":     {func(s *Store, i *Image) error { return overwrite(onlyFile(s.path(blobsDir)), 20) }, FoundBlob},
		"blob lost":        {func(s *Store, i *Image) error { return os.Remove(onlyFile(s.path(blobsDir))) }, FoundBlob},
		"reference":        {func(s *Store, _ *Image) error { s.refs["r.example/x:y"] = "sha256:" + someHex; return nil }, FoundReference},
		"leftover layer":   {func(s *Store, _ *Image) error { return os.Mkdir(s.path(layersDir, "sha256-feed"), 0o755) }, FoundLeftover},
		"leftover record":  {func(s *Store, _ *Image) error { return os.WriteFile(s.path(recordsDir, "x"), nil, 0o600) }, FoundLeftover},
		"document of none": {func(s *Store, _ *Image) error { return put(s, docsBucket, string(digest.FromString("x")), "x") }, FoundLeftover},
		"document changed": {func(s *Store, i *Image) error {
			return put(s, docsBucket, string(s.images[i.ID].Documents[0].Digest), "{}")
		}, FoundImage},
		"layer and document lost": {func(s *Store, i *Image) error {
			delete(s.layers, i.Layers[0])
			doc := s.images[i.ID].Documents[0].Digest
			return errors.Join(s.db.Update(func(tx *bolt.Tx) error {
				return errors.Join(tx.Bucket(layersBucket).Delete([]byte(i.Layers[0])), tx.Bucket(docsBucket).Delete([]byte(doc)))
			}), s.sweepFiles())
		}, FoundImage},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, func(o *Options) { o.KeepBlobs = true })
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", imagestest.NewImage(richLayer()))
			img := mustPull(t, s, reg.Host()+"/a:b")
			wantWhole(t, s)
			if err := c.damage(s, img); err != nil {
				t.Fatal(err)
			}
			r := mustVerify(t, s, VerifyOptions{Deep: true})
			if len(r.Findings) != 1 || r.Findings[0].Kind != c.kind {
				t.Errorf("found %v, want one of kind %s", r.Findings, c.kind)
			}
			r = mustVerify(t, s, VerifyOptions{Deep: true, Repair: true})
			if r.Damaged() {
				t.Errorf("not repaired: %+v", r.Findings)
			}
			mustPull(t, s, reg.Host()+"/a:b")
			wantWhole(t, s)
		})
	}
}

func onlyFile(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		return ""
	}
	return filepath.Join(dir, entries[0].Name())
}

// TestHostileLayersVerify: whatever odd things a layer does and is unpacked with, its records agree with it, and its
// archive is made again byte for byte, or not at all.
func TestHostileLayersVerify(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	tars := map[digest.Digest][]byte{}
	for i, c := range imagestest.Corpus(filepath.Join(s.root, tmpDir, "outside")) {
		if c.Refused || len(c.Tar) == 0 {
			continue
		}
		reg.Push("hostile", fmt.Sprint(i), imagestest.NewImage(imagestest.GzipLayer(c.Tar)))
		img := mustPull(t, s, fmt.Sprintf("%s/hostile:%d", reg.Host(), i))
		tars[digest.FromBytes(c.Tar)] = c.Tar
		r := mustVerify(t, s, VerifyOptions{Deep: true})
		for _, f := range r.Findings {
			t.Errorf("%s: found %s", c.Name, f)
		}
		rec := s.layers[img.Layers[0]]
		if rec.Tape == "" {
			t.Logf("%s: cannot be made again", c.Name)
			continue
		}
		var buf bytes.Buffer
		root, err := s.openLayer(img.Layers[0])
		if err != nil {
			t.Fatal(err)
		}
		tape, err := os.Open(s.recordFile(img.Layers[0], rec, tapeExt))
		if err != nil {
			t.Fatal(err)
		}
		if err := playTape(context.Background(), root, tape, &buf, nil); err != nil || !bytes.Equal(buf.Bytes(), c.Tar) {
			t.Errorf("%s: made again it is not what it was: %v", c.Name, err)
		}
		tape.Close()
		root.Close()
	}
	if len(tars) < 40 {
		t.Errorf("only %d layers", len(tars))
	}
}

// TestDamagedImagesAreForgotten: what nobody lists, nobody removes.
func TestDamagedImagesAreForgotten(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	shared := imagestest.Layer(imagestest.File("shared", "1"))
	reg.Push("a", "b", imagestest.NewImage(shared, imagestest.Layer(imagestest.File("f", "2"))))
	reg.Push("a", "c", imagestest.NewImage(shared))
	img := mustPull(t, s, reg.Host()+"/a:b")
	mustPull(t, s, reg.Host()+"/a:c")
	if err := os.Remove(s.path(layersDir, img.Layers[1].dir(), "f")); err != nil {
		t.Fatal(err)
	}
	mustVerify(t, s, VerifyOptions{})
	if err := s.collectUnused(); err != nil || len(leftovers(t, s)) != 2 {
		t.Errorf("at once: %v, %v; want it to wait for a pull", leftovers(t, s), err)
	}
	s.layers[img.Layers[1]].Since = time.Now().Add(1000 * forgetDamaged)
	if err := s.collectUnused(); err != nil || len(leftovers(t, s)) != 2 || time.Since(s.layers[img.Layers[1]].Since) > time.Minute {
		t.Errorf("after the clock was set back: %v, %v, damaged since %v", leftovers(t, s), err, s.layers[img.Layers[1]].Since)
	}
	s.layers[img.Layers[1]].Since = time.Now().Add(-2 * forgetDamaged)
	if err := s.collectUnused(); err != nil || len(leftovers(t, s)) != 1 || len(s.images) != 1 || len(s.Images()) != 1 {
		t.Errorf("hours later: %v, %v, %d images", leftovers(t, s), err, len(s.images))
	}
	mustPull(t, s, reg.Host()+"/a:b")
	wantWhole(t, s)
}

// TestDamageOfALayerThatWasMended: an export that reads a layer which is mended meanwhile finds what was wrong with it, and
// does not say it of the one that is there now.
func TestDamageOfALayerThatWasMended(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("long", strings.Repeat("x", 2<<20)), imagestest.File("short", "y")))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	written, mended := 0, false
	_, err := s.Export(context.Background(), []string{string(img.ID)}, onWrite(func(p []byte) (int, error) {
		if written += len(p); written > 1<<20 && !mended {
			mended = true
			if err := os.Truncate(s.path(layersDir, img.Layers[0].dir(), "short"), 0); err != nil {
				t.Fatal(err)
			}
			if r := mustVerify(t, s, VerifyOptions{Repair: true}); len(r.Findings) == 0 || r.Damaged() {
				t.Fatalf("found %v, want it repaired", r.Findings)
			}
		}
		return len(p), nil
	}))
	if !mended || !errors.Is(err, errDamaged) {
		t.Errorf("the export ends with %v, mended meanwhile: %v", err, mended)
	}
	if _, err := s.Image(string(img.ID)); err != nil {
		t.Errorf("after it was mended: %v", err)
	}
	wantWhole(t, s)
}

// TestPullOfWhatGoesMeanwhile: an image that is here is removed while it is pulled again, and then a layer that is here, too,
// is found damaged. The pull fetches what it lacks.
func TestPullOfWhatGoesMeanwhile(t *testing.T) {
	var s *Store
	var again *Image
	inherited := 0
	observe := func(e step.Event) {
		switch {
		case again == nil:
		case e.Step == "manifest" && inherited == 0:
			if err := s.Remove(context.Background(), string(again.ID)); err != nil {
				t.Error(err)
			}
		case e.Step == "inherit":
			if inherited++; inherited == 1 {
				s.mu.RLock()
				rec := s.layers[again.Layers[0]]
				s.mu.RUnlock()
				if err := s.markDamaged(again.Layers[0], rec, "by a test"); err != nil {
					t.Error(err)
				}
			}
		}
	}
	s = openStore(t, func(o *Options) { o.Observe = observe })
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.File("base", "1"))
	reg.Push("a", "base", imagestest.NewImage(base))
	reg.Push("a", "b", imagestest.NewImage(base, imagestest.Layer(imagestest.File("f", "2"))))
	mustPull(t, s, reg.Host()+"/a:base")
	again = mustPull(t, s, reg.Host()+"/a:b")
	if img := mustPull(t, s, reg.Host()+"/a:b"); img.ID != again.ID || inherited != 2 {
		t.Errorf("pulled %s, in %d times; want %s", img.ID, inherited, again.ID)
	}
	wantWhole(t, s)
}

type onWrite func([]byte) (int, error)

func (f onWrite) Write(p []byte) (int, error) { return f(p) }

// TestPinnedImagesAreNotForgotten: what a node may not get back stays, with all that is whole of it.
func TestPinnedImagesAreNotForgotten(t *testing.T) {
	from := openStore(t)
	reg := imagestest.NewRegistry(t)
	for _, name := range []string{"app", "pause"} {
		reg.Push(name, "1", imagestest.NewImage(imagestest.Layer(imagestest.File("whole", name)), imagestest.Layer(imagestest.File("f", name))))
	}
	mustPull(t, from, reg.Host()+"/app:1")
	archive, _ := exported(t, from, reg.Host()+"/app:1")
	s := openStore(t)
	app, err := imported(s, archive, ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range []*Image{app[0], mustPull(t, s, reg.Host()+"/pause:1")} {
		if err := os.Remove(s.path(layersDir, img.Layers[1].dir(), "f")); err != nil {
			t.Fatal(err)
		}
	}
	mustVerify(t, s, VerifyOptions{})
	for _, l := range s.layers {
		l.Since = time.Now().Add(-2 * forgetDamaged)
	}
	if err := s.collectUnused(); err != nil || len(leftovers(t, s)) != 4 || len(s.images) != 2 {
		t.Errorf("%v, %v, %d images", leftovers(t, s), err, len(s.images))
	}
	if again, err := imported(s, archive, ImportOptions{}); err != nil || again[0].ID != app[0].ID || !again[0].Pinned {
		t.Errorf("imported again: %+v, %v", again, err)
	}
}

// TestStoreOfAnEarlierVersion opens, runs its images, says what it cannot verify, and knows as much as others after the
// next pulls.
func TestStoreOfAnEarlierVersion(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(richLayer()))
	img := mustPull(t, s, reg.Host()+"/a:b")
	chain := img.Layers[0]
	rec, layer := s.images[img.ID], s.layers[chain]
	if err := errors.Join(
		put(s, imagesBucket, string(img.ID), fmt.Sprintf(`{"manifest":%q,"config":%s,"layers":[%q],"size":%d}`, rec.Manifest, rec.Config, chain, rec.Size)),
		put(s, layersBucket, string(chain), fmt.Sprintf(`{"diffID":%q,"bytes":%d,"inodes":%d}`, layer.DiffID, layer.Bytes, layer.Inodes)),
		s.Close(), os.RemoveAll(filepath.Join(root, recordsDir)), os.RemoveAll(filepath.Join(root, blobsDir)),
	); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	r := mustVerify(t, s, VerifyOptions{Deep: true, Repair: true})
	if len(r.Findings) != 0 || len(r.Unverifiable) != 1 || r.Unverifiable[0] != chain {
		t.Errorf("report %+v, want one layer that cannot be verified", r)
	}
	target := mountPoint(t)
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(context.Background(), "k", target), s.Unmount(target), s.Release("k")); err != nil {
		t.Error(err)
	}
	before := reg.Count("GET", "/blobs/")
	mustPull(t, s, reg.Host()+"/a:b")
	// The configuration: the layer is here.
	if n := reg.Count("GET", "/blobs/") - before; n != 1 || len(s.images[img.ID].Documents) == 0 {
		t.Errorf("%d blobs fetched, record %+v; want the documents", n, s.images[img.ID])
	}
}

// TestEverythingAtOnce: pulls, removals, damage, repairs, exports, imports and containers at the same time leave a whole
// store and nothing else.
func TestEverythingAtOnce(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.File("base", "x"))
	var refs []string
	for i := range 3 {
		reg.Push("a", fmt.Sprint(i), imagestest.NewImage(base, imagestest.Layer(imagestest.File("mine", fmt.Sprint(i)))))
		refs = append(refs, fmt.Sprintf("%s/a:%d", reg.Host(), i))
	}
	mustPull(t, s, refs[0])
	archive, _ := exported(t, s, refs[0])
	ctx := context.Background()
	fine := func(err error) bool { return err == nil || errdefs.IsNotFound(err) || errors.Is(err, errDamaged) }
	var wg sync.WaitGroup
	do := func(what string, times int, f func(i int) error) {
		wg.Go(func() {
			for i := range times {
				if err := f(i); !fine(err) {
					t.Errorf("%s: %v", what, err)
					return
				}
			}
		})
	}
	do("pull", 20, func(i int) error { _, err := s.Pull(ctx, refs[i%3], nil); return err })
	do("remove", 20, func(i int) error { return s.Remove(ctx, refs[i%2]) })
	do("import", 10, func(int) error { _, err := imported(s, archive, ImportOptions{}); return err })
	do("export", 10, func(i int) error { _, err := s.Export(ctx, refs[i%3:i%3+1], io.Discard); return err })
	do("repair", 10, func(int) error { _, err := s.Verify(ctx, VerifyOptions{Deep: true, Repair: true}); return err })
	do("damage", 20, func(int) error {
		for _, img := range s.Images() {
			s.mu.RLock()
			rec := s.layers[img.Layers[0]]
			s.mu.RUnlock()
			if rec != nil {
				_ = os.Truncate(filepath.Join(s.layerDir(img.Layers[0], rec), "base"), 0) // it may be gone
			}
		}
		return nil
	})
	target := mountPoint(t)
	do("run", 20, func(i int) error {
		img, err := s.Image(refs[i%3])
		if err != nil {
			return err
		}
		key := fmt.Sprint("k", i)
		if err := s.Prepare(key, img.ID, nil); err != nil {
			return err
		}
		return errors.Join(s.Mount(ctx, key, target), s.Unmount(target), s.Release(key))
	})
	wg.Wait()
	mustVerify(t, s, VerifyOptions{Deep: true})
	for _, ref := range refs {
		mustPull(t, s, ref)
	}
	wantWhole(t, s)
	for _, ref := range refs {
		if err := s.Remove(ctx, ref); err != nil {
			t.Error(err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 || len(s.holds) != 0 || len(s.retired) != 0 {
		t.Errorf("left: %v, holds %v, retired %v", left, s.holds, s.retired)
	}
}

// TestInheritedACLsAreOfTheLayer: files are given attributes by the directory that they are made in, too.
func TestInheritedACLsAreOfTheLayer(t *testing.T) {
	s := openStore(t)
	const userObj, user, groupObj, mask, other, none = 1, 2, 4, 16, 32, 1<<32 - 1
	acl := binary.LittleEndian.AppendUint32(nil, 2) // struct posix_acl_xattr_header of linux/posix_acl_xattr.h, and its entries
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{userObj, 7, none}, {user, 7, 1000}, {groupObj, 5, none}, {mask, 7, none}, {other, 5, none}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.perm)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	if err := unix.Setxattr(s.path(tmpDir), "system.posix_acl_default", acl, 0); errors.Is(err, unix.ENOTSUP) {
		t.Skip("the file system has no access control lists")
	} else if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.Dir("d"), imagestest.File("d/f", "x"))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	if n, err := unix.Lgetxattr(s.path(layersDir, img.Layers[0].dir(), "d/f"), "system.posix_acl_access", nil); err != nil || n == 0 {
		t.Fatalf("the file has none: %v", err)
	}
	wantWhole(t, s)
}

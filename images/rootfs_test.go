package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

func TestRootfsLifecycle(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.Dir(".").Mode(0o750).Owner(3, 4), imagestest.File("f", "x"))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	ctx := context.Background()
	target := mountPoint(t)
	for range 2 { // idempotent
		if err := s.Prepare("key", img.ID, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Mount(ctx, "key", target); err != nil {
			t.Fatal(err)
		}
	}
	if n := mountsAt(t, target); n != 1 {
		t.Errorf("%d mounts at the target", n)
	}
	if options := mountOptions(t, target); !slices.Contains(options, "volatile") && !slices.Contains(options, "fsync=volatile") {
		t.Errorf("mounted with %q: each unmount flushes the disk of the images", options)
	}
	var st unix.Stat_t
	if err := unix.Stat(target, &st); err != nil || st.Mode&0o7777 != 0o750 || st.Uid != 3 || st.Gid != 4 {
		t.Errorf("root directory: mode %o, %d:%d, %v", st.Mode, st.Uid, st.Gid, err)
	}
	if err := os.WriteFile(filepath.Join(target, "f"), []byte("written"), 0o644); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(s.UpperDir("key"), "f")); err != nil || string(data) != "written" {
		t.Errorf("upper: %q, %v", data, err)
	}
	if data, err := os.ReadFile(s.path(layersDir, img.Layers[0].dir(), "f")); err != nil || string(data) != "x" {
		t.Errorf("layer: %q, %v: a container wrote to the image", data, err)
	}
	s.countWritable("key")
	if u, ok := s.WritableUsage("key"); !ok || u.Inodes != 2 || u.Bytes == 0 || u.Mountpoint != s.root {
		t.Errorf("usage %+v, %v", u, ok)
	}
	if got := s.Keys(); !slices.Equal(got, []string{"key"}) {
		t.Errorf("keys %v", got)
	}
	// The image goes, the layers stay until the root file system does.
	if err := s.Remove(ctx, reg.Host()+"/a:b"); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(target, "f")); err != nil || string(data) != "written" {
		t.Errorf("after the image's removal: %q, %v", data, err)
	}
	for range 2 {
		if err := s.Unmount(target); err != nil {
			t.Error(err)
		}
	}
	if err := s.Mount(ctx, "key", target); err != nil {
		t.Errorf("mounted again, with a volatile work directory: %v", err)
	}
	if err := s.Unmount(target); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := s.Release("key"); err != nil {
			t.Error(err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if _, ok := s.WritableUsage("key"); ok {
		t.Error("usage of what is released")
	}
}

// mountPoint is a directory on which nothing is mounted any more when the test ends, however it ends.
func mountPoint(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func mountsAt(t *testing.T, target string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(data), " "+target+" ")
}

// mountOptions are those of the file system that is mounted at target, as the kernel has them.
func mountOptions(t *testing.T, target string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, " "+target+" ") {
			fields := strings.Fields(line)
			return strings.Split(fields[len(fields)-1], ",")
		}
	}
	return nil
}

func TestRootfsErrors(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "1", smallImage("1"))
	reg.Push("a", "2", smallImage("2"))
	one, two := mustPull(t, s, reg.Host()+"/a:1"), mustPull(t, s, reg.Host()+"/a:2")
	for _, key := range []string{"", "..", "../x", "a/b", "-a", strings.Repeat("a", 129)} {
		if err := s.Prepare(key, one.ID, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("key %q: %v", key, err)
		}
		if err := s.Release(key); !errdefs.IsInvalidArgument(err) {
			t.Errorf("release of key %q: %v", key, err)
		}
	}
	if err := s.Prepare("k", "sha256:"+someHex, nil); !errdefs.IsNotFound(err) {
		t.Errorf("unknown image: %v", err)
	}
	if err := s.Prepare("k", one.ID, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Prepare("k", two.ID, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("same key, other image: %v", err)
	}
	if err := s.Mount(context.Background(), "other", t.TempDir()); !errdefs.IsNotFound(err) {
		t.Errorf("mount of an unknown key: %v", err)
	}
	if err := s.Mount(context.Background(), "k", "/does/not/exist"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("mount at nothing: %v", err)
	}
	if err := s.Unmount("/does/not/exist"); err != nil {
		t.Errorf("unmount of nothing: %v", err)
	}
	if err := s.Unmount(t.TempDir()); err != nil {
		t.Errorf("unmount of what is not mounted: %v", err)
	}
	if err := s.Release("other"); err != nil {
		t.Errorf("release of an unknown key: %v", err)
	}
}

// TestManyLayers: the longest stack that is allowed, whose lower directories would not fit in mount(2)'s page.
func TestManyLayers(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	var layers []imagestest.LayerBlob
	for i := range maxLayers {
		layers = append(layers, imagestest.Layer(imagestest.File(fmt.Sprintf("f%d", i), "x"), imagestest.File("last", fmt.Sprint(i))))
	}
	reg.Push("a", "b", imagestest.NewImage(layers...))
	img := mustPull(t, s, reg.Host()+"/a:b")
	if err := s.Prepare("k", img.ID, nil); err != nil {
		t.Fatal(err)
	}
	target := mountPoint(t)
	if err := s.Mount(context.Background(), "k", target); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		if data, err := os.ReadFile(filepath.Join(target, "last")); err != nil || string(data) != fmt.Sprint(maxLayers-1) {
			t.Errorf("last: %q, %v", data, err)
		}
		if entries, err := os.ReadDir(target); err != nil || len(entries) != maxLayers+1 {
			t.Errorf("%d entries, %v", len(entries), err)
		}
	}
	check()
	if err := s.Unmount(target); err != nil {
		t.Fatal(err)
	}
	// The way of older kernels.
	lowers, err := s.lowers(&rootfsRecord{Layers: img.Layers})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.path(rootfsDir, "k", "work", "work", "incompat")); err != nil {
		t.Fatal(err)
	}
	var open []*os.File
	o := overlay{lowers: lowers, upper: s.UpperDir("k"), work: s.path(rootfsDir, "k", "work")}
	mnt, err := o.mountOld(target, func(path string) (string, error) {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		open = append(open, f)
		return fmt.Sprintf("/proc/self/fd/%d", f.Fd()), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH), unix.Close(mnt)); err != nil {
		t.Fatal(err)
	}
	for _, f := range open {
		f.Close()
	}
	check()
	if err := s.Unmount(target); err != nil {
		t.Fatal(err)
	}
}

func TestImageWithoutLayersAndOpaqueRoot(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "none", imagestest.NewImage())
	same := imagestest.Layer(imagestest.File("same", "x"))
	reg.Push("a", "opaque", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "x")), imagestest.Layer(imagestest.File(".wh..wh..opq", ""), imagestest.File("above", "x")), same, same))
	for tag, want := range map[string][]string{"none": nil, "opaque": {"above", "same"}} {
		img := mustPull(t, s, reg.Host()+"/a:"+tag)
		target, view := mountPoint(t), mountPoint(t)
		if err := s.Prepare(tag, img.ID, nil); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(s.Mount(context.Background(), tag, target), s.MountView(context.Background(), img.ID, view, nil)); err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{target, view} {
			entries, err := os.ReadDir(dir)
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			if err != nil || !slices.Equal(names, want) {
				t.Errorf("%s: %v, %v; want %v", tag, names, err, want)
			}
		}
		if err := errors.Join(s.Unmount(target), s.Unmount(view), s.Release(tag)); err != nil {
			t.Error(err)
		}
	}
}

func TestViewsHoldTheirLayersOverARestart(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	img := mustPull(t, s, reg.Host()+"/a:b")
	mounted, gone := mountPoint(t), mountPoint(t)
	if err := errors.Join(s.MountView(context.Background(), img.ID, mounted, nil), s.MountView(context.Background(), img.ID, gone, nil)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(mounted, "g"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a view: %v, want EROFS", err)
	}
	if err := errors.Join(s.Remove(context.Background(), string(img.ID)), s.Close(), unmount(gone)); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if data, err := os.ReadFile(filepath.Join(mounted, "f")); err != nil || string(data) != "x" {
		t.Errorf("view after a restart: %q, %v", data, err)
	}
	if len(s.views) != 1 {
		t.Errorf("views %v, want that which is mounted", s.views)
	}
	if err := s.Unmount(mounted); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestRootfsSurvivesRestartAndTornRecordDoesNot(t *testing.T) {
	needRoot(t)
	root := filepath.Join(t.TempDir(), "images")
	s, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	img := mustPull(t, s, reg.Host()+"/a:b")
	if err := errors.Join(s.Prepare("good", img.ID, nil), s.Prepare("torn", img.ID, nil), s.Remove(context.Background(), string(img.ID))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Truncate(s.path(rootfsDir, "torn", recordName), 10), s.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(Options{Root: root}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if got := s.Keys(); !slices.Equal(got, []string{"good"}) {
		t.Errorf("keys %v", got)
	}
	target := mountPoint(t)
	if err := s.Mount(context.Background(), "good", target); err != nil {
		t.Error(err)
	}
	if err := errors.Join(s.Unmount(target), s.Release("good")); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

package images

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// TestKEP4191_SplitFileSystems: what containers write is on a disk of its own, and nothing of it on that of the images.
func TestKEP4191_SplitFileSystems(t *testing.T) {
	disk := loopDisk(t, 64<<20, "mkfs.ext4", "-q")
	o := Options{Root: filepath.Join(t.TempDir(), "images"), Writable: filepath.Join(disk, "w")}
	open := func() *Store {
		t.Helper()
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s, ctx := open(), context.Background()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	target := mountPoint(t)
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(ctx, "k", target)); err != nil {
		t.Fatal(err)
	}
	before := free(t, disk)
	if err := os.WriteFile(filepath.Join(target, "mine"), make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	s.countWritable("k")
	took := before - free(t, disk)
	one, _ := s.WritableUsage("k")
	all, layers := s.WritablesUsage(), s.Usage()
	if one != all || all.Mountpoint != o.Writable || all.Bytes < 8<<20 || max(all.Bytes, took)-min(all.Bytes, took) > 8<<20/100 {
		t.Errorf("%+v of one root file system, %+v of all; the disk has %d bytes less", one, all, took)
	}
	if layers.Mountpoint != s.root || layers.Bytes > 1<<20 || onDisk(t, s.UpperDir("k")) != onDisk(t, disk) || onDisk(t, s.root) == onDisk(t, disk) {
		t.Errorf("images take %+v", layers)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Nobody loses sight of it by a change of options.
	if s, err := Open(Options{Root: o.Root}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), o.Writable) {
		t.Errorf("got %v, %v; want it said where the writable layers are", s, err)
	}
	s = open()
	if data, err := os.ReadFile(filepath.Join(s.UpperDir("k"), "mine")); err != nil || len(data) != 8<<20 || len(s.Keys()) != 1 {
		t.Errorf("after a restart: %d bytes, %v, root file systems %v", len(data), err, s.Keys())
	}
	if err := errors.Join(s.Unmount(target), s.Release("k")); err != nil {
		t.Error(err)
	}
	s.WaitDeleted(ctx)
	if now := free(t, disk); now < before {
		t.Errorf("%d bytes are free after all, were %d", now, before)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	writable := o.Writable
	o.Writable = ""
	s = open()
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Close()); err != nil || onDisk(t, s.UpperDir("k")) != onDisk(t, s.root) {
		t.Errorf("without a disk of their own: %v", err)
	}
	if s, err := Open(Options{Root: o.Root, Writable: writable}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, %v; want it said that there are writable layers", s, err)
	}
}

// TestUserNamespacesOnSplitFileSystems: layers with mapped ids on the one, an upper directory with a container's on the other.
func TestUserNamespacesOnSplitFileSystems(t *testing.T) {
	disk := loopDisk(t, 64<<20, "mkfs.ext4", "-q")
	s, err := Open(Options{Root: filepath.Join(t.TempDir(), "images"), Writable: filepath.Join(disk, "w")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x").Owner(7, 8))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	target := mountPoint(t)
	if err := errors.Join(s.Prepare("k", img.ID, testUserns(t, 1<<20, 1<<21, 65536)), s.Mount(context.Background(), "k", target)); err != nil {
		t.Fatal(err)
	}
	wantOwner(t, filepath.Join(target, "f"), "1048583:2097160")
	if err := os.WriteFile(filepath.Join(target, "f"), []byte("changed"), 0o600); err != nil {
		t.Error(err)
	}
	wantOwner(t, filepath.Join(s.UpperDir("k"), "f"), "1048583:2097160")
	if err := errors.Join(s.Unmount(target), s.Release("k")); err != nil {
		t.Error(err)
	}
}

// TestDiskOfWritableLayersIsNotMounted: a start without it would hold no layer of the containers that run on it.
func TestDiskOfWritableLayersIsNotMounted(t *testing.T) {
	needRoot(t)
	disk := filepath.Join(t.TempDir(), "disk")
	o := Options{Root: filepath.Join(t.TempDir(), "images"), Writable: filepath.Join(disk, "w")}
	open := func() *Store {
		t.Helper()
		s, err := Open(o)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	img := mustPull(t, s, reg.Host()+"/a:b")
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Close(), os.Rename(disk, disk+".away")); err != nil {
		t.Fatal(err)
	}
	for _, writable := range []string{o.Writable, o.Writable + "2", ""} {
		if s, err := Open(Options{Root: o.Root, Writable: writable}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), o.Writable) {
			t.Errorf("with %q: got %v, %v; want it said what is not there", writable, s, err)
		}
	}
	if err := os.Rename(disk+".away", disk); err != nil {
		t.Fatal(err)
	}
	s = open()
	if keys := s.Keys(); len(keys) != 1 {
		t.Errorf("mounted again: root file systems %v", keys)
	}
	// What is lost with a reboot was no container's any more.
	if err := errors.Join(s.Close(), os.RemoveAll(disk), os.WriteFile(filepath.Join(o.Root, rootfsDir+bootExt), []byte("another"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s = open()
	if err := errors.Join(s.Prepare("new", img.ID, nil), s.Close()); err != nil {
		t.Error(err)
	}
}

// onDisk is the device that a path is on.
func onDisk(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Dev
}

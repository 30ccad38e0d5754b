package images

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// testUserns is a user namespace that is there until the test ends: 65536 users from a number on, groups from another.
func testUserns(t *testing.T, uid, gid, length uint32) *Userns {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ids := func(host uint32) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{HostID: int(host), Size: int(length)}}
	}
	cmd := exec.Command("cat") // lives until its input ends
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: ids(uid), GidMappings: ids(gid)}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	return &Userns{Path: fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid), UIDs: IDs{uid, length}, GIDs: IDs{gid, length}}
}

func owner(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

func wantOwner(t *testing.T, path, want string) {
	t.Helper()
	if got := owner(t, path); got != want {
		t.Errorf("%s belongs to %s, want %s", path, got, want)
	}
}

func TestRootfsOfAUserNamespace(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(
		imagestest.Layer(imagestest.Dir("d").Owner(7, 8), imagestest.File("d/low", "low").Owner(7, 8), imagestest.File("gone", "x")),
		imagestest.Layer(imagestest.Dir(".").Mode(0o750).Owner(3, 4), imagestest.File("f", "x"), imagestest.File("far", "x").Owner(70000, 70000), imagestest.File(".wh.gone", "")),
	))
	img := mustPull(t, s, reg.Host()+"/a:b")
	ctx := context.Background()
	plain := mountPoint(t)
	if err := errors.Join(s.Prepare("plain", img.ID, nil), s.Mount(ctx, "plain", plain)); err != nil {
		t.Fatal(err)
	}
	before := s.Usage()
	for _, uid := range []uint32{1 << 17, 1 << 20} { // two of one image at the same time
		u := testUserns(t, uid, uid+100000, 65536)
		key := fmt.Sprint("k", uid)
		target := mountPoint(t)
		for range 2 { // idempotent
			if err := errors.Join(s.Prepare(key, img.ID, u), s.Mount(ctx, key, target)); err != nil {
				t.Fatal(err)
			}
		}
		if n := mountsAt(t, target); n != 1 {
			t.Errorf("%d mounts at the target", n)
		}
		at := func(name string, id uint32) {
			t.Helper()
			wantOwner(t, filepath.Join(target, name), fmt.Sprintf("%d:%d", uid+id, uid+100000+id))
		}
		wantOwner(t, target, fmt.Sprintf("%d:%d", uid+3, uid+100000+4))
		wantOwner(t, filepath.Join(target, "d/low"), fmt.Sprintf("%d:%d", uid+7, uid+100000+8))
		at("f", 0)
		wantOwner(t, filepath.Join(target, "far"), "65534:65534") // is nobody's who is mapped
		if _, err := os.Lstat(filepath.Join(target, "gone")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file that a layer took away: %v", err)
		}
		if copied, err := os.ReadDir(s.UpperDir(key)); err != nil || len(copied) != 0 {
			t.Errorf("copied for the user namespace: %v, %v", copied, err)
		}
		if now := s.Usage(); now.Bytes != before.Bytes {
			t.Errorf("layers take %d bytes, %d before", now.Bytes, before.Bytes)
		}
		// A copy into the upper directory belongs to the same users, and the layer stays as it was.
		if err := os.Chmod(filepath.Join(target, "d/low"), 0o600); err != nil {
			t.Fatal(err)
		}
		wantOwner(t, filepath.Join(s.UpperDir(key), "d/low"), fmt.Sprintf("%d:%d", uid+7, uid+100000+8))
		for _, layer := range img.Layers {
			if path := s.path(layersDir, layer.dir(), "d/low"); exists(path) {
				wantOwner(t, path, "7:8")
			}
		}
		wantOwner(t, filepath.Join(plain, "d/low"), "7:8")

		view := mountPoint(t)
		if err := s.MountView(ctx, img.ID, view, u); err != nil {
			t.Fatal(err)
		}
		wantOwner(t, filepath.Join(view, "f"), fmt.Sprintf("%d:%d", uid, uid+100000))
		if err := os.WriteFile(filepath.Join(view, "f"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("write to a view: %v", err)
		}
		if err := errors.Join(s.Unmount(view), s.Unmount(target), s.Release(key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.Unmount(plain), s.Release("plain")); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// The ways of kernels before lowerdir+ (6.7).
func TestMappedOverlayOfOlderKernels(t *testing.T) {
	u := testUserns(t, 1<<17, 1<<18, 65536)
	dir := t.TempDir()
	for _, d := range []string{"a", "b", "upper", "work", "stage", "target"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/b/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	mnt := -1
	err := inPrivateMounts(func() (err error) {
		o := overlay{upper: dir + "/upper", work: dir + "/work"}
		if o.lowers, err = mapLayers([]string{dir + "/a", dir + "/b"}, u.Path, dir+"/stage"); err != nil {
			return err
		}
		mnt, err = o.mountOld(filepath.Join(dir, "stage", overlayName), func(path string) (string, error) { return path, nil })
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(mnt)
	target := dir + "/target"
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(target); err != nil {
			t.Error(err)
		}
	})
	wantOwner(t, target+"/f", fmt.Sprintf("%d:%d", 1<<17, 1<<18))
	if n := mountsAt(t, dir+"/stage"); n != 0 {
		t.Errorf("%d mounts at the staging directory are seen by all", n)
	}
}

func TestManyLayersOfAUserNamespace(t *testing.T) {
	s := openStore(t)
	u := testUserns(t, 1<<17, 1<<18, 65536)
	reg := imagestest.NewRegistry(t)
	var layers []imagestest.LayerBlob
	for i := range 127 {
		layers = append(layers, imagestest.Layer(imagestest.File(fmt.Sprint("f", i), "x")))
	}
	reg.Push("a", "b", imagestest.NewImage(layers...))
	img := mustPull(t, s, reg.Host()+"/a:b")
	target := mountPoint(t)
	if err := errors.Join(s.Prepare("k", img.ID, u), s.Mount(context.Background(), "k", target)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"f0", "f126"} {
		wantOwner(t, filepath.Join(target, name), fmt.Sprintf("%d:%d", 1<<17, 1<<18))
	}
	if err := errors.Join(s.Unmount(target), s.Release("k")); err != nil {
		t.Fatal(err)
	}
}

func TestUserNamespaceThatCannotBeHad(t *testing.T) {
	s := openStore(t)
	u := testUserns(t, 1<<17, 1<<18, 100)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.Dir(".").Owner(100, 0))))
	img := mustPull(t, s, reg.Host()+"/a:b")
	if err := s.Prepare("k", img.ID, u); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "root directory: owner: id 100 is beyond") {
		t.Errorf("a root directory of an owner beyond the mapping: %v", err)
	}
	if keys := s.Keys(); len(keys) != 0 {
		t.Errorf("left: %v", keys)
	}
	u = testUserns(t, 1<<19, 1<<20, 1000)
	if err := s.Prepare("k", img.ID, u); err != nil {
		t.Fatal(err)
	}
	for name, other := range map[string]*Userns{"none": nil, "another": testUserns(t, 1<<17, 1<<18, 1000)} {
		if err := s.Prepare("k", img.ID, other); !errdefs.IsAlreadyExists(err) {
			t.Errorf("again with %s: %v", name, err)
		}
	}
	target := mountPoint(t)
	gone := *u
	gone.Path = filepath.Join(t.TempDir(), "gone")
	if err := errors.Join(s.Release("k"), s.Prepare("k", img.ID, &gone)); err != nil {
		t.Fatal(err)
	}
	if err := s.Mount(context.Background(), "k", target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a user namespace that is gone: %v", err)
	}
	if n := mountsAt(t, target); n != 0 {
		t.Errorf("%d mounts at the target", n)
	}
	if err := s.CanMap(u.Path, target); err != nil {
		t.Errorf("this machine's file system: %v", err)
	}
	// procfs cannot map ids, and the error says what it is about.
	err := inPrivateMounts(func() error {
		_, err := mapLayers([]string{"/proc"}, u.Path, target)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "layer /proc") || !strings.Contains(err.Error(), "cannot map ids") {
		t.Errorf("a layer on procfs: %v", err)
	}
	if err := s.Release("k"); err != nil {
		t.Fatal(err)
	}
}

package images

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("unpacking layers needs root: they have owners and overlay attributes")
	}
}

func openStore(t testing.TB, change ...func(*Options)) *Store {
	t.Helper()
	needRoot(t)
	o := Options{Root: filepath.Join(t.TempDir(), "images"), Log: slog.New(slog.NewTextHandler(testWriter{t}, nil))}
	for _, c := range change {
		c(&o)
	}
	s, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func TestPullMakesImageMountable(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	img := imagestest.NewImage(
		imagestest.Layer(imagestest.Dir("etc"), imagestest.File("etc/motd", "one\n"), imagestest.File("etc/gone", "x"), imagestest.Dir("tmp").Mode(0o1777)),
		imagestest.ZstdLayer(imagestest.Tar(imagestest.File("etc/motd", "two\n"), imagestest.File("tmp/x", "y"), imagestest.File("etc/.wh.gone", ""))),
		imagestest.PlainLayer(imagestest.Tar(imagestest.File("bin/sh", "#!"))),
	)
	built := reg.Push("team/app", "v1", img)
	ctx := context.Background()
	got, err := s.Pull(ctx, reg.Host()+"/team/app:v1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != built.ConfigID {
		t.Errorf("id %s, want the config digest %s", got.ID, built.ConfigID)
	}
	key := "aa"
	if err := s.Prepare(key, got.ID, nil); err != nil {
		t.Fatal(err)
	}
	target := mountPoint(t)
	if err := s.Mount(ctx, key, target); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(target, "etc/motd"))
	if err != nil || string(data) != "two\n" {
		t.Errorf("etc/motd: %q, %v", data, err)
	}
	if _, err := os.Lstat(filepath.Join(target, "etc/gone")); !os.IsNotExist(err) {
		t.Errorf("etc/gone: %v, want it whited out", err)
	}
	if st, err := os.Stat(filepath.Join(target, "tmp")); err != nil || st.Mode()&os.ModeSticky == 0 || st.Mode().Perm() != 0o777 {
		t.Errorf("tmp: %v, %v: want the mode of the layer below", st, err)
	}
	if err := s.Unmount(target); err != nil {
		t.Error(err)
	}
	if err := s.Release(key); err != nil {
		t.Error(err)
	}
}

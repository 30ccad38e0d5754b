package images

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// loopDisk is a file system of its own on a file of that size, made by mkfs, until the test ends.
func loopDisk(t *testing.T, size int64, mkfs ...string) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	file, at := filepath.Join(dir, "disk"), filepath.Join(dir, "mounted")
	if _, err := exec.LookPath(mkfs[0]); err != nil {
		t.Skipf("needs %s", mkfs[0])
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range [][]string{append(mkfs, file), {"mount", "-o", "loop", file, at}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s: %v", cmd, out, err)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Errorf("something is left on the disk: %v", err)
			_ = unix.Unmount(at, unix.MNT_DETACH)
		}
	})
	return at
}

// free is what there is to write to, in bytes, once all is written that was to be.
func free(t *testing.T, at string) uint64 {
	t.Helper()
	fd, err := unix.Open(at, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	if err := unix.Syncfs(fd); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstatfs(fd, &fs); err != nil {
		t.Fatal(err)
	}
	return fs.Bavail * uint64(fs.Bsize)
}

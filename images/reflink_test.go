package images

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
)

// TestReflinksOfWhatContainersChange: where the file system has reflinks, a container that changes a byte of a large file of
// its image takes next to nothing: layers and upper directories are on one file system, and the kernel copies a file up by
// reference there. ext4, which has none, shows that this can be seen.
func TestReflinksOfWhatContainersChange(t *testing.T) {
	for name, mkfs := range map[string][]string{
		"ext4":  {"mkfs.ext4", "-q"},
		"xfs":   {"mkfs.xfs", "-q", "-m", "reflink=1"},
		"btrfs": {"mkfs.btrfs", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			disk := loopDisk(t, 512<<20, mkfs...)
			s, err := Open(Options{Root: filepath.Join(disk, "images")})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			reg := imagestest.NewRegistry(t)
			large := imagestest.File("large", string(randomBytes(1, 64<<20)))
			reg.Push("a", "b", imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(large))))
			img := mustPull(t, s, reg.Host()+"/a:b")
			target := mountPoint(t)
			if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(context.Background(), "k", target)); err != nil {
				t.Fatal(err)
			}
			before := free(t, disk)
			f, err := os.OpenFile(filepath.Join(target, "large"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte("x"), 1<<20); err != nil {
				t.Error(err)
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
			if took := before - free(t, disk); (took > 4<<20) != (name == "ext4") {
				t.Errorf("one byte changed of 64 MiB takes %d", took)
			}
			if err := errors.Join(s.Unmount(target), s.Release("k")); err != nil {
				t.Error(err)
			}
			wantWhole(t, s) // the layer has not changed
		})
	}
}

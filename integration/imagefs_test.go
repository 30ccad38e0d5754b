//go:build integration

package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// mountDisk mounts an ext4 file system of its own at a directory, which is made. Its file is beside that.
func mountDisk(t *testing.T, at string, size int64) {
	t.Helper()
	must(t, os.MkdirAll(at, 0o700))
	file := at + ".disk"
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, size))
	for _, cmd := range [][]string{{"mkfs.ext4", "-q", file}, {"mount", "-o", "loop", file, at}} {
		if out, err := exec.CommandContext(t.Context(), cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s: %v", cmd, out, err)
		}
	}
}

// noiseLayer is a layer of one file that compresses to nothing less.
func noiseLayer(name string, mib int) imagestest.LayerBlob {
	data := make([]byte, mib<<20)
	_, _ = rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32s", name)))).Read(data)
	return imagestest.PlainLayer(imagestest.Tar(imagestest.File(name, string(data))))
}

// space is what a file system has left.
type space struct{ bytes, inodes uint64 }

// spaceOf is it once all is written that was to be.
func spaceOf(t *testing.T, at string) space {
	t.Helper()
	dir, err := os.Open(at)
	must(t, err)
	defer dir.Close()
	must(t, unix.Syncfs(int(dir.Fd())))
	return spaceNow(t, at)
}

func spaceNow(t *testing.T, at string) space {
	t.Helper()
	var fs unix.Statfs_t
	must(t, unix.Statfs(at, &fs))
	return space{fs.Bfree * uint64(fs.Bsize), fs.Ffree}
}

// near tells whether two numbers are the same to a percent.
func near(a, b uint64) bool { return max(a, b)-min(a, b) <= max(a, b)/100 }

// TestKEP4191_ImageFsInfo: what it says of images and of what containers write is what the file systems say, which may be two,
// to a percent, in a moment.
func TestKEP4191_ImageFsInfo(t *testing.T) {
	writable := filepath.Join(t.TempDir(), "w")
	t.Cleanup(func() {
		if err := unix.Unmount(writable, 0); err != nil {
			t.Error(err)
			_ = unix.Unmount(writable, unix.MNT_DETACH)
		}
	})
	mountDisk(t, writable, 128<<20)
	ctx := t.Context()
	n := idleNode(t, lab.Options{Serve: []string{"--writable-root", writable}})
	if n.Foreign() {
		t.Skip("where other runtimes keep their images is theirs")
	}
	store := filepath.Join(n.Root(), "images")
	mountDisk(t, store, 512<<20)
	must(t, n.StartRegistry(ctx))
	must(t, n.StartBerth(ctx))

	info := func() (images, containers *runtimeapi.FilesystemUsage) {
		t.Helper()
		r, err := n.CRI.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
		must(t, err)
		if len(r.ImageFilesystems) != 1 || len(r.ContainerFilesystems) != 1 {
			t.Fatalf("answered %v", r)
		}
		return r.ImageFilesystems[0], r.ContainerFilesystems[0]
	}
	images, containers := info()
	for at, fs := range map[string]*runtimeapi.FilesystemUsage{store: images, writable: containers} {
		var said, is unix.Stat_t
		must(t, unix.Stat(fs.FsId.Mountpoint, &said))
		must(t, unix.Stat(at, &is))
		if said.Dev != is.Dev {
			t.Errorf("%s is said, want what is mounted at %s", fs.FsId.Mountpoint, at)
		}
	}
	// took compares what is said to be used more than before with what the file system has less.
	took := func(what string, was, is *runtimeapi.FilesystemUsage, had, has space) {
		t.Helper()
		bytes, inodes := is.UsedBytes.Value-was.UsedBytes.Value, is.InodesUsed.Value-was.InodesUsed.Value
		if !near(bytes, had.bytes-has.bytes) || !near(inodes, had.inodes-has.inodes) {
			t.Errorf("%s: %d bytes and %d inodes are said, the file system has %d and %d less", what, bytes, inodes, had.bytes-has.bytes, had.inodes-has.inodes)
		}
	}

	reg := imagestest.NewRegistry(t)
	var many []imagestest.Entry
	for i := range 4000 {
		many = append(many, imagestest.File(fmt.Sprintf("d%d/file-%d", i%40, i), fmt.Sprint(i)))
	}
	shared := noiseLayer("shared", 60)
	reg.Push("one", "1", imagestest.NewImage(shared, imagestest.Layer(many...)))
	reg.Push("two", "1", imagestest.NewImage(shared, noiseLayer("two", 30)))
	had := spaceOf(t, store)
	for _, name := range []string{"one", "two"} {
		_, err := n.CRI.Pull(ctx, reg.Host()+"/"+name+":1")
		must(t, err)
	}
	with, _ := info()
	took("images", images, with, had, spaceOf(t, store))
	for _, name := range []string{"one", "two"} {
		_, err := n.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: reg.Host() + "/" + name + ":1"}})
		must(t, err)
	}
	if without, _ := info(); without.UsedBytes.Value != images.UsedBytes.Value || !near(spaceOf(t, store).bytes, had.bytes) {
		t.Errorf("%d bytes are said without images, were %d; the file system has %d, had %d", without.UsedBytes.Value, images.UsedBytes.Value, spaceOf(t, store).bytes, had.bytes)
	}

	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	pod := n.Pod("writes")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	images, containers = info()
	hadImages, hadContainers := spaceOf(t, store), spaceOf(t, writable)
	ctr, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("c"))
	must(t, err)
	_, err = n.CRI.Exec(ctx, ctr, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=40 && for i in $(seq 2000); do echo > /small-$i; done")
	must(t, err)
	must(t, lab.Eventually(ctx, time.Minute, "what the container wrote is counted", func(context.Context) error {
		if _, is := info(); is.UsedBytes.Value < 40<<20 {
			return fmt.Errorf("%d bytes are said", is.UsedBytes.Value)
		}
		return nil
	}))
	imagesNow, containersNow := info()
	took("containers", containers, containersNow, hadContainers, spaceOf(t, writable))
	if now := spaceOf(t, store); imagesNow.UsedBytes.Value != images.UsedBytes.Value || !near(now.bytes, hadImages.bytes) {
		t.Errorf("images: %d bytes are said, were %d; the file system has %d, had %d", imagesNow.UsedBytes.Value, images.UsedBytes.Value, now.bytes, hadImages.bytes)
	}
	st, err := n.CRI.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: ctr})
	must(t, err)
	if layer := st.Stats.WritableLayer; layer.GetFsId().GetMountpoint() != containersNow.FsId.Mountpoint || layer.UsedBytes.Value < 40<<20 {
		t.Errorf("the container's writable layer is told as %v", layer)
	}
	_, err = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: ctr})
	must(t, err)
	if now := spaceNow(t, writable); !near(now.bytes, hadContainers.bytes) || !near(now.inodes, hadContainers.inodes) {
		t.Errorf("the container is removed, and its file system has %+v, had %+v without it", now, hadContainers)
	}
	must(t, n.CRI.RemovePod(ctx, podID))

	var times []time.Duration
	for range 50 {
		start := time.Now()
		info()
		times = append(times, time.Since(start))
	}
	if slices.Sort(times); times[len(times)/2] > 5*time.Millisecond {
		t.Errorf("half of the answers took longer than %v", times[len(times)/2])
	}
}

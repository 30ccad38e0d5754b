package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/step"
)

// bigImage has what makes it hard to say how much it takes: many small files, a few large ones, links, holes, deep and
// large directories.
func bigImage(seed uint64) *imagestest.Image {
	entries := []imagestest.Entry{imagestest.File("large", string(randomBytes(byte(seed), 3<<20))), imagestest.GNUSparse("sparse", 256<<20, 128<<20, "data")}
	for i := range 300 {
		entries = append(entries, imagestest.File(fmt.Sprintf("many/%d/a-rather-long-name-of-a-file-%d", i%7, i), fmt.Sprint(seed, "x", i)))
		if i%10 == 0 {
			entries = append(entries, imagestest.HardLink(fmt.Sprintf("links/%d", i), fmt.Sprintf("many/%d/a-rather-long-name-of-a-file-%d", i%7, i)), imagestest.Symlink(fmt.Sprintf("symlinks/%d", i), "x"))
		}
	}
	return imagestest.NewImage(imagestest.Layer(entries...))
}

// TestUsageIsTrue: what ImageFsInfo says is what the disk says, to a percent, and takes no walk.
func TestUsageIsTrue(t *testing.T) {
	for _, keep := range []bool{false, true} {
		s := openStore(t, func(o *Options) { o.KeepBlobs = keep })
		reg := imagestest.NewRegistry(t)
		reg.Push("a", "b", bigImage(1))
		mustPull(t, s, reg.Host()+"/a:b")
		wantTrueUsage(t, s)
	}
}

func wantTrueUsage(t *testing.T, s *Store) {
	t.Helper()
	if err := unix.Syncfs(int(s.rootDir.Fd())); err != nil {
		t.Fatal(err)
	}
	var disk Usage
	for _, dir := range []string{layersDir, recordsDir, blobsDir} {
		f, err := os.Open(s.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		countTree(context.Background(), f, &disk, map[uint64]bool{}, 0)
	}
	said := s.Usage()
	if off := int64(said.Bytes) - int64(disk.Bytes); max(off, -off)*100 > int64(disk.Bytes) {
		t.Errorf("kept blobs %v: %d bytes are said, the disk has %d", s.keepBlobs, said.Bytes, disk.Bytes)
	}
	if off := int64(said.Inodes) - int64(disk.Inodes); max(off, -off)*100 > int64(disk.Inodes) {
		t.Errorf("kept blobs %v: %d inodes are said, the disk has %d", s.keepBlobs, said.Inodes, disk.Inodes)
	}
}

// TestRemovalGivesBackWhatItPromised: A kubelet that needs space adds up what removals promise, and
// looks at the disk at once.
func TestRemovalGivesBackWhatItPromised(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	shared := bigImage(1).Layers[0]
	reg.Push("a", "one", imagestest.NewImage(shared, bigImage(2).Layers[0], bigImage(2).Layers[0]))
	reg.Push("a", "two", imagestest.NewImage(shared, bigImage(3).Layers[0]))
	one := mustPull(t, s, reg.Host()+"/a:one")
	if all := s.Usage().Bytes; one.Own != all {
		t.Errorf("the only image promises %d bytes of %d", one.Own, all)
	}
	mustPull(t, s, reg.Host()+"/a:two")
	wantPromisesKept(t, s, reg.Host()+"/a:one", reg.Host()+"/a:two")
}

// wantPromisesKept removes the only images that there are.
func wantPromisesKept(t *testing.T, s *Store, names ...string) {
	t.Helper()
	for _, name := range names {
		img, err := s.Image(name)
		if err != nil {
			t.Fatal(err)
		}
		before := s.Usage().Bytes
		if err := s.Remove(context.Background(), string(img.ID)); err != nil {
			t.Fatal(err)
		}
		if back := before - s.Usage().Bytes; back != img.Own || img.Own == 0 {
			t.Errorf("%s: %d bytes were promised, %d came back", name, img.Own, back)
		}
		if entries, err := os.ReadDir(s.path(trashDir)); err != nil || len(entries) > 0 {
			t.Errorf("%s: removed, but still on the disk: %v, %v", name, entries, err)
		}
	}
	if left := s.Usage(); left.Bytes != 0 {
		t.Errorf("left: %+v", left)
	}
}

// TestBlobOfTwoLayersIsKeptOnce: one blob on different layers is another layer each time. Its second copy goes with the pull.
func TestBlobOfTwoLayersIsKeptOnce(t *testing.T) {
	s := openStore(t, func(o *Options) { o.KeepBlobs = true })
	reg := imagestest.NewRegistry(t)
	same := imagestest.Layer(imagestest.File("same", "1"))
	reg.Push("a", "one", imagestest.NewImage(same))
	reg.Push("a", "two", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "2")), same))
	mustPull(t, s, reg.Host()+"/a:one")
	mustPull(t, s, reg.Host()+"/a:two")
	if left, err := os.ReadDir(s.path(tmpDir)); err != nil || len(left) > 0 {
		t.Errorf("left of the pulls: %v, %v", left, err)
	}
	if err := s.Remove(context.Background(), reg.Host()+"/a:one"); err != nil {
		t.Fatal(err)
	}
	wantWhole(t, s) // the blob is the other one's, too
}

// TestBlobOfTwoLayersIsCountedOnce, whether one image has both layers or two have one each.
func TestBlobOfTwoLayersIsCountedOnce(t *testing.T) {
	s := openStore(t, func(o *Options) { o.KeepBlobs = true })
	reg := imagestest.NewRegistry(t)
	same := bigImage(1).Layers[0]
	reg.Push("a", "one", imagestest.NewImage(same, same))
	reg.Push("a", "two", imagestest.NewImage(imagestest.Layer(imagestest.File("below", "2")), same))
	one := mustPull(t, s, reg.Host()+"/a:one")
	if all := s.Usage().Bytes; one.Own != all {
		t.Errorf("the only image promises %d bytes of %d", one.Own, all)
	}
	wantTrueUsage(t, s)
	mustPull(t, s, reg.Host()+"/a:two")
	wantTrueUsage(t, s)
	wantPromisesKept(t, s, reg.Host()+"/a:one", reg.Host()+"/a:two")
}

// TestBlobOfTwoLayersOfACommitThatFails: each staged layer is as it was before, so that a pull that shares it can go on.
func TestBlobOfTwoLayersOfACommitThatFails(t *testing.T) {
	var s *Store
	var whole *bolt.DB
	var staged []*stagedLayer
	release := func() {}
	observe := func(e step.Event) {
		switch {
		case e.Step == "publish" && !e.Undo && whole == nil:
			staged, release = shareStaged(t, s)
			whole, s.db = s.db, new(bolt.DB) // one that is not open
		case e.Step == "commit" && whole != nil:
			s.db = whole
		}
	}
	s = openStore(t, func(o *Options) { o.KeepBlobs, o.Observe = true, observe })
	reg := imagestest.NewRegistry(t)
	same := imagestest.Layer(imagestest.File("same", "1"))
	reg.Push("a", "b", imagestest.NewImage(same, same))
	ref := reg.Host() + "/a:b"
	if err := pullErr(t, s, ref, nil); !strings.Contains(err.Error(), berrors.ErrDatabaseNotOpen.Error()) || strings.Contains(err.Error(), "undo") {
		t.Errorf("got %v; want that nothing is wrong but the database", err)
	}
	if len(staged) != 2 {
		t.Fatalf("%d layers are shared", len(staged))
	}
	before := reg.Count("GET", "/blobs/"+string(digest.FromBytes(same.Blob)))
	mustPull(t, s, ref)
	if n := reg.Count("GET", "/blobs/"+string(digest.FromBytes(same.Blob))) - before; n != 0 {
		t.Errorf("the blob was fetched %d times more", n)
	}
	release()
	wantWhole(t, s)
	if left := leftovers(t, s); len(left) != 2 || onlyFile(s.path(blobsDir)) == "" {
		t.Errorf("left: %v, one blob: %s", left, onlyFile(s.path(blobsDir)))
	}
}

// TestPullNeedsNoRoomForWhatIsCompressed: eks-ami#1359, containerd#4249. A disk of 1.2 times what an image unpacks to has room
// for it, though it compresses to nothing less; with compressed layers kept it has not, and is as it was before.
func TestPullNeedsNoRoomForWhatIsCompressed(t *testing.T) {
	disk := loopDisk(t, 48<<20, "mkfs.ext4", "-q", "-m", "0")
	reg := imagestest.NewRegistry(t)
	for _, keep := range []bool{true, false} {
		s, err := Open(Options{Root: filepath.Join(disk, "images"), KeepBlobs: keep})
		if err != nil {
			t.Fatal(err)
		}
		s.linger = 0
		room := free(t, disk)
		if keep {
			var layers []imagestest.LayerBlob
			for i := range 3 {
				large := imagestest.File("large", string(randomBytes(byte(i), int(room*10/12)/3)))
				layers = append(layers, imagestest.Layer(large))
			}
			reg.Push("a", "b", imagestest.NewImage(layers...))
		}
		_, err = s.Pull(context.Background(), reg.Host()+"/a:b", nil)
		if errdefs.IsResourceExhausted(err) != keep || !keep && err != nil {
			t.Errorf("kept blobs %v: %v", keep, err)
		}
		wantWhole(t, s)
		if keep {
			s.unpacks.wait()
			s.WaitDeleted(context.Background())
			if left := leftovers(t, s); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			// The kernel may free a file that is gone a while later: one that it writes back is let go of afterwards.
			waitFor(t, "all room is free again", func() bool { return free(t, disk) >= room-room/100 })
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestRecountSeesWhatWasJustWritten: a kubelet that sees that the disk is short asks at once who has written so much.
func TestRecountSeesWhatWasJustWritten(t *testing.T) {
	s := openStore(t, func(o *Options) { o.Writable = loopDisk(t, 64<<20, "mkfs.ext4", "-q") })
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("f", "x"))))
	if err := s.Prepare("key", mustPull(t, s, reg.Host()+"/a:b").ID, nil); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the first count", func() bool {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return s.counts.ended > 0
	})
	for i := range 2 {
		if err := os.WriteFile(filepath.Join(s.UpperDir("key"), fmt.Sprint(i)), make([]byte, writtenMuch), 0o600); err != nil {
			t.Fatal(err)
		}
		s.Recount(t.Context())
		if u, _ := s.WritableUsage("key"); u.Bytes < uint64(i+1)*writtenMuch {
			t.Errorf("%d bytes are counted of %d", u.Bytes, (i+1)*writtenMuch)
		}
	}
}

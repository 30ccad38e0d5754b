package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// sizedLayer is a layer of so many bytes and files, small as a blob.
func sizedLayer(name string, bytes, files int) imagestest.LayerBlob {
	var entries []imagestest.Entry
	for i := range files {
		entries = append(entries, imagestest.File(fmt.Sprintf("%s/%d", name, i), strings.Repeat(name[:1], bytes/files)))
	}
	return imagestest.Layer(entries...)
}

// blobsOf has a registry answer requests for the blobs of some layers otherwise.
func blobsOf(layers []imagestest.LayerBlob, answer http.HandlerFunc) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		for _, l := range layers {
			if strings.HasSuffix(r.URL.Path, "/blobs/"+digest.FromBytes(l.Blob).String()) {
				answer(w, r)
				return true
			}
		}
		return false
	}
}

func unavailable(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusInternalServerError)
}

// staged are the layers in tmp, without what lies beside them.
func staged(t *testing.T, s *Store) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(s.path(tmpDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// TestLayersOfAFailedPullAreThereForTheNext: layers that were whole when another one failed, or when the caller went, are
// neither fetched nor unpacked again for a while; then they are gone.
func TestLayersOfAFailedPullAreThereForTheNext(t *testing.T) {
	for _, cancelled := range []bool{false, true} {
		t.Run(fmt.Sprintf("cancelled=%v", cancelled), func(t *testing.T) {
			s := quick(t)
			reg := imagestest.NewRegistry(t)
			layers := []imagestest.LayerBlob{sizedLayer("one", 1000, 3), sizedLayer("two", 1000, 3), sizedLayer("three", 1000, 3)}
			reg.Push("a", "b", imagestest.NewImage(layers...))
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			others := func() bool {
				p := s.Pulls()
				return len(p) == 1 && len(p[0].Layers) == 3 && p[0].Layers[0].State == LayerUnpacked && p[0].Layers[1].State == LayerUnpacked
			}
			reg.Hook(blobsOf(layers[2:], func(w http.ResponseWriter, r *http.Request) {
				until(t, others)
				if cancelled {
					cancel()
					<-r.Context().Done()
				}
				w.WriteHeader(http.StatusNotFound)
			}))
			if _, err := s.Pull(ctx, reg.Host()+"/a:b", nil); err == nil {
				t.Fatal("pulled")
			}
			s.pulls.wait()
			s.unpacks.wait()
			if n := len(staged(t, s)); n != 2 {
				t.Errorf("%d layers are kept, want 2", n)
			}
			reg.Hook(nil)
			before := len(reg.Requests())
			mustPull(t, s, reg.Host()+"/a:b")
			var again []string
			for _, r := range reg.Requests()[before:] {
				for i, l := range layers {
					if strings.HasSuffix(r.Path, digest.FromBytes(l.Blob).String()) {
						again = append(again, fmt.Sprint(i))
					}
				}
			}
			if !slices.Equal(again, []string{"2"}) {
				t.Errorf("layers asked for by the second pull: %v, want the one that had failed", again)
			}
			wantWhole(t, s)
			if n := len(staged(t, s)); n != 0 {
				t.Errorf("%d layers are kept after the pull", n)
			}
		})
	}
}

// TestLayersThatWaitGo: by themselves, with the store, and at once where no other try makes the image better.
func TestLayersThatWaitGo(t *testing.T) {
	pull := func(t *testing.T, s *Store, bad imagestest.LayerBlob, hook bool) {
		t.Helper()
		reg := imagestest.NewRegistry(t)
		reg.Push("a", "b", imagestest.NewImage(sizedLayer("good", 1000, 1), bad))
		reg.Hook(blobsOf([]imagestest.LayerBlob{bad}, func(w http.ResponseWriter, r *http.Request) {
			until(t, func() bool { p := s.Pulls(); return len(p) == 1 && p[0].Layers[0].State == LayerUnpacked })
			if hook {
				unavailable(w, r)
				return
			}
			_, _ = w.Write(bad.Blob)
		}))
		_ = pullErr(t, s, reg.Host()+"/a:b", nil)
		s.pulls.wait()
		s.unpacks.wait()
	}
	t.Run("after a while", func(t *testing.T) {
		s := quick(t)
		s.linger = 100 * time.Millisecond
		pull(t, s, sizedLayer("bad", 1000, 1), true)
		until(t, func() bool { return len(leftovers(t, s)) == 0 })
	})
	t.Run("with the store", func(t *testing.T) {
		s, err := Open(Options{Root: filepath.Join(t.TempDir(), "images")})
		if err != nil {
			t.Fatal(err)
		}
		s.pace.BackOff = time.Millisecond
		pull(t, s, sizedLayer("bad", 1000, 1), true)
		if n := len(staged(t, s)); n != 1 {
			t.Errorf("%d layers are kept, want one", n)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if left := leftovers(t, s); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
	t.Run("of an image at fault", func(t *testing.T) {
		s := quick(t)
		bad := sizedLayer("bad", 1000, 1)
		bad.DiffID = digest.FromString("else")
		pull(t, s, bad, false)
		if left := leftovers(t, s); len(left) != 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// smallDisk is a store on a disk of its own.
func smallDisk(t *testing.T, options string) *Store {
	t.Helper()
	needRoot(t)
	dir := memoryDisk(t, options)
	s := quick(t, func(o *Options) { o.Root = filepath.Join(dir, "images") })
	t.Cleanup(func() { s.WaitDeleted(context.Background()) })
	return s
}

// memoryDisk is a directory on a disk of its own.
func memoryDisk(t *testing.T, options string) string {
	t.Helper()
	dir := mountPoint(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("needs a disk of its own: %v", err)
	}
	return dir
}

// leastFree watches what is free on a store's disk; the returned function tells the least that was.
func leastFree(t *testing.T, s *Store) func() amount {
	t.Helper()
	look := func() amount {
		free, err := s.space.free()
		if err != nil {
			t.Error(err)
		}
		return free
	}
	least, stop, ended := look(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			default:
				time.Sleep(200 * time.Microsecond)
				now := look()
				least = amount{min(least.bytes, now.bytes), min(least.inodes, now.inodes)}
			}
		}
	}()
	return func() amount {
		close(stop)
		<-ended
		return least
	}
}

// TestLayersShareTheDisk: layers each of which would fit do not fill the disk together, neither with bytes nor with files.
func TestLayersShareTheDisk(t *testing.T) {
	for name, layer := range map[string]func(name string) imagestest.LayerBlob{
		"bytes": func(name string) imagestest.LayerBlob { return sizedLayer(name, 14<<20, 4) },
		"files": func(name string) imagestest.LayerBlob { return sizedLayer(name, 1200, 1200) },
	} {
		t.Run(name, func(t *testing.T) {
			s := smallDisk(t, "size=24m,nr_inodes=2000")
			start, err := s.space.free()
			if err != nil {
				t.Fatal(err)
			}
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", imagestest.NewImage(layer("one"), layer("two"), layer("three")))
			reg.Push("a", "small", imagestest.NewImage(sizedLayer("small", 1000, 1)))
			least := leastFree(t, s)
			err = pullErr(t, s, reg.Host()+"/a:b", nil)
			if got := least(); !errdefs.IsResourceExhausted(err) || got.bytes < start.bytes/10-256<<10 || got.inodes < start.inodes/10-10 {
				t.Errorf("%v; free were %+v, and %+v in the worst moment; want a tenth", err, start, got)
			}
			s.unpacks.wait()
			if left := leftovers(t, s); len(left) != 0 {
				t.Errorf("left: %v", left)
			}
			s.WaitDeleted(context.Background())
			mustPull(t, s, reg.Host()+"/a:small")
		})
	}
}

// TestTheDiskIsNoFaultOfHosts: what pulls leave free is told once, and not as what each mirror did.
func TestTheDiskIsNoFaultOfHosts(t *testing.T) {
	s := smallDisk(t, "size=24m,nr_inodes=2000")
	mirror, reg := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	for _, r := range []*imagestest.Registry{mirror, reg} {
		r.Push("a", "b", imagestest.NewImage(sizedLayer("one", 14<<20, 4), sizedLayer("two", 14<<20, 4)))
	}
	var o Options
	certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", reg.URL, mirror.URL)})(&o)
	s.certsD = o.CertsD
	err := pullErr(t, s, "registry.example/a:b", nil)
	if !errdefs.IsResourceExhausted(err) || strings.Count(err.Error(), "which pulls leave free") != 1 {
		t.Errorf("got %v", err)
	}
}

// TestLayersThatWaitMakeRoom: they take a quarter of what is free at most, and go where that is needed.
func TestLayersThatWaitMakeRoom(t *testing.T) {
	for _, c := range []struct{ waits, kept int }{{3 << 20, 1}, {5 << 20, 0}} {
		s := smallDisk(t, "size=16m")
		reg := imagestest.NewRegistry(t)
		bad := sizedLayer("bad", 1000, 1)
		reg.Push("a", "fails", imagestest.NewImage(sizedLayer("waits", c.waits, 2), bad))
		reg.Push("a", "large", imagestest.NewImage(sizedLayer("large", 25<<19, 5)))
		var unpacked atomic.Bool
		reg.Hook(blobsOf([]imagestest.LayerBlob{bad}, func(w http.ResponseWriter, r *http.Request) {
			until(t, func() bool { p := s.Pulls(); return len(p) == 1 && p[0].Layers[0].State == LayerUnpacked })
			unpacked.Store(true)
			unavailable(w, r)
		}))
		if err := pullErr(t, s, reg.Host()+"/a:fails", nil); !errors.Is(err, ErrRegistryUnavailable) || !unpacked.Load() {
			t.Error(err)
		}
		s.pulls.wait()
		s.unpacks.wait()
		if n := len(staged(t, s)); n != c.kept {
			t.Errorf("of %d bytes %d layers are kept, want %d", c.waits, n, c.kept)
		}
		s.WaitDeleted(context.Background())
		mustPull(t, s, reg.Host()+"/a:large")
		if n := len(staged(t, s)); n != 0 {
			t.Errorf("%d layers are kept beside the large one", n)
		}
	}
}

// TestImportsLeaveSpace: of the archive, which is written down first, and what is made of it.
func TestImportsLeaveSpace(t *testing.T) {
	s := smallDisk(t, "size=24m")
	start, err := s.space.free()
	if err != nil {
		t.Fatal(err)
	}
	body := imagestest.Tar(imagestest.File("f", strings.Repeat("x", 11_400_000)))
	archive := imagestest.Gzip(imagestest.Tar(ociEntries(t, imagestest.NewImage(imagestest.PlainLayer(body)).Build(), "x:1")...))
	least := leastFree(t, s)
	_, err = s.Import(context.Background(), bytes.NewReader(archive), ImportOptions{})
	if got := least(); !errdefs.IsResourceExhausted(err) || got.bytes < start.bytes/10-256<<10 {
		t.Errorf("%v; of %d bytes %d were free in the worst moment", err, start.bytes, got.bytes)
	}
	s.unpacks.wait()
	if left := leftovers(t, s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

package images

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/internal/step"
)

func mustPull(t *testing.T, s *Store, ref string) *Image {
	t.Helper()
	img, err := s.Pull(context.Background(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestTagsAndDigestsOfOneImage(t *testing.T) {
	s := openStore(t)
	one, two := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	img := smallImage("x")
	for _, r := range []*imagestest.Registry{one, two} {
		r.Push("team/app", "v1", img)
		r.Push("team/app", "v2", img)
	}
	built := img.Build()
	d := "@" + built.Descriptor.Digest.String()
	for _, ref := range []string{one.Host() + "/team/app:v1", one.Host() + "/team/app:v2", two.Host() + "/team/app:v1", two.Host() + "/team/app" + d} {
		mustPull(t, s, ref)
	}
	imgs := s.Images()
	if len(imgs) != 1 {
		t.Fatalf("%d images, want one", len(imgs))
	}
	tags := []string{one.Host() + "/team/app:v1", one.Host() + "/team/app:v2", two.Host() + "/team/app:v1"}
	digests := []string{one.Host() + "/team/app" + d, two.Host() + "/team/app" + d}
	slices.Sort(tags)
	slices.Sort(digests)
	if got := imgs[0]; got.ID != built.ConfigID || !slices.Equal(got.RepoTags, tags) || !slices.Equal(got.RepoDigests, digests) {
		t.Errorf("got %+v, want tags %v, digests %v", got, tags, digests)
	}
	size := int64(len(img.Layers[0].Blob) + len(built.Blobs[built.ConfigID]))
	if imgs[0].Size != size {
		t.Errorf("size %d, want %d", imgs[0].Size, size)
	}
	if n := one.Count("GET", "/blobs/") + two.Count("GET", "/blobs/"); n != 2 {
		t.Errorf("%d blobs fetched, want the configuration and the layer once", n)
	}
	if err := s.Remove(context.Background(), tags[0]); err != nil {
		t.Fatal(err)
	}
	if imgs := s.Images(); len(imgs) != 0 || len(leftovers(t, s)) != 0 {
		t.Errorf("after removing by one tag: %v, %v", imgs, leftovers(t, s))
	}
	if u := s.Usage(); u.Bytes != 0 || u.Inodes != 0 {
		t.Errorf("usage after removing all: %+v", u)
	}
	for _, name := range append(tags, string(built.ConfigID), "never.heard/of:it") {
		if err := s.Remove(context.Background(), name); err != nil {
			t.Errorf("remove of the absent %s: %v", name, err)
		}
	}
}

func TestTagThatMovesLeavesImageUntagged(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	ref := reg.Host() + "/a:latest"
	reg.Push("a", "latest", smallImage("old"))
	old := mustPull(t, s, ref)
	reg.Push("a", "latest", smallImage("new"))
	moved := mustPull(t, s, reg.Host()+"/a") // :latest is understood
	if old.ID == moved.ID {
		t.Fatal("one image for both")
	}
	got, err := s.Image(old.ID.Encoded()[:12])
	if err != nil || len(got.RepoTags) != 0 || len(got.RepoDigests) != 1 {
		t.Errorf("old image: %+v, %v; want it without tags and with its digest", got, err)
	}
	if got, err := s.Image(ref); err != nil || got.ID != moved.ID {
		t.Errorf("by tag: %+v, %v", got, err)
	}
}

func TestImagesAreTheCallersOwn(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	img := smallImage("x")
	img.Config.Config.Env = []string{"A=1"}
	reg.Push("a", "b", img)
	first := mustPull(t, s, reg.Host()+"/a:b")
	first.Config.Config.Env[0] = "A=stolen"
	for _, got := range s.Images() {
		if got.Config.Config.Env[0] != "A=1" {
			t.Errorf("environment %v: changed through another caller's image", got.Config.Config.Env)
		}
	}
}

func TestOtherDigestAlgorithms(t *testing.T) {
	for _, alg := range []digest.Algorithm{digest.SHA384, digest.SHA512} {
		s := openStore(t)
		reg := imagestest.NewRegistry(t)
		img := smallImage("x")
		img.Algorithm = alg
		img.Layers[0].DiffID = alg.FromBytes(imagestest.Tar(imagestest.File("f", "x")))
		built := reg.Push("a", "", img)
		got, err := s.Pull(context.Background(), reg.Host()+"/a@"+built.Descriptor.Digest.String(), nil)
		if err != nil || got.ID != built.ConfigID {
			t.Errorf("%s: %+v, %v", alg, got, err)
		}
		for _, name := range []string{got.ID.String(), got.ID.Encoded(), got.ID.String()[:13], got.ID.Encoded()[:12]} {
			if found, err := s.Image(name); err != nil || found.ID != got.ID {
				t.Errorf("%s: %+v, %v", name, found, err)
			}
		}
	}
}

func TestPullsOfOneImageAreOne(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	img := imagestest.NewImage(imagestest.Layer(imagestest.File("f", "1")), imagestest.Layer(imagestest.File("f", "2")))
	reg.Push("a", "b", img)
	reg.Push("other", "c", imagestest.NewImage(append(img.Layers[:2:2], imagestest.Layer(imagestest.File("f", "3")))...))
	gate := make(chan struct{})
	reg.Hook(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-gate
		}
		return false
	})
	var wg sync.WaitGroup
	for i := range 20 {
		ref := "/a:b"
		if i%2 == 1 {
			ref = "/other:c"
		}
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), reg.Host()+ref, nil); err != nil {
				t.Error(err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	close(gate)
	wg.Wait()
	for _, l := range img.Layers {
		if n := reg.Count("GET", digest.FromBytes(l.Blob).String()); n != 1 {
			t.Errorf("layer fetched %d times", n)
		}
	}
	if left := leftovers(t, s); len(left) != 3 {
		t.Errorf("on disk: %v, want three layers", left)
	}
}

func TestPullsWithOtherCredentialsAreTheirOwn(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	reg.RequireBasic(user, secret)
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", &Auth{Username: user, Password: secret}); err != nil {
		t.Fatal(err)
	}
	if img, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil); err == nil {
		t.Errorf("without credentials: %+v, want an error though the image is here", img)
	}
}

func TestCancelledPullReturnsAtOnce(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage(strings.Repeat("x", 100_000)))
	stuck := make(chan struct{}, 10)
	release := make(chan struct{})
	defer close(release)
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", "5000")
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		stuck <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	})
	ctx, cancel := context.WithCancel(context.Background())
	other, cancelOther := context.WithCancel(context.Background())
	defer cancelOther()
	errs, otherErr := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := s.Pull(ctx, reg.Host()+"/a:b", nil)
		errs <- err
	}()
	<-stuck
	go func() {
		_, err := s.Pull(other, reg.Host()+"/a:b", nil)
		otherErr <- err
	}()
	time.Sleep(50 * time.Millisecond)
	start := time.Now()
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) || time.Since(start) > 100*time.Millisecond {
		t.Errorf("%v after %v", err, time.Since(start))
	}
	select {
	case err := <-otherErr:
		t.Errorf("the other caller was told %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	cancelOther()
	if err := <-otherErr; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	// Now nobody waits: the work ends, and a new pull begins afresh.
	reg.Hook(nil)
	if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
		t.Error(err)
	}
	s.pulls.wait()
	s.unpacks.wait()
	if left := leftovers(t, s); len(left) != 1 {
		t.Errorf("on disk: %v", left)
	}
}

func TestDeadlineOfAMillisecond(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Hook(func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-r.Context().Done():
		case <-time.After(time.Second):
		}
		return false
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := s.Pull(ctx, reg.Host()+"/a:b", nil)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 100*time.Millisecond {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

// TestPullRemoveListTogether runs everything at once: whatever is listed can be prepared and mounted.
func TestPullRemoveListTogether(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	base := imagestest.Layer(imagestest.Dir("etc"), imagestest.File("etc/base", "x"))
	for i := range 4 {
		reg.Push("a", fmt.Sprint(i), imagestest.NewImage(base, imagestest.Layer(imagestest.File("etc/mine", fmt.Sprint(i)))))
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	enough := time.After(3 * time.Second)
	var wg sync.WaitGroup
	var mounted, keys atomic.Int64
	for i := range 4 {
		ref := fmt.Sprintf("%s/a:%d", reg.Host(), i)
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := s.Pull(ctx, ref, nil); err != nil && ctx.Err() == nil {
					t.Errorf("pull: %v", err)
				}
			}
		})
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := s.Remove(context.Background(), ref); err != nil {
					t.Errorf("remove: %v", err)
				}
				time.Sleep(7 * time.Millisecond)
			}
		})
	}
	target := mountPoint(t)
	wg.Go(func() {
		for ctx.Err() == nil {
			for _, img := range s.Images() {
				key := fmt.Sprintf("k%d", keys.Add(1))
				err := s.Prepare(key, img.ID, nil)
				if errdefs.IsNotFound(err) {
					continue // removed since it was listed
				}
				if err == nil {
					err = s.Mount(context.Background(), key, target)
				}
				if err == nil {
					_, err = os.Stat(filepath.Join(target, "etc/base"))
				}
				if err == nil {
					_, err = os.Stat(filepath.Join(target, "etc/mine"))
				}
				if err != nil {
					t.Errorf("listed image: %v", err)
				}
				if err := errors.Join(s.Unmount(target), s.Release(key)); err != nil {
					t.Error(err)
				}
				mounted.Add(1)
			}
			select {
			case <-enough:
				enough = nil
			default:
			}
			if enough == nil && mounted.Load() >= 5 {
				cancel()
			}
		}
	})
	wg.Wait()
	if mounted.Load() < 5 {
		t.Errorf("only %d mounts: the test showed little", mounted.Load())
	}
	for i := range 4 {
		if err := s.Remove(context.Background(), fmt.Sprintf("%s/a:%d", reg.Host(), i)); err != nil {
			t.Error(err)
		}
	}
	s.pulls.wait()
	s.unpacks.wait()
	s.unpacks.dropIdle()
	for _, img := range s.Images() { // what the last pulls brought
		if err := s.Remove(context.Background(), string(img.ID)); err != nil {
			t.Error(err)
		}
	}
	if left := leftovers(t, s); len(left) != 0 || len(s.holds) != 0 {
		t.Errorf("left: %v, holds %v", left, s.holds)
	}
}

// TestImageRemovedWhilePulledAgain: the image is there when the pull looks, and gone when it wants to give it its name.
func TestImageRemovedWhilePulledAgain(t *testing.T) {
	var s *Store
	removals := 0 // still to come
	s = openStore(t, func(o *Options) {
		o.Observe = func(e step.Event) {
			if e.Step != "manifest" || s == nil || removals == 0 {
				return
			}
			removals--
			for _, img := range s.Images() {
				if err := s.Remove(context.Background(), string(img.ID)); err != nil {
					t.Error(err)
				}
			}
		}
	})
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	for n := range 6 {
		first := mustPull(t, s, reg.Host()+"/a:b")
		removals = n
		again := mustPull(t, s, reg.Host()+"/a:b")
		if first.ID != again.ID || len(s.Images()) != 1 || len(leftovers(t, s)) != 1 {
			t.Errorf("images %v, on disk %v", s.Images(), leftovers(t, s))
		}
	}
}

func TestFiveRemovesAtOnce(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	mustPull(t, s, reg.Host()+"/a:b")
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			if err := s.Remove(context.Background(), reg.Host()+"/a:b"); err != nil {
				t.Error(err)
			}
			if _, err := s.Image(reg.Host() + "/a:b"); !errdefs.IsNotFound(err) {
				t.Errorf("after its removal: %v", err)
			}
		})
	}
	wg.Wait()
}

// TestCVE_2021_41103_RootsArePrivate in any umask, and also where the root was there with another mode.
func TestCVE_2021_41103_RootsArePrivate(t *testing.T) {
	needRoot(t)
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	for _, umask := range []int{0, 0o077, 0o777} {
		root := filepath.Join(t.TempDir(), "deep", "images")
		if umask == 0 {
			if err := os.MkdirAll(root, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		if umask == 0o777 {
			if err := os.MkdirAll(filepath.Dir(root), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		syscall.Umask(umask)
		s, err := Open(Options{Root: root})
		if err != nil {
			t.Fatal(err)
		}
		for _, dir := range []string{".", layersDir, rootfsDir, tmpDir, trashDir, viewsDir} {
			st, err := os.Stat(filepath.Join(root, dir))
			if err != nil || st.Mode().Perm() != 0o700 {
				t.Errorf("umask %o: %s has mode %v, %v", umask, dir, st.Mode(), err)
			}
		}
		reg := imagestest.NewRegistry(t)
		reg.Push("a", "b", imagestest.NewImage(imagestest.Layer(imagestest.File("d/f", "x").Mode(0o666), imagestest.Char("null", 1, 3))))
		img := mustPull(t, s, reg.Host()+"/a:b")
		layer := s.path(layersDir, img.Layers[0].dir())
		for name, want := range map[string]os.FileMode{".": 0o755, "d": 0o755, "d/f": 0o666, "null": 0o666} {
			st, err := os.Stat(filepath.Join(layer, name))
			if err != nil || st.Mode().Perm() != want {
				t.Errorf("umask %o: %s: %v, %v; want %v", umask, name, st, err, want)
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		syscall.Umask(0)
	}
}

func TestBadRootsAreSaid(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, root := range []string{"", file, "/proc/nothing/here"} {
		if s, err := Open(Options{Root: root}); err == nil {
			s.Close()
			t.Errorf("%q was opened", root)
		}
	}
}

func TestSecondStoreOnOneRootIsRefused(t *testing.T) {
	s := openStore(t)
	if second, err := Open(Options{Root: s.root}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v, %v", second, err)
	}
}

// TestBoundsOfLayersAreSettings: and errors name them.
func TestBoundsOfLayersAreSettings(t *testing.T) {
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "files", imagestest.NewImage(sizedLayer("files", 20, 20)))
	reg.Push("a", "bytes", imagestest.NewImage(sizedLayer("bytes", 100_000, 1)))
	reg.Push("a", "blob", imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", strings.Repeat("x", 100_000))))))
	for _, c := range []struct {
		ref            string
		bytes, entries int64
		said           string
	}{
		{"files", 0, 21, ""},
		{"files", 0, 20, "20 entries (maxLayerEntries)"},
		{"bytes", 102_400, 0, ""},
		{"bytes", 102_399, 0, "102399 bytes are not allowed (maxLayerBytes)"},
		{"blob", 50_000, 0, "50000 bytes are not allowed (maxLayerBytes)"},
	} {
		s := openStore(t, func(o *Options) { o.MaxLayerBytes, o.MaxLayerEntries = c.bytes, c.entries })
		_, err := s.Pull(context.Background(), reg.Host()+"/a:"+c.ref, nil)
		if c.said == "" && err != nil || c.said != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.said)) {
			t.Errorf("%s within %d bytes and %d entries: %v", c.ref, c.bytes, c.entries, err)
		}
	}
}

func TestStepsAreObserved(t *testing.T) {
	var mu sync.Mutex
	var names []string
	s := openStore(t, func(o *Options) {
		o.Observe = func(e step.Event) {
			mu.Lock()
			defer mu.Unlock()
			if e.Call != "PullImage" || e.Duration <= 0 || e.Err != nil {
				t.Errorf("event %+v", e)
			}
			names = append(names, e.Step)
		}
	})
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", smallImage("x"))
	mustPull(t, s, reg.Host()+"/a:b")
	if want := []string{"resolve", "manifest", "layer-1", "inherit", "sync", "publish", "commit"}; !slices.Equal(names, want) {
		t.Errorf("steps %v, want %v", names, want)
	}
}

func TestSharedWork(t *testing.T) {
	var destroyed atomic.Int64
	s := shared[string, int]{destroy: func(int) { destroyed.Add(1) }}
	base := context.Background()
	gate := make(chan struct{})
	calls := 0
	work := func(ctx context.Context) (int, error) {
		calls++
		select {
		case <-gate:
			return 7, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	ctx, cancel := context.WithCancel(base)
	go func() { time.Sleep(10 * time.Millisecond); cancel() }()
	if _, _, own, err := s.acquire(ctx, base, "k", work); !own || !errors.Is(err, context.Canceled) {
		t.Errorf("own %v, %v", own, err)
	}
	s.wait()
	close(gate)
	v, release, own, err := s.acquire(base, base, "k", work)
	if v != 7 || !own || err != nil || calls != 2 {
		t.Fatalf("%d, %v, %v, %d calls", v, own, err, calls)
	}
	v, release2, own, err := s.acquire(base, base, "k", work)
	if v != 7 || own || err != nil || calls != 2 {
		t.Fatalf("%d, %v, %v, %d calls: want the kept result", v, own, err, calls)
	}
	release()
	release()
	if destroyed.Load() != 0 {
		t.Error("destroyed while it is held")
	}
	release2()
	if destroyed.Load() != 1 || len(s.works) != 0 {
		t.Errorf("destroyed %d times, %d works", destroyed.Load(), len(s.works))
	}
}

// shareStaged has the layers that are staged now, as another pull of them would, until release is called.
func shareStaged(t *testing.T, s *Store) (staged []*stagedLayer, release func()) {
	t.Helper()
	s.unpacks.mu.Lock()
	chains := slices.Collect(maps.Keys(s.unpacks.works))
	s.unpacks.mu.Unlock()
	var releases []func()
	for _, chain := range chains {
		l, release, _, err := s.unpacks.acquire(context.Background(), s.ctx, chain, nil)
		if err != nil {
			t.Error(err)
			continue
		}
		staged, releases = append(staged, l), append(releases, release)
	}
	return staged, func() {
		for _, release := range releases {
			release()
		}
	}
}

// TestCancelledPullRecordsNothing: to record what a layer is like takes as long as to read it. A pull that is cancelled does not
// go on with it, and another one that has the same layer does it then.
func TestCancelledPullRecordsNothing(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	returned, inherited := make(chan struct{}), make(chan error, 2)
	var s *Store
	var staged []*stagedLayer
	release := func() {}
	observe := func(e step.Event) {
		switch {
		case e.Step == "layer-1" && staged == nil:
			staged, release = shareStaged(t, s)
			cancel()
			<-returned // then the pull knows
			for _, l := range staged {
				looks := 0
				for ; l.record(endsAfter(looks)) != nil; looks++ { // half way, wherever that is
				}
				if looks == 0 {
					t.Error("recorded, though nobody waited")
				}
				if err := os.Remove(l.path + treeExt); err != nil {
					t.Error(err)
				}
			}
		case e.Step == "inherit":
			inherited <- e.Err
		}
	}
	s = openStore(t, func(o *Options) { o.Observe = observe })
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", imagestest.NewImage(richLayer()))
	if _, err := s.Pull(ctx, reg.Host()+"/a:b", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(returned)
	if err := <-inherited; err == nil || !strings.Contains(err.Error(), context.Canceled.Error()) {
		t.Errorf("recording ends with %v, want it cancelled", err)
	}
	before := reg.Count("GET", "/blobs/")
	mustPull(t, s, reg.Host()+"/a:b")
	if n := reg.Count("GET", "/blobs/") - before; len(staged) != 1 || n > 1 { // the configuration
		t.Errorf("%d layers were staged, %d blobs were fetched once more", len(staged), n)
	}
	release()
	for _, chain := range s.Images()[0].Layers {
		if rec := s.layers[chain]; rec.Tape == "" {
			t.Errorf("the layer's tape was forgotten: %+v", rec)
		}
	}
	wantWhole(t, s)
}

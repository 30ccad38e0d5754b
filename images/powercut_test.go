package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/images/imagestest"
)

// envPowerCuts is how often the power is cut.
const (
	envPowerCuts = "BERTH_POWERCUTS"
	envOwnMounts = "BERTH_TEST_OWN_MOUNTS"
	diskSize     = 96 << 20
)

// disk is a disk whose writes and flushes are written down: a file of a FUSE file system, below a loop device. What a
// machine finds after a power cut is everything up to the last flush, and anything of what came after it.
type disk struct {
	fs.Inode
	file *os.File

	mu  sync.Mutex
	log []diskEvent
	// bad tells which writes fail; nil: none.
	bad func(data []byte) bool
}

// diskEvent is a write, a flush, or, with a note, something that the disk knows nothing of.
type diskEvent struct {
	off  int64
	data []byte
	// note is called with the states of the images that were known when it happened.
	note func(map[string]imageState)
}

type imageState string

const (
	stateUnknown imageState = "" // a pull or a removal is under way
	stateThere   imageState = "there"
	stateGone    imageState = "gone"
)

func (d *disk) add(e diskEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, e)
}

func (d *disk) note(image string, state imageState) {
	d.add(diskEvent{note: func(all map[string]imageState) { all[image] = state }})
}

func (d *disk) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = 0o600, diskSize, 4096
	return 0
}

func (d *disk) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (d *disk) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := d.file.ReadAt(dest, off)
	if err != nil && err != io.EOF {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(dest[:n]), 0
}

func (d *disk) Write(_ context.Context, _ fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bad != nil && d.bad(data) {
		return 0, syscall.EIO
	}
	if _, err := d.file.WriteAt(data, off); err != nil {
		return 0, syscall.EIO
	}
	d.log = append(d.log, diskEvent{off: off, data: slices.Clone(data)})
	return uint32(len(data)), 0
}

func (d *disk) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	d.add(diskEvent{})
	return 0
}

// TestContainerd5854_PowerCut: containerd#5854, #12302, harvester#4434, podman#8005. A machine whose power is cut at random moments of pulls
// and removals finds, each time, a store in which nothing is wrong, every image that is listed whole, every image there whose
// pull had returned, and none whose removal had.
func TestContainerd5854_PowerCut(t *testing.T) {
	cuts := 15
	if n := os.Getenv(envPowerCuts); n != "" {
		var err error
		if cuts, err = strconv.Atoi(n); err != nil {
			t.Fatal(err)
		}
	}
	if !inOwnMounts(t) {
		return
	}
	dir := t.TempDir()
	d := newDisk(t, dir)
	start := filepath.Join(dir, "start")
	copySparse(t, d.file.Name(), start)

	refs := powerImages(t)
	for _, keep := range []bool{false, true} {
		d := &disk{file: d.file}
		begin := powerHistory(t, d, dir, refs, keep, 30+cuts/4)
		t.Logf("kept blobs %v: %d writes and flushes", keep, len(d.log))
		powerCuts(t, d, begin, start, dir, refs, keep, cuts/2+1)
		copySparse(t, start, d.file.Name())
	}
}

// inOwnMounts tells whether the test is in mounts of its own, which go with it, whatever becomes of it. If not, it has run there
// when this returns.
func inOwnMounts(t *testing.T) bool {
	t.Helper()
	needRoot(t)
	for _, file := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(file); err != nil {
			t.Skipf("a disk of the test's own needs %s", file)
		}
	}
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	if os.Getenv(envOwnMounts) != "" {
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), envOwnMounts+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Error(err)
	}
	return false
}

// newDisk is a disk with an empty file system.
func newDisk(t *testing.T, dir string) *disk {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "disk"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(diskSize); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", f.Name()).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %s: %v", out, err)
	}
	return &disk{file: f}
}

// powerImages are four images that share a layer.
func powerImages(t *testing.T) []string {
	t.Helper()
	reg := imagestest.NewRegistry(t)
	layer := func(name string, files, size int) imagestest.LayerBlob {
		entries := []imagestest.Entry{imagestest.File(name+"/big", strings.Repeat(name+" ", 200_000))}
		for i := range files {
			entries = append(entries, imagestest.File(fmt.Sprintf("%s/%d", name, i), strings.Repeat(name, size+i)))
		}
		return imagestest.Layer(entries...)
	}
	shared := layer("shared", 60, 100)
	var refs []string
	for i := range 4 {
		name := fmt.Sprint("own", i)
		reg.Push("app", name, imagestest.NewImage(shared, layer(name, 20, 300)))
		refs = append(refs, reg.Host()+"/app:"+name)
	}
	return refs
}

// mountLoop mounts a disk. The loop device goes with the mount.
func mountLoop(t *testing.T, file, at string) {
	t.Helper()
	if out, err := exec.Command("mount", "-o", "loop", file, at).CombinedOutput(); err != nil {
		t.Fatalf("mount %s: %s: %v", file, out, err)
	}
}

// mount mounts the disk until unmount is called.
func (d *disk) mount(t *testing.T, dir string) (at string, unmount func()) {
	t.Helper()
	fuseDir, at := filepath.Join(dir, "fuse"), filepath.Join(dir, "mount")
	for _, p := range []string{fuseDir, at} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	root := &fs.Inode{}
	server, err := fs.Mount(fuseDir, root, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "powercut", MaxWrite: 1 << 20},
		OnAdd: func(ctx context.Context) {
			root.AddChild("disk", root.NewPersistentInode(ctx, d, fs.StableAttr{Mode: syscall.S_IFREG}), true)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	mountLoop(t, filepath.Join(fuseDir, "disk"), at)
	return at, func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
		if err := server.Unmount(); err != nil {
			t.Error(err)
		}
	}
}

// powerHistory pulls and removes images on a disk, and returns where in its log the store was open.
func powerHistory(t *testing.T, d *disk, dir string, refs []string, keep bool, ops int) (begin int) {
	t.Helper()
	at, unmount := d.mount(t, dir)
	defer unmount()
	s, err := Open(Options{Root: filepath.Join(at, "images"), KeepBlobs: keep})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	d.mu.Lock()
	begin = len(d.log)
	d.mu.Unlock()
	for _, ref := range refs {
		d.note(ref, stateGone)
	}
	var wg sync.WaitGroup
	for i := range 2 { // each has two images of its own, so that it knows what they are
		wg.Go(func() {
			there := map[string]bool{}
			for range ops / 2 {
				ref := refs[2*i+rand.IntN(2)]
				d.note(ref, stateUnknown)
				if there[ref] {
					if err := s.Remove(context.Background(), ref); err != nil {
						t.Error(err)
						return
					}
					d.note(ref, stateGone)
				} else {
					if _, err := s.Pull(context.Background(), ref, nil); err != nil {
						t.Error(err)
						return
					}
					d.note(ref, stateThere)
				}
				there[ref] = !there[ref]
			}
		})
	}
	wg.Wait()
	return begin
}

// powerCuts looks at what the store is after power cuts at random places of a disk's log.
func powerCuts(t *testing.T, d *disk, begin int, start, dir string, refs []string, keep bool, cuts int) {
	t.Helper()
	places := make([]int, cuts)
	for i := range places {
		places[i] = begin + rand.IntN(len(d.log)-begin+1)
	}
	slices.Sort(places)
	flushed := filepath.Join(dir, "flushed") // the disk as of the last flush before the cut
	copySparse(t, start, flushed)
	f, err := os.OpenFile(flushed, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	done := 0
	states := map[string]imageState{}
	noted := 0
	for i, place := range places {
		last := done
		for j := done; j < place; j++ {
			if d.log[j].data == nil && d.log[j].note == nil {
				last = j + 1
			}
		}
		for ; done < last; done++ {
			d.log[done].write(t, f, 1)
		}
		for ; noted < place; noted++ {
			if note := d.log[noted].note; note != nil {
				note(states)
			}
		}
		cut := filepath.Join(dir, "cut")
		copySparse(t, flushed, cut)
		g, err := os.OpenFile(cut, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		share := []float64{0, 0.5, 1}[i%3] // of what was not flushed that is there all the same
		for _, e := range d.log[last:place] {
			e.write(t, g, share)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		after(t, cut, dir, refs, keep, states, fmt.Sprintf("cut %d at %d of %d, %d of %d writes unflushed", i, place, len(d.log), place-last, place), i%5 == 0)
		if t.Failed() {
			return
		}
	}
}

// write does a write, or each block of it with some probability.
func (e diskEvent) write(t *testing.T, f *os.File, probability float64) {
	t.Helper()
	for off := 0; off < len(e.data); off += 4096 {
		if probability < 1 && rand.Float64() >= probability {
			continue
		}
		if _, err := f.WriteAt(e.data[off:min(off+4096, len(e.data))], e.off+int64(off)); err != nil {
			t.Fatal(err)
		}
	}
}

// after looks at the store on a disk after the power was cut.
func after(t *testing.T, disk, dir string, refs []string, keep bool, states map[string]imageState, what string, pull bool) {
	t.Helper()
	at := filepath.Join(dir, "mount")
	mountLoop(t, disk, at)
	defer func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Fatal(err)
		}
	}()
	s, err := Open(Options{Root: filepath.Join(at, "images"), KeepBlobs: keep, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}()
	whole := func(when string) {
		r, err := s.Verify(context.Background(), VerifyOptions{Deep: true})
		if err != nil || len(r.Findings) > 0 || len(r.Unverifiable) > 0 {
			t.Errorf("%s%s: %v, %v", what, when, r.Findings, err)
		}
	}
	whole("")
	for _, ref := range refs {
		_, err := s.Image(ref)
		if is := map[bool]imageState{true: stateThere, false: stateGone}[err == nil]; states[ref] != stateUnknown && states[ref] != is {
			t.Errorf("%s: image %s is %s, the last that was told of it is %s", what, ref, is, states[ref])
		}
	}
	for _, img := range s.Images() {
		if err := readsRight(s, img, filepath.Join(dir, "root")); err != nil {
			t.Errorf("%s: image %v: %v", what, img.RepoTags, err)
		}
	}
	if entries, err := os.ReadDir(s.path(tmpDir)); err != nil || len(entries) > 0 {
		t.Errorf("%s: staged: %v, %v", what, entries, err)
	}
	if !pull {
		return
	}
	for _, ref := range refs {
		if _, err := s.Pull(context.Background(), ref, nil); err != nil {
			t.Errorf("%s: the next pull: %v", what, err)
		}
	}
	whole(", after the next pulls")
}

// readsRight mounts an image and reads a file of it.
func readsRight(s *Store, img *Image, at string) error {
	if err := os.MkdirAll(at, 0o700); err != nil {
		return err
	}
	if err := errors.Join(s.Prepare("k", img.ID, nil), s.Mount(context.Background(), "k", at)); err != nil {
		return err
	}
	_, tag, _ := strings.Cut(img.RepoTags[0], "/app:")
	for _, name := range []string{"shared", tag} {
		if data, err := os.ReadFile(filepath.Join(at, name, "big")); err != nil || string(data) != strings.Repeat(name+" ", 200_000) {
			return fmt.Errorf("%s/big has %d bytes, not those that it should have: %w", name, len(data), err)
		}
	}
	return errors.Join(s.Unmount(at), s.Release("k"))
}

// copySparse copies a disk, and no holes.
func copySparse(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %s: %v", from, out, err)
	}
}

// TestLostWritesAreHeardOf: the disk fails to write what a layer has, and tells it once, to somebody else. Neither the pull that
// has unpacked the layer nor one that came later and shares it makes an image of it; the next one fetches it again.
func TestLostWritesAreHeardOf(t *testing.T) {
	if !inOwnMounts(t) {
		return
	}
	const mark = "lost and found "
	dir := t.TempDir()
	d := newDisk(t, dir)
	at, unmount := d.mount(t, dir)
	defer unmount()
	s, err := Open(Options{Root: filepath.Join(at, "images")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	shared := imagestest.Layer(imagestest.File("f", strings.Repeat(mark, 20_000)))
	own := []imagestest.LayerBlob{sizedLayer("one", 1000, 1), sizedLayer("two", 1000, 1)}
	reg := imagestest.NewRegistry(t)
	var refs []string
	for i, l := range own {
		reg.Push("a", fmt.Sprint(i), imagestest.NewImage(shared, l))
		refs = append(refs, fmt.Sprintf("%s/a:%d", reg.Host(), i))
	}
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	reg.Hook(blobsOf(own[:1], func(w http.ResponseWriter, _ *http.Request) {
		<-gate
		_, _ = w.Write(own[0].Blob)
	}))
	fail := func(bad func([]byte) bool) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.bad = bad
	}
	fail(func(data []byte) bool { return bytes.Contains(data, []byte(mark)) })
	other, err := os.Open(at)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	first := make(chan error, 1)
	go func() {
		_, err := s.Pull(context.Background(), refs[0], nil)
		first <- err
	}()
	until(t, func() bool {
		p := s.Pulls()
		return len(p) == 1 && len(p[0].Layers) == 2 && p[0].Layers[0].State == LayerUnpacked
	})
	if err := syncfs(other); !errors.Is(err, unix.EIO) {
		t.Fatalf("the disk lost nothing: %v", err)
	}
	fail(nil)
	if _, err := s.Pull(context.Background(), refs[1], nil); err == nil || !strings.Contains(err.Error(), unix.EIO.Error()) {
		t.Errorf("a pull that shares the layer: %v", err)
	}
	open()
	if err := <-first; err == nil || !strings.Contains(err.Error(), unix.EIO.Error()) {
		t.Errorf("the pull that unpacked it: %v", err)
	}
	if imgs := s.Images(); len(imgs) != 0 {
		t.Errorf("there are %d images", len(imgs))
	}
	for _, ref := range refs {
		mustPull(t, s, ref)
	}
	if n := reg.Count("GET", digest.FromBytes(shared.Blob).String()); n != 2 {
		t.Errorf("the layer was fetched %d times, want it once more", n)
	}
	wantWhole(t, s)
}

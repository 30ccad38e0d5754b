package images

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// TestStagesPassEverythingOn: all bytes, in order, however they come, and the error after them.
func TestStagesPassEverythingOn(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	broken := errors.New("broken")
	for _, size := range []int{0, 1, blockSize - 1, blockSize, 3*blockSize + 7, 20 * blockSize} {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
		for _, end := range []error{io.EOF, broken} {
			p := newPipeline(context.Background())
			in := io.MultiReader(&dribble{r: bytes.NewReader(data), rnd: rnd}, failing{end})
			var seen bytes.Buffer
			out := p.through(p.ahead(p.ahead(in)), func(b []byte) { seen.Write(b) })
			got, err := io.ReadAll(out)
			if end == io.EOF && err != nil || end != io.EOF && !errors.Is(err, end) {
				t.Errorf("%d bytes: %v, want %v", size, err, end)
			}
			p.end(in)
			if !bytes.Equal(got, data) || !bytes.Equal(seen.Bytes(), data) {
				t.Errorf("%d bytes: read %d, seen %d, or others", size, len(got), seen.Len())
			}
		}
	}
}

// dribble reads a little at a time.
type dribble struct {
	r   io.Reader
	rnd *rand.Rand
}

// Read implements io.Reader.
func (d *dribble) Read(p []byte) (int, error) {
	return d.r.Read(p[:min(len(p), 1+d.rnd.IntN(100_000))])
}

type failing struct{ err error }

// Read implements io.Reader.
func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestStagesEndTogether: whoever is in the way of the others, a reader that hangs or one that is not read.
func TestStagesEndTogether(t *testing.T) {
	for _, read := range []int{0, 1, 3 * blockSize} {
		p := newPipeline(context.Background())
		hanging := &hang{ended: make(chan struct{}), left: 20 * blockSize}
		out := p.through(p.ahead(p.ahead(hanging)), func([]byte) {})
		if _, err := io.CopyN(io.Discard, out, int64(read)); err != nil {
			t.Fatal(err)
		}
		p.end(hanging)
		if _, err := io.ReadFull(out, make([]byte, 21*blockSize)); err == nil {
			t.Error("there is something to read after the end")
		}
	}
}

// hang has so many bytes and then waits to be closed.
type hang struct {
	ended chan struct{}
	once  sync.Once
	left  int
}

// Read implements io.Reader.
func (h *hang) Read(p []byte) (int, error) {
	if h.left > 0 {
		n := min(h.left, len(p))
		h.left -= n
		return n, nil
	}
	<-h.ended
	return 0, io.ErrClosedPipe
}

// Close implements io.Closer.
func (h *hang) Close() error {
	h.once.Do(func() { close(h.ended) })
	return nil
}

// TestZstdWindowsShareAMemory: of the windows that frames ask for only so many are there at a time.
func TestZstdWindowsShareAMemory(t *testing.T) {
	frame := zstdFrame(t, 64<<20, make([]byte, 3<<20))
	open := func(ctx context.Context) (io.ReadCloser, error) {
		return decompress(ctx, bufio.NewReader(bytes.NewReader(frame)))
	}
	var all []io.Closer
	for range 2 * maxZstdWindow / (64 << 20) {
		r, err := open(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if r, err := open(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more: %v, %v; want it to wait", r, err)
	}
	for _, r := range all {
		r.Close()
	}
	r, err := open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if n, err := io.Copy(io.Discard, r); n != 3<<20 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// zstdFrame is a frame of its own, with a window of a size unless that is 0.
func zstdFrame(t *testing.T, window int, data []byte, options ...zstd.EOption) []byte {
	t.Helper()
	var frame bytes.Buffer
	if window > 0 {
		options = append(options, zstd.WithWindowSize(window), zstd.WithSingleSegment(false))
	}
	w, err := zstd.NewWriter(&frame, options...)
	if err != nil {
		t.Fatal(err)
	}
	for half := range slices.Chunk(data, len(data)/2+1) { // else it is one segment
		if _, err := w.Write(half); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return frame.Bytes()
}

// TestZstdFramesAreUnderstood: whatever they are like, and wherever the stream ends, what comes out is what comes in, and the
// windows are seen.
func TestZstdFramesAreUnderstood(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	noise := make([]byte, 300_000)
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	text := []byte(strings.Repeat("some words. ", 30_000))
	skippable := append([]byte{0x5a, 0x2a, 0x4d, 0x18, 200, 0, 0, 0}, noise[:200]...)
	var stream []byte
	for _, part := range [][]byte{
		skippable, zstdFrame(t, 1<<20, noise), zstdFrame(t, 0, nil), zstdFrame(t, 2<<20, make([]byte, 400_000), zstd.WithEncoderCRC(false)), skippable,
		zstdFrame(t, 16<<20, text, zstd.WithEncoderLevel(zstd.SpeedBestCompression)), imagestest.Zstd(text), zstdFrame(t, 4<<20, noise),
	} {
		stream = append(stream, part...)
	}
	for _, n := range []int{len(stream), 0, 3, 7, 8, 100, 208, 209, 215, 217, 5000, len(stream) / 2, len(stream) - 5, len(stream) - 1} {
		z := &zstdFrames{ctx: context.Background(), r: bufio.NewReader(bytes.NewReader(stream[:n]))}
		got, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(got, stream[:n]) {
			t.Errorf("of %d bytes came %d, or others: %v", n, len(got), err)
		}
		if n == len(stream) && (z.first != usualZstdWindow || z.window != 16<<20 || z.inFrame || z.left != math.MaxInt64) {
			t.Errorf("the windows were %d and %d; in a frame: %v, at a header %v", z.first, z.window, z.inFrame, z.left)
		}
		z.free()
	}
}

// TestLaterZstdFramesCount: of the windows of later frames that want more than the first one has, one is there at a time.
func TestLaterZstdFramesCount(t *testing.T) {
	text := []byte(strings.Repeat("some words. ", 30_000))
	stream := append(zstdFrame(t, 1<<10, text), zstdFrame(t, 64<<20, text)...)
	open := func(ctx context.Context) io.ReadCloser {
		r, err := decompress(ctx, bufio.NewReader(bytes.NewReader(stream)))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	one := open(context.Background())
	if n, err := io.Copy(io.Discard, one); n != int64(2*len(text)) || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	two := open(ctx)
	if n, err := io.Copy(io.Discard, two); n != int64(len(text)) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("beside another: %d bytes, %v; want the second frame to wait", n, err)
	}
	two.Close()
	one.Close()
	three := open(context.Background())
	defer three.Close()
	if n, err := io.Copy(io.Discard, three); n != int64(2*len(text)) || err != nil {
		t.Errorf("after it: %d bytes, %v", n, err)
	}
}

// TestPullsShareTheNodesBounds: layers under way and connections, of all pulls together.
func TestPullsShareTheNodesBounds(t *testing.T) {
	s := quick(t)
	s.layersAtOnce, s.connections = newSlots(4), newSlots(6)
	reg := imagestest.NewRegistry(t)
	const pulls, layers = 8, 5
	var all []imagestest.LayerBlob
	for i := range pulls {
		var blobs []imagestest.LayerBlob
		for j := range layers {
			blobs = append(blobs, imagestest.Layer(imagestest.File(fmt.Sprintf("f%d-%d", i, j), strings.Repeat("x", 1000))))
		}
		reg.Push(fmt.Sprintf("a%d", i), "b", imagestest.NewImage(blobs...))
		all = append(all, blobs...)
	}
	isLayer := map[string]bool{}
	for _, l := range all {
		isLayer[digest.FromBytes(l.Blob).String()] = true
	}
	var layer, any load
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		defer any.begin()()
		if isLayer[path.Base(r.URL.Path)] {
			defer layer.begin()()
		}
		time.Sleep(2 * time.Millisecond) // so that they meet
		return false
	})
	var wg sync.WaitGroup
	for i := range pulls {
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), fmt.Sprintf("%s/a%d:b", reg.Host(), i), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if layer.most < 2 || layer.most > 4 || any.most > 6 {
		t.Errorf("%d layers and %d requests at a time, of 4 layers and 6 connections", layer.most, any.most)
	}
	if len(s.layersAtOnce) != 0 || len(s.connections) != 0 {
		t.Errorf("not given back: %d layers, %d connections", len(s.layersAtOnce), len(s.connections))
	}
}

// load counts how much of something there is at a time.
type load struct {
	mu        sync.Mutex
	now, most int
}

func (l *load) begin() (end func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.now++
	l.most = max(l.most, l.now)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.now--
	}
}

// TestPullsShareAMemory: twelve layers are pulled at once, gzip and zstd, and all that are under way have come half way.
func TestPullsShareAMemory(t *testing.T) {
	s := quick(t)
	const atOnce = 4
	s.layersAtOnce = newSlots(atOnce)
	reg := imagestest.NewRegistry(t)
	var all []imagestest.LayerBlob
	for i := range 6 {
		own := []imagestest.LayerBlob{imagestest.GzipLayer(noise(byte(2*i), 2<<20)), imagestest.ZstdLayer(noise(byte(2*i+1), 2<<20))}
		reg.Push(fmt.Sprint("a", i), "b", imagestest.NewImage(own...))
		all = append(all, own...)
	}
	blobs := map[string][]byte{}
	for _, l := range all {
		blobs[digest.FromBytes(l.Blob).String()] = l.Blob
	}
	var stuck atomic.Int32
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	reg.Hook(blobsOf(all, func(w http.ResponseWriter, r *http.Request) {
		blob := blobs[path.Base(r.URL.Path)]
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:len(blob)/2])
		_ = http.NewResponseController(w).Flush()
		stuck.Add(1)
		<-gate
		_, _ = w.Write(blob[len(blob)/2:])
	}))
	before := liveMemory()
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), fmt.Sprintf("%s/a%d:b", reg.Host(), i), nil); err != nil {
				t.Error(err)
			}
		})
	}
	until(t, func() bool { return stuck.Load() == atOnce })
	time.Sleep(200 * time.Millisecond) // for what came to get through, and for more layers, if there are any
	grown := liveMemory() - before
	if n := stuck.Load(); n != atOnce || grown > atOnce*(4<<20+usualZstdWindow) {
		t.Errorf("%d layers under way, and %d MiB more than before", n, grown>>20)
	}
	t.Logf("%d layers: %d KiB", stuck.Load(), grown>>10)
	open()
	wg.Wait()
}

// noise is an archive of a file that does not get smaller.
func noise(seed byte, n int) []byte {
	return imagestest.Tar(imagestest.File("noise", string(randomBytes(seed, n))))
}

// liveMemory is what is in use, and no garbage.
func liveMemory() int64 {
	for range 3 { // what pools keep goes with the second
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestLayersDoNotWaitForThoseBelow: the lowest one hangs, and the others are unpacked. What they have from it comes in time.
func TestLayersDoNotWaitForThoseBelow(t *testing.T) {
	s := quick(t)
	reg := imagestest.NewRegistry(t)
	layers := []imagestest.LayerBlob{
		imagestest.Layer(imagestest.Dir("d").Mode(0o751)), imagestest.Layer(imagestest.File("d/2", "x")), imagestest.Layer(imagestest.File("d/3", "x")),
	}
	reg.Push("a", "b", imagestest.NewImage(layers...))
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	reg.Hook(blobsOf(layers[:1], func(w http.ResponseWriter, _ *http.Request) {
		<-gate
		_, _ = w.Write(layers[0].Blob)
	}))
	pulled := make(chan *Image, 1)
	go func() {
		img, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
		if err != nil {
			t.Error(err)
		}
		pulled <- img
	}()
	until(t, func() bool {
		p := s.Pulls()
		return len(p) == 1 && len(p[0].Layers) == 3 && p[0].Layers[0].State == LayerFetching && p[0].Layers[1].State == LayerUnpacked && p[0].Layers[2].State == LayerUnpacked
	})
	open()
	img := <-pulled
	if img == nil {
		return
	}
	for _, chain := range img.Layers {
		if st, err := os.Stat(s.path(layersDir, chain.dir(), "d")); err != nil || st.Mode().Perm() != 0o751 {
			t.Errorf("d of layer %s: %v, %v", chain, st.Mode(), err)
		}
	}
}

// TestUnpackedIsWrittenEarly: and not all at the end of a pull.
func TestUnpackedIsWrittenEarly(t *testing.T) {
	s := quick(t)
	s.early.every = 100_000
	_, img := bigLayer()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", img)
	mustPull(t, s, reg.Host()+"/a:b")
	until(t, func() bool { return s.early.times.Load() > 0 })
}

// TestWhatIsHereIsNotFetchedAgain: neither layers nor documents, under another name, in another repository, or by another
// index.
func TestWhatIsHereIsNotFetchedAgain(t *testing.T) {
	s := quick(t)
	reg := imagestest.NewRegistry(t)
	shared := imagestest.Layer(imagestest.File("shared", "x"))
	one := imagestest.NewImage(shared, imagestest.Layer(imagestest.File("own", "1")))
	built := reg.Push("a", "1", one)
	reg.Push("other", "1", one)
	index := reg.PushIndex("a", "index", built.Descriptor)
	own := imagestest.Layer(imagestest.File("own", "2"))
	reg.Push("a", "2", imagestest.NewImage(shared, own))
	mustPull(t, s, reg.Host()+"/a:1")
	fetched := func(ref string) []string {
		t.Helper()
		before := len(reg.Requests())
		mustPull(t, s, reg.Host()+ref)
		var got []string
		for _, r := range reg.Requests()[before:] {
			if r.Method == http.MethodGet {
				got = append(got, r.Path[strings.LastIndex(r.Path, "/")+1:])
			}
		}
		return got
	}
	for _, ref := range []string{"/a:1", "/other:1", "/a@" + built.Descriptor.Digest.String()} {
		if got := fetched(ref); len(got) != 0 {
			t.Errorf("%s: fetched %v", ref, got)
		}
	}
	if got := fetched("/a:index"); len(got) != 1 || got[0] != index.Digest.String() {
		t.Errorf("index: fetched %v, want just the index", got)
	}
	got := fetched("/a:2")
	if len(got) != 3 || slices.Contains(got, digest.FromBytes(shared.Blob).String()) || !slices.Contains(got, digest.FromBytes(own.Blob).String()) {
		t.Errorf("image that shares a layer: fetched %v, want manifest, configuration and its own layer", got)
	}
}

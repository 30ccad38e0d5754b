package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// Sizes of the images of BenchmarkPull: small by default, so that it runs anywhere. BERTH_BENCH_SCALE=10 makes them those
// of the goals (810 MB unpacked).
func benchScale() int {
	if n, err := strconv.Atoi(os.Getenv("BERTH_BENCH_SCALE")); err == nil && n > 0 {
		return n
	}
	return 1
}

// realistic is an archive of about n bytes in files of about each bytes, whose contents pack about as well as programs do.
func realistic(seed uint64, n, each int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 4096)
	for i := range words {
		w := make([]byte, 3+rnd.IntN(12))
		for j := range w {
			w[j] = byte(rnd.IntN(256))
		}
		words[i] = w
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := 0; buf.Len() < n; i++ {
		size := each/2 + rnd.IntN(each)
		var body bytes.Buffer
		for body.Len() < size {
			body.Write(words[min(rnd.IntN(4096), rnd.IntN(4096))])
		}
		dir := fmt.Sprintf("d%d-%d", seed, i/50)
		if i%50 == 0 {
			_ = w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: imagestest.Epoch})
		}
		_ = w.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s/f%d", dir, i), Mode: 0o644, Size: int64(body.Len()), ModTime: imagestest.Epoch})
		_, _ = w.Write(body.Bytes())
	}
	_ = w.Close()
	return buf.Bytes()
}

// BenchmarkPull pulls from a registry in process. It tells bytes of archives per second, and how far the process's
// resident memory went above what it was.
func BenchmarkPull(b *testing.B) {
	const mb = 1 << 20
	scale := benchScale()
	layers := func(n, size, each int, pack func([]byte) imagestest.LayerBlob) *imagestest.Image {
		var blobs []imagestest.LayerBlob
		for i := range n {
			blobs = append(blobs, pack(realistic(uint64(i), size, each)))
		}
		return imagestest.NewImage(blobs...)
	}
	for _, c := range []struct {
		name          string
		n, size, each int
		pack          func([]byte) imagestest.LayerBlob
	}{
		{"layers=8", 8, 10 * mb * scale, 64 << 10, imagestest.GzipLayer},
		{"layers=60", 60, mb * scale / 2, 64 << 10, imagestest.GzipLayer},
		{"layers=1", 1, 40 * mb * scale, 64 << 10, imagestest.GzipLayer},
		{"layers=1/zstd", 1, 40 * mb * scale, 64 << 10, imagestest.ZstdLayer},
		{"layers=1/plain", 1, 40 * mb * scale, 64 << 10, imagestest.PlainLayer},
		{"layers=1/smallfiles", 1, 10 * mb * scale, 2 << 10, imagestest.GzipLayer},
	} {
		b.Run(c.name, func(b *testing.B) {
			reg := imagestest.NewRegistry(b)
			reg.Push("a", "b", layers(c.n, c.size, c.each, c.pack)) // kept by no variable: it would count as the pull's memory
			s := openStore(b)
			b.SetBytes(int64(c.n * c.size))
			peak := watchRSS(b)
			for b.Loop() {
				if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := s.Remove(context.Background(), reg.Host()+"/a:b"); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(peak()/mb, "MB-RSS")
		})
	}
}

// watchRSS returns what tells how much the resident memory grew at most since.
func watchRSS(b *testing.B) func() float64 {
	rss := func() float64 {
		data, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			b.Fatal(err)
		}
		pages, err := strconv.Atoi(strings.Fields(string(data))[1])
		if err != nil {
			b.Fatal(err)
		}
		return float64(pages * os.Getpagesize())
	}
	debug.FreeOSMemory() // else the blobs that the benchmark made leave room for all
	base := rss()
	stop, most := make(chan struct{}), make(chan float64)
	go func() {
		peak := base
		for {
			select {
			case <-stop:
				most <- peak
				return
			case <-time.After(20 * time.Millisecond):
				peak = max(peak, rss())
			}
		}
	}()
	return func() float64 {
		close(stop)
		return <-most - base
	}
}

// BenchmarkFill unpacks one archive of one kind, without a network: what the stages cost by themselves.
func BenchmarkFill(b *testing.B) {
	needRoot(b)
	small := realistic(1, 16<<20, 2<<10)
	large := realistic(1, 64<<20, 1<<20)
	for _, c := range []struct {
		name string
		tar  []byte
		blob []byte
	}{
		{"gzip/small", small, imagestest.Gzip(small)},
		{"gzip/large", large, imagestest.Gzip(large)},
		{"zstd/large", large, imagestest.Zstd(large)},
		{"plain/small", small, small},
		{"plain/large", large, large},
	} {
		b.Run(c.name, func(b *testing.B) {
			id := digest.FromBytes(c.tar)
			b.SetBytes(int64(len(c.tar)))
			dir := b.TempDir()
			if err := spreadOut(dir); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				at := filepath.Join(dir, unique())
				if err := os.Mkdir(at, 0o700); err != nil {
					b.Fatal(err)
				}
				root, err := os.Open(at)
				if err != nil {
					b.Fatal(err)
				}
				l := &stagedLayer{root: root}
				if err := l.fill(context.Background(), bytes.NewReader(c.blob), id, defaultBounds); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				root.Close()
				for _, path := range []string{at, at + tapeExt} {
					if err := os.RemoveAll(path); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
			}
		})
	}
}

package images

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"
)

// maxZstdWindow bounds the memory that a zstd frame may ask for: without it 134 KB took half a gigabyte.
const maxZstdWindow = 128 << 20

// zstdWindows bounds the memory of all windows of this process.
var zstdWindows = semaphore.NewWeighted(2 * maxZstdWindow)

// decompress returns the tar stream within r. What it is, is told by its first bytes, since media types are wrong in
// many images. The decoders are in process: nothing from PATH gets to see a layer. It waits for memory, if need be.
func decompress(ctx context.Context, r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		return z, nil
	case len(head) == 4 && isZstd(binary.LittleEndian.Uint32(head)):
		window := zstdWindow(r)
		if err := zstdWindows.Acquire(ctx, window); err != nil {
			return nil, err
		}
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			zstdWindows.Release(window)
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return &zstdReader{z, window}, nil
	}
	return io.NopCloser(r), nil
}

// gzipMagic is how each gzip stream begins.
var gzipMagic = []byte{0x1f, 0x8b}

// isCompressed tells whether a stream that begins so is one that decompress unpacks.
func isCompressed(head []byte) bool {
	return bytes.HasPrefix(head, gzipMagic) || len(head) >= 4 && isZstd(binary.LittleEndian.Uint32(head))
}

// isZstd knows the magic of a frame and those of skippable frames, which may come first.
func isZstd(magic uint32) bool { return magic == 0xfd2fb528 || magic&^0xf == 0x184d2a50 }

// zstdReader gives its memory back when it is closed.
type zstdReader struct {
	*zstd.Decoder
	window int64
}

// Close implements io.Closer.
func (z *zstdReader) Close() error {
	z.Decoder.Close()
	zstdWindows.Release(z.window)
	return nil
}

// zstdWindow returns the window of the first frame. Frames after it mostly have the same; where the first is to be
// skipped, or is not what a header looks like, the largest is assumed.
func zstdWindow(r *bufio.Reader) int64 {
	head, err := r.Peek(zstd.HeaderMaxSize)
	if err != nil && err != io.EOF {
		return maxZstdWindow
	}
	var h zstd.Header
	if h.Decode(head) != nil || h.Skippable {
		return maxZstdWindow
	}
	window := h.WindowSize
	if h.SingleSegment {
		window = h.FrameContentSize
	}
	return int64(min(window, maxZstdWindow))
}

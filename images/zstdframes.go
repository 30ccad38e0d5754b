package images

import (
	"bufio"
	"context"
	"math"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"
)

const (
	// maxZstdWindow bounds the memory that a zstd frame may ask for: without it 134 KB took half a gigabyte.
	maxZstdWindow = 128 << 20
	// usualZstdWindow is what most compress with. A first frame that is content with less is often followed by such ones
	// (zstd:chunked).
	usualZstdWindow = 8 << 20
)

// zstdWindows bounds the memory of the windows of all first frames of this process. Whoever comes to a frame that wants more than
// the first did has its memory already, so that two could wait for each other for ever: they have their turn at larger ones,
// one at a time.
var (
	zstdWindows = semaphore.NewWeighted(2 * maxZstdWindow)
	zstdLarger  = newSlots(1)
)

// zstdFrames passes a stream of zstd frames on, and gets the memory for a frame's window before the decoder sees its header.
// What it does not understand it passes on as well: the decoder says what is wrong.
type zstdFrames struct {
	ctx context.Context
	r   *bufio.Reader

	first, window int64 // that there is memory for
	left          int64 // bytes to pass on before the next header
	inFrame       bool
	sum           bool // the frame ends with a checksum
}

// Read implements io.Reader.
func (z *zstdFrames) Read(p []byte) (int, error) {
	for z.left == 0 {
		if err := z.header(); err != nil {
			return 0, err
		}
	}
	n, err := z.r.Read(p[:min(int64(len(p)), z.left)])
	z.left -= int64(n)
	return n, err
}

// header looks at the header that comes next, of a frame or of a block in it (RFC 8878, sections 3.1.1 and 3.1.2).
func (z *zstdFrames) header() error {
	if z.inFrame {
		z.block()
		return nil
	}
	head, _ := z.r.Peek(zstd.HeaderMaxSize) // at the end of the stream there is less
	var h zstd.Header
	if h.Decode(head) != nil {
		z.left = math.MaxInt64
		return nil
	}
	if h.Skippable {
		z.left = int64(h.HeaderSize) + int64(h.SkippableSize)
		return nil
	}
	window := h.WindowSize
	if h.SingleSegment {
		window = h.FrameContentSize
	}
	if err := z.reserve(int64(max(usualZstdWindow, min(window, maxZstdWindow)))); err != nil {
		return err
	}
	z.left, z.inFrame, z.sum = int64(h.HeaderSize), true, h.HasCheckSum
	return nil
}

func (z *zstdFrames) block() {
	head, err := z.r.Peek(3)
	if err != nil {
		z.left = math.MaxInt64
		return
	}
	bits := uint32(head[0]) | uint32(head[1])<<8 | uint32(head[2])<<16
	last, kind, size := bits&1 != 0, bits>>1&3, int64(bits>>3)
	if kind == 1 { // one byte, size times
		size = 1
	}
	z.left = 3 + size
	if last && z.sum {
		z.left += 4
	}
	z.inFrame = !last
}

// reserve waits for the memory of a window, unless there is enough from the frames before.
func (z *zstdFrames) reserve(window int64) error {
	if window <= z.window {
		return nil
	}
	if z.first == 0 {
		if err := zstdWindows.Acquire(z.ctx, window); err != nil {
			return err
		}
		z.first, z.window = window, window
		return nil
	}
	if z.window == z.first {
		if err := zstdLarger.take(z.ctx); err != nil {
			return err
		}
	}
	z.window = window
	return nil
}

// free gives the memory back.
func (z *zstdFrames) free() {
	zstdWindows.Release(z.first)
	if z.window > z.first {
		zstdLarger.give()
	}
}

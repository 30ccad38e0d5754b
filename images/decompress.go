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
)

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
		frames := &zstdFrames{ctx: ctx, r: r}
		if err := frames.header(); err != nil {
			return nil, err
		}
		z, err := zstd.NewReader(frames, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			frames.free()
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return &zstdReader{z, frames}, nil
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
	frames *zstdFrames
}

// Close implements io.Closer.
func (z *zstdReader) Close() error {
	z.Decoder.Close()
	z.frames.free()
	return nil
}

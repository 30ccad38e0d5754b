package images

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxZstdWindow bounds the memory that a zstd frame may ask for: without it 134 KB took half a gigabyte.
const maxZstdWindow = 128 << 20

// decompress returns the tar stream within r. What it is, is told by its first bytes, since media types are wrong in
// many images. The decoders are in process: nothing from PATH gets to see a layer.
func decompress(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		return z, nil
	case len(head) == 4 && isZstd(binary.LittleEndian.Uint32(head)):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		return z.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}

// isCompressed tells whether a stream that begins so is one that decompress unpacks.
func isCompressed(head []byte) bool {
	return bytes.HasPrefix(head, []byte{0x1f, 0x8b}) || len(head) >= 4 && isZstd(binary.LittleEndian.Uint32(head))
}

// isZstd knows the magic of a frame and those of skippable frames, which may come first.
func isZstd(magic uint32) bool { return magic == 0xfd2fb528 || magic&^0xf == 0x184d2a50 }

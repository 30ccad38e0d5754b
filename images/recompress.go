package images

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// gzipHead is how many bytes of a gzip stream are kept when the rest is dropped: enough to tell which compressor could have
// made it, since the first block's codes depend on some tens of kilobytes of what is in it.
const gzipHead = 256

// gzipper is a compressor that may have made a layer.
type gzipper struct {
	name string
	open func(w io.Writer, like *gzip.Header) (io.WriteCloser, error)
}

// gzippers are those that layers are made with: docker, BuildKit and most other tools are in Go, and use its standard
// library or klauspost's, most of them with the default level.
func gzippers() []gzipper {
	var all []gzipper
	for _, level := range []int{-1, 9, 1, 5, 6, 2, 3, 4, 7, 8} {
		all = append(all, gzipper{fmt.Sprintf("compress/gzip level %d", level), func(w io.Writer, like *gzip.Header) (io.WriteCloser, error) {
			z, err := stdgzip.NewWriterLevel(w, level)
			if err == nil {
				z.Header = stdgzip.Header{Comment: like.Comment, Extra: like.Extra, ModTime: like.ModTime, Name: like.Name, OS: like.OS}
			}
			return z, err
		}}, gzipper{fmt.Sprintf("klauspost/compress/gzip level %d", level), func(w io.Writer, like *gzip.Header) (io.WriteCloser, error) {
			z, err := gzip.NewWriterLevel(w, level)
			if err == nil {
				z.Header = *like
			}
			return z, err
		}})
	}
	return all
}

// trialTries bounds how many compressors that begin alike are tried to the end.
const trialTries = 3

// recompress makes a compressed layer again, in a file of the store, which the caller closes. Nil if no compressor that is
// known makes it: then it has to do without.
func (s *Store) recompress(ctx context.Context, rec *layerRecord, was ocispec.Descriptor, play func(io.Writer) error) (*os.File, error) {
	if len(rec.Head) == 0 {
		return nil, nil
	}
	z, err := gzip.NewReader(bytes.NewReader(rec.Head))
	if err != nil {
		return nil, nil // no gzip
	}
	like := z.Header
	var start bytes.Buffer
	if err := play(&cappedWriter{w: &start, left: 1 << 20}); err != nil && !errors.Is(err, errEnough) {
		return nil, err
	}
	tries := 0
	for _, g := range gzippers() {
		if tries == trialTries || !g.beginsLike(&like, start.Bytes(), rec.Size, rec.Head) {
			continue
		}
		tries++
		f, err := s.tryGzip(ctx, g, &like, was, play)
		if f != nil || err != nil {
			return f, err
		}
	}
	return nil, nil
}

// beginsLike tells whether a compressor, given the start of an archive of size bytes, begins as the layer did.
func (g gzipper) beginsLike(like *gzip.Header, start []byte, size int64, head []byte) bool {
	var out bytes.Buffer
	z, err := g.open(&cappedWriter{w: &out, left: int64(len(head))}, like)
	if err != nil {
		return false
	}
	// Little by little: the first block comes early, and no more is wanted.
	for rest := start; len(rest) > 0 && err == nil; rest = rest[min(len(rest), 64<<10):] {
		_, err = z.Write(rest[:min(len(rest), 64<<10)])
	}
	if err == nil && int64(len(start)) == size {
		err = z.Close()
	}
	if err != nil && !errors.Is(err, errEnough) {
		return false
	}
	return out.Len() > 10 && bytes.Equal(out.Bytes(), head[:out.Len()])
}

// tryGzip compresses a whole archive. Nil if that gives other bytes.
func (s *Store) tryGzip(ctx context.Context, g gzipper, like *gzip.Header, was ocispec.Descriptor, play func(io.Writer) error) (_ *os.File, err error) {
	at := s.path(tmpDir, unique())
	f, err := os.OpenFile(at, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	keep := false
	defer func() {
		err = errors.Join(err, s.trash(at)) // an open file stays readable
		if !keep {
			f.Close()
		}
	}()
	hash := was.Digest.Algorithm().Hash()
	z, err := g.open(&cappedWriter{w: io.MultiWriter(hash, f), left: was.Size}, like)
	if err != nil {
		return nil, err
	}
	err = play(z)
	if err == nil {
		err = z.Close()
	}
	if errors.Is(err, errEnough) {
		return nil, nil // longer than it was
	}
	if err != nil {
		return nil, err
	}
	if digest.NewDigest(was.Digest.Algorithm(), hash) != was.Digest {
		return nil, nil
	}
	s.log.Debug("layer compressed as it was", "layer", was.Digest, "by", g.name)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	keep = true
	return f, ctx.Err()
}

// errEnough ends what would go on.
var errEnough = errors.New("enough")

// cappedWriter writes so many bytes and no more.
type cappedWriter struct {
	w    io.Writer
	left int64
}

// Write implements io.Writer.
func (c *cappedWriter) Write(p []byte) (int, error) {
	if int64(len(p)) <= c.left {
		c.left -= int64(len(p))
		return c.w.Write(p)
	}
	n, err := c.w.Write(p[:c.left])
	c.left = 0
	if err == nil {
		err = errEnough
	}
	return n, err
}

package images

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// ImportOptions say how images are imported.
type ImportOptions struct {
	// Names, if any, are given in place of those in the archive, to its only image.
	Names []string
	// Unpinned lets the kubelet's garbage collection remove the images. Otherwise it does not, since a node without a
	// registry does not get them back.
	Unpinned bool
}

// Import makes images of this node of those in a tar file that is an OCI layout or a docker archive (what `docker save`
// writes), compressed or not. It is read to its end, into a file of the store, before anything is made of it. Digests, sizes
// and archives are verified as those of a pull are. An image without a name is there by its id. Images for other platforms
// are left out.
//
// It returns the images that are there, also with an error, which is about the next one: errdefs.ErrNotFound where a blob or
// an image for this platform is missing, ErrDataLoss where bytes are not what their digest says, ErrFailedPrecondition for
// what is no image or tries to get out of its archive, ErrResourceExhausted where it is too large. An error of reading the
// archive is in the chain.
func (s *Store) Import(ctx context.Context, archive io.Reader, o ImportOptions) ([]*Image, error) {
	imgs, err := s.importing(ctx, archive, o)
	if err != nil {
		err = fmt.Errorf("import: %w", err)
	}
	return imgs, err
}

func (s *Store) importing(ctx context.Context, archive io.Reader, o ImportOptions) ([]*Image, error) {
	var names []reference.Named
	for _, name := range o.Names {
		named, err := parseReference(name)
		if err != nil {
			return nil, err
		}
		names = append(names, named)
	}
	// Space for the archive and for what is made of it.
	if err := s.space.begin(); err != nil {
		return nil, err
	}
	defer s.space.end()
	f, err := s.spool(ctx, bufio.NewReaderSize(&transferReader{archive}, 256<<10))
	if err != nil {
		return nil, err
	}
	defer s.unspool(f)
	l, err := openLayout(f)
	if err != nil {
		return nil, err
	}
	list, err := l.images()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, badImage("it has no image")
	}
	if len(names) > 0 {
		digests := map[digest.Digest]bool{} // an image is listed once for each of its names
		for _, img := range list {
			digests[img.top.Digest] = true
		}
		if len(digests) > 1 {
			return nil, fmt.Errorf("there are %d images, to which names cannot be given: %w", len(digests), errdefs.ErrInvalidArgument)
		}
		list = list[:1]
	}
	var imgs []*Image
	var elsewhere error
	for _, entry := range list {
		img, err := s.importImage(ctx, l, entry, names, !o.Unpinned)
		if errors.Is(err, errElsewhere) {
			elsewhere = err
			continue
		}
		if err != nil {
			return imgs, err
		}
		imgs = append(imgs, img)
	}
	if len(imgs) == 0 {
		return nil, elsewhere
	}
	return imgs, nil
}

// importImage is a pull whose origin is a layout.
func (s *Store) importImage(ctx context.Context, l *layout, entry layoutImage, names []reference.Named, pin bool) (*Image, error) {
	if len(names) == 0 && entry.name != "" {
		named, err := parseReference(entry.name)
		if err != nil {
			return nil, err
		}
		names = []reference.Named{named}
	}
	label := entry.top.Digest.String()
	if len(names) > 0 {
		label = names[0].String()
	}
	for _, named := range names {
		if d, ok := named.(reference.Digested); ok && d.Digest() != entry.top.Digest {
			return nil, badImage("%s names %s, and not what is there", named, d.Digest())
		}
	}
	start := time.Now()
	// Of its own: two imports of one name may be of two archives. The store waits for it as it does for pulls.
	img, release, _, err := s.pulls.acquire(ctx, s.ctx, pullKey{ref: "import " + unique()}, func(ctx context.Context) (*Image, error) {
		progress := s.track.begin(label)
		defer s.track.end(progress)
		_, img, err := s.attempt(ctx, "ImportImage", label, progress, func(p *pull) {
			p.src, p.names, p.pinned, p.unknown = &layoutOrigin{l, entry.top}, names, pin, entry.unknown
		})
		return img, err
	})
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", label, err)
	}
	defer release()
	s.log.Info("image imported", "image", label, "id", img.ID, "pinned", img.Pinned, "took", time.Since(start).Round(time.Millisecond))
	return img, nil
}

// spool writes an archive down uncompressed, within the space that there is. unspool gives it up.
func (s *Store) spool(ctx context.Context, r *bufio.Reader) (f *os.File, err error) {
	limit, err := s.unpackLimit()
	if err != nil {
		return nil, err
	}
	plain, err := decompress(ctx, r)
	if err != nil {
		return nil, blame(fmt.Errorf("archive: %w", err))
	}
	defer plain.Close()
	f, err = os.OpenFile(s.path(tmpDir, unique()), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	spooled := &spaceWriter{f, func(a amount) error { return s.take(ctx, a) }}
	n, err := io.Copy(spooled, io.LimitReader(&contextReader{ctx, plain}, limit.bytes+1))
	if err == nil && n > limit.bytes {
		err = fmt.Errorf("archive: %w", limit.tooLarge())
	}
	if err != nil {
		s.unspool(f)
		return nil, blame(err)
	}
	return f, nil
}

// transferReader makes errors of reading those of the transfer: the image is not to blame.
type transferReader struct{ r io.Reader }

// Read implements io.Reader.
func (t *transferReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err != nil && err != io.EOF {
		err = &transferError{err}
	}
	return n, err
}

func (s *Store) unspool(f *os.File) {
	if err := errors.Join(f.Close(), s.trash(f.Name())); err != nil {
		s.log.Warn("discard archive", "error", err)
	}
}

// SetPinned has the kubelet told that it must not remove the image that name means, or that it may, and returns its id. The
// error is errdefs.ErrFailedPrecondition for a pause image that is to be unpinned.
func (s *Store) SetPinned(ctx context.Context, name string, pin bool) (digest.Digest, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	s.change.Lock()
	defer s.change.Unlock()
	id, err := s.find(name)
	if err != nil {
		return "", err
	}
	s.mu.RLock()
	rec, refs := *s.images[id], s.refsOf(id)
	s.mu.RUnlock()
	if rec.Pinned = pin; !pin && pinned(&rec, refs) {
		return id, fmt.Errorf("image %s is a pause image, and always pinned: %w", quote(name), errdefs.ErrFailedPrecondition)
	}
	return id, s.apply(changes{putImages: map[digest.Digest]*imageRecord{id: &rec}})
}

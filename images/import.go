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
	"golang.org/x/sys/unix"
)

// ImportOptions say how images are imported.
type ImportOptions struct {
	// Names, if any, are given in place of those in the archive, to its only image.
	Names []string
	// Unpinned lets the kubelet's garbage collection remove the images. Otherwise it does not, since a node without a
	// registry does not get them back.
	Unpinned bool
}

// Import makes images of this node of those in an OCI layout (a directory, or a tar file) or in a docker archive (what
// `docker save` writes), compressed or not, at a path of this node. Digests, sizes and archives are verified as those of a
// pull are. An image without a name is there by its id. Images for other platforms are left out.
//
// It returns the images that are there, also with an error, which is about the next one: errdefs.ErrNotFound where a blob or
// an image for this platform is missing, ErrDataLoss where bytes are not what their digest says, ErrFailedPrecondition for
// what is no image or tries to get out of its archive, ErrResourceExhausted where it is too large.
func (s *Store) Import(ctx context.Context, path string, o ImportOptions) ([]*Image, error) {
	return s.importFrom(ctx, quote(path), o, func(ctx context.Context) (string, func(), error) {
		return s.plainArchive(ctx, path)
	})
}

// ImportStream is Import of a tar file that is read to its end, into a file of the store, before anything is made of it.
func (s *Store) ImportStream(ctx context.Context, r io.Reader, o ImportOptions) ([]*Image, error) {
	return s.importFrom(ctx, "stream", o, func(ctx context.Context) (string, func(), error) {
		return s.spool(ctx, bufio.NewReaderSize(r, 256<<10))
	})
}

func (s *Store) importFrom(ctx context.Context, what string, o ImportOptions, open func(context.Context) (string, func(), error)) ([]*Image, error) {
	imgs, err := s.importing(ctx, o, open)
	if err != nil {
		s.log.Warn("import failed", "from", what, "error", err)
		return imgs, fmt.Errorf("import %s: %w", what, err)
	}
	return imgs, nil
}

func (s *Store) importing(ctx context.Context, o ImportOptions, open func(context.Context) (string, func(), error)) ([]*Image, error) {
	var names []reference.Named
	for _, name := range o.Names {
		named, err := parseReference(name)
		if err != nil {
			return nil, err
		}
		names = append(names, named)
	}
	path, done, err := open(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := openLayout(path)
	if err != nil {
		return nil, err
	}
	defer l.close()
	list, err := l.images()
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, badImage("it has no image")
	}
	if len(names) > 0 {
		for _, img := range list[1:] {
			if img.top.Digest != list[0].top.Digest {
				return nil, fmt.Errorf("there are %d images, to which names cannot be given: %w", len(list), errdefs.ErrInvalidArgument)
			}
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

// plainArchive returns a path that openLayout takes: what is compressed is written down first.
func (s *Store) plainArchive(ctx context.Context, path string) (string, func(), error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return "", nil, err
	}
	if st.Mode().IsRegular() {
		r := bufio.NewReaderSize(f, 256<<10)
		if head, _ := r.Peek(4); isCompressed(head) {
			return s.spool(ctx, r)
		}
	}
	return path, func() {}, nil
}

// spool writes an archive down uncompressed, within the space that there is.
func (s *Store) spool(ctx context.Context, r *bufio.Reader) (string, func(), error) {
	limit, err := s.unpackLimit()
	if err != nil {
		return "", nil, err
	}
	plain, err := decompress(ctx, r)
	if err != nil {
		return "", nil, badImage("archive: %w", err)
	}
	defer plain.Close()
	at := s.path(tmpDir, unique())
	f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", nil, err
	}
	done := func() {
		if err := s.trash(at); err != nil {
			s.log.Warn("discard archive", "error", err)
		}
	}
	n, err := io.Copy(f, io.LimitReader(&contextReader{ctx, plain}, limit.bytes+1))
	err = errors.Join(err, f.Close())
	if err == nil && n > limit.bytes {
		err = fmt.Errorf("archive: %w", limit.tooLarge())
	}
	if err != nil {
		done()
		return "", nil, blame(err)
	}
	return at, done, nil
}

// SetPinned has the kubelet told that it must not remove the image that name means, or that it may.
func (s *Store) SetPinned(ctx context.Context, name string, pinned bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.change.Lock()
	defer s.change.Unlock()
	id, err := s.find(name)
	if err != nil {
		return err
	}
	s.mu.RLock()
	rec := *s.images[id]
	s.mu.RUnlock()
	rec.Pinned = pinned
	return s.apply(changes{putImages: map[digest.Digest]*imageRecord{id: &rec}})
}

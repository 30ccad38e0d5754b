package images

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// bounds are what a layer may grow to.
type bounds struct {
	bytes   int64 // unpacked
	entries int64
	scarce  bool               // bytes is nine tenths of what the disk has free
	take    func(amount) error // asks for space, of which other layers take as well; nil: there is enough
}

// stream bounds the archive itself: contents, and for each entry its headers and padding.
func (b bounds) stream() int64 { return b.bytes + 4096*b.entries + 1<<20 }

// tooLarge is the error about a layer that has more bytes.
func (b bounds) tooLarge() error {
	why := "maxLayerBytes"
	if b.scarce {
		why = "nine tenths of what is free"
	}
	return fmt.Errorf("more than %d bytes are not allowed (%s): %w", b.bytes, why, errdefs.ErrResourceExhausted)
}

// stagedLayer is a layer that is unpacked but not recorded yet.
type stagedLayer struct {
	chain    ChainID
	progress *layerProgress // nil where nobody wants to know, as is
	unpacked func(int)      // what counts bytes of the archive
	rec      layerRecord
	path     string // in tmp, until published
	root     *os.File
	// implicit are the directories that the layer has no entry for, parents first; "" is its root.
	implicit  []string
	finishing slots // one, for what follows
	inherited bool  // implicit is done
	sealed    bool  // rec is whole

	unsummed bool  // the tape does not know all contents
	bare     bool  // no entry has attributes
	size     int64 // about what it takes on the disk

	flushing sync.Mutex
	lost     atomic.Bool // not all of it could be written to the disk
	forgone  atomic.Bool // it belongs to an image that no other try makes better

	// placed are the renames that put it where it is published, for their undoing. Guarded by Store.change.
	placed    []move
	published bool // guarded by Store.change, and not changed any more when nobody holds the layer
}

// unfit tells that no other pull should have the layer. Nobody holds it.
func (l *stagedLayer) unfit() bool { return l.lost.Load() || l.forgone.Load() }

// flush makes the layer durable, for a pull that did not unpack it. The kernel tells once to each open file that something could
// not be written since it was opened (syncfs(2)): the layer's own was open before there was anything in it.
func (l *stagedLayer) flush() error {
	l.flushing.Lock()
	defer l.flushing.Unlock()
	if l.lost.Load() {
		return unix.EIO
	}
	err := syncfs(l.root)
	if err != nil {
		l.lost.Store(true)
	}
	return err
}

// discardStaged gives a staged layer up. If it was published, nothing is left of it but the descriptor, and its blob where
// another layer had that already.
func (s *Store) discardStaged(l *stagedLayer) {
	l.root.Close()
	discard := s.trashStaged
	if l.published {
		discard = func(at string) error { return s.trash(at + blobExt) }
	}
	if err := discard(l.path); err != nil {
		s.log.Warn("discard staged layer", "layer", l.chain, "error", err)
	}
}

// unpack fetches a layer and unpacks it into a directory of its own.
func (s *Store) unpack(ctx context.Context, src origin, desc ocispec.Descriptor, diffID digest.Digest, chain ChainID, artifact bool, progress *layerProgress) (*stagedLayer, error) {
	limit, err := s.unpackLimit()
	if err != nil {
		return nil, err
	}
	limit.take = func(a amount) error { return s.take(ctx, a) }
	l := &stagedLayer{chain: chain, progress: progress, unpacked: s.unpacked, finishing: newSlots(1)}
	clean := func() {
		if l.root != nil {
			l.root.Close()
			l.root = nil
		}
		if l.path != "" {
			if err := s.trashStaged(l.path); err != nil {
				s.log.Warn("discard half-unpacked layer", "layer", chain, "error", err)
			}
			l.path = ""
		}
	}
	err = src.blob(ctx, desc, s.bounds.bytes, func(r io.Reader) error {
		clean() // what an earlier try left
		progress.fetched.Store(0)
		progress.unpacked.Store(0)
		var err error
		if l.path, err = s.makeStaged(); err != nil {
			return err
		}
		// The parent is 0700; this mode is seen inside as that of "/", unless the layer says another.
		if err := os.Chmod(l.path, 0o755); err != nil {
			return err
		}
		if l.root, err = os.Open(l.path); err != nil {
			return err
		}
		seen, kept, err := s.keepBlob(l, &counter{r: r, count: progress.countFetched}, desc)
		if err != nil {
			return err
		}
		if c, ok := r.(io.Closer); ok {
			seen = struct {
				io.Reader
				io.Closer
			}{seen, c}
		}
		if artifact {
			return errors.Join(l.fillArtifact(ctx, seen, desc, diffID, limit), kept())
		}
		return errors.Join(l.fill(ctx, seen, diffID, limit), kept())
	})
	if err != nil {
		clean()
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	if l.rec.Blob != nil {
		l.size += l.rec.Blob.Size
	}
	return l, nil
}

// unpackLimit returns the bounds of a layer, with what the file system has left.
func (s *Store) unpackLimit() (bounds, error) {
	limit := s.bounds
	free, err := s.space.free()
	if err != nil {
		return limit, err
	}
	// What lingers goes when the space is needed.
	if most := free.bytes - free.bytes/10 + s.unpacks.lingering(sizeOf); most < limit.bytes {
		limit.bytes, limit.scarce = most, true
	}
	return limit, nil
}

// fill unpacks a compressed stream and verifies its diff ID.
func (l *stagedLayer) fill(ctx context.Context, r io.Reader, diffID digest.Digest, limit bounds) error {
	got, err := l.fillTar(ctx, r, diffID, limit)
	if err == nil && got != diffID {
		return badImage("unpacked it has the diff id %s, the configuration says %s", got, diffID)
	}
	return err
}

// fillTar unpacks a compressed stream and returns the digest of the archive in it, by the algorithm of diffID. Where it
// ends early it closes r, if r is an io.Closer: that must end a Read under way.
func (l *stagedLayer) fillTar(ctx context.Context, r io.Reader, diffID digest.Digest, limit bounds) (digest.Digest, error) {
	p := newPipeline(ctx)
	var plain io.Closer
	defer func() {
		p.end(r)
		if plain != nil {
			plain.Close()
		}
	}()
	packed := bufio.NewReaderSize(p.ahead(r), 64<<10)
	head, err := packed.Peek(gzipHead)
	if err != nil && err != io.EOF {
		return "", judge(err, nil, packed)
	}
	if bytes.HasPrefix(head, gzipMagic) {
		head = bytes.Clone(head)
	} else {
		head = nil
	}
	archive, err := decompress(ctx, packed)
	if err != nil {
		return "", judge(err, nil, packed)
	}
	plain = archive
	hash := diffID.Algorithm().Hash()
	bounded := &counter{r: &streamBound{r: archive, left: limit.stream(), limit: limit}, count: l.count}
	out := p.through(p.ahead(bounded), func(b []byte) { hash.Write(b) })
	a := newApplier(l.root, limit)
	defer a.close()
	if a.tape, err = newTape(out, l.root.Name()+tapeExt); err != nil {
		return "", err
	}
	recorded := false
	defer func() {
		if !recorded {
			_ = a.tape.close(false)
		}
	}()
	if err := a.apply(ctx, a.tape); err != nil {
		return "", judge(err, out, packed)
	}
	// What follows the end of the archive belongs to the diff ID, and what follows the compressed stream to the digest.
	if _, err := io.Copy(io.Discard, a.tape); err != nil {
		return "", judge(err, nil, packed)
	}
	if _, err := io.Copy(io.Discard, packed); err != nil {
		return "", err
	}
	recorded = true
	if err := a.tape.close(true); err != nil {
		return "", err
	}
	got := digest.NewDigest(diffID.Algorithm(), hash)
	l.rec = layerRecord{DiffID: diffID, Opaque: a.opaqueRoot, Head: head}
	if a.replaced {
		err = os.Remove(l.root.Name() + tapeExt) // the directory has not all that would have to be played back
	} else {
		l.rec.Tape, l.unsummed = got, a.tape.unsummed // its own digest comes when the layer is sealed
		l.rec.Archive, l.rec.Size = got, a.tape.total
	}
	if err != nil {
		return "", err
	}
	l.implicit, l.size, l.bare = a.implicitDirs(), int64(a.bytes), !a.attrs
	return got, nil
}

func (l *stagedLayer) count(n int) {
	l.progress.countUnpacked(n)
	if l.unpacked != nil {
		l.unpacked(n)
	}
}

// judge says whose an error is. Before the image is blamed the rest is read: if its digest is wrong, it was the registry,
// and another mirror may have the right bytes. archive, if not nil, is being unpacked still.
func judge(err error, archive, packed io.Reader) error {
	if err = blame(err); !errors.Is(err, errImage) {
		return err
	}
	if archive != nil {
		_, rerr := io.Copy(io.Discard, archive)
		switch rerr = blame(rerr); {
		case rerr == nil, errors.Is(rerr, errImage):
		case errdefs.IsResourceExhausted(rerr):
			return err
		default:
			return rerr
		}
	}
	if _, rerr := io.Copy(io.Discard, packed); rerr != nil {
		return rerr
	}
	return err
}

// blame makes errors of a layer's content those of the image, and leaves those of network, disk and context alone.
func blame(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*transferError](err); ok {
		return err
	}
	if errors.Is(err, errContent) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, errImage) || errdefs.IsResourceExhausted(err) {
		return err
	}
	if isFull(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	if errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOMEM) {
		return err
	}
	return badImage("%w", err)
}

// streamBound bounds the unpacked stream.
type streamBound struct {
	r     io.Reader
	left  int64
	limit bounds
}

// Read implements io.Reader.
func (c *streamBound) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.left -= int64(n); c.left < 0 {
		return 0, fmt.Errorf("unpacked: %w", c.limit.tooLarge())
	}
	return n, err
}

// counter tells how much was read.
type counter struct {
	r     io.Reader
	count func(int)
}

// Read implements io.Reader.
func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.count(n)
	return n, err
}

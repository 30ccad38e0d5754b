package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What a layer has beside its directory: while it is staged, files named after it; then in directories of their own, so
// that an earlier version of berth, which knows none of them, does not take them for layers that it has lost.
const (
	treeExt = ".tree"
	tapeExt = ".tape"
	blobExt = ".blob"
)

// dirName is the name of a layer's directory. One that was damaged gets its successor beside it, since the old one may be
// mounted.
func (r *layerRecord) dirName(chain ChainID) string {
	if r.Generation == 0 {
		return chain.dir()
	}
	return chain.dir() + "." + strconv.Itoa(r.Generation)
}

func (s *Store) layerDir(chain ChainID, rec *layerRecord) string {
	return s.path(layersDir, rec.dirName(chain))
}

func (s *Store) recordFile(chain ChainID, rec *layerRecord, ext string) string {
	return s.path(recordsDir, rec.dirName(chain)+ext)
}

// blobFile is where a compressed layer is kept.
func (s *Store) blobFile(d digest.Digest) string { return s.path(blobsDir, ChainID(d).dir()) }

// move is a rename, and what undoes it.
type move struct{ from, to string }

// moves are the renames that put a staged layer into its place, the directory last. A blob that another layer has, too, is
// there already: recorded, or among those that were placed before it.
func (s *Store) moves(l *stagedLayer, placed map[digest.Digest]bool) []move {
	m := []move{{l.path + treeExt, s.recordFile(l.chain, &l.rec, treeExt)}}
	if l.rec.Tape != "" {
		m = append(m, move{l.path + tapeExt, s.recordFile(l.chain, &l.rec, tapeExt)})
	}
	if b := l.rec.Blob; b != nil && !placed[b.Digest] && !s.keepsBlob(b.Digest) {
		m = append(m, move{l.path + blobExt, s.blobFile(b.Digest)})
	}
	return append(m, move{l.path, s.layerDir(l.chain, &l.rec)})
}

// place puts a staged layer into its place. blobs are those that were placed for the same commit; its own is added. The
// caller holds s.change.
func (s *Store) place(l *stagedLayer, blobs map[digest.Digest]bool) error {
	s.mu.RLock()
	l.rec.Generation = 0
	if old := s.layers[l.chain]; old != nil {
		l.rec.Generation = old.Generation + 1
	}
	// Where the layer was on record no more, its directory may be mounted below a container all the same.
	for s.isRetired(l.rec.dirName(l.chain)) {
		l.rec.Generation++
	}
	s.mu.RUnlock()
	for _, m := range s.moves(l, blobs) {
		if err := s.trash(m.to); err != nil { // what a failed publish may have left
			return errors.Join(err, s.unplace(l))
		}
		if err := os.Rename(m.from, m.to); err != nil {
			return errors.Join(err, s.unplace(l))
		}
		l.placed = append(l.placed, m)
	}
	l.published = true
	if l.rec.Blob != nil {
		blobs[l.rec.Blob.Digest] = true
	}
	return nil
}

// isRetired tells of the name of a layer's directory. The caller holds s.mu.
func (s *Store) isRetired(name string) bool {
	_, retired := s.retired[name]
	return retired
}

// unplace takes a staged layer back.
func (s *Store) unplace(l *stagedLayer) error {
	var errs []error
	for _, m := range l.placed {
		errs = append(errs, os.Rename(m.to, m.from))
	}
	l.placed, l.published = nil, false
	return errors.Join(errs...)
}

// syncPlaces makes what place did durable.
func (s *Store) syncPlaces() error {
	return errors.Join(syncDir(s.path(layersDir)), syncDir(s.path(recordsDir)), syncDir(s.path(blobsDir)))
}

// trashStaged gives up what is staged at a path.
func (s *Store) trashStaged(at string) error {
	return errors.Join(s.trash(at), s.trash(at+treeExt), s.trash(at+tapeExt), s.trash(at+blobExt))
}

// trashLayer gives up a layer that is not recorded any more. A blob that another layer has stays.
func (s *Store) trashLayer(chain ChainID, rec *layerRecord) error {
	errs := []error{
		s.trash(s.layerDir(chain, rec)), s.trash(s.recordFile(chain, rec, treeExt)), s.trash(s.recordFile(chain, rec, tapeExt)),
	}
	if rec.Blob != nil && !s.keepsBlob(rec.Blob.Digest) {
		errs = append(errs, s.trash(s.blobFile(rec.Blob.Digest)))
	}
	return errors.Join(errs...)
}

// keepsBlob tells whether a layer that is recorded, and not damaged, has a blob.
func (s *Store) keepsBlob(d digest.Digest) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, rec := range s.layers {
		if rec.Blob != nil && rec.Blob.Digest == d && rec.Damaged == "" {
			return true
		}
	}
	return false
}

// keepBlob has what is read through the returned reader kept beside a staged layer, where blobs are kept. The returned
// function ends it.
func (s *Store) keepBlob(l *stagedLayer, r io.Reader, desc ocispec.Descriptor) (io.Reader, func() error, error) {
	if !s.keepBlobs {
		return r, func() error { return nil }, nil
	}
	f, err := os.OpenFile(l.path+blobExt, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	return io.TeeReader(r, f), func() error {
		l.rec.Blob = &ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}
		return f.Close()
	}, nil
}

// openKept opens a blob that is kept, or says why it is damaged: its size and, where all of it is to be read, its content are
// not as they should be.
func (s *Store) openKept(ctx context.Context, blob *ocispec.Descriptor, all bool) (f *os.File, why string, err error) {
	f, err = os.Open(s.blobFile(blob.Digest))
	if err != nil {
		return nil, fmt.Sprintf("blob %s cannot be opened: %v", blob.Digest, err), nil
	}
	defer func() {
		if why != "" || err != nil {
			f.Close()
			f = nil
		}
	}()
	if st, err := f.Stat(); err != nil || st.Size() != blob.Size {
		return f, fmt.Sprintf("blob %s has another size", blob.Digest), nil
	}
	if !all {
		return f, "", nil
	}
	got, err := blob.Digest.Algorithm().FromReader(&contextReader{ctx, f})
	if ctx.Err() != nil {
		return f, "", ctx.Err()
	}
	if err != nil || got != blob.Digest {
		return f, fmt.Sprintf("blob %s has other content", blob.Digest), nil
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, "", err
}

// seal records what a staged layer's directory is like, once nothing of it changes any more, and what it takes. If the
// context of one pull ends before, another one that shares the layer does it.
func (l *stagedLayer) seal(ctx context.Context) error {
	if err := l.finishing.take(ctx); err != nil {
		return err
	}
	defer l.finishing.give()
	if l.sealed {
		return nil
	}
	err := l.record(ctx)
	l.sealed = err == nil
	return err
}

// record leaves nothing behind where it fails, so that it can be tried again.
func (l *stagedLayer) record(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			if rerr := os.Remove(l.path + treeExt); !errors.Is(rerr, os.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	l.rec.Sums = l.rec.Tape == "" || l.unsummed
	if l.rec.Bytes, l.rec.Inodes, err = writeTree(ctx, l.root, l.path+treeExt, l.rec.Sums, l.bare); err != nil {
		return fmt.Errorf("record of layer %s: %w", l.chain, err)
	}
	if l.rec.Tree, err = l.account(ctx, treeExt); err != nil {
		return err
	}
	if l.rec.Tape != "" {
		tape, err := l.account(ctx, tapeExt)
		if err != nil {
			return err
		}
		l.rec.Tape = tape
	}
	if l.rec.Blob != nil {
		l.rec.Kept, err = blocksOf(l.path + blobExt)
	}
	return err
}

// account returns the digest of a file beside a staged layer, and adds what it takes to the layer's.
func (l *stagedLayer) account(ctx context.Context, ext string) (digest.Digest, error) {
	f, err := os.Open(l.path + ext)
	if err != nil {
		return "", err
	}
	defer f.Close()
	d, err := digest.FromReader(&contextReader{ctx, f})
	if err != nil {
		return "", err
	}
	bytes, err := blocksOf(l.path + ext)
	if err != nil {
		return "", err
	}
	l.rec.Bytes += bytes
	l.rec.Inodes++
	return d, nil
}

package images

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image that is whole on this node, as it was when it was asked for. The caller owns it.
type Image struct {
	// ID is the digest of the configuration, so that one image from two registries is one; of an artifact, that of its
	// manifest.
	ID digest.Digest
	// RepoTags and RepoDigests are normalised references, sorted. An image whose tag moved on has only digests.
	RepoTags, RepoDigests []string
	// Size is that of the compressed layers and the configuration.
	Size   int64
	Config ocispec.Image
	// Artifact is the type of an OCI artifact, which can be mounted but not run; "" for a container image.
	Artifact string
	// Pinned: the kubelet must not garbage-collect it.
	Pinned bool
	// Own is what removing the image gives back, in bytes of the disk: its layers that no other image has.
	Own uint64
	// Layers are the chain IDs, bottom first.
	Layers []ChainID
}

// Image returns the image that name means: a tag, a digest reference, an id, a prefix of one id (with or without
// "sha256:"); a name without tag means :latest. It returns errdefs.ErrNotFound, also for one that is damaged, or
// errdefs.ErrInvalidArgument for what can be none of these.
func (s *Store) Image(name string) (*Image, error) { return s.named(name, s.describe) }

// Known is Image, and returns one that is damaged, too: it is not listed, but takes space until it is pulled again or removed.
func (s *Store) Known(name string) (*Image, error) { return s.named(name, s.describeAny) }

func (s *Store) named(name string, describe func(digest.Digest, []string, users) (*Image, error)) (*Image, error) {
	id, err := s.find(name)
	if err != nil {
		return nil, err
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	img, err := describe(id, s.refsOf(id), s.users())
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", quote(name), err)
	}
	return img, nil
}

// Images returns all images, ordered by id.
func (s *Store) Images() []*Image {
	s.mu.RLock()
	defer s.mu.RUnlock()
	refs := make(map[digest.Digest][]string, len(s.images))
	for ref, id := range s.refs {
		refs[id] = append(refs[id], ref)
	}
	users := s.users()
	all := make([]*Image, 0, len(s.images))
	for id := range s.images {
		slices.Sort(refs[id])
		if img, err := s.describe(id, refs[id], users); err == nil {
			all = append(all, img)
		}
	}
	slices.SortFunc(all, func(a, b *Image) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// describe builds an Image from its record, unless it is damaged. The caller holds s.mu.
func (s *Store) describe(id digest.Digest, refs []string, users users) (*Image, error) {
	if rec := s.images[id]; rec != nil {
		if why := s.damage(rec); why != "" {
			return nil, fmt.Errorf("%s: %w", why, errdefs.ErrNotFound)
		}
	}
	return s.describeAny(id, refs, users)
}

// describeAny builds an Image from its record. Each caller gets its own, so that none can change another's environment
// (CVE-2021-21334). The caller holds s.mu.
func (s *Store) describeAny(id digest.Digest, refs []string, users users) (*Image, error) {
	rec := s.images[id]
	if rec == nil {
		return nil, errdefs.ErrNotFound
	}
	img := &Image{ID: id, Size: rec.Size, Layers: slices.Clone(rec.Layers), Pinned: pinned(rec, refs), Artifact: rec.Artifact}
	if err := json.Unmarshal(rec.Config, &img.Config); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	var own Tally
	for _, chain := range rec.Layers {
		if l := s.layers[chain]; l != nil && users.layers[chain] == 1 {
			mine := l.layer(chain)
			if users.blobs[mine.Blob] > 1 {
				own.Without(mine)
			}
			own.Add(mine)
		}
	}
	img.Own = own.Bytes
	for _, ref := range refs {
		if strings.Contains(ref, "@") {
			img.RepoDigests = append(img.RepoDigests, ref)
		} else {
			img.RepoTags = append(img.RepoTags, ref)
		}
	}
	return img, nil
}

// users are how many images have each layer, and how many each blob that is kept.
type users struct {
	layers map[ChainID]int
	blobs  map[digest.Digest]int
}

// users counts. The caller holds s.mu.
func (s *Store) users() users {
	n := users{make(map[ChainID]int, len(s.layers)), map[digest.Digest]int{}}
	for _, rec := range s.images {
		// An image may have a layer twice.
		layers, blobs := map[ChainID]bool{}, map[digest.Digest]bool{}
		for _, chain := range rec.Layers {
			if !layers[chain] {
				layers[chain] = true
				n.layers[chain]++
			}
			if l := s.layers[chain]; l != nil && l.Blob != nil && !blobs[l.Blob.Digest] {
				blobs[l.Blob.Digest] = true
				n.blobs[l.Blob.Digest]++
			}
		}
	}
	return n
}

// pinned tells whether an image must stay until somebody asks for its removal.
func pinned(rec *imageRecord, refs []string) bool {
	return rec.Pinned || slices.ContainsFunc(refs, isPause)
}

// isPause says whether a reference is that of a pause image, whatever its registry. No runtime but berth lacks one, and
// a kubelet's garbage collection that removes it breaks the other (kubernetes#81756).
func isPause(ref string) bool {
	named, err := reference.ParseNormalizedNamed(ref)
	return err == nil && path.Base(reference.Path(named)) == "pause"
}

// Remove removes the image that name means with all its references. Nil if there is none. Layers that a prepared root
// file system uses stay until it is released. The disk has its space back when it returns, unless the context ends before:
// the kubelet, which removes images for the space, looks at once.
func (s *Store) Remove(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.remove(name); err != nil {
		return err
	}
	s.WaitDeleted(ctx)
	return nil
}

func (s *Store) remove(name string) error {
	s.change.Lock()
	defer s.change.Unlock()
	id, err := s.find(name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.RLock()
	refs := s.refsOf(id)
	s.mu.RUnlock()
	if err := s.apply(changes{deleteImages: []digest.Digest{id}, deleteRefs: refs}); err != nil {
		return fmt.Errorf("remove image %s: %w", quote(name), err)
	}
	if err := s.collect(); err != nil {
		return fmt.Errorf("remove layers of image %s: %w", quote(name), err)
	}
	s.log.Info("image removed", "image", id, "references", refs)
	return nil
}

// hold keeps layers from being deleted; it returns false, holding none, if one of them is not there.
func (s *Store) hold(chains ...ChainID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, chain := range chains {
		if s.layers[chain] == nil {
			return false
		}
	}
	for _, chain := range chains {
		s.holds[chain]++
	}
	return true
}

// reserve holds a layer that may not be there yet, and tells whether it is, undamaged.
func (s *Store) reserve(chain ChainID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holds[chain]++
	return s.whole(chain)
}

// unhold gives up what hold or reserve took.
func (s *Store) unhold(chains ...ChainID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, chain := range chains {
		if s.holds[chain]--; s.holds[chain] <= 0 {
			delete(s.holds, chain)
		}
	}
}

// lowers returns the directories of the layers that are seen, top first, as overlayfs wants them: what lies below an opaque layer is
// not mounted.
func (s *Store) lowers(of *rootfsRecord) ([]string, error) {
	var dirs []string
	for _, chain := range slices.Backward(of.Layers) {
		root, err := s.openLayer(chain)
		if err != nil {
			return nil, err
		}
		root.Close()
		s.mu.RLock()
		rec := s.layers[chain]
		s.mu.RUnlock()
		if rec == nil || rec.Generation != of.Generations[chain] {
			return nil, fmt.Errorf("layer %s was damaged and has been pulled again since the root file system was made from it: %w", chain, errDamaged)
		}
		dirs = append(dirs, s.layerDir(chain, rec))
		if rec.Opaque {
			break
		}
	}
	return dirs, nil
}

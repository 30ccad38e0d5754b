package images

import (
	"cmp"
	"maps"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Layer is an unpacked layer, as it was when it was asked for.
type Layer struct {
	ID            ChainID
	DiffID        digest.Digest
	Bytes, Inodes uint64 // that its directory and its records take
	// Blob is the compressed layer, if that is kept, and Kept what it takes. Other layers may have the same one.
	Blob digest.Digest
	Kept uint64
	// Images are those that have it, sorted; none where only a container is left of an image that was removed.
	Images []digest.Digest
	// Held: a prepared root file system, a view or a pull needs it.
	Held bool
}

// Layers returns all layers, ordered by id.
func (s *Store) Layers() []Layer {
	s.mu.RLock()
	defer s.mu.RUnlock()
	of := make(map[ChainID][]digest.Digest, len(s.layers))
	for _, id := range slices.Sorted(maps.Keys(s.images)) {
		for _, chain := range s.images[id].Layers {
			if ids := of[chain]; len(ids) == 0 || ids[len(ids)-1] != id { // a layer may be there twice
				of[chain] = append(ids, id)
			}
		}
	}
	all := make([]Layer, 0, len(s.layers))
	for chain, rec := range s.layers {
		l := rec.layer(chain)
		l.Images, l.Held = of[chain], s.holds[chain] > 0
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b Layer) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

func (r *layerRecord) layer(chain ChainID) Layer {
	l := Layer{ID: chain, DiffID: r.DiffID, Bytes: r.Bytes, Inodes: r.Inodes, Kept: r.Kept}
	if r.Blob != nil {
		l.Blob = r.Blob.Digest
	}
	return l
}

// Users returns who uses an image: the keys of its prepared root file systems and the targets of its views, sorted.
func (s *Store) Users(image digest.Digest) (keys, targets []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for key, rec := range s.rootfs {
		if rec.Image == image {
			keys = append(keys, key)
		}
	}
	for _, view := range s.views {
		if view.Image == image {
			targets = append(targets, view.Target)
		}
	}
	slices.Sort(keys)
	slices.Sort(targets)
	return keys, targets
}

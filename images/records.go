package images

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// ChainID names a layer together with all layers below it, as the OCI image specification defines it.
type ChainID digest.Digest

// String returns the digest in its usual form.
func (c ChainID) String() string { return string(c) }

// dir is the name of the layer's directory: the colon would have to be escaped in overlay's options.
func (c ChainID) dir() string {
	d := digest.Digest(c)
	return d.Algorithm().String() + "-" + d.Encoded()
}

// imageRecord is what the database holds of an image. It is not changed once it is stored.
type imageRecord struct {
	// Manifest is the digest of the manifest that was pulled first.
	Manifest digest.Digest `json:"manifest"`
	// Config is the image's configuration as it came from the registry; {} for an artifact.
	Config json.RawMessage `json:"config"`
	Layers []ChainID       `json:"layers"`
	Size   int64           `json:"size"`
	// Artifact is the type of what is no container image.
	Artifact string `json:"artifact,omitempty"`
	// Documents are the indexes, manifests and configurations that lead to the layers, whose bytes are in the database, and
	// Blobs the layers as the manifest names them. Records of earlier versions have neither.
	Documents []ocispec.Descriptor `json:"documents,omitempty"`
	Blobs     []ocispec.Descriptor `json:"blobs,omitempty"`
	// Pinned: the kubelet is told not to remove it.
	Pinned bool `json:"pinned,omitempty"`
}

// layerRecord is what the database holds of an unpacked layer.
type layerRecord struct {
	DiffID digest.Digest `json:"diffID"`
	Bytes  uint64        `json:"bytes"`
	Inodes uint64        `json:"inodes"`
	// Opaque: the layer hides all layers below. Overlayfs knows no opaque root directory, so the mount leaves them out.
	Opaque bool `json:"opaque,omitempty"`
	// Archive and Size are those of the archive that the tape makes again.
	Archive digest.Digest `json:"archive,omitempty"`
	Size    int64         `json:"size,omitempty"`
	// Head is how the compressed layer begins, if that is gzip: it tells what may have compressed it.
	Head []byte `json:"head,omitempty"`
	// File is the only file of an artifact's layer that is no archive: it is the layer.
	File string `json:"file,omitempty"`
	// Tree and Tape are the digests of its records: what its directory is like, and what its archive was besides. Layers of
	// earlier versions have neither; and one whose archive has more than its directory shows has no tape.
	Tree digest.Digest `json:"tree,omitempty"`
	Tape digest.Digest `json:"tape,omitempty"`
	// Sums: the tree has the sums of contents, since a tape does not have them all.
	Sums bool `json:"sums,omitempty"`
	// Blob is the compressed layer that is kept. Other layers may have the same one, so that Bytes and Inodes are without it,
	// and Kept is what it takes. Records of earlier versions have it in Bytes and Inodes.
	Blob *ocispec.Descriptor `json:"blob,omitempty"`
	Kept uint64              `json:"kept,omitempty"`
	// Generation counts the directories that the layer has had.
	Generation int `json:"generation,omitempty"`
	// Damaged says what is wrong with it, and Since since when that is known. A damaged layer is pulled again, and until
	// then its images are not listed.
	Damaged string    `json:"damaged,omitempty"`
	Since   time.Time `json:"since,omitzero"`
}

var (
	imagesBucket = []byte("images") // config digest → imageRecord
	refsBucket   = []byte("refs")   // normalised tag or digest reference → config digest
	layersBucket = []byte("layers") // chain ID → layerRecord
	docsBucket   = []byte("docs")   // digest → index, manifest or configuration, as it came

	buckets = [][]byte{imagesBucket, refsBucket, layersBucket, docsBucket}
)

// changes are applied to the database in one transaction, then to memory.
type changes struct {
	putImages    map[digest.Digest]*imageRecord
	putRefs      map[string]digest.Digest
	putLayers    map[ChainID]*layerRecord
	putDocs      map[digest.Digest][]byte
	deleteImages []digest.Digest
	deleteRefs   []string
	deleteLayers []ChainID
	// sweepDocs deletes documents that no image has; those of images that are deleted go in any case.
	sweepDocs bool
}

// none tells that there is nothing to change.
func (c *changes) none() bool {
	return len(c.putImages)+len(c.putRefs)+len(c.putLayers)+len(c.putDocs)+len(c.deleteImages)+len(c.deleteRefs)+len(c.deleteLayers) == 0 && !c.sweepDocs
}

// apply makes changes durable and then visible. The caller holds s.change.
func (s *Store) apply(c changes) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		images, refs, layers := tx.Bucket(imagesBucket), tx.Bucket(refsBucket), tx.Bucket(layersBucket)
		for _, id := range c.deleteImages {
			if err := images.Delete([]byte(id)); err != nil {
				return err
			}
		}
		for _, ref := range c.deleteRefs {
			if err := refs.Delete([]byte(ref)); err != nil {
				return err
			}
		}
		for _, chain := range c.deleteLayers {
			if err := layers.Delete([]byte(chain)); err != nil {
				return err
			}
		}
		for chain, rec := range c.putLayers {
			if err := putJSON(layers, string(chain), rec); err != nil {
				return err
			}
		}
		for id, rec := range c.putImages {
			if err := putJSON(images, string(id), rec); err != nil {
				return err
			}
		}
		for ref, id := range c.putRefs {
			if err := refs.Put([]byte(ref), []byte(id)); err != nil {
				return err
			}
		}
		for d, data := range c.putDocs {
			if err := tx.Bucket(docsBucket).Put([]byte(d), data); err != nil {
				return err
			}
		}
		if len(c.deleteImages) > 0 || c.sweepDocs {
			return s.sweepDocs(tx.Bucket(docsBucket), &c)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", dbName, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, id := range c.deleteImages {
		delete(s.images, id)
	}
	for _, ref := range c.deleteRefs {
		delete(s.refs, ref)
	}
	for _, chain := range c.deleteLayers {
		delete(s.layers, chain)
	}
	maps.Copy(s.layers, c.putLayers)
	maps.Copy(s.images, c.putImages)
	maps.Copy(s.refs, c.putRefs)
	return nil
}

// sweepDocs deletes the documents that no image has once changes are made.
func (s *Store) sweepDocs(docs *bolt.Bucket, c *changes) error {
	used := s.usedDocs(c)
	cur := docs.Cursor()
	for k, _ := cur.First(); k != nil; k, _ = cur.Next() {
		if !used[digest.Digest(k)] {
			if err := cur.Delete(); err != nil {
				return err
			}
		}
	}
	return nil
}

// usedDocs are the documents that images have once changes are made.
func (s *Store) usedDocs(c *changes) map[digest.Digest]bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := maps.Clone(s.images)
	maps.Copy(all, c.putImages)
	used := map[digest.Digest]bool{}
	for id, rec := range all {
		if slices.Contains(c.deleteImages, id) {
			continue
		}
		for _, d := range rec.Documents {
			used[d.Digest] = true
		}
	}
	return used
}

// strayDocs tells whether there are documents that no image has once changes are made.
func (s *Store) strayDocs(c *changes) (stray bool, err error) {
	used := s.usedDocs(c)
	err = s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(docsBucket).ForEach(func(k, _ []byte) error {
			stray = stray || !used[digest.Digest(k)]
			return nil
		})
	})
	return stray, err
}

// document returns a document that an image has.
func (s *Store) document(d digest.Digest) (data []byte, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		if data = slices.Clone(tx.Bucket(docsBucket).Get([]byte(d))); data == nil {
			return fmt.Errorf("document %s: %w", d, errdefs.ErrNotFound)
		}
		return nil
	})
	return data, err
}

// damage tells why an image is not listed: one of its layers is damaged; "" if none is. The caller holds s.mu.
func (s *Store) damage(rec *imageRecord) string {
	for _, chain := range rec.Layers {
		if l := s.layers[chain]; l != nil && l.Damaged != "" {
			return fmt.Sprintf("layer %s is damaged: %s", chain, l.Damaged)
		}
	}
	return ""
}

// whole tells whether a layer is there and not known to be damaged. The caller holds s.mu.
func (s *Store) whole(chain ChainID) bool {
	rec := s.layers[chain]
	return rec != nil && rec.Damaged == ""
}

func putJSON(b *bolt.Bucket, key string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put([]byte(key), data)
}

// load reads the database into memory. What cannot be read is left out and said: an image that is not listed is pulled
// again, one that is listed must be whole.
func (s *Store) load() (broken changes, err error) {
	err = s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return broken, err
	}
	err = s.db.View(func(tx *bolt.Tx) error {
		if err := tx.Bucket(layersBucket).ForEach(func(k, v []byte) error {
			rec, chain := new(layerRecord), ChainID(k)
			if err := json.Unmarshal(v, rec); err != nil || digest.Digest(chain).Validate() != nil {
				s.log.Error("unreadable layer record dropped", "layer", string(k), "error", err)
				broken.deleteLayers = append(broken.deleteLayers, chain)
				return nil
			}
			s.layers[chain] = rec
			return nil
		}); err != nil {
			return err
		}
		if err := tx.Bucket(imagesBucket).ForEach(func(k, v []byte) error {
			rec, id := new(imageRecord), digest.Digest(k)
			if err := json.Unmarshal(v, rec); err != nil || id.Validate() != nil {
				s.log.Error("unreadable image record dropped", "image", string(k), "error", err)
				broken.deleteImages = append(broken.deleteImages, id)
				return nil
			}
			s.images[id] = rec
			return nil
		}); err != nil {
			return err
		}
		return tx.Bucket(refsBucket).ForEach(func(k, v []byte) error {
			s.refs[string(k)] = digest.Digest(v)
			return nil
		})
	})
	return broken, err
}

// refsOf returns the references of an image, sorted. The caller holds s.mu.
func (s *Store) refsOf(id digest.Digest) []string {
	var refs []string
	for ref, to := range s.refs {
		if to == id {
			refs = append(refs, ref)
		}
	}
	slices.Sort(refs)
	return refs
}

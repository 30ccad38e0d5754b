package images

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// A layer that is found damaged is marked so, on record. From then on its images are not listed, so that a kubelet pulls
// them again, and a pull takes the layer for one that is not there: it alone is fetched, into a directory of its own, since
// the damaged one may be mounted below a container. That one goes with the last root file system made from it.

// errDamaged is in the chain of errors about layers that are damaged.
var errDamaged = fmt.Errorf("damaged on this node, pull the image again: %w", errdefs.ErrDataLoss)

// forgetDamaged is how long an image with a damaged layer, which nobody sees, waits for the pull that mends it before the
// rest of its layers is given up.
const forgetDamaged = time.Hour

// markDamaged puts damage on record that was seen in a layer as seen has it. One that has been mended since, or is marked
// already, stays as it is.
func (s *Store) markDamaged(chain ChainID, seen *layerRecord, why string) error {
	s.change.Lock()
	defer s.change.Unlock()
	s.mu.RLock()
	still := s.layers[chain] == seen
	s.mu.RUnlock()
	if !still || seen.Damaged != "" {
		return nil
	}
	rec := *seen
	rec.Damaged, rec.Since = why, time.Now().UTC().Truncate(time.Second)
	if err := s.apply(changes{putLayers: map[ChainID]*layerRecord{chain: &rec}}); err != nil {
		return fmt.Errorf("mark layer %s as damaged: %w", chain, err)
	}
	s.log.Error("layer is damaged, its images are to be pulled again", "layer", chain, "what", why)
	return nil
}

// forget drops the images of layers that have been damaged for long: nobody lists them, so that nobody else would remove
// what they still take. Those that are pinned stay: the node may have no registry to get the rest of them back from. The
// caller holds s.change, or is alone. A layer that was damaged later than now, by a clock that has been set back since, counts from now
// on.
func (s *Store) forget(now time.Time) error {
	var drop changes
	s.mu.RLock()
	for chain, l := range s.layers {
		if l.Damaged != "" && l.Since.After(now) {
			rec := *l
			rec.Since = now.UTC().Truncate(time.Second)
			if drop.putLayers == nil {
				drop.putLayers = map[ChainID]*layerRecord{}
			}
			drop.putLayers[chain] = &rec
		}
	}
	for id, rec := range s.images {
		long := func(chain ChainID) bool {
			l := s.layers[chain]
			return l != nil && l.Damaged != "" && now.Sub(l.Since) > forgetDamaged
		}
		if !slices.ContainsFunc(rec.Layers, long) {
			continue
		}
		if refs := s.refsOf(id); !pinned(rec, refs) {
			drop.deleteImages = append(drop.deleteImages, id)
			drop.deleteRefs = append(drop.deleteRefs, refs...)
		}
	}
	s.mu.RUnlock()
	if len(drop.deleteImages) > 0 {
		s.log.Warn("damaged images were not pulled again and are dropped", "images", drop.deleteImages)
	} else if len(drop.putLayers) == 0 {
		return nil
	}
	return s.apply(drop)
}

// here tells whether an image is there, with no layer that is known to be damaged. The caller holds s.mu.
func (s *Store) here(id digest.Digest) bool {
	rec := s.images[id]
	return rec != nil && s.damage(rec) == ""
}

// onDisk tells whether all layers are where they should be, and marks those that are not as damaged.
func (s *Store) onDisk(chains []ChainID) bool {
	whole := true
	for _, chain := range chains {
		root, err := s.openLayer(chain)
		if err != nil {
			whole = false
			continue
		}
		root.Close()
	}
	return whole
}

// openLayer opens a layer's directory.
func (s *Store) openLayer(chain ChainID) (*os.File, error) {
	s.mu.RLock()
	rec := s.layers[chain]
	s.mu.RUnlock()
	if rec == nil {
		return nil, fmt.Errorf("layer %s: %w", chain, errdefs.ErrNotFound)
	}
	return s.openLayerAs(chain, rec)
}

// openLayerAs opens the directory that a layer has by rec. Is it not there, or not readable, then the layer is damaged, and
// the error is errDamaged.
func (s *Store) openLayerAs(chain ChainID, rec *layerRecord) (*os.File, error) {
	if rec.Damaged != "" {
		return nil, fmt.Errorf("layer %s: %s: %w", chain, rec.Damaged, errDamaged)
	}
	fd, err := unix.Open(s.layerDir(chain, rec), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		return os.NewFile(uintptr(fd), s.layerDir(chain, rec)), nil
	}
	what := "its directory cannot be opened: " + err.Error()
	if !isDamage(err) {
		return nil, fmt.Errorf("layer %s: %s", chain, what)
	}
	return nil, errors.Join(fmt.Errorf("layer %s: %s: %w", chain, what, errDamaged), s.markDamaged(chain, rec, what))
}

// isDamage tells errors of a file system that lost something, or was damaged itself, from those of a node that is short of
// something.
func isDamage(err error) bool {
	for _, no := range []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.EIO, unix.EUCLEAN, unix.EBADMSG, unix.ESTALE, unix.EISDIR} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// replace applies changes, and gives up the directories of damaged layers that are replaced by them. The caller holds
// s.change.
func (s *Store) replace(c changes) error {
	s.mu.RLock()
	old := map[ChainID]*layerRecord{}
	for chain := range c.putLayers {
		if rec := s.layers[chain]; rec != nil {
			old[chain] = rec
		}
	}
	s.mu.RUnlock()
	if err := s.apply(c); err != nil {
		return err
	}
	s.mu.Lock()
	for chain, rec := range old {
		s.retired[rec.dirName(chain)] = retiredLayer{chain, rec}
		s.log.Info("damaged layer mended", "layer", chain)
	}
	s.mu.Unlock()
	s.sweepRetired()
	return nil
}

// retiredLayer is a directory of a layer that has another one now.
type retiredLayer struct {
	chain ChainID
	rec   *layerRecord
}

// sweepRetired gives up the retired directories that no root file system and no view was made from. The caller holds
// s.change.
func (s *Store) sweepRetired() {
	s.mu.Lock()
	var gone []retiredLayer
	for name, l := range s.retired {
		if !s.mountedFrom(name) {
			gone = append(gone, l)
			delete(s.retired, name)
		}
	}
	s.mu.Unlock()
	for _, l := range gone {
		if err := s.trashLayer(l.chain, l.rec); err != nil {
			s.log.Warn("damaged layer stays until the next start", "layer", l.chain, "error", err)
		}
	}
}

// mountedFrom tells whether something may be mounted from a layer's directory. The caller holds s.mu.
func (s *Store) mountedFrom(name string) bool {
	return slices.ContainsFunc(s.made(), func(rec *rootfsRecord) bool { return rec.uses(name) })
}

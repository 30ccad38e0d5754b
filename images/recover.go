package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// recover brings memory, database and directories into agreement. Only what the database names counts: staging
// directories, and layers that were renamed but not yet recorded, are what a killed pull left, and go.
func (s *Store) recover() error {
	broken, err := s.load()
	if err != nil {
		return err
	}
	nothing := func(string) bool { return false }
	if err := errors.Join(s.trashAll(s.path(tmpDir), s.trash, nothing), s.trashAll(s.writablePath(tmpDir), s.trashWritable, nothing)); err != nil {
		return err
	}
	onDisk := map[string]bool{}
	if err := s.trashAll(s.path(layersDir), s.trash, func(name string) bool {
		onDisk[name] = true
		return true
	}); err != nil {
		return err
	}
	for chain, rec := range s.layers {
		if !onDisk[rec.dirName(chain)] {
			s.log.Error("layer is recorded but not on disk", "layer", chain)
			broken.deleteLayers = append(broken.deleteLayers, chain)
			delete(s.layers, chain)
		}
	}
	// Listed means complete: an image that lost a layer is not listed, so that the kubelet pulls it again.
	for id, rec := range s.images {
		for _, chain := range rec.Layers {
			if s.layers[chain] == nil {
				s.log.Error("image lost a layer and is dropped", "image", id, "layer", chain)
				broken.deleteImages = append(broken.deleteImages, id)
				delete(s.images, id)
				break
			}
		}
	}
	for ref, id := range s.refs {
		if s.images[id] == nil {
			broken.deleteRefs = append(broken.deleteRefs, ref)
		}
	}
	if err := s.loadRootfs(onDisk); err != nil {
		return err
	}
	if err := s.loadViews(onDisk); err != nil {
		return err
	}
	if broken.sweepDocs, err = s.strayDocs(&broken); err != nil {
		return err
	}
	if !broken.none() {
		if err := s.apply(broken); err != nil {
			return err
		}
	}
	// Layers whose image went while a root file system used them, which is now gone, too.
	if err := s.collect(); err != nil {
		return err
	}
	return s.sweepFiles()
}

// sweepFiles gives up whatever lies among layers, records and blobs and belongs to none.
func (s *Store) sweepFiles() error {
	for _, rec := range s.made() {
		for _, chain := range rec.Layers {
			// An earlier directory of a layer, or one of a layer that is not on record any more.
			was := &layerRecord{Generation: rec.Generations[chain]}
			now := s.layers[chain]
			if now == nil {
				s.log.Warn("layer is on record no more, and stays for what was made of it", "layer", chain, "image", rec.Image)
			}
			if now == nil || now.Generation != was.Generation {
				s.retired[was.dirName(chain)] = retiredLayer{chain, was}
			}
		}
	}
	known := s.knownFiles()
	var errs []error
	for _, dir := range []string{layersDir, recordsDir, blobsDir} {
		errs = append(errs, s.trashAll(s.path(dir), s.trash, func(name string) bool { return known[name] }))
	}
	return errors.Join(errs...)
}

// knownFiles are the names among layers, records and blobs that belong to something. The caller holds s.mu, or is alone.
func (s *Store) knownFiles() map[string]bool {
	known := map[string]bool{}
	for chain, rec := range s.layers {
		name := rec.dirName(chain)
		known[name], known[name+treeExt], known[name+tapeExt] = true, rec.Tree != "", rec.Tape != ""
		if rec.Blob != nil {
			known[filepath.Base(s.blobFile(rec.Blob.Digest))] = true
		}
	}
	for name, l := range s.retired {
		known[name], known[name+treeExt], known[name+tapeExt] = true, true, l.rec.Tape != ""
	}
	return known
}

// trashAll throws the entries of a directory away that keep refuses.
func (s *Store) trashAll(dir string, throw func(path string) error, keep func(name string) bool) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if keep(e.Name()) {
			continue
		}
		if err := throw(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

var trashCount atomic.Uint64

// unique returns a name that was not used before in this store's tmp or trash.
func unique() string {
	return strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.Itoa(os.Getpid()) + "-" + strconv.FormatUint(trashCount.Add(1), 36)
}

// trash moves a tree of the images away at once; it is deleted in the background. Nil if it is absent.
func (s *Store) trash(path string) error { return s.throw(path, s.path(trashDir)) }

// trashWritable is trash for what belongs to root file systems.
func (s *Store) trashWritable(path string) error { return s.throw(path, s.writablePath(trashDir)) }

func (s *Store) throw(path, trash string) error {
	s.deletions.shun(path)
	err := os.Rename(path, filepath.Join(trash, unique()))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("discard %s: %w", filepath.Base(path), err)
	}
	s.thrown.Add(1)
	s.discard()
	return nil
}

// discard wakes the worker that empties the trash.
func (s *Store) discard() {
	select {
	case s.trashed <- struct{}{}:
	default:
	}
}

// emptyTrash deletes what was moved to the trash, until the store is closed. What is left then goes at the next Open.
func (s *Store) emptyTrash() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.trashed:
		}
		thrown := s.thrown.Load()
		for _, dir := range slices.Compact([]string{s.path(trashDir), s.writablePath(trashDir)}) {
			if err := s.empty(dir); err != nil {
				s.log.Warn("what was discarded is not deleted", "error", err)
			}
		}
		if s.ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		s.deleted = thrown
		close(s.emptied)
		s.emptied = make(chan struct{})
		s.mu.Unlock()
	}
}

// empty deletes what is in a directory, until the store is closed.
func (s *Store) empty(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if s.ctx.Err() != nil {
			return nil
		}
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// WaitDeleted waits until the disk has back what was removed and released until now, or ctx ends.
func (s *Store) WaitDeleted(ctx context.Context) {
	thrown := s.thrown.Load()
	for {
		s.mu.RLock()
		deleted, emptied := s.deleted, s.emptied
		s.mu.RUnlock()
		if deleted >= thrown {
			return
		}
		select {
		case <-emptied:
		case <-ctx.Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// collectUnused is collect for those who do not hold s.change.
func (s *Store) collectUnused() error {
	s.change.Lock()
	defer s.change.Unlock()
	return s.collect()
}

// collect deletes the layers that nobody needs. The caller holds s.change, or is alone.
func (s *Store) collect() error {
	if err := s.forget(time.Now()); err != nil {
		return err
	}
	s.mu.RLock()
	used := map[ChainID]bool{}
	for _, rec := range s.images {
		for _, chain := range rec.Layers {
			used[chain] = true
		}
	}
	var unused []ChainID
	for chain := range s.layers {
		if !used[chain] && s.holds[chain] == 0 {
			unused = append(unused, chain)
		}
	}
	s.mu.RUnlock()
	if len(unused) == 0 {
		return nil
	}
	// From here no pull finds them any more: what one already holds was just left out.
	s.mu.Lock()
	gone := unused[:0]
	records := map[ChainID]*layerRecord{}
	for _, chain := range unused {
		if s.holds[chain] == 0 {
			gone = append(gone, chain)
			records[chain] = s.layers[chain]
			delete(s.layers, chain)
		}
	}
	s.mu.Unlock()
	if err := s.apply(changes{deleteLayers: gone}); err != nil {
		// The records are still there, and so are the directories: the next Open, or a pull, takes them up.
		return err
	}
	var errs []error
	for _, chain := range gone {
		errs = append(errs, s.trashLayer(chain, records[chain]))
	}
	return errors.Join(errs...)
}

// writeRecord puts a small record into a directory. It is not flushed: what it describes does not outlive a power cut.
func writeRecord(dir string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, recordName), data, 0o600)
}

func readRecord(dir string, v any) error {
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", strings.TrimSuffix(dir, "/"), err)
	}
	return nil
}

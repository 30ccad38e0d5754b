package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// rootfsRecord says what a prepared root file system is made of. It lies beside its upper directory and not in the
// database, since it is on the way of every container's start and needs no fsync: it dies with its container.
type rootfsRecord struct {
	Image  digest.Digest `json:"image"`
	Layers []ChainID     `json:"layers"`
	Userns *Userns       `json:"userns,omitempty"`
	// Generations are those of the layers' directories, where it is not the first.
	Generations map[ChainID]int `json:"generations,omitempty"`
}

// uses tells whether the directory of a layer is one that the root file system is made of.
func (r *rootfsRecord) uses(name string) bool {
	return slices.ContainsFunc(r.Layers, func(chain ChainID) bool {
		return (&layerRecord{Generation: r.Generations[chain]}).dirName(chain) == name
	})
}

// viewRecord is the same for a read-only view.
type viewRecord struct {
	rootfsRecord
	Target string `json:"target"`
}

var keyPattern = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z_-]{0,127}$`)

func checkKey(key string) error {
	if !keyPattern.MatchString(key) {
		return fmt.Errorf("root file system key %s: %w", quote(key), errdefs.ErrInvalidArgument)
	}
	return nil
}

// Prepare makes a writable root file system of an image, named key, and keeps the image's layers from being deleted
// until Release. With a user namespace, which is not nil, it is for containers in that. A second call for the same changes
// nothing.
func (s *Store) Prepare(key string, image digest.Digest, userns *Userns) error {
	if err := checkKey(key); err != nil {
		return err
	}
	rec, err := s.holdImage(image)
	if err != nil {
		return fmt.Errorf("prepare root file system %s: %w", key, err)
	}
	if err := s.runnable(image); err != nil {
		return errors.Join(fmt.Errorf("prepare root file system %s: %w", key, err), s.letGo(rec))
	}
	rec.Userns = userns
	s.mu.Lock()
	have := s.rootfs[key]
	if have == nil {
		s.rootfs[key] = rec // claimed, so that of two calls one makes it
	}
	s.mu.Unlock()
	if have != nil {
		if err := s.letGo(rec); err != nil {
			return fmt.Errorf("prepare root file system %s: %w", key, err)
		}
		if have.Image != image {
			return fmt.Errorf("root file system %s is of image %s: %w", key, have.Image, errdefs.ErrAlreadyExists)
		}
		if (have.Userns == nil) != (userns == nil) || userns != nil && *have.Userns != *userns {
			return fmt.Errorf("root file system %s is for another user namespace: %w", key, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	if err := s.makeRootfs(key, rec); err != nil {
		s.mu.Lock()
		delete(s.rootfs, key)
		s.mu.Unlock()
		return fmt.Errorf("prepare root file system %s: %w", key, errors.Join(err, s.letGo(rec)))
	}
	s.mu.Lock()
	if s.rootfs[key] == rec {
		s.usage[key] = Usage{Mountpoint: s.writable, Bytes: 4096, Inodes: 1} // its root directory; counted from now on
	}
	s.mu.Unlock()
	return nil
}

// holdImage returns what an image is made of, with its layers held.
func (s *Store) holdImage(image digest.Digest) (*rootfsRecord, error) {
	s.mu.RLock()
	img, damage := s.images[image], ""
	if img != nil {
		damage = s.damage(img)
	}
	s.mu.RUnlock()
	if damage != "" {
		return nil, fmt.Errorf("image %s: %s: %w", image, damage, errDamaged)
	}
	if img == nil || !s.hold(img.Layers...) {
		return nil, fmt.Errorf("image %s: %w", quote(string(image)), errdefs.ErrNotFound)
	}
	rec := &rootfsRecord{Image: image, Layers: slices.Clone(img.Layers)}
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, chain := range rec.Layers {
		if l := s.layers[chain]; l != nil && l.Generation > 0 {
			if rec.Generations == nil {
				rec.Generations = map[ChainID]int{}
			}
			rec.Generations[chain] = l.Generation
		}
	}
	return rec, nil
}

// makeRootfs makes the directories in tmp and renames them into place, so that whatever is in place has a record.
func (s *Store) makeRootfs(key string, rec *rootfsRecord) (err error) {
	tmp := s.writablePath(tmpDir, unique())
	defer func() {
		if err != nil {
			err = errors.Join(err, s.trashWritable(tmp))
		}
	}()
	upper := filepath.Join(tmp, "upper")
	for _, dir := range []string{tmp, upper, filepath.Join(tmp, "work")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	// The root directory that a container sees has the attributes of upper: those of the image's topmost layer.
	lowers, err := s.lowers(rec)
	if err != nil {
		return err
	}
	top := s.path(emptyDir)
	if len(lowers) > 0 {
		top = lowers[0]
	}
	from, err := os.Open(top)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Open(upper)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := copyMeta(int(to.Fd()), int(from.Fd())); err != nil {
		return fmt.Errorf("attributes of the root directory: %w", err)
	}
	if rec.Userns != nil {
		if err := rec.Userns.giveTo(to); err != nil {
			return fmt.Errorf("root directory: %w", err)
		}
	}
	if err := writeRecord(tmp, rec); err != nil {
		return err
	}
	return os.Rename(tmp, s.writablePath(rootfsDir, key))
}

// Mount mounts the root file system key at target, a directory. Nil if it is mounted there already.
func (s *Store) Mount(ctx context.Context, key, target string, options ...MountOption) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.RLock()
	rec := s.rootfs[key]
	s.mu.RUnlock()
	if rec == nil {
		return fmt.Errorf("root file system %s: %w", quote(key), errdefs.ErrNotFound)
	}
	if mounted, err := isMountPoint(target); err != nil || mounted {
		return err
	}
	lowers, err := s.lowers(rec)
	if err != nil {
		return fmt.Errorf("mount root file system %s: %w", key, err)
	}
	if len(lowers) == 0 {
		lowers = []string{s.path(emptyDir)}
	}
	work := s.writablePath(rootfsDir, key, "work")
	// Left by a mount that was not undone in order, such as by a reboot; overlayfs refuses such a work directory,
	// because of what upper may have lost. What a container wrote before a reboot is not looked at again.
	if err := os.RemoveAll(filepath.Join(work, "work", "incompat")); err != nil {
		return fmt.Errorf("mount root file system %s: %w", key, err)
	}
	o := overlay{lowers: lowers, upper: s.UpperDir(key), work: work}
	if rec.Userns != nil {
		o.userns = rec.Userns.Path
	}
	for _, option := range options {
		option(&o)
	}
	if err := o.mount(target); err != nil {
		return fmt.Errorf("mount root file system %s at %s: %w", key, target, err)
	}
	return nil
}

// MountView mounts an image alone, read-only, at target, for containers of a user namespace where that is not nil. Its
// layers stay until Unmount of that target.
func (s *Store) MountView(ctx context.Context, image digest.Digest, target string, userns *Userns, options ...MountOption) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if mounted, err := isMountPoint(target); err != nil || mounted {
		return err
	}
	rec, err := s.holdImage(image)
	if err != nil {
		return fmt.Errorf("view: %w", err)
	}
	name := viewName(target)
	rec.Userns = userns
	view := &viewRecord{rootfsRecord: *rec, Target: target}
	s.mu.Lock()
	old := s.views[name]
	s.views[name] = view
	s.mu.Unlock()
	if old != nil {
		err = s.letGo(&old.rootfsRecord)
	}
	if err = errors.Join(err, s.makeView(name, view, options)); err != nil {
		return errors.Join(fmt.Errorf("view of image %s at %s: %w", image, target, err), s.dropView(target))
	}
	return nil
}

func (s *Store) makeView(name string, view *viewRecord, options []MountOption) error {
	dir := s.path(viewsDir, name)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := writeRecord(dir, view); err != nil {
		return err
	}
	lowers, err := s.lowers(&view.rootfsRecord)
	if err != nil {
		return err
	}
	// Without an upper directory overlayfs wants two lower ones.
	if len(lowers) < 2 {
		lowers = append(lowers, s.path(emptyDir), s.path(voidDir))
	}
	o := overlay{lowers: lowers}
	if view.Userns != nil {
		o.userns = view.Userns.Path
	}
	for _, option := range options {
		option(&o)
	}
	return o.mount(view.Target)
}

func viewName(target string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(target)))
	return hex.EncodeToString(sum[:])
}

// dropView gives up what a view holds. Nil if there is none at target.
func (s *Store) dropView(target string) error {
	name := viewName(target)
	s.mu.Lock()
	view := s.views[name]
	delete(s.views, name)
	s.mu.Unlock()
	if view == nil {
		return nil
	}
	return errors.Join(s.trash(s.path(viewsDir, name)), s.letGo(&view.rootfsRecord))
}

// Unmount unmounts what is mounted at target. Nil if nothing is.
func (s *Store) Unmount(target string) error {
	if err := unmount(target); err != nil {
		return err
	}
	return s.dropView(target)
}

// Release gives up a root file system, which must not be mounted any more, and its layers. Nil if it is absent. WaitDeleted waits for
// its space.
func (s *Store) Release(key string) error {
	if err := checkKey(key); err != nil {
		return err
	}
	s.mu.Lock()
	rec := s.rootfs[key]
	delete(s.usage, key)
	s.mu.Unlock()
	if rec == nil {
		return nil
	}
	if err := s.trashWritable(s.writablePath(rootfsDir, key)); err != nil {
		return fmt.Errorf("release root file system %s: %w", key, err)
	}
	s.mu.Lock()
	mine := s.rootfs[key] == rec
	if mine {
		delete(s.rootfs, key)
	}
	s.mu.Unlock()
	if !mine {
		return nil // released by another call
	}
	if err := s.letGo(rec); err != nil {
		return fmt.Errorf("release root file system %s: %w", key, err)
	}
	return nil
}

// letGo gives up what holdImage took, and deletes the layers that nobody needs any more: those of an image that was
// removed meanwhile. While the image is there, there are none to look for.
func (s *Store) letGo(rec *rootfsRecord) error {
	s.unhold(rec.Layers...)
	s.mu.RLock()
	there, retired := s.images[rec.Image] != nil, len(s.retired) > 0
	s.mu.RUnlock()
	if there && !retired {
		return nil
	}
	s.change.Lock()
	defer s.change.Unlock()
	s.sweepRetired()
	if there {
		return nil
	}
	return s.collect()
}

// Keys returns the keys of all prepared root file systems, sorted.
func (s *Store) Keys() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := make([]string, 0, len(s.rootfs))
	for key := range s.rootfs {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// UpperDir is where what a container writes to its root file system is kept.
func (s *Store) UpperDir(key string) string { return s.writablePath(rootfsDir, key, "upper") }

// holdDirs holds the layers that something was made of, also those that are on record no more, as after the loss of the
// database: a container may run on their directories. It returns false, holding none, if one of these is not there.
func (s *Store) holdDirs(rec *rootfsRecord, onDisk map[string]bool) bool {
	for _, chain := range rec.Layers {
		if digest.Digest(chain).Validate() != nil || !onDisk[(&layerRecord{Generation: rec.Generations[chain]}).dirName(chain)] {
			return false
		}
	}
	for _, chain := range rec.Layers {
		s.reserve(chain)
	}
	return true
}

// made are the records of all that was made of layers. The caller holds s.mu, or is alone.
func (s *Store) made() []*rootfsRecord {
	all := slices.Collect(maps.Values(s.rootfs))
	for _, view := range s.views {
		all = append(all, &view.rootfsRecord)
	}
	return all
}

// loadRootfs reads the records of root file systems at Open. One that is torn, or whose layers are not on the disk any more,
// cannot be mounted again: it goes.
func (s *Store) loadRootfs(onDisk map[string]bool) error {
	return s.trashAll(s.writablePath(rootfsDir), s.trashWritable, func(key string) bool {
		rec := new(rootfsRecord)
		if err := readRecord(s.writablePath(rootfsDir, key), rec); err != nil {
			s.log.Warn("unreadable root file system discarded", "key", key, "error", err)
			return false
		}
		if checkKey(key) != nil || !s.holdDirs(rec, onDisk) {
			s.log.Warn("root file system without its layers discarded", "key", key)
			return false
		}
		s.rootfs[key] = rec
		return true
	})
}

// loadViews keeps the records of views that are still mounted.
func (s *Store) loadViews(onDisk map[string]bool) error {
	return s.trashAll(s.path(viewsDir), s.trash, func(name string) bool {
		view := new(viewRecord)
		if err := readRecord(s.path(viewsDir, name), view); err != nil {
			return false
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(view.Target, &fs); err != nil || fs.Type != unix.OVERLAYFS_SUPER_MAGIC || !s.holdDirs(&view.rootfsRecord, onDisk) {
			return false
		}
		s.views[name] = view
		return true
	})
}

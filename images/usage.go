package images

import (
	"context"
	"os"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Usage is what something takes of the file system that is mounted at Mountpoint.
type Usage struct {
	Mountpoint    string
	Bytes, Inodes uint64
}

// Usage returns what the layers of all images take. It was counted when they were unpacked.
func (s *Store) Usage() Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var all Tally
	for chain, rec := range s.layers {
		all.Add(rec.layer(chain))
	}
	return Usage{Mountpoint: s.root, Bytes: all.Bytes, Inodes: all.Inodes}
}

// Tally adds up what layers take on the disk: each layer once, and once each blob that some of them keep. The zero value is
// ready for use.
type Tally struct {
	Bytes, Inodes uint64

	layers map[ChainID]bool
	blobs  map[digest.Digest]bool
}

// Add adds a layer.
func (t *Tally) Add(l Layer) {
	if t.layers == nil {
		t.layers = map[ChainID]bool{}
	}
	if !t.layers[l.ID] {
		t.layers[l.ID] = true
		t.Bytes += l.Bytes
		t.Inodes += l.Inodes
	}
	if l.Kept > 0 && t.first(l.Blob) {
		t.Bytes += l.Kept
		t.Inodes++
	}
}

// Without leaves the blob of a layer out of what is added from now on.
func (t *Tally) Without(l Layer) { t.first(l.Blob) }

func (t *Tally) first(blob digest.Digest) bool {
	if t.blobs == nil {
		t.blobs = map[digest.Digest]bool{}
	}
	was := t.blobs[blob]
	t.blobs[blob] = true
	return !was
}

// WritableUsage returns what a prepared root file system's own writes take, as last counted; false if it was not yet.
func (s *Store) WritableUsage(key string) (Usage, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u, ok := s.usage[key]
	return u, ok
}

// WritablesUsage returns what all of them take.
func (s *Store) WritablesUsage() Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := Usage{Mountpoint: s.writable}
	for _, u := range s.usage {
		all.Bytes += u.Bytes
		all.Inodes += u.Inodes
	}
	return all
}

// countEvery is how often writable layers are counted, as often as the kubelet looks for pods to evict. Counting takes
// at most a tenth of the time.
const countEvery = 10 * time.Second

// writtenMuch is by how much less room a disk has when its writable layers are to be counted without delay.
const writtenMuch = 16 << 20

// counts are what is known of counting. Store.mu guards it, but for the channels.
type counts struct {
	begun, ended uint64
	room         uint64        // on the disk, when the last count that ended had begun
	took         time.Duration // that one
	asked        chan struct{} // holds one for who waits for the next
	next         chan struct{} // is closed at the end of a count
}

// countWritables counts the writable layers, one after the other, until the store is closed.
func (s *Store) countWritables() {
	for {
		start := time.Now()
		s.mu.Lock()
		s.counts.begun++
		s.mu.Unlock()
		room, _ := roomOf(s.writable) // unknown, none is less
		for _, key := range s.Keys() {
			s.countWritable(key)
		}
		took := time.Since(start)
		s.mu.Lock()
		c := &s.counts
		c.ended, c.room, c.took = c.begun, room, took
		close(c.next)
		c.next = make(chan struct{})
		s.mu.Unlock()
		if !s.rest(10*took, nil) || !s.rest(countEvery-10*took, c.asked) {
			return
		}
	}
}

// rest waits, unless it is woken. It is false once the store is closed.
func (s *Store) rest(d time.Duration, wake <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-s.ctx.Done():
		return false
	case <-timer.C:
	case <-wake:
	}
	return true
}

// Recount has the writable layers counted now, where much was written since they last were: who is told what they take decides by it
// which pod has to go. It waits until that is done, or ctx ends; not at all where a count takes longer than ctx lasts.
func (s *Store) Recount(ctx context.Context) {
	room, err := roomOf(s.writable)
	s.mu.RLock()
	mine, was, took := s.counts.begun+1, s.counts.room, s.counts.took
	s.mu.RUnlock()
	if err != nil || room+writtenMuch > was {
		return
	}
	if until, ok := ctx.Deadline(); ok && time.Until(until) < took {
		return
	}
	select {
	case s.counts.asked <- struct{}{}:
	default: // somebody has
	}
	for {
		s.mu.RLock()
		ended, next := s.counts.ended, s.counts.next
		s.mu.RUnlock()
		if ended >= mine {
			return
		}
		select {
		case <-next:
		case <-ctx.Done():
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// roomOf is how many bytes the file system of a directory has left.
func roomOf(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return fs.Bavail * uint64(fs.Bsize), nil
}

// countWritable counts one. One that was released meanwhile is left out.
func (s *Store) countWritable(key string) {
	u := Usage{Mountpoint: s.writable}
	fd, err := unix.Open(s.UpperDir(key), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	countTree(s.ctx, os.NewFile(uintptr(fd), key), &u, map[uint64]bool{}, 0)
	if s.ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rootfs[key] != nil {
		s.usage[key] = u
	}
}

// countTree adds up a directory that a container may change meanwhile: it goes down by descriptor and follows no link,
// so that nothing outside is counted. What cannot be read is left out.
func countTree(ctx context.Context, dir *os.File, u *Usage, linked map[uint64]bool, depth int) {
	defer dir.Close()
	var st unix.Stat_t
	if unix.Fstat(int(dir.Fd()), &st) == nil {
		u.add(&st)
	}
	for ctx.Err() == nil && depth < 512 {
		names, err := dir.Readdirnames(512)
		for _, name := range names {
			if unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
				continue
			}
			if st.Mode&unix.S_IFMT == unix.S_IFDIR {
				fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
				if err == nil {
					countTree(ctx, os.NewFile(uintptr(fd), name), u, linked, depth+1)
				}
				continue
			}
			if st.Nlink > 1 {
				if linked[st.Ino] {
					continue
				}
				linked[st.Ino] = true
			}
			u.add(&st)
		}
		if err != nil {
			return
		}
	}
}

// blocksOf returns what a file takes, in bytes.
func blocksOf(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return uint64(st.Blocks) * 512, nil
}

func (u *Usage) add(st *unix.Stat_t) {
	u.Bytes += uint64(st.Blocks) * 512
	u.Inodes++
}

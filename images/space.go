package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// space bounds what all layers under way take of the file system together: of what is free when the first pull begins with
// its layers, or the first import, a tenth is left when the last one ends, of bytes and of inodes.
type space struct {
	dir *os.File

	mu    sync.Mutex
	pulls int
	keep  amount // is left
	ahead amount // may be taken before the file system is asked again
}

// amount is space of a file system.
type amount struct{ bytes, inodes int64 }

// Others write to the file system, too: so much is taken at most before it is asked again.
const (
	bytesAhead  = 16 << 20
	inodesAhead = 4096
)

// begin counts a pull or an import that takes space from now on, until end.
func (s *space) begin() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pulls == 0 {
		free, err := s.free()
		if err != nil {
			return err
		}
		s.keep, s.ahead = amount{free.bytes / 10, free.inodes / 10}, amount{}
	}
	s.pulls++
	return nil
}

func (s *space) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulls--
}

// take is called before something is written.
func (s *space) take(want amount) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead.bytes -= want.bytes
	s.ahead.inodes -= want.inodes
	if s.ahead.bytes >= 0 && s.ahead.inodes >= 0 {
		return nil
	}
	free, err := s.free()
	if err != nil {
		return err
	}
	left := amount{free.bytes - s.keep.bytes - want.bytes, free.inodes - s.keep.inodes - want.inodes}
	if left.bytes < 0 || left.inodes < 0 {
		return fmt.Errorf("%d bytes and %d inodes are free on the disk of %s, %w", free.bytes, free.inodes, s.dir.Name(), errSpace)
	}
	s.ahead = amount{min(bytesAhead, left.bytes/4), min(inodesAhead, left.inodes/4)}
	return nil
}

// errSpace says that there is space, and that pulls do not take it.
var errSpace = fmt.Errorf("which pulls leave free: %w", errdefs.ErrResourceExhausted)

// isFull tells errors of a file system, or a quota, that somebody else has filled.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// free is what the file system has left. Some have as many inodes as there is space.
func (s *space) free() (amount, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(s.dir.Fd()), &fs); err != nil {
		return amount{}, fmt.Errorf("statfs %s: %w", s.dir.Name(), err)
	}
	free := amount{int64(fs.Bavail) * fs.Bsize, int64(fs.Ffree)}
	if fs.Files == 0 {
		free.inodes = math.MaxInt64
	}
	return free, nil
}

// take is space.take for what is unpacked. Before it fails, layers that only wait for another try are given up.
func (s *Store) take(ctx context.Context, want amount) error {
	if s.space.take(want) == nil {
		return nil
	}
	s.unpacks.dropIdle()
	s.WaitDeleted(ctx)
	return s.space.take(want)
}

// spaceWriter asks for space before it writes.
type spaceWriter struct {
	w    io.Writer
	take func(amount) error
}

// Write implements io.Writer.
func (s *spaceWriter) Write(p []byte) (int, error) {
	if err := s.take(amount{bytes: int64(len(p))}); err != nil {
		return 0, err
	}
	return s.w.Write(p)
}

// lingerFor is how long a layer that was unpacked for a pull which failed then, or was cancelled, waits for the next one that
// needs it: longer than the kubelet's longest pause between two tries, which is five minutes.
const lingerFor = 10 * time.Minute

// lingers tells how long a layer that no pull needs any more waits for the next one. All that do take a quarter of the free
// space at most.
func (s *Store) lingers(l *stagedLayer, others []*stagedLayer) time.Duration {
	if l.published || l.unfit() || s.ctx.Err() != nil {
		return 0
	}
	free, err := s.space.free()
	if err != nil || l.size+sizeOf(others) > free.bytes/4 {
		return 0
	}
	return s.linger
}

func sizeOf(layers []*stagedLayer) (n int64) {
	for _, l := range layers {
		n += l.size
	}
	return n
}

package images

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// fsTopDir is FS_TOPDIR_FL of linux/fs.h, which the package unix has not.
const fsTopDir = 0x20000

// spreadOut tells ext4 that directories which are made in this one have nothing to do with each other, so that each gets
// a block group of its own. Without it a layer is made where another was removed a moment ago, and ext4, which gives no
// inode out again for up to five minutes, looks at each of those for each new file: 0.8 ms instead of 0.04 ms, measured
// with 8,000 files. Other file systems do not know the flag.
func spreadOut(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	fd := int(f.Fd())
	flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && flags&fsTopDir == 0 {
		err = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|fsTopDir))
	}
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("flags of %s: %w", dir, err)
	}
	return nil
}

// Without a journal, ext4 gives no inode out again that was deleted a short while ago (recently_deleted in fs/ext4/ialloc.c),
// and looks at each of those for each new file in their place: of the 8 layers of an image that was removed and pulled again, each
// time, those that came to where others had been took the pull from 2.3 s to 3 and 4, by the processor time of the kernel.
// So a layer goes elsewhere.

// quarantine is where on a file system inodes were deleted a short while ago. The zero value does nothing.
type quarantine struct {
	on bool // the file system is such

	mu    sync.Mutex
	until map[uint64]time.Time // by place
}

const (
	// inodesOfPlace is how many inodes are in one place: a flexible block group as mke2fs makes them, 16 groups of 8192. Where it
	// was told otherwise, places are but guessed.
	inodesOfPlace = 16 * 8192
	// shunned is for how long: what ext4 waits for at most (RECENTCY_MIN and RECENTCY_DIRTY).
	shunned = 6 * time.Minute
	// placeTries is how many places are tried, of the 130 that a disk of 256 GiB has, until any will do.
	placeTries = 32
)

func place(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st.Ino / inodesOfPlace, nil
}

// shun notes that a directory is about to be deleted with all that is in it.
func (q *quarantine) shun(path string) {
	if !q.on {
		return
	}
	at, err := place(path)
	if err != nil {
		return // nothing is deleted
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.until == nil {
		q.until = map[uint64]time.Time{}
	}
	now := time.Now()
	maps.DeleteFunc(q.until, func(_ uint64, until time.Time) bool { return now.After(until) })
	q.until[at] = now.Add(shunned)
}

// shuns tells whether a directory that was just made is where others were deleted.
func (q *quarantine) shuns(path string) bool {
	if !q.on {
		return false
	}
	at, err := place(path)
	if err != nil {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return time.Now().Before(q.until[at])
}

// makeStaged makes the directory of a layer that is about to be unpacked.
func (s *Store) makeStaged() (path string, err error) {
	for try := 1; ; try++ {
		path = s.path(tmpDir, unique())
		if err := os.Mkdir(path, 0o700); err != nil {
			return "", err
		}
		if try == placeTries || !s.deletions.shuns(path) {
			return path, nil
		}
		if err := os.Remove(path); err != nil {
			return "", err
		}
	}
}

// withoutJournal tells whether a directory is on an ext4 that has no journal: the driver shows the options of each of its file
// systems, with data=MODE where there is one.
func withoutJournal(dir string) bool {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return false
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return false
	}
	options, err := os.ReadFile(filepath.Join("/proc/fs/ext4", filepath.Base(device), "options"))
	return err == nil && !strings.Contains("\n"+string(options), "\ndata=")
}

package cni

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// book is what is in the files of a directory of addresses, so that they need not all be read for each pod. Programs that take
// and give back addresses beside have the directory's lock meanwhile, and the kernel tells (inotify(7)) of what they did before
// it is theirs no more: whoever has the lock next reads the files anew that were told of, and knows what is there.
type book struct {
	dir    unix.Stat_t
	owners map[string]string // what is in each file
	torn   map[string]bool   // files of addresses that have no owner

	// Guarded by notices.
	wd    int             // of inotify, 0 for none
	stale map[string]bool // files that have changed
	lost  bool            // nobody knows which have
}

// notices are what the kernel tells of the directories of all books.
var notices struct {
	sync.Mutex
	fd    int // 0: not there
	books map[int]*book
}

const leaseNotices = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_MODIFY | unix.IN_CLOSE_WRITE |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF

// toldOf are file systems that nothing changes but through the kernel of this node.
var toldOf = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.TMPFS_MAGIC, unix.OVERLAYFS_SUPER_MAGIC}

func watchable(fs unix.Statfs_t) bool { return slices.Contains(toldOf, int64(fs.Type)) }

// openBook reads a directory, whose lock the caller has. It is told of changes if it can be.
func openBook(dir string) (*book, error) {
	b := &book{lost: true, stale: map[string]bool{}}
	if err := unix.Stat(dir, &b.dir); err != nil {
		return nil, err
	}
	b.watch(dir) // before it is read
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	b.owners, b.torn = make(map[string]string, len(entries)), map[string]bool{}
	for _, e := range entries {
		if !e.IsDir() {
			b.read(dir, e.Name())
		}
	}
	return b, nil
}

// read notes what is in a file. One that cannot be read belongs to nobody, as with the reference plugin.
func (b *book) read(dir, name string) {
	delete(b.owners, name)
	delete(b.torn, name)
	if name == "lock" {
		return
	}
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return
	}
	b.owners[name] = strings.TrimSpace(string(data))
	if strings.Trim(string(data), "\x00") == "" && net.ParseIP(name) != nil {
		b.torn[name] = true
	}
}

// watch has the kernel tell of changes.
func (b *book) watch(dir string) {
	var fs unix.Statfs_t
	if unix.Statfs(dir, &fs) != nil || !watchable(fs) {
		return
	}
	notices.Lock()
	defer notices.Unlock()
	if notices.fd == 0 {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			return
		}
		notices.fd, notices.books = fd, map[int]*book{}
	}
	wd, err := unix.InotifyAddWatch(notices.fd, dir, leaseNotices|unix.IN_ONLYDIR)
	if err != nil {
		return
	}
	if other := notices.books[wd]; other != nil { // of the same directory by another name; the kernel tells one of us
		other.wd, other.lost = 0, true
	}
	notices.books[wd] = b
	b.wd, b.lost = wd, false
}

// close ends what watch began.
func (b *book) close() {
	notices.Lock()
	defer notices.Unlock()
	if b.wd != 0 && notices.books[b.wd] == b {
		delete(notices.books, b.wd)
		_, _ = unix.InotifyRmWatch(notices.fd, uint32(b.wd)) // the directory may have gone, and the watch with it
	}
}

// hear takes what the kernel has told. The caller holds notices.
func hear() {
	var buf [4 << 10]byte // room for some, at least one
	for {
		n, err := unix.Read(notices.fd, buf[:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || n <= 0:
			if !errors.Is(err, unix.EAGAIN) {
				loseAll()
			}
			return
		}
		for events := buf[:n]; len(events) >= unix.SizeofInotifyEvent; {
			size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
			enter(events[:size])
			events = events[size:]
		}
	}
}

// enter notes a struct inotify_event.
func enter(event []byte) {
	wd, mask := int(int32(binary.NativeEndian.Uint32(event))), binary.NativeEndian.Uint32(event[4:])
	if mask&unix.IN_Q_OVERFLOW != 0 {
		loseAll()
	}
	b := notices.books[wd]
	switch {
	case b == nil:
	case mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT|unix.IN_IGNORED) != 0:
		b.lost = true
		if mask&unix.IN_IGNORED != 0 {
			delete(notices.books, wd)
		}
	default:
		b.stale[string(bytes.TrimRight(event[unix.SizeofInotifyEvent:], "\x00"))] = true
	}
}

func loseAll() {
	for _, b := range notices.books {
		b.lost = true
	}
}

// update reads what has changed since it was read. It says whether the book can be relied upon; the caller has the lock.
func (b *book) update(dir string) bool {
	var now unix.Stat_t
	if unix.Stat(dir, &now) != nil || now.Dev != b.dir.Dev || now.Ino != b.dir.Ino {
		return false
	}
	notices.Lock()
	if notices.fd != 0 {
		hear()
	}
	lost, stale := b.lost, b.stale
	b.stale = map[string]bool{}
	notices.Unlock()
	if lost {
		return false
	}
	for name := range stale {
		b.read(dir, name)
	}
	return true
}

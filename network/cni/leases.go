package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// leases is the directory in which host-local keeps the addresses of a network, one file each, locked as long as it is open.
// The lock is the reference plugin's, which may run beside. The reference project's own store is not used: the descriptor of
// its lock stays open in programs that are started meanwhile, and its files can be left without an owner by a kill.
type leases struct {
	dir  string
	lock *os.File
	desk *desk
	*book
}

// desk is what this process has of a directory, for one goroutine at a time: the one that waits for the lock, or has it.
type desk struct {
	turn chan struct{}
	book *book // nil if it was not read yet
}

var desks sync.Map // by directories

// lockPoll is how often a lock that another process has is tried.
const lockPoll = 2 * time.Millisecond

// openLeases waits for the lock until the context ends.
func openLeases(ctx context.Context, network, dataDir string) (_ *leases, err error) {
	if dataDir == "" {
		dataDir = DefaultDataDir
	}
	l := &leases{dir: filepath.Join(dataDir, network)}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	d, _ := desks.LoadOrStore(l.dir, &desk{turn: make(chan struct{}, 1)})
	select {
	case d.(*desk).turn <- struct{}{}:
		l.desk = d.(*desk)
	case <-ctx.Done():
		return nil, fmt.Errorf("addresses of network %s are locked: %w", network, ctx.Err())
	}
	if l.lock, err = os.OpenFile(filepath.Join(l.dir, "lock"), os.O_RDONLY|os.O_CREATE, 0o750); err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return l, l.read()
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			return nil, fmt.Errorf("lock %s: %w", l.lock.Name(), err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("addresses of network %s are locked: %w", network, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

// DefaultDataDir is where host-local keeps addresses, in a directory of each network, if its configuration has no dataDir.
const DefaultDataDir = "/var/lib/cni/networks"

func (l *leases) close() {
	if l.lock != nil {
		_ = l.lock.Close() // and so unlocked
	}
	if l.desk != nil {
		<-l.desk.turn
	}
}

// Lock does nothing, as do Unlock and Close: it is locked as long as it is open.
func (*leases) Lock() error { return nil }

// Unlock is the other half of Lock.
func (*leases) Unlock() error { return nil }

// Close is not asked for by the allocator, which is all that the reference project's interface is needed for.
func (*leases) Close() error { return nil }

// read finds out what is in the files.
func (l *leases) read() (err error) {
	if l.book = l.desk.book; l.book != nil {
		if l.book.update(l.dir) {
			return nil
		}
		l.book.close()
	}
	l.book, err = openBook(l.dir)
	l.desk.book = l.book
	return err
}

// freeTorn gives back addresses whose files have no owner. Whoever takes one writes its file under the lock; one that is empty
// while we have that is from before a power cut, which the pod has not outlived, or of a program that was killed meanwhile, and
// no DEL would find it (harvester#7471).
func (l *leases) freeTorn(log *slog.Logger) {
	for file := range l.torn {
		if os.Remove(filepath.Join(l.dir, file)) == nil {
			delete(l.owners, file)
			delete(l.torn, file)
			log.Warn("an address whose owner a power cut or a kill has lost is given back", "address", file, "directory", l.dir)
		}
	}
}

// of lists the files that belong to an interface of a container.
func (l *leases) of(owner string) []string {
	var files []string
	for file, o := range l.owners {
		if o == owner {
			files = append(files, file)
		}
	}
	return files
}

func owner(id, ifName string) string { return strings.TrimSpace(id) + "\r\n" + ifName }

// GetByID lists the addresses of an interface of a container. Before it had names of interfaces, host-local noted the
// container alone.
func (l *leases) GetByID(id, ifName string) []net.IP {
	var ips []net.IP
	for _, file := range append(l.of(owner(id, ifName)), l.of(strings.TrimSpace(id))...) {
		if ip := net.ParseIP(file); ip != nil {
			ips = append(ips, ip)
		}
	}
	return ips
}

// has says whether a container has an address, or had one before there were names of interfaces.
func (l *leases) has(id, ifName string) bool {
	return len(l.of(owner(id, ifName))) > 0 || len(l.of(strings.TrimSpace(id))) > 0
}

// ReleaseByID gives back the addresses of an interface of a container, as far as it can.
func (l *leases) ReleaseByID(id, ifName string) error {
	files := l.of(owner(id, ifName))
	if len(files) == 0 {
		files = l.of(strings.TrimSpace(id))
	}
	for _, file := range files {
		if os.Remove(filepath.Join(l.dir, file)) == nil {
			delete(l.owners, file)
		}
	}
	return nil
}

// Reserve takes an address if it is free. Its file is there whole or not at all: one without an owner would never be given
// back.
func (l *leases) Reserve(id, ifName string, ip net.IP, rangeID string) (bool, error) {
	if _, taken := l.owners[ip.String()]; taken {
		return false, nil
	}
	err := writeOnce(l.dir, ip.String(), owner(id, ifName))
	switch {
	case errors.Is(err, os.ErrExist):
		return false, nil
	case err != nil:
		return false, err
	}
	l.owners[ip.String()] = owner(id, ifName)
	if err := os.WriteFile(l.lastFile(rangeID), []byte(ip.String()), 0o600); err != nil {
		return false, err
	}
	return true, nil
}

// LastReservedIP is the address that was last taken from a set of ranges, nil if that file is torn.
func (l *leases) LastReservedIP(rangeID string) (net.IP, error) {
	data, err := os.ReadFile(l.lastFile(rangeID))
	if err != nil {
		return nil, err
	}
	return net.ParseIP(string(data)), nil
}

func (l *leases) lastFile(rangeID string) string {
	return filepath.Join(l.dir, "last_reserved_ip."+rangeID)
}

// writeOnce makes a file that is not there yet, with what it holds.
func writeOnce(dir, name, content string) error {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_WRONLY, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) { // a file system without such files
		if f, err = os.CreateTemp(dir, ".new-"); err == nil {
			defer os.Remove(f.Name()) //nolint:errcheck // it holds its owner, with whom it goes
		}
	}
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // written before it has a name
	if _, err := f.WriteString(content); err != nil {
		return err
	}
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
}

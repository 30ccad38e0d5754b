package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cgroups"
)

// Problem is why something does not work: a word for programs and a sentence for people.
type Problem struct{ Reason, Message string }

// Health is whether pods can be run and whether their disk has room; nil is well.
//
// A disk that is full is no problem of the runtime: the kubelet would stop looking after its pods, and it is by ending
// some that room comes back.
type Health struct{ Runtime, Storage *Problem }

const (
	healthHolds  = time.Second     // so long an answer is good for others who ask
	healthWithin = 5 * time.Second // a disk or a hierarchy that takes longer does not answer
)

// health looks at most once a second, one look at a time: one that hangs holds nobody up and is not repeated.
type health struct {
	look func() Health
	wait time.Duration

	mu     sync.Mutex
	at     time.Time
	last   Health
	answer chan Health // of a look under way
}

func (h *health) get(ctx context.Context) Health {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.at) < healthHolds {
		return h.last
	}
	if h.answer == nil {
		answer := make(chan Health, 1)
		go func() { answer <- h.look() }() // ends when the kernel lets it
		h.answer = answer
	}
	t := time.NewTimer(h.wait)
	defer t.Stop()
	select {
	case h.last = <-h.answer:
		h.answer, h.at = nil, time.Now()
	case <-t.C:
		p := &Problem{"NotAnswering", fmt.Sprintf("the disk or the cgroup hierarchy has not answered within %s", h.wait)}
		h.last, h.at = Health{p, p}, time.Now()
	case <-ctx.Done(): // whoever asked has gone
	}
	return h.last
}

// Health tells whether pods can be run, from looks at the file systems, the cgroup hierarchy and the exec server that
// cost some microseconds.
func (m *Manager) Health(ctx context.Context) Health { return m.health.get(ctx) }

// look is one look at all that a pod needs of the node.
func (m *Manager) look() Health {
	var h Health
	h.Runtime, h.Storage = statDisks(m.opts.Root, m.opts.Run, m.opts.Images.Usage().Mountpoint, m.opts.Images.WritablesUsage().Mountpoint)
	if h.Runtime != nil {
		return h
	}
	if err := cgroups.Check(); err != nil {
		h.Runtime = &Problem{"CgroupsNotReady", "cgroups cannot be made: " + err.Error()}
		return h
	}
	select {
	case <-m.closing:
		return h
	default:
	}
	if _, err := m.execs.get(); err != nil {
		h.Runtime = &Problem{"ExecServerNotReady", "no process can be executed in containers: " + err.Error()}
	}
	return h
}

// statDisks tells what keeps from writing to any of some directories at all, and what else is wrong with one.
func statDisks(dirs ...string) (lasting, any *Problem) {
	var full *Problem
	for _, dir := range dirs {
		l, f := statDisk(dir)
		lasting, full = cmp.Or(lasting, l), cmp.Or(full, f)
	}
	return lasting, cmp.Or(lasting, full)
}

// statDisk tells whether a directory can be written to at all, and whether there is room.
func statDisk(dir string) (lasting, full *Problem) {
	var fs unix.Statfs_t
	err := unix.Statfs(dir, &fs)
	for errors.Is(err, unix.EINTR) {
		err = unix.Statfs(dir, &fs)
	}
	if err != nil {
		return &Problem{"StorageNotReady", fmt.Sprintf("%s: %v", dir, err)}, nil
	}
	return judgeDisk(dir, fs)
}

// judgeDisk is about what root may still use. A file system without a count of inodes (btrfs) has none to lack.
func judgeDisk(dir string, fs unix.Statfs_t) (lasting, full *Problem) {
	switch {
	case fs.Flags&unix.ST_RDONLY != 0:
		return &Problem{"StorageReadOnly", dir + " is on a file system that is read-only: mounted so, or made so by the kernel after an error of the disk"}, nil
	case fs.Bfree == 0:
		return nil, &Problem{"StorageFull", dir + " is on a file system that is full"}
	case fs.Files > 0 && fs.Ffree == 0:
		return nil, &Problem{"StorageFull", dir + " is on a file system that has no inodes left"}
	}
	return nil, nil
}

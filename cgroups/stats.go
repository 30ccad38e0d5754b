package cgroups

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Unlimited is the limit that is none.
const Unlimited = math.MaxUint64

// Stats is what a cgroup and those below it have used.
type Stats struct {
	// Time is when the CPU time was read: rates are made of two of them.
	Time   time.Time
	CPU    CPUStats
	Memory MemoryStats
	Pids   PidsStats
	// OOMKills counts processes killed because memory ran out.
	OOMKills uint64
}

// CPUStats is CPU time.
type CPUStats struct {
	UsageNanos uint64 // cumulative
}

// MemoryStats is memory, in bytes, but for the counts of faults.
type MemoryStats struct {
	Usage           uint64 // all that is charged, the page cache included
	WorkingSet      uint64 // usage without inactive file pages, as the kubelet defines it
	RSS             uint64 // anonymous memory
	PageFaults      uint64 // cumulative
	MajorPageFaults uint64 // cumulative
	Limit           uint64 // of this cgroup itself; Unlimited if none
	Available       uint64 // limit less working set; 0 if unlimited
	SwapUsage       uint64
	SwapLimit       uint64 // Unlimited if none; 0 where swap is not accounted
	SwapAvailable   uint64 // 0 if unlimited
}

// PidsStats counts tasks.
type PidsStats struct {
	Current uint64
}

// ReadStats reads what p uses. Controllers that are not there leave zeros. The error is of the class errdefs.ErrNotFound
// where the cgroup does not exist.
func ReadStats(p Path) (*Stats, error) {
	l, err := at(p)
	if err != nil {
		return nil, err
	}
	r := reader{buf: make([]byte, 0, 8192)}
	var s Stats
	if l.v2 {
		r.v2(l.dir(p, ""), &s)
	} else {
		r.v1(l.dir(p, "cpuacct"), l.dir(p, "memory"), l.dir(p, "pids"), &s)
	}
	switch {
	case r.err != nil && gone(r.err):
		return nil, fmt.Errorf("stats of cgroup %s: %w: %w", p, r.err, errdefs.ErrNotFound)
	case r.err != nil:
		return nil, fmt.Errorf("stats of cgroup %s: %w", p, r.err)
	}
	s.Memory.derive()
	return &s, nil
}

// derive computes what follows from the rest.
func (m *MemoryStats) derive() {
	m.Limit, m.SwapLimit = normal(m.Limit), normal(m.SwapLimit)
	m.Available = available(m.Limit, m.WorkingSet)
	m.SwapAvailable = available(m.SwapLimit, m.SwapUsage)
}

// normal recognises what v1 shows where there is no limit: the largest page-aligned int64.
func normal(limit uint64) uint64 {
	if limit > 1<<62 {
		return Unlimited
	}
	return limit
}

func available(limit, used uint64) uint64 {
	if limit == Unlimited {
		return 0
	}
	return sub(limit, used)
}

func sub(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

// reader reads files of the kernel into one buffer, and keeps the first error.
type reader struct {
	buf []byte
	err error
}

func (r *reader) v2(dir string, s *Stats) {
	s.Time = time.Now()
	r.keyed(dir, "cpu.stat", func(key string, v uint64) {
		if key == "usage_usec" {
			s.CPU.UsageNanos = v * 1000
		}
	})
	m := &s.Memory
	m.Usage = r.number(dir, "memory.current")
	m.WorkingSet = m.Usage
	r.keyed(dir, "memory.stat", func(key string, v uint64) {
		switch key {
		case "anon":
			m.RSS = v
		case "inactive_file":
			m.WorkingSet = sub(m.Usage, v)
		case "pgfault":
			m.PageFaults = v
		case "pgmajfault":
			m.MajorPageFaults = v
		}
	})
	m.Limit = r.number(dir, "memory.max")
	m.SwapUsage = r.number(dir, "memory.swap.current")
	m.SwapLimit = r.number(dir, "memory.swap.max")
	r.keyed(dir, "memory.events", func(key string, v uint64) {
		if key == "oom_kill" {
			s.OOMKills = v
		}
	})
	s.Pids.Current = r.number(dir, "pids.current")
}

func (r *reader) v1(cpuacct, memory, pids string, s *Stats) {
	s.Time = time.Now()
	s.CPU.UsageNanos = r.number(cpuacct, "cpuacct.usage")
	m := &s.Memory
	m.Usage = r.number(memory, "memory.usage_in_bytes")
	m.WorkingSet = m.Usage
	r.keyed(memory, "memory.stat", func(key string, v uint64) {
		switch key {
		case "total_rss":
			m.RSS = v
		case "total_inactive_file":
			m.WorkingSet = sub(m.Usage, v)
		case "total_pgfault":
			m.PageFaults = v
		case "total_pgmajfault":
			m.MajorPageFaults = v
		case "total_swap": // there only if swap is accounted
			m.SwapUsage = v
		}
	})
	m.Limit = r.number(memory, "memory.limit_in_bytes")
	// v1 limits memory and swap together.
	if both := normal(r.number(memory, "memory.memsw.limit_in_bytes")); both == Unlimited {
		m.SwapLimit = Unlimited
	} else {
		m.SwapLimit = sub(both, m.Limit)
	}
	r.keyed(memory, "memory.oom_control", func(key string, v uint64) {
		if key == "oom_kill" {
			s.OOMKills = v
		}
	})
	s.Pids.Current = r.number(pids, "pids.current")
}

// number reads a file of one number, where "max" is Unlimited.
func (r *reader) number(dir, file string) uint64 {
	data := bytes.TrimSpace(r.read(dir, file))
	switch {
	case len(data) == 0:
		return 0
	case string(data) == "max":
		return Unlimited
	}
	v, err := strconv.ParseUint(string(data), 10, 64)
	if err != nil {
		r.fail(dir, file, err)
	}
	return v
}

// keyed reads a file of lines "key number".
func (r *reader) keyed(dir, file string, each func(key string, v uint64)) {
	data := r.read(dir, file)
	for len(data) > 0 {
		var line []byte
		line, data, _ = bytes.Cut(data, []byte("\n"))
		key, value, ok := bytes.Cut(line, []byte(" "))
		if !ok {
			continue
		}
		v, err := strconv.ParseUint(string(value), 10, 64)
		if err != nil {
			r.fail(dir, file, err)
			return
		}
		each(string(key), v)
	}
}

// read returns nothing, without an error, for the file of a controller that is not there.
func (r *reader) read(dir, file string) []byte {
	if r.err != nil || dir == "" {
		return nil
	}
	data, err := r.readAll(dir + "/" + file)
	if err == nil {
		return data
	}
	if !gone(err) || !exists(dir) {
		r.fail(dir, file, err)
	}
	return nil
}

// readAll makes plain system calls: the runtime's poller is of no use for files of the kernel and costs four more calls.
func (r *reader) readAll(name string) ([]byte, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd) //nolint:errcheck // opened for reading
	buf := r.buf[:0]
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, cap(buf))...)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			r.buf = buf
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
}

func (r *reader) fail(dir, file string, err error) {
	if r.err == nil {
		r.err = fmt.Errorf("%s/%s: %w", dir, file, err)
	}
}

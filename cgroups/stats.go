package cgroups

import (
	"fmt"
	"math"
	"time"

	"github.com/containerd/errdefs"
)

// Unlimited is the limit that is none.
const Unlimited = math.MaxUint64

// Stats is what a cgroup and those below it have used, as it is asked for every few seconds: see [ReadStats] for what it
// costs, and [Details] for the rest.
type Stats struct {
	// Time is when the CPU time was read: rates are made of two of them.
	Time   time.Time
	CPU    CPUStats
	Memory MemoryStats
	IO     IOStats
	Pids   PidsStats
	// OOMKills counts processes killed because memory ran out.
	OOMKills uint64
}

// CPUStats is CPU time.
type CPUStats struct {
	UsageNanos uint64    // cumulative
	Pressure   *Pressure // nil where the kernel does not tell it: on v1, or with PSI turned off
}

// MemoryStats is memory, in bytes, but for the counts of faults.
type MemoryStats struct {
	Usage           uint64 // all that is charged, the page cache included
	WorkingSet      uint64 // usage without inactive file pages, as the kubelet defines it
	RSS             uint64 // anonymous memory
	Cache           uint64 // of files
	MappedFile      uint64 // of Cache, what is mapped
	ActiveFile      uint64
	InactiveFile    uint64
	Dirty           uint64 // file pages that wait to be written, and
	Writeback       uint64 // that are being written
	PageFaults      uint64 // cumulative
	MajorPageFaults uint64 // cumulative
	Limit           uint64 // of this cgroup itself; Unlimited if none
	Available       uint64 // limit less working set; 0 if unlimited
	SwapUsage       uint64
	SwapLimit       uint64 // Unlimited if none; 0 where swap is not accounted
	SwapAvailable   uint64 // 0 if unlimited
	Reclaim         ReclaimStats
	Pressure        *Pressure
}

// ReclaimStats counts pages, cumulatively: what the kernel looked at and took to make room, and what came back because it
// was needed after all. It is zero on v1, which does not tell.
type ReclaimStats struct {
	Scanned, Stolen            uint64
	RefaultedFile, RefaultAnon uint64
}

// IOStats is how much tasks waited for devices; what they read and wrote is in [Details].
type IOStats struct {
	Pressure *Pressure
}

// PidsStats counts tasks.
type PidsStats struct {
	Current uint64
}

// ReadStats reads what p uses: nine files on v2, seven on v1, and no process is asked. Controllers that are not there leave
// zeros. The error is of the class errdefs.ErrNotFound where the cgroup does not exist.
func ReadStats(p Path) (*Stats, error) {
	l, err := at(p)
	if err != nil {
		return nil, err
	}
	r := newReader()
	var s Stats
	if l.v2 {
		r.v2(l.dir(p, ""), &s)
	} else {
		r.v1(func(controller string) string { return l.dir(p, controller) }, &s)
	}
	if r.err != nil {
		return nil, statsError(p, r.err)
	}
	s.Memory.derive()
	return &s, nil
}

func statsError(p Path, err error) error {
	if gone(err) {
		return fmt.Errorf("stats of cgroup %s: %w: %w", p, err, errdefs.ErrNotFound)
	}
	return fmt.Errorf("stats of cgroup %s: %w", p, err)
}

// derive computes what follows from the rest.
func (m *MemoryStats) derive() {
	m.WorkingSet = sub(m.Usage, m.InactiveFile)
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

func (r *reader) v2(dir string, s *Stats) {
	s.Time = time.Now()
	r.keyed(dir, "cpu.stat", func(key string, v uint64) {
		if key == "usage_usec" {
			s.CPU.UsageNanos = v * 1000
		}
	})
	s.CPU.Pressure = r.pressure(dir, "cpu.pressure")
	m := &s.Memory
	m.Usage = r.number(dir, "memory.current")
	r.keyed(dir, "memory.stat", func(key string, v uint64) {
		if field := m.fieldOfV2(key); field != nil {
			*field = v
		}
	})
	m.Limit = r.number(dir, "memory.max")
	m.SwapUsage = r.number(dir, "memory.swap.current")
	m.SwapLimit = r.number(dir, "memory.swap.max")
	m.Pressure = r.pressure(dir, "memory.pressure")
	r.keyed(dir, "memory.events", func(key string, v uint64) {
		if key == "oom_kill" {
			s.OOMKills = v
		}
	})
	s.IO.Pressure = r.pressure(dir, "io.pressure")
	s.Pids.Current = r.number(dir, "pids.current")
}

// fieldOfV2 is where a line of memory.stat belongs, nil if nowhere.
func (m *MemoryStats) fieldOfV2(key string) *uint64 {
	switch key {
	case "anon":
		return &m.RSS
	case "file":
		return &m.Cache
	case "file_mapped":
		return &m.MappedFile
	case "active_file":
		return &m.ActiveFile
	case "inactive_file":
		return &m.InactiveFile
	case "file_dirty":
		return &m.Dirty
	case "file_writeback":
		return &m.Writeback
	case "pgfault":
		return &m.PageFaults
	case "pgmajfault":
		return &m.MajorPageFaults
	case "pgscan":
		return &m.Reclaim.Scanned
	case "pgsteal":
		return &m.Reclaim.Stolen
	case "workingset_refault_file":
		return &m.Reclaim.RefaultedFile
	case "workingset_refault_anon":
		return &m.Reclaim.RefaultAnon
	}
	return nil
}

func (r *reader) v1(dir func(controller string) string, s *Stats) {
	s.Time = time.Now()
	s.CPU.UsageNanos = r.number(dir("cpuacct"), "cpuacct.usage")
	m, memory := &s.Memory, dir("memory")
	m.Usage = r.number(memory, "memory.usage_in_bytes")
	r.keyed(memory, "memory.stat", func(key string, v uint64) {
		if field := m.fieldOfV1(key); field != nil {
			*field = v
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
	s.Pids.Current = r.number(dir("pids"), "pids.current")
}

// fieldOfV1 takes the lines that count the cgroups below, too, as those of v2 do.
func (m *MemoryStats) fieldOfV1(key string) *uint64 {
	switch key {
	case "total_rss":
		return &m.RSS
	case "total_cache":
		return &m.Cache
	case "total_mapped_file":
		return &m.MappedFile
	case "total_active_file":
		return &m.ActiveFile
	case "total_inactive_file":
		return &m.InactiveFile
	case "total_dirty":
		return &m.Dirty
	case "total_writeback":
		return &m.Writeback
	case "total_pgfault":
		return &m.PageFaults
	case "total_pgmajfault":
		return &m.MajorPageFaults
	case "total_swap": // there only if swap is accounted
		return &m.SwapUsage
	}
	return nil
}

// Add adds what another cgroup uses, one that is neither above nor below. Of two that have no common limit and no common
// pressure there is none to tell.
func (s *Stats) Add(o *Stats) {
	if s.Time.IsZero() || o.Time.Before(s.Time) {
		s.Time = o.Time
	}
	s.CPU.UsageNanos += o.CPU.UsageNanos
	s.CPU.Pressure, s.IO.Pressure, s.Memory.Pressure = nil, nil, nil
	s.Pids.Current += o.Pids.Current
	s.OOMKills += o.OOMKills
	m, n := &s.Memory, &o.Memory
	for _, sum := range []struct{ to, of *uint64 }{
		{&m.Usage, &n.Usage},
		{&m.WorkingSet, &n.WorkingSet},
		{&m.RSS, &n.RSS},
		{&m.Cache, &n.Cache},
		{&m.MappedFile, &n.MappedFile},
		{&m.ActiveFile, &n.ActiveFile},
		{&m.InactiveFile, &n.InactiveFile},
		{&m.Dirty, &n.Dirty},
		{&m.Writeback, &n.Writeback},
		{&m.PageFaults, &n.PageFaults},
		{&m.MajorPageFaults, &n.MajorPageFaults},
		{&m.SwapUsage, &n.SwapUsage},
		{&m.Reclaim.Scanned, &n.Reclaim.Scanned},
		{&m.Reclaim.Stolen, &n.Reclaim.Stolen},
		{&m.Reclaim.RefaultedFile, &n.Reclaim.RefaultedFile},
		{&m.Reclaim.RefaultAnon, &n.Reclaim.RefaultAnon},
	} {
		*sum.to += *sum.of
	}
	m.Limit, m.Available = Unlimited, 0
	m.SwapLimit, m.SwapAvailable = Unlimited, 0
}

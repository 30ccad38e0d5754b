package cgroups

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
)

// Details is [Stats] with all else that a cgroup tells, for a metrics endpoint.
type Details struct {
	Stats
	CPUTime    CPUTime
	Throttling Throttling
	MaxMemory  uint64 // the highest usage yet, in bytes; 0 where the kernel does not tell (v2 before Linux 5.19)
	MemoryHits MemoryHits
	KernelUsed uint64 // kernel memory, in bytes
	Devices    []DeviceIO
	HugePages  []HugePageStats
	Limits     Limits
}

// CPUTime divides CPU time by mode.
type CPUTime struct {
	UserNanos, SystemNanos uint64
}

// Throttling is what a CPU quota has held up.
type Throttling struct {
	Periods, ThrottledPeriods uint64
	ThrottledNanos            uint64
	Bursts, BurstNanos        uint64
}

// MemoryHits counts how often usage met a limit.
type MemoryHits struct {
	High, Max uint64 // memory.high and memory.max of v2; v1's limit is Max
}

// HugePageStats is huge pages of one size, in bytes.
type HugePageStats struct {
	Size         string // "2MB"
	Usage        uint64
	MaxUsage     uint64 // v1 only
	TimesRefused uint64
}

// Limits are the settings of a cgroup itself.
type Limits struct {
	CPUShares         uint64 // in v1's measure, 2 to 262144
	PeriodMicros      uint64
	QuotaMicros       uint64 // 0: none
	MemoryReservation uint64 // v1's soft limit or v2's memory.min; Unlimited if none
	SwapWithMemory    uint64 // v1's measure: limit of memory and swap together; on v2 that of swap alone
	Pids              uint64 // 0: none
}

// ReadDetails reads all that p tells. Errors are those of [ReadStats].
func ReadDetails(p Path) (*Details, error) {
	l, err := at(p)
	if err != nil {
		return nil, err
	}
	r := newReader()
	var d Details
	if l.v2 {
		dir := l.dir(p, "")
		r.v2(dir, &d.Stats)
		r.detailsV2(dir, &d)
	} else {
		dir := func(controller string) string { return l.dir(p, controller) }
		r.v1(dir, &d.Stats)
		r.detailsV1(dir, &d)
	}
	if r.err != nil {
		return nil, statsError(p, r.err)
	}
	d.Memory.derive()
	return &d, nil
}

func (r *reader) detailsV2(dir string, d *Details) {
	r.keyed(dir, "cpu.stat", func(key string, v uint64) {
		switch key {
		case "user_usec":
			d.CPUTime.UserNanos = v * 1000
		case "system_usec":
			d.CPUTime.SystemNanos = v * 1000
		case "nr_periods":
			d.Throttling.Periods = v
		case "nr_throttled":
			d.Throttling.ThrottledPeriods = v
		case "throttled_usec":
			d.Throttling.ThrottledNanos = v * 1000
		case "nr_bursts":
			d.Throttling.Bursts = v
		case "burst_usec":
			d.Throttling.BurstNanos = v * 1000
		}
	})
	r.keyed(dir, "memory.stat", func(key string, v uint64) {
		if key == "kernel" {
			d.KernelUsed = v
		}
	})
	d.MaxMemory = r.number(dir, "memory.peak")
	r.keyed(dir, "memory.events", func(key string, v uint64) {
		switch key {
		case "high":
			d.MemoryHits.High = v
		case "max":
			d.MemoryHits.Max = v
		}
	})
	d.Devices = r.devicesV2(dir)
	for _, size := range cgroups.HugePageSizes() {
		file := "hugetlb." + size
		if !fileExists(dir + "/" + file + ".current") {
			continue
		}
		page := HugePageStats{Size: size, Usage: r.number(dir, file+".current")}
		r.keyed(dir, file+".events", func(key string, v uint64) {
			if key == "max" {
				page.TimesRefused = v
			}
		})
		d.HugePages = append(d.HugePages, page)
	}
	if weight := r.number(dir, "cpu.weight"); weight > 0 {
		d.Limits.CPUShares = sharesOfWeight(weight)
	}
	d.Limits.QuotaMicros, d.Limits.PeriodMicros = r.cpuMax(dir)
	d.Limits.MemoryReservation = r.number(dir, "memory.min")
	d.Limits.SwapWithMemory = normal(r.number(dir, "memory.swap.max"))
	d.Limits.Pids = limitOrZero(r.number(dir, "pids.max"))
}

// cpuMax reads "QUOTA PERIOD", where no quota is "max".
func (r *reader) cpuMax(dir string) (quota, period uint64) {
	words := strings.Fields(string(r.read(dir, "cpu.max")))
	if len(words) != 2 {
		return 0, 0
	}
	var err error
	if words[0] != "max" {
		if quota, err = strconv.ParseUint(words[0], 10, 64); err != nil {
			r.fail(dir, "cpu.max", err)
		}
	}
	if period, err = strconv.ParseUint(words[1], 10, 64); err != nil {
		r.fail(dir, "cpu.max", err)
	}
	return quota, period
}

func (r *reader) detailsV1(dir func(controller string) string, d *Details) {
	d.CPUTime.UserNanos = r.number(dir("cpuacct"), "cpuacct.usage_user")
	d.CPUTime.SystemNanos = r.number(dir("cpuacct"), "cpuacct.usage_sys")
	cpu, memory := dir("cpu"), dir("memory")
	r.keyed(cpu, "cpu.stat", func(key string, v uint64) {
		switch key {
		case "nr_periods":
			d.Throttling.Periods = v
		case "nr_throttled":
			d.Throttling.ThrottledPeriods = v
		case "throttled_time":
			d.Throttling.ThrottledNanos = v
		case "nr_bursts":
			d.Throttling.Bursts = v
		case "burst_time":
			d.Throttling.BurstNanos = v
		}
	})
	d.MaxMemory = r.number(memory, "memory.max_usage_in_bytes")
	d.MemoryHits.Max = r.number(memory, "memory.failcnt")
	d.KernelUsed = r.number(memory, "memory.kmem.usage_in_bytes")
	d.Devices = r.devicesV1(dir("blkio"))
	if pages := dir("hugetlb"); pages != "" {
		for _, size := range cgroups.HugePageSizes() {
			d.HugePages = append(d.HugePages, HugePageStats{
				Size:         size,
				Usage:        r.number(pages, "hugetlb."+size+".usage_in_bytes"),
				MaxUsage:     r.number(pages, "hugetlb."+size+".max_usage_in_bytes"),
				TimesRefused: r.number(pages, "hugetlb."+size+".failcnt"),
			})
		}
	}
	d.Limits.CPUShares = r.number(cpu, "cpu.shares")
	d.Limits.PeriodMicros = r.number(cpu, "cpu.cfs_period_us")
	if quota := bytes.TrimSpace(r.read(cpu, "cpu.cfs_quota_us")); len(quota) > 0 && quota[0] != '-' {
		var err error
		if d.Limits.QuotaMicros, err = strconv.ParseUint(string(quota), 10, 64); err != nil {
			r.fail(cpu, "cpu.cfs_quota_us", err)
		}
	}
	d.Limits.MemoryReservation = normal(r.number(memory, "memory.soft_limit_in_bytes"))
	d.Limits.SwapWithMemory = normal(r.number(memory, "memory.memsw.limit_in_bytes"))
	d.Limits.Pids = limitOrZero(r.number(dir("pids"), "pids.max"))
}

func limitOrZero(limit uint64) uint64 {
	if limit == Unlimited {
		return 0
	}
	return limit
}

// sharesOfWeight is what cAdvisor makes of a weight: the shares that it would be made of by the formula of KEP-2254, which
// libcontainer has left for another since.
func sharesOfWeight(weight uint64) uint64 {
	return 2 + (min(weight, 10000)-1)*262142/9999
}

package cgroups

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
)

// snapshot is the content of the files that an update is about to write.
type snapshot []setting

type setting struct{ dir, file, value string }

// snapshot reads what an update to want touches. Files that are not there are left out: writing them fails too.
func (l *layout) snapshot(p Path, want *cgroups.Resources) (snapshot, error) {
	var s snapshot
	r := reader{buf: make([]byte, 0, 256)}
	keep := func(touched bool, controller string, files ...string) {
		if !touched {
			return
		}
		dir := l.dir(p, controller)
		for _, file := range files {
			if data := r.read(dir, file); data != nil {
				s = append(s, setting{dir, file, strings.TrimSpace(string(data))})
			}
		}
	}
	memory := want.Memory != 0 || want.MemorySwap != 0
	quota := want.CpuQuota != 0 || want.CpuPeriod != 0 || want.CpuBurst != nil
	keep(want.CpusetCpus != "", "cpuset", "cpuset.cpus")
	keep(want.CpusetMems != "", "cpuset", "cpuset.mems")
	keep(want.PidsLimit != nil, "pids", "pids.max")
	keep(want.CPUIdle != nil, "cpu", "cpu.idle")
	for _, h := range want.HugetlbLimit {
		keep(true, "hugetlb", l.hugetlbFile(p, h.Pagesize))
	}
	if l.v2 {
		keep(want.CpuWeight != 0, "cpu", "cpu.weight")
		keep(quota, "cpu", "cpu.max", "cpu.max.burst")
		keep(memory, "memory", "memory.swap.max", "memory.max")
		keep(want.MemoryReservation != 0, "memory", "memory.low")
		for key := range want.Unified {
			keep(true, "", key)
		}
		return s, r.err
	}
	keep(want.CpuShares != 0, "cpu", "cpu.shares")
	keep(quota, "cpu", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.cfs_burst_us")
	keep(want.CpuRtPeriod != 0 || want.CpuRtRuntime != 0, "cpu", "cpu.rt_period_us", "cpu.rt_runtime_us")
	keep(memory, "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
	keep(want.MemoryReservation != 0, "memory", "memory.soft_limit_in_bytes")
	keep(want.MemorySwappiness != nil, "memory", "memory.swappiness")
	return s, r.err
}

// restore writes everything back. Some limits bound each other (memory and memory with swap, quota and period), so that
// one may only fit once the other is back: a second pass writes what the first could not.
func (s snapshot) restore() error {
	left := slices.Clone(s)
	var errs []error
	for range 2 {
		errs = nil
		left = slices.DeleteFunc(left, func(o setting) bool {
			value := o.value
			if value == "" {
				value = "\n" // an empty cpuset is written so
			}
			err := cgroups.WriteFile(o.dir, o.file, value)
			if err != nil {
				errs = append(errs, err)
			}
			return err == nil
		})
	}
	return errors.Join(errs...)
}

// hugetlbFile names the limit of a huge page size, "" where the controller or the size is not there.
func (l *layout) hugetlbFile(p Path, size string) string {
	dir := l.dir(p, "hugetlb")
	file := "hugetlb." + size + ".limit_in_bytes"
	if l.v2 {
		file = "hugetlb." + size + ".max"
	}
	if dir == "" || !fileExists(dir+"/"+file) {
		return ""
	}
	return file
}

func parseInt(s string, otherwise int64) int64 {
	v, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return otherwise
	}
	return v
}

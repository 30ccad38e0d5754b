package cgroups

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Update changes limits of p in place: CPU, memory, cpuset, pids, huge pages, unified. What is unset, zero or empty stays
// as it is: a CPU manager sends a cpuset and nothing else. Device rules in r are ignored: they belong to the creation of a
// container. It does not return with half of r applied: what was changed is put back when a part is refused.
//
// A memory limit below what is in use, after the kernel has reclaimed what it can, is refused with
// errdefs.ErrFailedPrecondition on v2 as on v1, where the kernel does so itself (on v2 it would kill instead). Other
// classes: errdefs.ErrInvalidArgument for values that are refused, errdefs.ErrNotFound where p does not exist.
func Update(p Path, r *specs.LinuxResources) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	if r == nil {
		return nil
	}
	if !Exists(p) {
		return fmt.Errorf("update cgroup %s: %w", p, errdefs.ErrNotFound)
	}
	now, err := l.limits(p)
	if err != nil {
		return fmt.Errorf("update cgroup %s: %w", p, err)
	}
	want, err := merge(r, now)
	if err != nil {
		return fmt.Errorf("update cgroup %s: %w", p, err)
	}
	if l.v2 && want.Memory > 0 {
		if err := makeRoom(l.dir(p, "memory"), uint64(want.Memory)); err != nil {
			return fmt.Errorf("update cgroup %s: %w", p, err)
		}
	}
	before, err := l.snapshot(p, want)
	if err != nil {
		return fmt.Errorf("update cgroup %s: %w", p, err)
	}
	m, err := l.manager(p, &cgroups.Resources{SkipDevices: true})
	if err != nil {
		return fmt.Errorf("update cgroup %s: %w", p, err)
	}
	err = m.Set(want)
	if s, ok := p.Scope(); ok && err == nil { // after the kernel, which is the stricter one, has taken them
		err = l.setScope(p, s, want)
	}
	if err != nil {
		err = fmt.Errorf("update cgroup %s: %w", p, l.classify(p, want, err))
		if undo := before.restore(); undo != nil {
			err = errors.Join(err, fmt.Errorf("put back the limits of cgroup %s: %w", p, undo))
		}
		return err
	}
	return nil
}

// limits are those settings of a cgroup that a partial update depends on.
type limits struct {
	v2            bool
	cpuQuota      int64  // -1: none
	cpuPeriod     uint64 // 0: unknown
	memory        uint64 // Unlimited: none
	memoryAndSwap uint64 // v1; Unlimited: none
	swapAccounted bool   // v1: memoryAndSwap is a limit that exists
	hugetlb       func(pageSize string) bool
}

func (l *layout) limits(p Path) (limits, error) {
	now := limits{v2: l.v2, hugetlb: func(size string) bool { return l.hugetlbFile(p, size) != "" }}
	r := reader{buf: make([]byte, 0, 256)}
	memory := l.dir(p, "memory")
	if l.v2 {
		quota, period, _ := strings.Cut(strings.TrimSpace(string(r.read(memory, "cpu.max"))), " ")
		now.cpuQuota = parseInt(quota, -1) // "max"
		now.cpuPeriod = uint64(parseInt(period, 0))
		now.memory = normal(r.number(memory, "memory.max"))
		return now, r.err
	}
	now.memory = normal(r.number(memory, "memory.limit_in_bytes"))
	if data := r.read(memory, "memory.memsw.limit_in_bytes"); data != nil {
		now.swapAccounted = true
		now.memoryAndSwap = normal(uint64(parseInt(strings.TrimSpace(string(data)), -1)))
	}
	return now, r.err
}

var (
	pageSize   = regexp.MustCompile(`^[1-9][0-9]{0,5}[KMG]B$`)
	unifiedKey = regexp.MustCompile(`^[a-z_]+(\.[A-Za-z0-9_]+)+$`)
)

// merge decides what to set, from what is asked for and what holds now.
func merge(r *specs.LinuxResources, now limits) (*cgroups.Resources, error) {
	if r.BlockIO != nil || r.Network != nil || len(r.Rdma) > 0 {
		return nil, fmt.Errorf("block I/O, network and RDMA limits cannot be updated: %w", errdefs.ErrNotImplemented)
	}
	out := &cgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true}
	if r.CPU != nil {
		mergeCPU(out, r.CPU, now)
	}
	if r.Memory != nil {
		if err := mergeMemory(out, r.Memory, now); err != nil {
			return nil, err
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit != 0 {
		out.PidsLimit = r.Pids.Limit
	}
	for _, h := range r.HugepageLimits {
		if !pageSize.MatchString(h.Pagesize) {
			return nil, fmt.Errorf("huge page size %q: %w", h.Pagesize, errdefs.ErrInvalidArgument)
		}
		// The kubelet sends every size, whether or not the controller is there.
		if now.hugetlb(h.Pagesize) {
			out.HugetlbLimit = append(out.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
		}
	}
	for key, value := range r.Unified {
		switch {
		case !now.v2:
			return nil, fmt.Errorf("unified %q on cgroup v1: %w", key, errdefs.ErrInvalidArgument)
		case !unifiedKey.MatchString(key), strings.HasPrefix(key, "cgroup."):
			// cgroup.procs, cgroup.kill and the like are no resources.
			return nil, fmt.Errorf("unified %q is not a resource: %w", key, errdefs.ErrInvalidArgument)
		}
		setUnified(out, key, value)
	}
	return out, nil
}

func mergeCPU(out *cgroups.Resources, c *specs.LinuxCPU, now limits) {
	if c.Shares != nil {
		out.CpuShares = *c.Shares
		out.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)
	}
	if c.Quota != nil {
		out.CpuQuota = *c.Quota
	}
	if c.Period != nil {
		out.CpuPeriod = *c.Period
	}
	if now.v2 && (out.CpuQuota != 0) != (out.CpuPeriod != 0) {
		// One file holds both on v2, and the library would set the one that is missing to its default.
		if out.CpuQuota == 0 {
			out.CpuQuota = now.cpuQuota
		} else {
			out.CpuPeriod = now.cpuPeriod
		}
	}
	out.CpuBurst = c.Burst
	out.CPUIdle = c.Idle
	if c.RealtimePeriod != nil {
		out.CpuRtPeriod = *c.RealtimePeriod
	}
	if c.RealtimeRuntime != nil {
		out.CpuRtRuntime = *c.RealtimeRuntime
	}
	out.CpusetCpus, out.CpusetMems = c.Cpus, c.Mems
}

// mergeMemory keeps the allowance of swap where only the limit of memory changes. In r and on v1, the limit of swap is
// that of memory and swap together; the library translates for v2 and writes both in the order that the kernel accepts.
func mergeMemory(out *cgroups.Resources, m *specs.LinuxMemory, now limits) error {
	if m.Limit != nil {
		out.Memory = *m.Limit
	}
	if m.Swap != nil {
		out.MemorySwap = *m.Swap
	}
	if m.Reservation != nil {
		out.MemoryReservation = *m.Reservation
	}
	out.MemorySwappiness = m.Swappiness
	if out.Memory < -1 || out.MemorySwap < -1 || out.MemoryReservation < -1 {
		return fmt.Errorf("memory limit %d, with swap %d, reservation %d: %w", out.Memory, out.MemorySwap, out.MemoryReservation, errdefs.ErrInvalidArgument)
	}
	switch {
	case out.MemorySwap == 0 && out.Memory == -1 && now.v2:
		// The library would lift the limit of swap as well.
		out.Memory = 0
		setUnified(out, "memory.max", "max")
	case out.MemorySwap == 0 && out.Memory > 0 && now.swapAccounted && now.memoryAndSwap != Unlimited:
		out.MemorySwap = out.Memory + int64(sub(now.memoryAndSwap, now.memory))
	case out.MemorySwap != 0 && out.Memory == 0 && now.v2:
		// Swap alone is what is left of both after memory.
		out.Memory = -1
		if now.memory != Unlimited {
			out.Memory = int64(now.memory)
		}
	}
	if out.Memory > 0 && out.MemorySwap > 0 && out.MemorySwap < out.Memory {
		return fmt.Errorf("memory limit %d is more than memory and swap together, %d: %w", out.Memory, out.MemorySwap, errdefs.ErrInvalidArgument)
	}
	return nil
}

func setUnified(out *cgroups.Resources, key, value string) {
	if out.Unified == nil {
		out.Unified = map[string]string{}
	}
	out.Unified[key] = value
}

// makeRoom does on v2 what the kernel does on v1 when a limit is lowered: reclaim, and refuse if that is not enough.
func makeRoom(dir string, limit uint64) error {
	r := reader{buf: make([]byte, 0, 4096)}
	usage := r.number(dir, "memory.current")
	if r.err != nil || usage <= limit {
		return r.err
	}
	// Linux 5.19. EAGAIN says that less could be reclaimed; the next read shows how much.
	err := cgroups.WriteFile(dir, "memory.reclaim", fmt.Sprint(usage-limit))
	switch {
	case err == nil, errors.Is(err, unix.EAGAIN):
		usage = r.number(dir, "memory.current")
	case gone(err):
		r.keyed(dir, "memory.stat", func(key string, v uint64) {
			if key == "inactive_file" || key == "active_file" {
				usage = sub(usage, v)
			}
		})
	default:
		return err
	}
	if r.err == nil && usage > limit {
		return fmt.Errorf("memory limit %d is below what is in use, %d: %w", limit, usage, errdefs.ErrFailedPrecondition)
	}
	return r.err
}

// classify says what kind of refusal an error of the library is.
func (l *layout) classify(p Path, want *cgroups.Resources, err error) error {
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.E2BIG), errors.Is(err, unix.EACCES):
		// EACCES is how a cpuset says that its parent does not have those CPUs.
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case gone(err) && !Exists(p):
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	case gone(err):
		return fmt.Errorf("controller not available: %w: %w", err, errdefs.ErrFailedPrecondition)
	case !l.v2 && want.Memory > 0:
		// The library's text for EBUSY does not wrap it.
		r := reader{buf: make([]byte, 0, 64)}
		if r.number(l.dir(p, "memory"), "memory.usage_in_bytes") > uint64(want.Memory) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	return err
}

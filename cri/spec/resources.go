package spec

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const resourcesField = "config.linux.resources"

// Bounds of the kernel's CPU bandwidth controller, in microseconds, and of its shares.
const (
	minCPUQuota  = 1_000
	maxCPUQuota  = 1<<44 - 1
	minCPUPeriod = 1_000
	maxCPUPeriod = 1_000_000
	minCPUShares = 2
	maxCPUShares = 262_144
)

var (
	hugePageSize = regexp.MustCompile(`^[1-9][0-9]{0,9}[KMG]B$`)
	unifiedKey   = regexp.MustCompile(`^[a-z0-9]+(\.[a-zA-Z0-9_-]+)+$`)
)

// ValidateResources refuses limits that can never be set; at is where they stand in the request. Zero means "not given".
func ValidateResources(at string, r *cri.LinuxContainerResources) error {
	const negative = "is negative"
	switch {
	case r.GetCpuShares() != 0 && (r.GetCpuShares() < minCPUShares || r.GetCpuShares() > maxCPUShares):
		return invalid(at+".cpu_shares", r.GetCpuShares(), "is outside %d..%d", minCPUShares, maxCPUShares)
	case r.GetCpuQuota() != 0 && r.GetCpuQuota() != -1 && r.GetCpuQuota() < minCPUQuota:
		return invalid(at+".cpu_quota", r.GetCpuQuota(), "is neither -1 (no limit) nor %d or more", minCPUQuota)
	case r.GetCpuQuota() > maxCPUQuota:
		return invalid(at+".cpu_quota", r.GetCpuQuota(), "is more than %d", int64(maxCPUQuota))
	case r.GetCpuPeriod() != 0 && (r.GetCpuPeriod() < minCPUPeriod || r.GetCpuPeriod() > maxCPUPeriod):
		return invalid(at+".cpu_period", r.GetCpuPeriod(), "is outside %d..%d", minCPUPeriod, maxCPUPeriod)
	case r.GetMemoryLimitInBytes() < -1:
		return invalid(at+".memory_limit_in_bytes", r.GetMemoryLimitInBytes(), negative)
	case r.GetMemorySwapLimitInBytes() < -1:
		return invalid(at+".memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), negative)
	case r.GetOomScoreAdj() < -1000 || r.GetOomScoreAdj() > 1000:
		return invalid(at+".oom_score_adj", r.GetOomScoreAdj(), "is outside -1000..1000")
	}
	if memory, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes(); memory > 0 && swap > 0 && swap < memory {
		return invalid(at+".memory_swap_limit_in_bytes", swap, "is less than memory_limit_in_bytes %d, which it includes", memory)
	}
	if !cpuList(r.GetCpusetCpus()) {
		return invalid(at+".cpuset_cpus", r.GetCpusetCpus(), "is not a list like 0-3,5")
	}
	if !cpuList(r.GetCpusetMems()) {
		return invalid(at+".cpuset_mems", r.GetCpusetMems(), "is not a list like 0-3,5")
	}
	for i, p := range r.GetHugepageLimits() {
		if !hugePageSize.MatchString(p.GetPageSize()) {
			return invalid(index(at+".hugepage_limits", i)+".page_size", p.GetPageSize(), "is not a size like 2MB")
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.GetUnified())) {
		if err := validateUnified(at+".unified", key, r.GetUnified()[key]); err != nil {
			return err
		}
	}
	return nil
}

// validateUnified accepts files of controllers, and of cgroup core only the two that limit: cgroup.procs would move a
// process of the host, and cgroup.kill, cgroup.freeze and cgroup.subtree_control are berth's to write.
func validateUnified(at, key, value string) error {
	if !unifiedKey.MatchString(key) {
		return invalid(at, key, "is not a file of a controller")
	}
	if strings.HasPrefix(key, "cgroup.") && key != "cgroup.max.depth" && key != "cgroup.max.descendants" {
		return invalid(at, key, "is not a limit")
	}
	if controls(strings.ReplaceAll(value, "\n", "")) { // one line for each device, in io.max
		return invalid(at+"["+key+"]", value, "contains a control character")
	}
	return nil
}

// cpuList says whether s is a list of the kernel's form, or empty.
func cpuList(s string) bool {
	if s == "" {
		return true
	}
	for part := range strings.SplitSeq(s, ",") {
		low, high, isRange := strings.Cut(part, "-")
		from, err := strconv.ParseUint(low, 10, 16)
		if err != nil {
			return false
		}
		if isRange {
			to, err := strconv.ParseUint(high, 10, 16)
			if err != nil || to < from {
				return false
			}
		}
	}
	return true
}

// Resources translates CRI limits for this host; also for UpdateContainerResources, with what [MergeResources] returns.
func Resources(r *cri.LinuxContainerResources, h Host) (*specs.LinuxResources, error) {
	return resources(resourcesField, r, h)
}

func resources(at string, r *cri.LinuxContainerResources, h Host) (*specs.LinuxResources, error) {
	if err := ValidateResources(at, r); err != nil {
		return nil, err
	}
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{
		Shares: given(uint64(r.GetCpuShares())),
		Quota:  given(r.GetCpuQuota()),
		Period: given(uint64(r.GetCpuPeriod())),
		Cpus:   r.GetCpusetCpus(),
		Mems:   r.GetCpusetMems(),
	}}
	if *out.CPU == (specs.LinuxCPU{}) {
		out.CPU = nil
	}
	var err error
	if out.Memory, err = memory(at, r, h); err != nil {
		return nil, err
	}
	if out.HugepageLimits, err = hugePages(at, r, h); err != nil {
		return nil, err
	}
	if len(r.GetUnified()) > 0 {
		if h.CgroupVersion != 2 {
			return nil, unmet(at+".unified", slices.Min(slices.Collect(maps.Keys(r.GetUnified()))), "needs cgroup v2; this host has v1")
		}
		out.Unified = maps.Clone(r.GetUnified()) // libcontainer writes these last
	}
	return out, nil
}

// memory: the swap limit is memory plus swap. A container with a memory limit and no swap limit does not swap, as
// otherwise it would escape its limit. Without the swap controller no swap limit can be set, and none is.
func memory(at string, r *cri.LinuxContainerResources, h Host) (*specs.LinuxMemory, error) {
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if swap > 0 && limit == 0 {
		return nil, invalid(at+".memory_swap_limit_in_bytes", swap, "is given without memory_limit_in_bytes")
	}
	if swap == 0 && limit > 0 {
		swap = limit
	}
	if !h.SwapController {
		swap = 0
	}
	m := &specs.LinuxMemory{Limit: given(limit), Swap: given(swap)}
	if *m == (specs.LinuxMemory{}) {
		return nil, nil
	}
	return m, nil
}

// hugePages: the kubelet sends every size of the node, mostly with 0. Where the controller is missing nothing can be
// limited, and where a size is, a limit of 0 is true anyway.
func hugePages(at string, r *cri.LinuxContainerResources, h Host) ([]specs.LinuxHugepageLimit, error) {
	if len(h.HugePageSizes) == 0 {
		return nil, nil
	}
	var list []specs.LinuxHugepageLimit
	for i, p := range r.GetHugepageLimits() {
		if !slices.Contains(h.HugePageSizes, p.GetPageSize()) {
			if p.GetLimit() == 0 {
				continue
			}
			return nil, unmet(index(at+".hugepage_limits", i)+".page_size", p.GetPageSize(), "is not a size of this host (%s)",
				strings.Join(h.HugePageSizes, ", "))
		}
		list = append(list, specs.LinuxHugepageLimit{Pagesize: p.GetPageSize(), Limit: p.GetLimit()})
	}
	return list, nil
}

// given is nil for zero, which the CRI means by "not given".
func given[T int64 | uint64](v T) *T {
	if v == 0 {
		return nil
	}
	return &v
}

// oomScoreAdj is never left to chance: without a request it is 0, not what the parent of the container happens to have.
// A value below what berth may give is raised to that, as otherwise the container could not start.
func oomScoreAdj(r *cri.LinuxContainerResources, h Host) *int {
	adj := max(int(r.GetOomScoreAdj()), h.OOMScoreAdjFloor)
	return &adj
}

// MergeResources lays an update over what a container has: zero keeps, lists replace, unified is merged by key. A new
// memory limit without a swap limit keeps the amount of swap. Neither argument is changed or shared.
func MergeResources(old, upd *cri.LinuxContainerResources) *cri.LinuxContainerResources {
	out := &cri.LinuxContainerResources{}
	if old != nil {
		out = proto.Clone(old).(*cri.LinuxContainerResources)
	}
	if upd == nil {
		return out
	}
	keep(&out.CpuPeriod, upd.CpuPeriod)
	keep(&out.CpuQuota, upd.CpuQuota)
	keep(&out.CpuShares, upd.CpuShares)
	keep(&out.OomScoreAdj, upd.OomScoreAdj)
	keep(&out.CpusetCpus, upd.CpusetCpus)
	keep(&out.CpusetMems, upd.CpusetMems)
	if upd.MemoryLimitInBytes != 0 {
		if out.MemorySwapLimitInBytes > 0 {
			swap := max(out.MemorySwapLimitInBytes-max(out.MemoryLimitInBytes, 0), 0)
			out.MemorySwapLimitInBytes = max(upd.MemoryLimitInBytes, 0) + swap
		}
		out.MemoryLimitInBytes = upd.MemoryLimitInBytes
	}
	keep(&out.MemorySwapLimitInBytes, upd.MemorySwapLimitInBytes)
	if len(upd.HugepageLimits) > 0 {
		out.HugepageLimits = proto.Clone(upd).(*cri.LinuxContainerResources).HugepageLimits
	}
	for key, value := range upd.Unified {
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		out.Unified[key] = value
	}
	return out
}

// keep replaces what is there unless the update says nothing.
func keep[T comparable](old *T, upd T) {
	var zero T
	if upd != zero {
		*old = upd
	}
}

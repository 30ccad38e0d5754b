package nri

import (
	"maps"
	"slices"

	"github.com/containerd/nri/pkg/api"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Resources are those of the CRI in NRI's form; zero means "not given" in the one and nil in the other.
func Resources(r *cri.LinuxContainerResources) *api.LinuxResources {
	if r == nil {
		return nil
	}
	out := &api.LinuxResources{
		Cpu:     &api.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()},
		Memory:  &api.LinuxMemory{},
		Unified: maps.Clone(r.GetUnified()),
	}
	if v := r.GetCpuShares(); v != 0 {
		out.Cpu.Shares = api.UInt64(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		out.Cpu.Quota = api.Int64(v)
	}
	if v := r.GetCpuPeriod(); v != 0 {
		out.Cpu.Period = api.UInt64(uint64(v))
	}
	if v := r.GetMemoryLimitInBytes(); v != 0 {
		out.Memory.Limit = api.Int64(v)
	}
	if v := r.GetMemorySwapLimitInBytes(); v != 0 {
		out.Memory.Swap = api.Int64(v)
	}
	for _, h := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, &api.HugepageLimit{PageSize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	return out
}

// CRIResources is the way back: what of NRI's resources the CRI has fields for. The rest is of the cgroup alone.
func CRIResources(r *api.LinuxResources) *cri.LinuxContainerResources {
	if r == nil {
		return nil
	}
	out := &cri.LinuxContainerResources{
		CpuShares: int64(r.GetCpu().GetShares().GetValue()), CpuQuota: r.GetCpu().GetQuota().GetValue(),
		CpuPeriod:  int64(r.GetCpu().GetPeriod().GetValue()),
		CpusetCpus: r.GetCpu().GetCpus(), CpusetMems: r.GetCpu().GetMems(),
		MemoryLimitInBytes: r.GetMemory().GetLimit().GetValue(), MemorySwapLimitInBytes: r.GetMemory().GetSwap().GetValue(),
		Unified: maps.Clone(r.GetUnified()),
	}
	if len(out.Unified) == 0 {
		out.Unified = nil
	}
	for _, h := range r.GetHugepageLimits() {
		limit := &cri.HugepageLimit{PageSize: h.GetPageSize(), Limit: h.GetLimit()}
		out.HugepageLimits = slices.DeleteFunc(out.HugepageLimits, func(o *cri.HugepageLimit) bool { return o.PageSize == limit.PageSize })
		out.HugepageLimits = append(out.HugepageLimits, limit)
	}
	return out
}

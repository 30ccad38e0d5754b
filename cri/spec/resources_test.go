package spec

import (
	"math"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func ptr[T any](v T) *T { return &v }

func TestResources(t *testing.T) {
	for _, c := range []struct {
		name string
		r    *cri.LinuxContainerResources
		h    Host
		want *specs.LinuxResources
	}{
		{"nil", nil, testHost(2), &specs.LinuxResources{}},
		{"zero means not given", &cri.LinuxContainerResources{}, testHost(2), &specs.LinuxResources{}},
		{
			"everything", fullResources(), testHost(2),
			&specs.LinuxResources{
				CPU:    &specs.LinuxCPU{Shares: ptr[uint64](512), Quota: ptr[int64](50_000), Period: ptr[uint64](100_000), Cpus: "0-1", Mems: "0"},
				Memory: &specs.LinuxMemory{Limit: ptr[int64](128 << 20), Swap: ptr[int64](160 << 20)},
				HugepageLimits: []specs.LinuxHugepageLimit{
					{Pagesize: "2MB", Limit: 4 << 20}, {Pagesize: "1GB", Limit: 0},
				},
				Unified: map[string]string{"memory.high": "100000000", "pids.max": "512", "memory.oom.group": "1"},
			},
		},
		{
			"only the CPU manager's set", &cri.LinuxContainerResources{CpusetCpus: "2,4-6"}, testHost(2),
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "2,4-6"}},
		},
		{
			"no swap limit means no swap", &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20}, testHost(2),
			&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr[int64](1 << 20), Swap: ptr[int64](1 << 20)}},
		},
		{
			"swap without limit", &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: -1}, testHost(2),
			&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr[int64](1 << 20), Swap: ptr[int64](-1)}},
		},
		{
			"memory without limit", &cri.LinuxContainerResources{MemoryLimitInBytes: -1, CpuQuota: -1}, testHost(2),
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr[int64](-1)}, Memory: &specs.LinuxMemory{Limit: ptr[int64](-1)}},
		},
		{
			"no swap controller", &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20},
			Host{CgroupVersion: 2},
			&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr[int64](1 << 20)}},
		},
		{
			"no hugetlb controller", &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 1 << 21}}},
			Host{CgroupVersion: 2},
			&specs.LinuxResources{},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := Resources(c.r, c.h)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got  %s\nwant %s", encode(t, got), encode(t, c.want))
			}
		})
	}
}

func TestResourcesRefused(t *testing.T) {
	for word, r := range map[string]*cri.LinuxContainerResources{
		"cpu_shares: -1":                       {CpuShares: -1},
		"cpu_shares: 1":                        {CpuShares: 1},
		"cpu_shares: 262145":                   {CpuShares: 262_145},
		"cpu_quota: 9223372036854775807":       {CpuQuota: math.MaxInt64},
		"cpu_quota: -2":                        {CpuQuota: -2},
		"cpu_quota: 999":                       {CpuQuota: 999},
		"cpu_period: 999":                      {CpuPeriod: 999},
		"cpu_period: 1000001":                  {CpuPeriod: 1_000_001},
		"cpu_period: -5":                       {CpuPeriod: -5},
		"memory_limit_in_bytes: -2":            {MemoryLimitInBytes: -2},
		"memory_swap_limit_in_bytes: -2":       {MemorySwapLimitInBytes: -2},
		"memory_swap_limit_in_bytes: 5":        {MemoryLimitInBytes: 6, MemorySwapLimitInBytes: 5},
		"memory_swap_limit_in_bytes: 7":        {MemorySwapLimitInBytes: 7},
		"oom_score_adj: -1001":                 {OomScoreAdj: -1001},
		"oom_score_adj: 1001":                  {OomScoreAdj: 1001},
		`cpuset_cpus: "3-1"`:                   {CpusetCpus: "3-1"},
		`cpuset_cpus: "0\n"`:                   {CpusetCpus: "0\n"},
		`cpuset_cpus: ","`:                     {CpusetCpus: ","},
		`cpuset_cpus: "+1"`:                    {CpusetCpus: "+1"},
		`cpuset_mems: "a"`:                     {CpusetMems: "a"},
		`hugepage_limits[0].page_size: "2M"`:   {HugepageLimits: []*cri.HugepageLimit{{PageSize: "2M"}}},
		`hugepage_limits[0].page_size: "../x"`: {HugepageLimits: []*cri.HugepageLimit{{PageSize: "../x"}}},
	} {
		refuse(t, func(in *Input) { in.Container.Linux.Resources = r }, "config.linux.resources."+word)
		if word == "memory_swap_limit_in_bytes: 7" { // may be laid over a memory limit in an update
			continue
		}
		refused(t, ValidateResources("linux", r), errdefs.ErrInvalidArgument, "linux."+word)
	}
	_, err := Resources(&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "64KB", Limit: 1}}}, testHost(2))
	refused(t, err, errdefs.ErrFailedPrecondition, "hugepage_limits[0].page_size", "64KB", "2MB, 1GB")
	_, err = Resources(&cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}, testHost(1))
	refused(t, err, errdefs.ErrFailedPrecondition, "unified", "cgroup v2")
}

// cgroup.procs as a "resource" would move a process of the host into the container's cgroup.
func TestUnifiedWritesLimitsOnly(t *testing.T) {
	for key, value := range map[string]string{
		"cgroup.procs": "1", "cgroup.kill": "1", "cgroup.freeze": "1", "cgroup.subtree_control": "+memory", "cgroup.type": "threaded",
		"../memory.max": "1", "a/b.c": "1", "memory": "1", "": "1", ".": "1", "memory.": "1", "memory.max\n": "1", "memory.high": "1\x00",
	} {
		r := &cri.LinuxContainerResources{Unified: map[string]string{key: value}}
		refused(t, ValidateResources("linux", r), errdefs.ErrInvalidArgument, "linux.unified")
	}
	for key, value := range map[string]string{
		"memory.min": "0", "memory.high": "max", "memory.swap.max": "0", "io.max": "8:0 rbps=1\n8:16 rbps=2", "cgroup.max.depth": "3",
		"hugetlb.2MB.max": "0", "cpu.weight.nice": "-3",
	} {
		if err := ValidateResources("linux", &cri.LinuxContainerResources{Unified: map[string]string{key: value}}); err != nil {
			t.Error(err)
		}
	}
}

func TestOOMScoreAdj(t *testing.T) {
	for _, c := range []struct {
		r     *cri.LinuxContainerResources
		floor int
		want  int
	}{
		{nil, -1000, 0},
		{&cri.LinuxContainerResources{OomScoreAdj: 900}, -1000, 900},
		{&cri.LinuxContainerResources{OomScoreAdj: -997}, -1000, -997},
		{&cri.LinuxContainerResources{OomScoreAdj: -997}, -500, -500},
		{&cri.LinuxContainerResources{OomScoreAdj: -997}, 0, 0},
		{nil, 200, 200},
	} {
		p := mustContainer(t, func(in *Input) {
			in.Container.Linux.Resources, in.Host.OOMScoreAdjFloor = c.r, c.floor
		}).Spec.Process
		if p.OOMScoreAdj == nil || *p.OOMScoreAdj != c.want {
			t.Errorf("%v with floor %d: %v, want %d", c.r, c.floor, p.OOMScoreAdj, c.want)
		}
	}
}

func TestMergeResources(t *testing.T) {
	full := fullResources()
	for _, c := range []struct {
		name           string
		old, upd, want *cri.LinuxContainerResources
	}{
		{"nothing", nil, nil, &cri.LinuxContainerResources{}},
		{"from nothing", nil, full, full},
		{"nothing new", full, &cri.LinuxContainerResources{}, full},
		{"nil update", full, nil, full},
		{
			"only the cpuset", &cri.LinuxContainerResources{CpuShares: 5, CpusetCpus: "0", CpusetMems: "1"},
			&cri.LinuxContainerResources{CpusetCpus: "3"}, &cri.LinuxContainerResources{CpuShares: 5, CpusetCpus: "3", CpusetMems: "1"},
		},
		{
			"unified by key", &cri.LinuxContainerResources{Unified: map[string]string{"a.b": "1", "c.d": "2"}},
			&cri.LinuxContainerResources{Unified: map[string]string{"c.d": "3", "e.f": "4"}},
			&cri.LinuxContainerResources{Unified: map[string]string{"a.b": "1", "c.d": "3", "e.f": "4"}},
		},
		{
			"more memory, same swap", &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 130},
			&cri.LinuxContainerResources{MemoryLimitInBytes: 200}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200, MemorySwapLimitInBytes: 230},
		},
		{
			"both given", &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 130},
			&cri.LinuxContainerResources{MemoryLimitInBytes: 200, MemorySwapLimitInBytes: 210},
			&cri.LinuxContainerResources{MemoryLimitInBytes: 200, MemorySwapLimitInBytes: 210},
		},
		{
			"swap without limit stays", &cri.LinuxContainerResources{MemoryLimitInBytes: 100, MemorySwapLimitInBytes: -1},
			&cri.LinuxContainerResources{MemoryLimitInBytes: 200}, &cri.LinuxContainerResources{MemoryLimitInBytes: 200, MemorySwapLimitInBytes: -1},
		},
		{
			"no more limit", &cri.LinuxContainerResources{CpuQuota: 5000, HugepageLimits: full.HugepageLimits},
			&cri.LinuxContainerResources{CpuQuota: -1, HugepageLimits: full.HugepageLimits[:1]},
			&cri.LinuxContainerResources{CpuQuota: -1, HugepageLimits: full.HugepageLimits[:1]},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			oldCopy, updCopy := proto.Clone(c.old), proto.Clone(c.upd)
			got := MergeResources(c.old, c.upd)
			if !proto.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
			if got.Unified != nil {
				got.Unified["x.y"] = "z"
			}
			for _, p := range got.HugepageLimits {
				p.Limit++
			}
			if !proto.Equal(c.old, oldCopy) || !proto.Equal(c.upd, updCopy) {
				t.Error("an argument was changed")
			}
			if again := MergeResources(MergeResources(c.old, c.upd), c.upd); !proto.Equal(again, c.want) {
				t.Errorf("twice is not once: %v", again)
			}
		})
	}
}

package cgroups

import (
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

const mib = 1 << 20

func TestMerge(t *testing.T) {
	v1 := limits{memory: 100, memoryAndSwap: 100, swapAccounted: true, hugetlb: func(size string) bool { return size == "2MB" }}
	v2 := limits{v2: true, cpuQuota: 5000, cpuPeriod: 50000, memory: 100, hugetlb: func(string) bool { return true }}
	type in = specs.LinuxResources
	type out = cgroups.Resources
	memory := func(limit, swap int64) in { return in{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &swap}} }
	for name, tc := range map[string]struct {
		in   in
		now  limits
		want out
	}{
		"nothing":              {in{}, v1, out{}},
		"empty parts":          {in{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}, Pids: &specs.LinuxPids{}}, v1, out{}},
		"zeros":                {in{CPU: &specs.LinuxCPU{Shares: ptr(uint64(0)), Quota: ptr(int64(0)), Period: ptr(uint64(0))}, Memory: &specs.LinuxMemory{Limit: ptr(int64(0)), Swap: ptr(int64(0))}, Pids: &specs.LinuxPids{Limit: ptr(int64(0))}}, v2, out{}},
		"cpuset only":          {in{CPU: &specs.LinuxCPU{Cpus: "0-1"}}, v2, out{CpusetCpus: "0-1"}},
		"shares":               {in{CPU: &specs.LinuxCPU{Shares: ptr(uint64(1024))}}, v1, out{CpuShares: 1024, CpuWeight: 100}},
		"quota on v1":          {in{CPU: &specs.LinuxCPU{Quota: ptr(int64(20000))}}, v1, out{CpuQuota: 20000}},
		"quota keeps period":   {in{CPU: &specs.LinuxCPU{Quota: ptr(int64(20000))}}, v2, out{CpuQuota: 20000, CpuPeriod: 50000}},
		"period keeps quota":   {in{CPU: &specs.LinuxCPU{Period: ptr(uint64(10000))}}, v2, out{CpuQuota: 5000, CpuPeriod: 10000}},
		"no quota":             {in{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1)), Period: ptr(uint64(100000))}}, v2, out{CpuQuota: -1, CpuPeriod: 100000}},
		"memory keeps no swap": {in{Memory: &specs.LinuxMemory{Limit: ptr(int64(300))}}, v1, out{Memory: 300, MemorySwap: 300}},
		"memory keeps swap":    {in{Memory: &specs.LinuxMemory{Limit: ptr(int64(300))}}, limits{memory: 100, memoryAndSwap: 150, swapAccounted: true}, out{Memory: 300, MemorySwap: 350}},
		"memory, unlimited swap": {
			in{Memory: &specs.LinuxMemory{Limit: ptr(int64(300))}}, limits{memory: 100, memoryAndSwap: Unlimited, swapAccounted: true}, out{Memory: 300},
		},
		"memory, swap not accounted": {in{Memory: &specs.LinuxMemory{Limit: ptr(int64(300))}}, limits{memory: 100}, out{Memory: 300}},
		"memory and swap":            {memory(300, 400), v1, out{Memory: 300, MemorySwap: 400}},
		"memory on v2":               {in{Memory: &specs.LinuxMemory{Limit: ptr(int64(300))}}, v2, out{Memory: 300}},
		"no limit keeps swap on v2":  {in{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}}, v2, out{Unified: map[string]string{"memory.max": "max"}}},
		"swap on v2":                 {in{Memory: &specs.LinuxMemory{Swap: ptr(int64(150))}}, v2, out{Memory: 100, MemorySwap: 150}},
		"swap, no limit, on v2":      {in{Memory: &specs.LinuxMemory{Swap: ptr(int64(150))}}, limits{v2: true, memory: Unlimited}, out{Memory: -1, MemorySwap: 150}},
		"pids":                       {in{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}, v2, out{PidsLimit: ptr(int64(-1))}},
		"huge pages that are there": {
			in{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 0}, {Pagesize: "1GB", Limit: 7}}},
			v1,
			out{HugetlbLimit: []*cgroups.HugepageLimit{{Pagesize: "2MB"}}},
		},
		"unified":              {in{Unified: map[string]string{"memory.high": "max", "memory.oom.group": "1"}}, v2, out{Unified: map[string]string{"memory.high": "max", "memory.oom.group": "1"}}},
		"devices are not ours": {in{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}}, v2, out{}},
	} {
		got, err := merge(&tc.in, tc.now)
		tc.want.SkipDevices, tc.want.SkipFreezeOnSet = true, true
		if err != nil || !reflect.DeepEqual(*got, tc.want) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, got, err, tc.want)
		}
	}
	for name, tc := range map[string]struct {
		in   in
		now  limits
		want error
	}{
		"unified on v1":       {in{Unified: map[string]string{"memory.high": "1"}}, v1, errdefs.ErrInvalidArgument},
		"unified path":        {in{Unified: map[string]string{"../memory.max": "1"}}, v2, errdefs.ErrInvalidArgument},
		"unified, no key":     {in{Unified: map[string]string{"memory": "1"}}, v2, errdefs.ErrInvalidArgument},
		"processes":           {in{Unified: map[string]string{"cgroup.procs": "1"}}, v2, errdefs.ErrInvalidArgument},
		"kill":                {in{Unified: map[string]string{"cgroup.kill": "1"}}, v2, errdefs.ErrInvalidArgument},
		"page size":           {in{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "../2MB"}}}, v1, errdefs.ErrInvalidArgument},
		"page size, negative": {in{HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "-2MB"}}}, v1, errdefs.ErrInvalidArgument},
		"negative memory":     {memory(-2, 0), v1, errdefs.ErrInvalidArgument},
		"swap below memory":   {memory(300, 200), v1, errdefs.ErrInvalidArgument},
		"block I/O":           {in{BlockIO: &specs.LinuxBlockIO{}}, v1, errdefs.ErrNotImplemented},
	} {
		if got, err := merge(&tc.in, tc.now); !errors.Is(err, tc.want) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

// values reads settings of a cgroup by names that do not depend on the version.
func values(t *testing.T, p Path) map[string]string {
	t.Helper()
	l := layoutOf(t)
	out := map[string]string{}
	for name, f := range map[string][3]string{
		"weight": {"cpu", "cpu.shares", "cpu.weight"},
		"quota":  {"cpu", "cpu.cfs_quota_us", "cpu.max"},
		"period": {"cpu", "cpu.cfs_period_us", "cpu.max"},
		"memory": {"memory", "memory.limit_in_bytes", "memory.max"},
		"swap":   {"memory", "memory.memsw.limit_in_bytes", "memory.swap.max"},
		"cpus":   {"cpuset", "cpuset.cpus", "cpuset.cpus"},
		"pids":   {"pids", "pids.max", "pids.max"},
	} {
		file := f[1]
		if l.v2 {
			file = f[2]
		}
		dir := l.dir(p, f[0])
		if dir == "" || !fileExists(dir+"/"+file) {
			continue
		}
		v := read(t, dir+"/"+file)
		if l.v2 && file == "cpu.max" {
			quota, period, _ := strings.Cut(v, " ")
			v = quota
			if name == "period" {
				v = period
			}
		}
		out[name] = v
	}
	return out
}

// differ compares only what the machine has.
func differ(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, w := range want {
		if g, ok := got[name]; ok && g != w {
			t.Errorf("%s is %s, want %s", name, g, w)
		}
	}
}

func with(m map[string]string, name, value string) map[string]string {
	out := map[string]string{}
	for k, v := range m {
		out[k] = v
	}
	out[name] = value
	return out
}

func TestUpdateChangesOnlyWhatItIsTold(t *testing.T) {
	p := newCgroup(t)
	v2 := layoutOf(t).v2
	all := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(20000)), Period: ptr(uint64(50000)), Cpus: "0"},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 * mib)), Swap: ptr(int64(64 * mib))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(77))},
	}
	if err := Update(p, all); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"weight": "512", "quota": "20000", "period": "50000", "memory": "67108864", "swap": "67108864", "cpus": "0", "pids": "77"}
	if v2 {
		want["weight"], want["swap"] = "59", "0"
	}
	differ(t, values(t, p), want)
	step := func(name string, r *specs.LinuxResources, changes ...string) {
		t.Helper()
		if err := Update(p, r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for i := 0; i < len(changes); i += 2 {
			want = with(want, changes[i], changes[i+1])
		}
		differ(t, values(t, p), want)
	}
	step("nil", nil)
	step("nothing", &specs.LinuxResources{})
	step("cpuset, as the CPU manager does", &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: "1"}}, "cpus", "1")
	step("period", &specs.LinuxResources{CPU: &specs.LinuxCPU{Period: ptr(uint64(100000))}}, "period", "100000")
	step("quota", &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(30000))}}, "quota", "30000")
	raised := []string{"memory", "134217728", "swap", "134217728"}
	lowered := []string{"memory", "33554432", "swap", "33554432"}
	if v2 {
		raised, lowered = raised[:2], lowered[:2]
	}
	step("memory up", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(128 * mib))}}, raised...)
	step("memory down", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(32 * mib))}}, lowered...)
	step("again", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(32 * mib))}})
	none := "-1"
	if v2 {
		none = "max"
	}
	step("no quota", &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: ptr(int64(-1))}}, "quota", none)
	step("shares", &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2))}}, "weight", map[bool]string{false: "2", true: "1"}[v2])
	step("no pids limit", &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(-1))}}, "pids", "max")
	if v2 {
		step("unified", &specs.LinuxResources{Unified: map[string]string{"memory.high": "max", "memory.max": "50331648", "memory.oom.group": "1"}}, "memory", "50331648")
		step("no memory limit", &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(-1))}}, "memory", "max")
	}
}

func TestUpdateIsAtomic(t *testing.T) {
	p := newCgroup(t)
	if err := Update(p, &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(512)), Quota: ptr(int64(20000)), Period: ptr(uint64(50000))},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(64 * mib)), Swap: ptr(int64(64 * mib))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(77))},
	}); err != nil {
		t.Fatal(err)
	}
	before := values(t, p)
	for name, r := range map[string]*specs.LinuxResources{
		"cpus that are not there": {CPU: &specs.LinuxCPU{Cpus: "4000", Shares: ptr(uint64(100))}, Memory: &specs.LinuxMemory{Limit: ptr(int64(128 * mib))}},
		"cpus that are none":      {CPU: &specs.LinuxCPU{Cpus: "x"}, Pids: &specs.LinuxPids{Limit: ptr(int64(5))}},
		// Comes after memory and pids on v1 or v2.
		"quota that is too small": {CPU: &specs.LinuxCPU{Quota: ptr(int64(1)), Shares: ptr(uint64(100))}, Memory: &specs.LinuxMemory{Limit: ptr(int64(32 * mib))}, Pids: &specs.LinuxPids{Limit: ptr(int64(5))}},
	} {
		err := Update(p, r)
		if !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
		differ(t, values(t, p), before)
	}
}

func TestUpdateOfNothing(t *testing.T) {
	if err := Update(newPath(t), &specs.LinuxResources{}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

// A limit below what is in use is refused; page cache that can be dropped is no reason to.
func TestMemoryLimitBelowUsage(t *testing.T) {
	p := newCgroup(t)
	file(t, p, "memory", "memory.limit_in_bytes", "memory.max")
	if err := Update(p, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(256 * mib)), Swap: ptr(int64(256 * mib))}}); err != nil {
		t.Fatal(err)
	}
	ready := t.TempDir() + "/ready"
	// 48 MiB that nobody can take away: a variable of the shell.
	start(t, p, `x=$(head -c 50331648 /dev/zero | tr '\0' x); echo > `+ready+`; sleep 60`)
	waitFor(t, func() bool { return fileExists(ready) })
	before := values(t, p)
	err := Update(p, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(8 * mib))}, CPU: &specs.LinuxCPU{Shares: ptr(uint64(300))}})
	if !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("%v", err)
	}
	differ(t, values(t, p), before)
	if s, err := ReadStats(p); err != nil || s.OOMKills != 0 {
		t.Errorf("OOM kills: %+v, %v", s, err)
	}

	q := newCgroup(t)
	if err := Update(q, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(256 * mib)), Swap: ptr(int64(256 * mib))}}); err != nil {
		t.Fatal(err)
	}
	dir := cacheDir(t)
	start(t, q, `head -c 50331648 /dev/zero > `+dir+`/f; sync `+dir+`/f; cat `+dir+`/f > /dev/null; echo > `+dir+`/ready; sleep 60`)
	waitFor(t, func() bool { return fileExists(dir + "/ready") })
	if shmem(t, q) > 8*mib { // a machine whose disk is memory: take files that are there
		if err := os.Remove(dir + "/f"); err != nil {
			t.Fatal(err)
		}
		start(t, q, `cat /usr/bin/* /usr/lib/*/*.so* 2>/dev/null | head -c 62914560 > /dev/null; echo > `+dir+`/again; sleep 60`)
		waitFor(t, func() bool { return fileExists(dir + "/again") })
	}
	s, err := ReadStats(q)
	if err != nil {
		t.Fatal(err)
	}
	if s.Memory.Usage < 32*mib || shmem(t, q) > 8*mib {
		t.Skipf("no page cache that can be dropped is charged here: %+v", s.Memory)
	}
	if err := Update(q, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(16 * mib))}}); err != nil {
		t.Errorf("page cache: %v", err)
	}
}

// shmem is the part of the page cache that is memory itself.
func shmem(t *testing.T, p Path) (n uint64) {
	t.Helper()
	r := reader{buf: make([]byte, 0, 4096)}
	r.keyed(layoutOf(t).dir(p, "memory"), "memory.stat", func(key string, v uint64) {
		if key == "shmem" || key == "total_shmem" {
			n = v
		}
	})
	if r.err != nil {
		t.Fatal(r.err)
	}
	return n
}

// cacheDir is on a disk, where cache can be dropped: /tmp may be memory.
func cacheDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "berth-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

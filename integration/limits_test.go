//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// limit is one field of a container's resources and what the kernel then says.
type limit struct {
	name       string
	controller string
	v1, v2     string // files; "" where there is none
	set        func(*runtimeapi.LinuxContainerResources)
	on1, on2   string // their contents; "" where the file is not looked at
}

// limits are all fields of LinuxContainerResources but unified and oom_score_adj.
func limits() []limit {
	type r = runtimeapi.LinuxContainerResources
	return []limit{
		{"cpu_shares", "cpu", "cpu.shares", "cpu.weight", func(r *r) { r.CpuShares = 512 }, "512", "59"},
		{"cpu_quota", "cpu", "cpu.cfs_quota_us", "cpu.max", func(r *r) { r.CpuQuota, r.CpuPeriod = 20000, 50000 }, "20000", "20000 50000"},
		{"cpu_period", "cpu", "cpu.cfs_period_us", "cpu.max", func(r *r) { r.CpuQuota, r.CpuPeriod = 30000, 60000 }, "60000", "30000 60000"},
		{"memory_limit", "memory", "memory.limit_in_bytes", "memory.max", func(r *r) { r.MemoryLimitInBytes = 64 << 20 }, "67108864", "67108864"},
		{"no swap beside a memory limit", "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", func(r *r) { r.MemoryLimitInBytes = 64 << 20 }, "67108864", "0"},
		{"memory_swap_limit", "memory", "memory.memsw.limit_in_bytes", "memory.swap.max", func(r *r) { r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 64<<20, 80<<20 }, "83886080", "16777216"},
		{"cpuset_cpus", "cpuset", "cpuset.cpus", "cpuset.cpus", func(r *r) { r.CpusetCpus = "0" }, "0", "0"},
		{"cpuset_mems", "cpuset", "cpuset.mems", "cpuset.mems", func(r *r) { r.CpusetMems = "0" }, "0", "0"},
		{"hugepage_limits", "hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max", func(r *r) {
			r.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}
		}, "4194304", "4194304"},
		{"hugepage_limits of nothing", "pids", "pids.max", "pids.max", func(r *r) { // the kubelet sends each size, whatever the node has
			r.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}, {PageSize: "64KB"}}
		}, "max", "max"},
		{"unified pids.max", "pids", "", "pids.max", func(r *r) { r.Unified = map[string]string{"pids.max": "77"} }, "", "77"},
		{"unified memory.high", "memory", "", "memory.high", func(r *r) {
			r.MemoryLimitInBytes, r.Unified = 64<<20, map[string]string{"memory.high": "50331648", "memory.oom.group": "1"}
		}, "", "50331648"},
		{"unified memory.oom.group", "memory", "", "memory.oom.group", func(r *r) { r.Unified = map[string]string{"memory.oom.group": "1"} }, "", "1"},
		{"unified is last", "memory", "", "memory.swap.max", func(r *r) {
			r.MemoryLimitInBytes, r.MemorySwapLimitInBytes, r.Unified = 64<<20, 80<<20, map[string]string{"memory.swap.max": "4096"}
		}, "", "4096"},
	}
}

// TestEachLimit: each field of a container's resources is what the kernel holds the container to, and what its status says.
func TestEachLimit(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	pod := n.Pod("limits")
	pod.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 20}
	pod.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 256 << 20, CpuShares: 1024}
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })

	for i, l := range limits() {
		t.Run(l.name, func(t *testing.T) {
			want, file := l.on1, l.v1
			if onCgroup2() {
				want, file = l.on2, l.v2
			}
			if !hasController(l.controller) {
				t.Skipf("this machine has no %s controller", l.controller)
			}
			c := lab.Sleeper(fmt.Sprint("limit-", i))
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{}
			l.set(c.Linux.Resources)
			id, err := n.CRI.Create(ctx, podID, pod, c)
			if file == "" { // unified on v1: nothing would hold the container to it
				first := slices.Min(slices.Collect(maps.Keys(c.Linux.Resources.Unified)))
				wantCode(t, err, codes.FailedPrecondition, "config.linux.resources.unified", first, "cgroup v2")
				return
			}
			must(t, err)
			cgroup, _, err := cgroupOf(ctx, n, id)
			must(t, err)
			got := limitOf(t, cgroup, l.controller, l.v1, l.v2)
			if got == "" && strings.Contains(l.name, "swap") {
				t.Skip("this kernel does not account swap")
			}
			if got != want {
				t.Errorf("%s has %q, want %q", file, got, want)
			}
			st, err := n.CRI.ContainerState(ctx, id)
			must(t, err)
			if got := st.GetResources().GetLinux(); got.String() != c.Linux.Resources.String() {
				t.Errorf("status.resources: %v, want %v", got, c.Linux.Resources)
			}
		})
	}

	t.Run("oom_score_adj", func(t *testing.T) {
		floor := lowestOOMScore(t, n.Berth.PID())
		for _, adj := range []int64{-500, 0, 321, 1000} {
			c := lab.Sleeper(fmt.Sprint("adj", adj))
			c.Linux.Resources.OomScoreAdj = adj
			id, err := n.CRI.Create(ctx, podID, pod, c)
			must(t, err)
			_, pid, err := cgroupOf(ctx, n, id)
			must(t, err)
			got, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
			must(t, err)
			if want := max(adj, floor); strings.TrimSpace(string(got)) != fmt.Sprint(want) {
				t.Errorf("oom_score_adj is %s, want %d", got, want)
			}
		}
		// The sandbox's own is below that floor, too.
		log, err := os.ReadFile(filepath.Join(n.Dir, "berth.log"))
		must(t, err)
		if said := strings.Count(string(log), "oom_score_adj cannot be lowered"); said > 1 || floor > -998 && said == 0 {
			t.Errorf("that oom_score_adj cannot be lowered is said %d times", said)
		}
	})

	// The kubelet's own cgroup holds the pod to them; what was asked for is kept and shown.
	t.Run("overhead and pod-level resources", func(t *testing.T) {
		resp, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID, Verbose: true})
		must(t, err)
		var info struct {
			Overhead, Resources runtimeapi.LinuxContainerResources
		}
		must(t, json.Unmarshal([]byte(resp.Info["info"]), &info))
		if info.Overhead.MemoryLimitInBytes != 1<<20 || info.Resources.MemoryLimitInBytes != 256<<20 || info.Resources.CpuShares != 1024 {
			t.Errorf("%s", resp.Info["info"])
		}
	})
}

// lowestOOMScore is the lowest oom_score_adj that a process may give to another.
func lowestOOMScore(t *testing.T, pid int) int64 {
	t.Helper()
	caps, err := strconv.ParseUint(readStatus(t, pid)["CapEff"], 16, 64)
	must(t, err)
	if caps&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return -1000
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	must(t, err)
	own, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	must(t, err)
	return own
}

// TestDefaultUlimits: limits that the configuration gives reach a container and what is executed in it; the others are the
// daemon's, as on containerd.
func TestDefaultUlimits(t *testing.T) {
	n := newNodeServing(t, "--default-ulimits", "nofile=1234:2345,core=0:0,msgqueue=1000:2000")
	ctx := t.Context()
	ledger(t, n)
	pod := n.Pod("ulimits")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
	id, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("limited"))
	must(t, err)
	of := func(pid string) map[string]string {
		text, err := n.CRI.Exec(ctx, id, "cat", "/proc/"+pid+"/limits")
		must(t, err)
		found := map[string]string{}
		for line := range strings.Lines(text) {
			if len(line) > 67 {
				found[strings.TrimSpace(line[:26])] = strings.Join(strings.Fields(line[26:68]), ":")
			}
		}
		return found
	}
	daemon := map[string]string{}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", n.Berth.PID()))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if len(line) > 67 {
			daemon[strings.TrimSpace(line[:26])] = strings.Join(strings.Fields(line[26:68]), ":")
		}
	}
	for _, pid := range []string{"1", "self"} {
		got := of(pid)
		for name, want := range map[string]string{
			"Max open files": "1234:2345", "Max core file size": "0:0", "Max msgqueue size": "1000:2000",
			"Max stack size": daemon["Max stack size"], "Max locked memory": daemon["Max locked memory"],
		} {
			if got[name] != want {
				t.Errorf("process %s: %s is %q, want %q", pid, name, got[name], want)
			}
		}
	}
}

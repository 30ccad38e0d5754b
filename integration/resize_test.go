//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestResize: UpdateContainerResources does what it is asked, all of it or nothing, keeps the rest, and the status follows.
func TestResize(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	pod := n.Pod("resize")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })

	type r = runtimeapi.LinuxContainerResources
	start := func(t *testing.T, name string, run bool, res *r, script string) (string, string) {
		t.Helper()
		c := lab.Sh(name, script)
		c.Linux.Resources = res
		id, err := n.CRI.Create(ctx, podID, pod, c)
		must(t, err)
		if run {
			_, err = n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			must(t, err)
		}
		cgroup, _, err := cgroupOf(ctx, n, id)
		must(t, err)
		return id, cgroup
	}
	update := func(id string, res *r) error {
		_, err := n.CRI.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{ContainerId: id, Linux: res})
		return err
	}
	status := func(t *testing.T, id string) *r {
		t.Helper()
		st, err := n.CRI.ContainerState(ctx, id)
		must(t, err)
		return st.GetResources().GetLinux()
	}
	memory := func(t *testing.T, cgroup string) string {
		t.Helper()
		return limitOf(t, cgroup, "memory", "memory.limit_in_bytes", "memory.max")
	}
	cpu := func(t *testing.T, cgroup string) string {
		t.Helper()
		if onCgroup2() {
			return limitOf(t, cgroup, "cpu", "", "cpu.max")
		}
		return limitOf(t, cgroup, "cpu", "cpu.cfs_quota_us", "") + " " + limitOf(t, cgroup, "cpu", "cpu.cfs_period_us", "")
	}
	const idle = "trap 'exit 0' TERM; sleep 86400 & wait"

	for _, running := range []bool{false, true} {
		name := map[bool]string{false: "created", true: "running"}[running]
		t.Run(name, func(t *testing.T) {
			id, cgroup := start(t, name, running, &r{CpuShares: 100, CpuQuota: 10000, CpuPeriod: 100000, MemoryLimitInBytes: 32 << 20}, idle)
			must(t, update(id, &r{MemoryLimitInBytes: 64 << 20, CpuQuota: 20000})) // up
			if memory(t, cgroup) != "67108864" || cpu(t, cgroup) != "20000 100000" {
				t.Errorf("up: memory %s, cpu %s", memory(t, cgroup), cpu(t, cgroup))
			}
			for range 2 { // down, and once more
				must(t, update(id, &r{MemoryLimitInBytes: 48 << 20, CpuQuota: 15000, CpuPeriod: 50000}))
			}
			if memory(t, cgroup) != "50331648" || cpu(t, cgroup) != "15000 50000" {
				t.Errorf("down: memory %s, cpu %s", memory(t, cgroup), cpu(t, cgroup))
			}
			want := &r{CpuShares: 100, CpuQuota: 15000, CpuPeriod: 50000, MemoryLimitInBytes: 48 << 20}
			if got := status(t, id); got.String() != want.String() {
				t.Errorf("status.resources: %v, want %v", got, want)
			}
			if got := limitOf(t, cgroup, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max"); got != "" && got != "0" && got != "50331648" {
				t.Errorf("swap does not follow: %s", got)
			}
			must(t, update(id, &r{CpusetCpus: "0"})) // as the CPU manager does
			if got := limitOf(t, cgroup, "cpuset", "cpuset.cpus", "cpuset.cpus"); got != "0" {
				t.Errorf("cpuset %q", got)
			}
			if memory(t, cgroup) != "50331648" || cpu(t, cgroup) != "15000 50000" {
				t.Errorf("a cpuset alone changes memory to %s, cpu to %s", memory(t, cgroup), cpu(t, cgroup))
			}
			want.CpusetCpus = "0"
			if got := status(t, id); got.String() != want.String() {
				t.Errorf("status.resources: %v, want %v", got, want)
			}

			// The cpuset is refused by the kernel, after the rest has been set.
			err := update(id, &r{MemoryLimitInBytes: 96 << 20, CpuQuota: 40000, CpusetCpus: "60000"})
			wantCode(t, err, codes.InvalidArgument, "cpuset")
			if memory(t, cgroup) != "50331648" || cpu(t, cgroup) != "15000 50000" || limitOf(t, cgroup, "cpuset", "cpuset.cpus", "cpuset.cpus") != "0" {
				t.Errorf("half of a refused update stays: memory %s, cpu %s", memory(t, cgroup), cpu(t, cgroup))
			}
			if got := status(t, id); got.String() != want.String() {
				t.Errorf("status.resources after a refusal: %v, want %v", got, want)
			}

			// What a daemon knew, the next one knows.
			must(t, n.KillBerth())
			must(t, n.StartBerth(ctx))
			if got := status(t, id); got.String() != want.String() {
				t.Errorf("status.resources after a restart: %v, want %v", got, want)
			}
		})
	}

	t.Run("below what is in use", func(t *testing.T) {
		// A variable of the shell: anonymous memory, which cannot be reclaimed without swap.
		id, cgroup := start(t, "user", true, &r{MemoryLimitInBytes: 128 << 20}, "x=$(head -c 40000000 /dev/zero | tr '\\0' x); echo full; "+idle)
		must(t, lab.Eventually(ctx, time.Minute, "output", func(context.Context) error {
			c := lab.Container("user")
			lines, err := lab.Log(pod, c)
			if err == nil && (len(lines) == 0 || lines[0].Text != "full") {
				err = os.ErrNotExist
			}
			return err
		}))
		wantCode(t, update(id, &r{MemoryLimitInBytes: 16 << 20}), codes.FailedPrecondition, "16777216")
		if got := memory(t, cgroup); got != "134217728" {
			t.Errorf("limit is %s", got)
		}
		st, err := n.CRI.ContainerState(ctx, id)
		must(t, err)
		if st.State != runtimeapi.ContainerState_CONTAINER_RUNNING || st.GetResources().GetLinux().MemoryLimitInBytes != 128<<20 {
			t.Errorf("%v %v", st.State, st.Resources)
		}
	})

	t.Run("swap follows", func(t *testing.T) {
		id, cgroup := start(t, "swap", true, &r{MemoryLimitInBytes: 32 << 20, MemorySwapLimitInBytes: 40 << 20}, idle)
		if limitOf(t, cgroup, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max") == "" {
			t.Skip("this kernel does not account swap")
		}
		for _, size := range []int64{64 << 20, 24 << 20} {
			must(t, update(id, &r{MemoryLimitInBytes: size}))
			if got := status(t, id); got.MemorySwapLimitInBytes-got.MemoryLimitInBytes != 8<<20 || got.MemoryLimitInBytes != size {
				t.Errorf("status.resources: %v", got)
			}
		}
		want := map[bool]string{false: "33554432", true: "8388608"}[onCgroup2()]
		if got := limitOf(t, cgroup, "memory", "memory.memsw.limit_in_bytes", "memory.swap.max"); got != want {
			t.Errorf("swap limit %s, want %s", got, want)
		}
	})

	t.Run("unified is merged by key", func(t *testing.T) {
		if !onCgroup2() {
			id, _ := start(t, "unified1", true, &r{}, idle)
			wantCode(t, update(id, &r{Unified: map[string]string{"memory.high": "max"}}), codes.FailedPrecondition, "memory.high")
			return
		}
		id, cgroup := start(t, "unified2", true, &r{Unified: map[string]string{"memory.high": "67108864", "pids.max": "50"}}, idle)
		must(t, update(id, &r{Unified: map[string]string{"pids.max": "60"}}))
		if limitOf(t, cgroup, "", "", "memory.high") != "67108864" || limitOf(t, cgroup, "", "", "pids.max") != "60" {
			t.Errorf("memory.high %s, pids.max %s", limitOf(t, cgroup, "", "", "memory.high"), limitOf(t, cgroup, "", "", "pids.max"))
		}
		if got := status(t, id).Unified; len(got) != 2 || got["memory.high"] != "67108864" || got["pids.max"] != "60" {
			t.Errorf("status.resources.unified: %v", got)
		}
	})

	t.Run("exited or unknown", func(t *testing.T) {
		id, _ := start(t, "short", true, &r{}, "exit 0")
		_, err := n.CRI.WaitExit(ctx, id, time.Minute)
		must(t, err)
		wantCode(t, update(id, &r{CpuShares: 10}), codes.FailedPrecondition, "exited")
		wantCode(t, update(strings.Repeat("0", 64), &r{CpuShares: 10}), codes.NotFound)
	})

	t.Run("the pod as a whole", func(t *testing.T) {
		resize := func(req *runtimeapi.UpdatePodSandboxResourcesRequest) error {
			_, err := n.CRI.UpdatePodSandboxResources(ctx, req)
			return err
		}
		must(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID, Resources: &r{MemoryLimitInBytes: 512 << 20, CpuShares: 300}}))
		must(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID, Overhead: &r{MemoryLimitInBytes: 1 << 20}}))
		must(t, n.KillBerth())
		must(t, n.StartBerth(ctx))
		resp, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID, Verbose: true})
		must(t, err)
		var info struct{ Overhead, Resources r }
		must(t, json.Unmarshal([]byte(resp.Info["info"]), &info))
		if info.Resources.MemoryLimitInBytes != 512<<20 || info.Resources.CpuShares != 300 || info.Overhead.MemoryLimitInBytes != 1<<20 {
			t.Errorf("%s", resp.Info["info"])
		}
		wantCode(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID, Resources: &r{CpuShares: 1}}), codes.InvalidArgument, "resources.cpu_shares", "1")
		wantCode(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: podID, Overhead: &r{MemoryLimitInBytes: -2}}), codes.InvalidArgument, "overhead.memory_limit_in_bytes", "-2")
		wantCode(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: strings.Repeat("0", 64)}), codes.NotFound)
		wantCode(t, resize(&runtimeapi.UpdatePodSandboxResourcesRequest{}), codes.InvalidArgument, "pod_sandbox_id")
	})
}

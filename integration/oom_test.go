//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// oomRuns is how many containers TestOOMKilled runs; `make test-oom` runs 500.
const oomRuns = "BERTH_OOM_RUNS"

// oomMemory is less than what eats more, and enough for a shell.
const oomMemory = 16 << 20

// eatMemory has dd fill a buffer four times as large as oomMemory.
const eatMemory = "dd if=/dev/zero of=/dev/null bs=64M count=1"

// TestOOMKilled: the first status that says that a container has exited says that memory ran out, each time.
func TestOOMKilled(t *testing.T) {
	runs := 60
	if s := os.Getenv(oomRuns); s != "" {
		var err error
		runs, err = strconv.Atoi(s)
		must(t, err)
	}
	n := newNode(t)
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	t.Run("init", func(t *testing.T) { oomKilled(t, n, n.Cgroup(), runs) })
	t.Run("others", func(t *testing.T) { oomOfOthers(t, n, n.Cgroup()) })
}

// oomKilled runs containers whose only process runs out of memory.
func oomKilled(t *testing.T, n *lab.Node, parent string, runs int) {
	ctx := t.Context()
	const workers = 3
	todo := make(chan int, runs)
	for i := range runs {
		todo <- i
	}
	close(todo)
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		wrong int
	)
	for w := range workers {
		pod := n.Pod(fmt.Sprint("oom-", w))
		pod.Linux.CgroupParent = parent
		podID, err := n.CRI.RunPod(ctx, pod)
		must(t, err)
		t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
		wg.Go(func() {
			for i := range todo {
				st, err := oomOnce(ctx, n, podID, pod, i)
				if err == nil && st.Reason == "OOMKilled" && st.ExitCode == 137 && st.Message != "" {
					continue
				}
				mu.Lock()
				if wrong++; wrong <= 5 {
					t.Errorf("run %d: %v: %q, exit code %d: %s", i, err, st.GetReason(), st.GetExitCode(), st.GetMessage())
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	t.Logf("%d of %d containers were told wrong", wrong, runs)
}

// oomOnce runs a container and returns the first of its statuses that says Exited.
func oomOnce(ctx context.Context, n *lab.Node, podID string, pod *runtimeapi.PodSandboxConfig, i int) (*runtimeapi.ContainerStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	c := lab.Sh(fmt.Sprint("eater-", i), "exec "+eatMemory)
	c.Linux.Resources.MemoryLimitInBytes = oomMemory
	id, err := n.CRI.Start(ctx, podID, pod, c)
	if err != nil {
		return nil, err
	}
	for {
		st, err := n.CRI.ContainerState(ctx, id) // no pause between two: the first is what counts
		if err != nil {
			return nil, err
		}
		if st.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			_, err := n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			return st, err
		}
	}
}

// oomOfOthers: a container of which any process was killed for memory is OOMKilled, however its init ends, as containerd
// tells it; one that was killed by somebody is not.
func oomOfOthers(t *testing.T, n *lab.Node, parent string) {
	ctx := t.Context()
	pod := n.Pod("oom-others")
	pod.Linux.CgroupParent = parent
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
	for name, test := range map[string]struct {
		script, reason string
		code           int32
	}{
		"child-then-0":  {eatMemory + "; exit 0", "OOMKilled", 0},
		"child-then-3":  {eatMemory + "; exit 3", "OOMKilled", 3},
		"grandchild":    {"(sh -c '" + eatMemory + "; true'); exit 4", "OOMKilled", 4},
		"enough-memory": {"dd if=/dev/zero of=/dev/null bs=1M count=64; exit 5", "Error", 5},
		"killed":        {"sleep 86400 & wait", "Error", 137},
	} {
		c := lab.Sh(name, test.script)
		c.Linux.Resources.MemoryLimitInBytes = oomMemory
		id, err := n.CRI.Start(ctx, podID, pod, c)
		must(t, err)
		if name == "killed" {
			_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
			must(t, err)
		}
		st, err := n.CRI.WaitExit(ctx, id, time.Minute)
		must(t, err)
		if st.Reason != test.reason || st.ExitCode != test.code {
			t.Errorf("%s: %s, exit code %d; want %s, %d", name, st.Reason, st.ExitCode, test.reason, test.code)
		}
	}
}

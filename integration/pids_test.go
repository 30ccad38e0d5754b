//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestPidsLimit: a pod that uses up its limit of processes, while it floods its log, keeps its shim, and what can be done
// without a new process can be done.
func TestPidsLimit(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	pod := n.Pod("bombs")
	pod.Linux.CgroupParent = n.Cgroup() + "/podbombs"
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() {
		must(t, n.CRI.RemovePod(context.Background(), podID))
		must(t, lab.RemoveCgroup(pod.Linux.CgroupParent)) // the kubelet's, in life
	})
	shim, err := shimPID(ctx, n, podID)
	must(t, err)
	limit := cgroupFile(pod.Linux.CgroupParent, "pids", "pids.max", "pids.max")
	// refused is how many forks the kernel has refused: it counts them where the limit is, or where the process is.
	refused := func(cgroup string) (n int) {
		for _, at := range []string{pod.Linux.CgroupParent, cgroup} {
			data, err := os.ReadFile(cgroupFile(at, "pids", "pids.events", "pids.events"))
			must(t, err)
			for line := range strings.Lines(string(data)) {
				if value, ok := strings.CutPrefix(line, "max "); ok {
					count, err := strconv.Atoi(strings.TrimSpace(value))
					must(t, err)
					n += count
				}
			}
		}
		return n
	}
	const flood = 20_000_000 // bytes, on each stream
	for i := range 10 {
		must(t, os.WriteFile(limit, []byte("max"), 0))
		c := lab.Sh(fmt.Sprint("bomb-", i), fmt.Sprintf(`
(yes to-the-log | head -c %d & yes to-the-log | head -c %d >&2 &
 bomb() { bomb | bomb & }; bomb
 while :; do sleep 86400 & done) &
exec sleep 86400`, flood, flood))
		id, err := n.CRI.Create(ctx, podID, pod, c)
		must(t, err)
		cgroup, _, err := cgroupOf(ctx, n, id)
		must(t, err)
		before := refused(cgroup)
		must(t, os.WriteFile(limit, []byte("80"), 0))
		_, err = n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		must(t, err)
		must(t, lab.Eventually(ctx, 2*time.Minute, "a fork that is refused", func(context.Context) error {
			if refused(cgroup) == before {
				return fmt.Errorf("%d have been", before)
			}
			return nil
		}))
		must(t, os.WriteFile(limit, []byte("1"), 0)) // from now on, whatever ends meanwhile
		for range 3 {                                // the shim has work beside the flood
			_, err = n.CRI.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: id})
			must(t, err)
			_, _ = n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 30}) // may be refused
		}
		st, err := n.CRI.ContainerState(ctx, id)
		must(t, err)
		if st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Errorf("round %d: the container is %v: %s: %s", i, st.State, st.Reason, st.Message)
		}
		if now, err := shimPID(ctx, n, podID); err != nil || now != shim {
			t.Fatalf("round %d: the shim was %d, is %d: %v", i, shim, now, err)
		}
		_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
		must(t, err)
		st, err = n.CRI.WaitExit(ctx, id, time.Minute)
		must(t, err)
		if st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("round %d: %s, exit code %d: %s", i, st.Reason, st.ExitCode, st.Message)
		}
		_, err = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		must(t, err)
	}
	resp, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID})
	must(t, err)
	if resp.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("the pod is %v", resp.Status.State)
	}
}

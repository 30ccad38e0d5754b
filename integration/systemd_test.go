//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestSystemdDriver: sandboxes and containers are scopes of systemd, with limits that a reload does not undo, and no unit
// is left of them.
func TestSystemdDriver(t *testing.T) {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		t.Skip("systemd is not process 1 here; `make test-vm` has a machine where it is")
	}
	n := newNodeServing(t, "--cgroup-driver", "auto")
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	slice := fmt.Sprintf("berthit%d.slice", n.Index)
	t.Cleanup(func() { _ = exec.Command("systemctl", "stop", slice).Run() })

	conf, err := n.CRI.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	must(t, err)
	if conf.GetLinux() == nil || conf.Linux.CgroupDriver != runtimeapi.CgroupDriver_SYSTEMD {
		t.Errorf("RuntimeConfig: %v", conf)
	}

	pod := n.Pod("scoped")
	pod.Linux.CgroupParent = "/" + slice
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	c := lab.Sh("ctr", "trap 'exit 7' TERM; echo started; sleep 86400 & wait")
	c.Linux.Resources.MemoryLimitInBytes, c.Linux.Resources.CpuQuota, c.Linux.Resources.CpuPeriod = 64<<20, 50000, 100000
	id, err := n.CRI.Start(ctx, podID, pod, c)
	must(t, err)
	sandbox, ctr := "berth-"+podID+".scope", "berth-"+id+".scope"

	t.Run("units", func(t *testing.T) {
		for _, unit := range []string{sandbox, ctr} {
			want := map[string]string{
				"ActiveState": "active", "Slice": slice, "Delegate": "yes", "ControlGroup": path.Join("/"+slice, unit),
			}
			if unit == ctr {
				want["MemoryMax"] = "67108864"
				want["CPUQuotaPerSecUSec"] = "500ms"
			}
			for property, value := range want {
				if got := unitProperty(t, unit, property); got != value {
					t.Errorf("%s: %s is %q, want %q", unit, property, got, value)
				}
			}
		}
		cgroup, _, err := cgroupOf(ctx, n, id)
		must(t, err)
		if cgroup != path.Join("/"+slice, ctr) {
			t.Errorf("the status says %s", cgroup)
		}
	})

	t.Run("limits outlive a reload of systemd", func(t *testing.T) {
		_, err := n.CRI.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 << 20, CpuQuota: 70000},
		})
		must(t, err)
		must(t, exec.CommandContext(ctx, "systemctl", "daemon-reload").Run())
		cgroup := path.Join("/"+slice, ctr)
		if got := limitOf(t, cgroup, "memory", "memory.limit_in_bytes", "memory.max"); got != "100663296" {
			t.Errorf("memory limit %s", got)
		}
		if got := limitOf(t, cgroup, "cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "70000") {
			t.Errorf("CPU quota %s", got)
		}
		if got := unitProperty(t, ctr, "MemoryMax"); got != "100663296" {
			t.Errorf("MemoryMax %s", got)
		}
		// And devices can still be opened.
		_, err = n.CRI.Exec(ctx, id, "sh", "-c", "echo x > /dev/null && head -c 1 /dev/zero > /dev/null")
		must(t, err)
	})

	t.Run("exec in a cgroup of its own", func(t *testing.T) {
		out, err := n.CRI.Exec(ctx, id, "sh", "-c", "cat /proc/self/cgroup")
		must(t, err)
		if out == "" {
			t.Error("no cgroup")
		}
		_, err = n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "sleep 600 & sleep 600"}, Timeout: 1})
		if err == nil {
			t.Error("an exec that hangs does not time out")
		}
	})

	t.Run("a daemon that is started again knows them", func(t *testing.T) {
		must(t, n.KillBerth())
		must(t, n.StartBerth(ctx))
		_, err := n.CRI.Exec(ctx, id, "true")
		must(t, err)
	})

	t.Run("kills for memory are told right", func(t *testing.T) { oomKilled(t, n, "/"+slice, 12) })

	t.Run("no unit is left", func(t *testing.T) {
		_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60})
		must(t, err)
		st, err := n.CRI.WaitExit(ctx, id, time.Minute)
		must(t, err)
		if st.ExitCode != 7 {
			t.Errorf("exit code %d (%s)", st.ExitCode, st.Reason)
		}
		must(t, n.CRI.RemovePod(ctx, podID))
		must(t, lab.Eventually(ctx, time.Minute, "end of units", func(ctx context.Context) error {
			out, err := exec.CommandContext(ctx, "systemctl", "list-units", "--all", "--no-legend", "--plain", "berth-*.scope").Output()
			if err == nil && strings.TrimSpace(string(out)) != "" {
				err = fmt.Errorf("units are left:\n%s", out)
			}
			return err
		}))
		for _, unit := range []string{sandbox, ctr} {
			if dir := cgroupFile(path.Join("/"+slice, unit), "memory", "", ""); onFileSystem(dir) {
				t.Errorf("%s is left", dir)
			}
		}
	})
}

func unitProperty(t *testing.T, unit, property string) string {
	t.Helper()
	out, err := exec.Command("systemctl", "show", "--value", "-p", property, unit).Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

//go:build integration

package integration

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestExecsKilledWhileTheyStart has clients of execs give up while these start, and then ends the container. libcontainer
// starts a process by way of two others, and what it does not know of stays behind as zombies: the init of a PID namespace
// that has one does not end, and no exit code is told.
func TestExecsKilledWhileTheyStart(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	p := newStreamingPod(t, n)
	ctx := t.Context()
	server := stormProcesses(t, n)["exec server"]
	const script = "trap 'exit 7' TERM; while :; do sleep 0.1; done"
	for round := range 2 {
		cfg := lab.Sh(fmt.Sprint("ends-", round), script)
		cfg.Linux.Resources.CpuShares = 1024
		id := p.start(t, cfg)
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range 12 {
					ctx, cancel := context.WithTimeout(ctx, time.Duration(rand.Int64N(int64(400*time.Millisecond))))
					_, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 30})
					cancel()
					if err != nil && status.Code(err) != codes.DeadlineExceeded {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		must(t, lab.Eventually(ctx, soon, "no exec has left a zombie", func(context.Context) error {
			if dead := zombies(t, server); len(dead) > 0 {
				return fmt.Errorf("%d of the exec server's: %.200q", len(dead), dead)
			}
			return nil
		}))
		_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60})
		must(t, err)
		st, err := n.CRI.ContainerState(ctx, id)
		must(t, err)
		if st.ExitCode != 7 {
			t.Errorf("it has ended with %d (%s: %s)", st.ExitCode, st.Reason, st.Message)
		}
	}
}

// zombies are the children of a process that have ended and that it has not taken note of.
func zombies(t *testing.T, parent int) (found []string) {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, dir := range dirs {
		stat, _ := os.ReadFile(dir + "/stat") // it may have gone
		name, after, _ := strings.Cut(string(stat), ") ")
		if f := strings.Fields(after); len(f) > 1 && f[0] == "Z" && f[1] == strconv.Itoa(parent) {
			found = append(found, name)
		}
	}
	return found
}

// TestKilledExecServerLeavesNothing ends the exec server in ways in which it cannot kill what it runs. The daemon, or the
// next one, does.
func TestKilledExecServerLeavesNothing(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	p := newStreamingPod(t, n)
	ctx := t.Context()
	quiet := lab.Container("quiet", "sleep", "86400")
	quiet.Linux.Resources.CpuShares = 1024
	id := p.start(t, quiet)
	must(t, lab.Eventually(ctx, soon, "the pod's containers have all their processes", func(ctx context.Context) error {
		_, err := n.CRI.Exec(ctx, p.sleeper, "pgrep", "sleep")
		return err
	}))
	before, err := n.Processes()
	must(t, err)
	for _, tc := range []struct {
		name string
		end  func(server int) error
	}{
		{"killed", func(server int) error { return unix.Kill(server, unix.SIGKILL) }},
		{"stopped for good", func(server int) error { return unix.Kill(server, unix.SIGSTOP) }},
		{"killed with its daemon", func(server int) error {
			if err := unix.Kill(server, unix.SIGKILL); err != nil {
				return err
			}
			if err := n.KillBerth(); err != nil {
				return err
			}
			return n.StartBerth(ctx)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var execs sync.WaitGroup
			for range 5 {
				execs.Go(func() {
					_, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", hostileProbe}, Timeout: 20})
					if c := status.Code(err); c != codes.Unavailable && c != codes.DeadlineExceeded {
						t.Errorf("an exec ends with %v", err)
					}
				})
			}
			must(t, lab.Eventually(ctx, soon, "all execs run", func(context.Context) error {
				now, err := n.Processes()
				if err == nil && len(now) < len(before)+5*4 {
					err = fmt.Errorf("%d processes, before %d", len(now), len(before))
				}
				return err
			}))
			must(t, tc.end(stormProcesses(t, n)["exec server"]))
			execs.Wait()
			must(t, lab.Eventually(ctx, 2*time.Minute, "an exec passes and nothing is left of the others", func(ctx context.Context) error {
				if _, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 5}); err != nil {
					return err
				}
				now, err := n.Processes()
				if err != nil {
					return err
				}
				maps.DeleteFunc(now, func(pid int, _ string) bool { _, ok := before[pid]; return ok })
				if cgroups := execCgroups(t, n); len(now)+len(cgroups) > 0 {
					return fmt.Errorf("%d processes: %.300s, and %d cgroups: %.300q", len(now), fmt.Sprint(now), len(cgroups), cgroups)
				}
				return nil
			}))
		})
	}
}

// execCgroups are the cgroups of executions, wherever a container of the node has them.
func execCgroups(t *testing.T, n *lab.Node) (found []string) {
	t.Helper()
	for _, top := range []string{"/sys/fs/cgroup/freezer", "/sys/fs/cgroup"} {
		err := filepath.WalkDir(top+n.Cgroup(), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "exec-") {
				found = append(found, path)
			}
			return nil // it may have gone
		})
		must(t, err)
	}
	return found
}

// TestFrozenExecs: what a privileged process does with its own cgroup keeps neither it nor its container from ending. On v1
// a frozen process does not die of SIGKILL.
func TestFrozenExecs(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	if onCgroup2() {
		t.Skip("on cgroup v2 a frozen process dies")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	pod := n.Pod("frozen")
	pod.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
	const own = "cd /sys/fs/cgroup/freezer/exec-*; "
	for i, tc := range []struct {
		script string
		dies   bool // before its container does
	}{
		{own + "echo FROZEN > freezer.state", true},
		{own + "mkdir a a/b; echo $$ > a/b/cgroup.procs; (setsid sleep 86400 &) ; echo FROZEN > a/b/freezer.state", true},
		{"echo FROZEN > /sys/fs/cgroup/freezer/freezer.state", false},
	} {
		cfg := lab.Container(fmt.Sprint("frozen-", i), "sleep", "86400")
		cfg.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true, NamespaceOptions: cfg.Linux.SecurityContext.NamespaceOptions}
		cfg.Linux.Resources.CpuShares = 1024
		id, err := n.CRI.Start(ctx, podID, pod, cfg)
		must(t, err)
		before, err := n.Processes()
		must(t, err)
		_, err = n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", tc.script + "; sleep 86400"}, Timeout: 3})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s: %v", tc.script, err)
		}
		must(t, lab.Eventually(ctx, soon, "nothing is left of the exec", func(context.Context) error {
			if !tc.dies {
				return nil
			}
			now, err := n.Processes()
			if err != nil {
				return err
			}
			maps.DeleteFunc(now, func(pid int, _ string) bool { _, ok := before[pid]; return ok })
			if cgroups := execCgroups(t, n); len(now)+len(cgroups) > 0 {
				return fmt.Errorf("%v in %q", now, cgroups)
			}
			return nil
		}))
		_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
		must(t, err)
	}
}

// TestStopAndRemoveAtOnce: a stop that has waited for a removal does not bring back what is gone.
func TestStopAndRemoveAtOnce(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	for i := range 3 {
		pod := n.Pod(fmt.Sprint("both-", i))
		podID, err := n.CRI.RunPod(ctx, pod)
		must(t, err)
		id, err := n.CRI.Start(ctx, podID, pod, lab.Sh("slow", "trap 'sleep 0.2; exit 0' TERM; while :; do sleep 0.1; done"))
		must(t, err)
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 60})
				if err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				_, err := n.CRI.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: podID})
				if err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				_, err := n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
}

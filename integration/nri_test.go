//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// ownMemoryLimit prints the limit of the container's own cgroup, as v1 or v2 has it.
const ownMemoryLimit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max"

// TestNRIAdjustments has a plugin change a container in each way that NRI knows and this machine has, and looks at what
// became of it from inside; then it asks for what cannot be, which must leave nothing; then it changes what runs.
func TestNRIAdjustments(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("another runtime's plugins are its own matter")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("from the host\n"), 0o644))
	hook := filepath.Join(dir, "hook")
	must(t, os.WriteFile(hook, []byte("#!/bin/sh\ncat > \"$1\"\n"), 0o755))
	oom := 777
	p := &nriPlugin{adjust: map[string]func(*api.ContainerAdjustment){
		"all": func(a *api.ContainerAdjustment) {
			a.AddEnv("ADDED", "by a plugin")
			a.RemoveEnv("UNWANTED")
			a.AddAnnotation("made.by/plugin", "yes")
			a.AddMount(&api.Mount{Destination: "/added", Source: dir, Type: "bind", Options: []string{"rbind", "ro"}})
			a.AddDevice(&api.LinuxDevice{Path: "/dev/added", Type: "c", Major: 1, Minor: 5})
			a.AddRlimit("RLIMIT_NOFILE", 4321, 1234)
			a.AddHooks(&api.Hooks{
				CreateRuntime: []*api.Hook{{Path: hook, Args: []string{"hook", filepath.Join(dir, "created")}}},
				Poststop:      []*api.Hook{{Path: hook, Args: []string{"hook", filepath.Join(dir, "stopped")}}},
			})
			a.SetLinuxMemoryLimit(48 << 20)
			a.SetLinuxPidLimits(123)
			a.SetLinuxOomScoreAdj(&oom)
			a.AddOrReplaceNamespace(&api.LinuxNamespace{Type: "uts"})
			a.SetLinuxIOPriority(&api.LinuxIOPriority{Class: api.IOPrioClass_IOPRIO_CLASS_BE, Priority: 7})
			a.SetLinuxScheduler(&api.LinuxScheduler{Policy: api.LinuxSchedulerPolicy_SCHED_BATCH})
			a.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", Syscalls: []*api.LinuxSyscall{
				{Names: []string{"mkdir", "mkdirat"}, Action: "SCMP_ACT_ERRNO"},
			}})
		},
		"args": func(a *api.ContainerAdjustment) { a.SetArgs([]string{"sh", "-c", "echo other program"}) },
		"clumsy": func(a *api.ContainerAdjustment) {
			a.AddMount(&api.Mount{Destination: "/x", Source: dir + "/none", Type: "bind"})
		},
	}}
	s := p.attach(t, n)
	pod := n.Pod("adjusted")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { // before the ledger is looked at
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := n.CRI.RemovePod(ctx, podID); err != nil {
			t.Error(err)
		}
	})

	all := lab.Sh("all", `echo "env=$ADDED/$UNWANTED"
echo "file=$(cat /added/file)"; touch /added/x 2>/dev/null || echo mount=readonly
head -c 2 /dev/added | od -An -tx1 | sed 's/^ */device=/'
echo "nofile=$(ulimit -Sn)/$(ulimit -Hn)"
echo "oom=$(cat /proc/self/oom_score_adj)"
mkdir /tmp/x 2>/dev/null || echo mkdir=refused
echo "memory=$(`+ownMemoryLimit+`)"
sed -n 's/^policy *: */policy=/p' /proc/self/sched
exec sleep 3600`)
	all.Envs = []*runtimeapi.KeyValue{{Key: "UNWANTED", Value: []byte("1")}}
	id, err := n.CRI.Start(ctx, podID, pod, all)
	must(t, err)
	want := []string{"env=by a plugin/", "file=from the host", "mount=readonly", "device=00 00", "nofile=1234/4321", "oom=777", "mkdir=refused", fmt.Sprintf("memory=%d", 48<<20)}
	must(t, lab.Eventually(ctx, time.Minute, "what the plugin wants is in the container", func(context.Context) error {
		lines, err := lab.Log(pod, all)
		if err != nil {
			return err
		}
		var missing []string
		for _, w := range want {
			if !slices.ContainsFunc(lines, func(l lab.LogLine) bool { return l.Text == w }) {
				missing = append(missing, w)
			}
		}
		if missing != nil {
			return fmt.Errorf("%q are missing in %v", missing, lines)
		}
		return nil
	}))
	if state, err := os.ReadFile(filepath.Join(dir, "created")); err != nil || !strings.Contains(string(state), id) {
		t.Errorf("the hook before the start got %q, %v", state, err)
	}
	status, err := n.CRI.ContainerState(ctx, id)
	must(t, err)
	if limit := status.GetResources().GetLinux().GetMemoryLimitInBytes(); limit != 48<<20 {
		t.Errorf("the status tells a limit of %d", limit)
	}

	// What runs is changed out of the blue, and in answer to a resize.
	u := &api.ContainerUpdate{ContainerId: id}
	u.SetLinuxMemoryLimit(56 << 20)
	failed, err := s.UpdateContainers([]*api.ContainerUpdate{u})
	if err != nil || len(failed) > 0 {
		t.Errorf("update: %v %v", failed, err)
	}
	expectLimit(t, n, id, 56<<20)
	p.update = func(c *api.Container, _ *api.LinuxResources) []*api.ContainerUpdate {
		u := &api.ContainerUpdate{ContainerId: c.GetId()}
		u.SetLinuxMemoryLimit(60 << 20)
		return []*api.ContainerUpdate{u}
	}
	_, err = n.CRI.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: id, Linux: &runtimeapi.LinuxContainerResources{CpuShares: 512},
	})
	must(t, err)
	expectLimit(t, n, id, 60<<20)

	args, err := n.CRI.Start(ctx, podID, pod, lab.Sh("args", "echo asked for"))
	must(t, err)
	_, err = n.CRI.WaitExit(ctx, args, time.Minute)
	must(t, err)
	if lines, err := lab.Log(pod, lab.Sh("args", "")); err != nil || len(lines) != 1 || lines[0].Text != "other program" {
		t.Errorf("%v %v", lines, err)
	}

	_, err = n.CRI.Create(ctx, podID, pod, lab.Sleeper("clumsy"))
	if err == nil || !strings.Contains(err.Error(), "10-test") || !strings.Contains(err.Error(), `Mounts["/x"]`) {
		t.Errorf("a mistake is told as: %v", err)
	}
	list, err := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	must(t, err)
	for _, c := range list.Containers {
		if c.GetMetadata().GetName() == "clumsy" {
			t.Errorf("the container of the mistake is there: %v", c)
		}
	}

	_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
	must(t, err)
	for _, id := range []string{id, args} {
		_, err = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		must(t, err)
	}
	if state, err := os.ReadFile(filepath.Join(dir, "stopped")); err != nil || !strings.Contains(string(state), id) {
		t.Errorf("the hook after the stop got %q, %v", state, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var about []string
	for _, e := range p.events {
		if what, name, _ := strings.Cut(e, " "); name == "all" {
			about = append(about, what)
		}
	}
	if got := strings.Join(about, " "); got != "create created start started update updated stop remove" {
		t.Errorf("the plugin is told: %s", got)
	}
}

func expectLimit(t *testing.T, n *lab.Node, id string, want int64) {
	t.Helper()
	out, err := n.CRI.Exec(t.Context(), id, "sh", "-c", ownMemoryLimit)
	if err != nil || strings.TrimSpace(out) != fmt.Sprint(want) {
		t.Errorf("the limit is %q, not %d: %v", out, want, err)
	}
}

// A daemon that is killed and started again takes its plugins back, tells them of what has gone on, and hears of no
// container that they were never told of.
func TestNRIPluginReconnects(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("another runtime's plugins are its own matter")
	}
	ctx := t.Context()
	first := (&nriPlugin{}).attach(t, n)
	pod := n.Pod("goes-on")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	id, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("goes-on"))
	must(t, err)
	must(t, n.KillBerth())
	first.Wait()
	must(t, n.StartBerth(ctx))
	again := &nriPlugin{}
	again.attach(t, n)
	again.mu.Lock()
	synced := slices.Clone(again.synced)
	again.mu.Unlock()
	if !slices.Equal(synced, []string{id}) {
		t.Errorf("the plugin is told of %v, not of %s", synced, id)
	}
	_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id})
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, podID))
	again.mu.Lock()
	defer again.mu.Unlock()
	if got := strings.Join(again.events, ", "); got != "stop goes-on, remove goes-on" {
		t.Errorf("the plugin is told: %s", got)
	}
}

// TestNRIKillMatrix kills the daemon before and after every event that a plugin is told, as TestKillMatrix does at all
// other steps, which it passes without a plugin. An end is told by who sees it first, the call that has asked for it or the
// shim's watch, so that no life is sure to pass those points.
func TestNRIKillMatrix(t *testing.T) {
	ctx := t.Context()
	points := slices.DeleteFunc(livePoints(ctx, t, installWatcher), func(p string) bool {
		return !strings.Contains(p, ".nri") || strings.HasPrefix(p, "Exit.") || strings.HasPrefix(p, "StopContainer.") || strings.HasPrefix(p, "ShimDied.")
	})
	if len(points) < 16 {
		t.Fatalf("only these points are events of plugins: %v", points)
	}
	t.Logf("%d points: %v", len(points), points)
	matrix(t, points, func(k *killNode, point string) error {
		if _, err := os.Stat(k.NRISocket()); err != nil {
			return errors.Join(errors.New("the node has no NRI"), err)
		}
		_, err := k.killAt(ctx, point, "")
		return err
	}, installWatcher)
}

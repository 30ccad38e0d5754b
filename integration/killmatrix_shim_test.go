//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// leastShimPoints is how many fail points a shim must have.
const leastShimPoints = 10

// TestShimKillMatrix kills the shim of a pod at each of its fail points, in turn. The daemon sees it: the pod is not ready,
// its containers have exited, no process of theirs is left, the names are free again, and nothing else is harmed.
func TestShimKillMatrix(t *testing.T) {
	ctx := t.Context()
	all := shimPoints(ctx, t)
	if len(all) < leastShimPoints {
		t.Fatalf("%d fail points of a shim, at least %d are expected: %v", len(all), leastShimPoints, all)
	}
	t.Logf("%d points of the shim", len(all))
	began := time.Now()
	t.Run("calls", func(t *testing.T) { // ends when its nodes have, which run side by side
		matrix(t, all, func(k *killNode, point string) error { return k.killShimAt(ctx, point) })
	})
	t.Logf("%d points of the shim in %v", len(all), time.Since(began).Round(time.Second))
}

// shimPoints lists the points that the shims pass in a life that is not disturbed.
func shimPoints(ctx context.Context, t *testing.T) []string {
	t.Helper()
	k, err := newKillNode(ctx, t)
	must(t, err)
	defer func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}()
	if k.Foreign() {
		t.Skip("another runtime has no fail points")
	}
	list := filepath.Join(k.Dir, "points")
	must(t, k.KillBerth())
	must(t, k.StartBerth(ctx, listTo(envShimList, list)))
	must(t, newShimLife(k.Node).all(ctx))
	must(t, k.settle(ctx))
	passed, err := points(list)
	must(t, err)
	return passed
}

// shimLife is a pod that makes use of all that a shim does.
type shimLife struct {
	n          *lab.Node
	pod        *runtimeapi.PodSandboxConfig
	stops, run *runtimeapi.ContainerConfig // one that is stopped, one that runs until the pod is
	podID      string
	pid        int // of the shim
	ids        map[*runtimeapi.ContainerConfig]string
	pids       map[*runtimeapi.ContainerConfig]int
	failed     map[*runtimeapi.ContainerConfig]bool // StartContainer failed
	stopping   bool                                 // the first was told to stop
	errs       []error
}

func newShimLife(n *lab.Node) *shimLife {
	l := &shimLife{n: n, pod: n.Pod("shim")}
	l.pod.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	l.stops = ticking("stops", fmt.Sprintf("exit %d", stoppedCode))
	l.run = ticking("runs", "exit 1")
	l.run.Stdin = true
	return l
}

// all makes all calls, none of which may fail.
func (l *shimLife) all(ctx context.Context) error {
	l.calls(ctx, func() bool { return false })
	return errors.Join(l.errs...)
}

// calls makes the calls, and after each asks whether it is the last. Errors are kept, and no call is made that needs what an
// earlier one did not give.
func (l *shimLife) calls(ctx context.Context, enough func() bool) {
	l.ids, l.pids, l.failed = map[*runtimeapi.ContainerConfig]string{}, map[*runtimeapi.ContainerConfig]int{}, map[*runtimeapi.ContainerConfig]bool{}
	l.errs, l.podID, l.pid, l.stopping = nil, "", 0, false
	cri := l.n.CRI
	did := func(what string, err error) bool {
		if err != nil {
			l.errs = append(l.errs, fmt.Errorf("%s: %w", what, err))
		}
		return err == nil && !enough()
	}
	err := func() (err error) {
		if l.podID, err = cri.RunPod(ctx, l.pod); err == nil {
			l.pid, err = shimPID(ctx, l.n, l.podID)
		}
		return err
	}()
	if !did("RunPodSandbox", err) {
		return
	}
	for _, c := range []*runtimeapi.ContainerConfig{l.stops, l.run} {
		resp, err := cri.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: l.podID, Config: c, SandboxConfig: l.pod})
		if err == nil {
			l.ids[c] = resp.ContainerId
			l.pids[c], _ = containerPID(ctx, l.n, resp.ContainerId) // none, when it has died already
		}
		if !did("CreateContainer", err) {
			return
		}
		_, err = cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: l.ids[c]})
		l.failed[c] = err != nil
		if !did("StartContainer", err) {
			return
		}
	}
	// Attach, to a container with stdin: crictl ends when its own input does.
	attach, cancel := context.WithTimeout(ctx, 2*time.Second)
	cmd := l.n.CrictlCommand(attach, "attach", "-i", l.ids[l.run])
	cmd.Stdin = strings.NewReader("hello\n")
	cmd.WaitDelay = time.Second
	_ = cmd.Run() // the container ignores it, and attach may last as long as the container
	cancel()
	if !did("Attach", nil) {
		return
	}
	_, err = cri.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: l.ids[l.run]})
	if !did("ReopenContainerLog", err) {
		return
	}
	l.stopping = true
	_, err = cri.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: l.ids[l.stops], Timeout: 20})
	if !did("StopContainer", err) {
		return
	}
	_, err = cri.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: l.ids[l.stops]})
	if err == nil {
		delete(l.ids, l.stops)
	}
	if !did("RemoveContainer", err) {
		return
	}
	_, err = cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: l.podID})
	if !did("StopPodSandbox", err) {
		return
	}
	_, err = cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: l.podID})
	if err == nil {
		l.podID = ""
	}
	did("RemovePodSandbox", err)
}

// gone tells whether the shim has ended. Before its pid is known, a failed RunPodSandbox says so.
func (l *shimLife) gone() bool {
	if l.pid == 0 {
		return len(l.errs) > 0
	}
	for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ended(l.pid) {
			return true
		}
	}
	return false
}

// killShimAt has a shim die at a point, and checks what the daemon makes of it.
func (k *killNode) killShimAt(ctx context.Context, point string) error {
	if err := k.KillBerth(); err != nil {
		return err
	}
	if err := k.StartBerth(ctx, envShimKill+"="+point); err != nil {
		return err
	}
	l := newShimLife(k.Node)
	l.calls(ctx, l.gone)
	if !l.gone() {
		return fmt.Errorf("this life did not pass the point, or its shim lives on: %w", errors.Join(l.errs...))
	}
	if !k.Berth.Alive() {
		return errors.New("the daemon died, too")
	}
	check := func(when string, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w (errors of calls: %v)", when, err, l.errs)
		}
		return nil
	}
	if err := check("after the shim's death", l.mourned(ctx, point == "shim.tell-exit.before")); err != nil {
		return err
	}
	if err := check("clean-up", l.remove(ctx)); err != nil {
		return err
	}
	if err := check("clean-up", errors.Join(k.settle(ctx), k.unharmed(ctx))); err != nil {
		return err
	}
	// With a shim that lives, the same calls succeed.
	if err := k.KillBerth(); err != nil {
		return err
	}
	if err := k.StartBerth(ctx); err != nil {
		return err
	}
	if err := l.all(ctx); err != nil {
		return fmt.Errorf("repeated: %w", err)
	}
	return errors.Join(k.settle(ctx), k.unharmed(ctx))
}

// mourned checks that a pod without a shim is not ready and its containers have exited. kept says that the shim had noted
// the exit of the container that was stopped.
func (l *shimLife) mourned(ctx context.Context, kept bool) error {
	if l.podID == "" {
		return nil
	}
	if err := podEnds(ctx, l.n, l.podID); err != nil {
		return err
	}
	for c, id := range l.ids {
		want := []int32{killedCode}
		switch {
		case l.failed[c]:
			want = append(want, 128) // StartError
		case c == l.stops && kept:
			want = []int32{stoppedCode}
		}
		if err := containerEnds(ctx, l.n, id, l.pids[c], want...); err != nil {
			return fmt.Errorf("container %s: %w", c.Metadata.Name, err)
		}
	}
	return nil
}

// podEnds waits until a pod is not ready, which must have a reason.
func podEnds(ctx context.Context, n *lab.Node, id string) error {
	return lab.Eventually(ctx, 10*time.Second, "pod is not ready", func(ctx context.Context) error {
		resp, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
		if err != nil {
			return err
		}
		if resp.Status.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			return errors.New("it is ready")
		}
		if !strings.Contains(resp.Info["info"], `"reason":"`) {
			return fmt.Errorf("no reason in %.200s", resp.Info["info"])
		}
		return nil
	})
}

// containerEnds waits until a container has exited, with one of some codes, a reason and no process left.
func containerEnds(ctx context.Context, n *lab.Node, id string, pid int, codes ...int32) error {
	st, err := n.CRI.WaitExit(ctx, id, 10*time.Second)
	if err != nil {
		return err
	}
	ok := false
	for _, code := range codes {
		ok = ok || st.ExitCode == code
	}
	if !ok || st.Reason == "" || st.FinishedAt == 0 {
		return fmt.Errorf("it exited with %d (%s: %s) at %d, expected is one of %v", st.ExitCode, st.Reason, st.Message, st.FinishedAt, codes)
	}
	if pid > 0 {
		return awaitEnd(ctx, pid)
	}
	return nil
}

// remove stops and removes what there is.
func (l *shimLife) remove(ctx context.Context) error {
	var errs []error
	for _, id := range l.ids {
		_, err := l.n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 5})
		errs = append(errs, err)
		_, err = l.n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		errs = append(errs, err)
	}
	if l.podID != "" {
		errs = append(errs, l.n.CRI.RemovePod(ctx, l.podID))
	}
	return errors.Join(errs...)
}

// endings is a pod with containers in all states, and how each is to end when the pod's shim dies while the daemon is dead.
type endings struct {
	pod                     *runtimeapi.PodSandboxConfig
	podID                   string
	shim                    int
	created, runs, exits    *runtimeapi.ContainerConfig
	createdID, runsID       string
	exitsID                 string
	createdPID, runsPID     int
	exitsPID, exitsWithCode int
}

func newEndings(ctx context.Context, n *lab.Node, name string, shared bool) (*endings, error) {
	e := &endings{pod: n.Pod(name), exitsWithCode: 7}
	if shared {
		e.pod.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
	}
	var err error
	if e.podID, err = n.CRI.RunPod(ctx, e.pod); err != nil {
		return nil, err
	}
	if e.shim, err = shimPID(ctx, n, e.podID); err != nil {
		return nil, err
	}
	e.created, e.runs = ticking("created", "exit 1"), ticking("runs", "exit 1")
	e.exits = ticking("exits", fmt.Sprintf("exit %d", e.exitsWithCode))
	if e.createdID, err = n.CRI.Create(ctx, e.podID, e.pod, e.created); err != nil {
		return nil, err
	}
	if e.createdPID, err = containerPID(ctx, n, e.createdID); err != nil {
		return nil, err
	}
	runs, err := startTicks(ctx, n, e.podID, e.pod, e.runs)
	if err != nil {
		return nil, err
	}
	exits, err := startTicks(ctx, n, e.podID, e.pod, e.exits)
	if err != nil {
		return nil, err
	}
	e.runsID, e.runsPID, e.exitsID, e.exitsPID = runs.id, runs.pid, exits.id, exits.pid
	return e, errors.Join(runs.goesOn(ctx), exits.goesOn(ctx))
}

// TestShimKilledFromOutside kills the shims of pods with running containers, while the daemon lives and while it is dead.
func TestShimKilledFromOutside(t *testing.T) {
	ctx := t.Context()
	k, err := newKillNode(ctx, t)
	k = killTestNode(t, k, err)
	for _, shared := range []bool{false, true} {
		for _, dead := range []bool{false, true} {
			t.Run(fmt.Sprintf("shared PID namespace %t, daemon dead %t", shared, dead), func(t *testing.T) {
				e, err := newEndings(ctx, k.Node, "endings", shared)
				must(t, err)
				if dead {
					must(t, k.KillBerth())
				}
				// One exits by itself before: its exit is kept, whoever dies then.
				must(t, syscall.Kill(e.exitsPID, syscall.SIGTERM))
				must(t, awaitEnd(ctx, e.exitsPID))
				kept := filepath.Join(k.Run(), "containers", e.exitsID, "exit.json")
				must(t, lab.Eventually(ctx, 5*time.Second, "exit is kept", func(context.Context) error {
					_, err := os.Stat(kept)
					return err
				}))
				must(t, syscall.Kill(e.shim, syscall.SIGKILL))
				must(t, awaitEnd(ctx, e.shim))
				if dead {
					must(t, k.StartBerth(ctx))
				}
				must(t, podEnds(ctx, k.Node, e.podID))
				must(t, containerEnds(ctx, k.Node, e.exitsID, e.exitsPID, int32(e.exitsWithCode)))
				must(t, containerEnds(ctx, k.Node, e.runsID, e.runsPID, killedCode))
				must(t, containerEnds(ctx, k.Node, e.createdID, e.createdPID, killedCode))
				must(t, k.unharmed(ctx))
				must(t, k.CRI.RemovePod(ctx, e.podID))
				must(t, k.settle(ctx))
				again, err := k.CRI.RunPod(ctx, e.pod)
				must(t, err)
				must(t, k.CRI.RemovePod(ctx, again))
				must(t, k.settle(ctx))
			})
		}
	}
}

//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
	"github.com/berth-run/berth/internal/step"
)

// TestReboot takes away what a reboot takes away: processes, mounts, namespaces, cgroups and the run directory. The records
// stay, under another boot id: every container has exited, every pod is not ready, and all can be removed.
func TestReboot(t *testing.T) {
	ctx := t.Context()
	k, err := newBareNode(ctx, t, func(n *lab.Node) error {
		// A reboot takes the firewall's rules, too, but those here are in a table that others on the machine use.
		conflist := strings.ReplaceAll(n.Conflist(), `"ipMasq": true`, `"ipMasq": false`)
		return os.WriteFile(filepath.Join(n.CNIConf(), "10-lab.conflist"), []byte(conflist), 0o644)
	})
	k = killTestNode(t, k, err)
	for _, image := range append([]string{testimages.Busybox}, lifeImages...) {
		_, err := k.CRI.Pull(ctx, image)
		must(t, err)
	}
	k.before, err = k.snapshot()
	must(t, err)

	for _, crash := range []struct {
		point string // at which the daemon died before
		last  func(context.Context, string) error
	}{
		{"RunPodSandbox.record.before", nil},
		{"StopPodSandbox.containers.before", k.CRI.RemovePod},
		{"RemovePodSandbox.record.after", k.CRI.RemovePod},
	} {
		t.Run("after a crash at "+crash.point, func(t *testing.T) {
			rebooted(t, k, crash.point, crash.last)
		})
	}
}

// rebooted makes pods and containers in all states, with one pod in a state that only a crash leaves, and reboots.
func rebooted(t *testing.T, k *killNode, point string, last func(context.Context, string) error) {
	ctx := t.Context()
	var pods []*endings
	for i, shared := range []bool{false, true} {
		e, err := newEndings(ctx, k.Node, fmt.Sprint("pod-", i), shared)
		must(t, err)
		must(t, syscall.Kill(e.exitsPID, syscall.SIGTERM))
		_, err = k.CRI.WaitExit(ctx, e.exitsID, 10*time.Second)
		must(t, err)
		pods = append(pods, e)
	}
	stopped := k.Pod("stopped")
	stoppedID, err := k.CRI.RunPod(ctx, stopped)
	must(t, err)
	_, err = k.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: stoppedID})
	must(t, err)

	must(t, k.KillBerth())
	must(t, k.StartBerth(ctx, step.EnvKill+"="+point))
	half := k.Pod("half")
	id, err := k.CRI.RunPod(ctx, half)
	if last != nil {
		must(t, err)
		err = last(ctx, id)
	}
	if err == nil || !k.died(5*time.Second) {
		t.Fatalf("the daemon did not die: %v", err)
	}
	must(t, k.reboot())
	must(t, k.StartBerth(ctx))

	list, err := k.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	for _, p := range list.Items {
		if p.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("pod %s is %v after a reboot", p.Metadata.Name, p.State)
		}
	}
	for _, e := range pods {
		must(t, podEnds(ctx, k.Node, e.podID))
		must(t, containerEnds(ctx, k.Node, e.exitsID, 0, int32(e.exitsWithCode)))
		must(t, containerEnds(ctx, k.Node, e.runsID, 0, 255))
		must(t, containerEnds(ctx, k.Node, e.createdID, 0, 255))
		for _, id := range []string{e.exitsID, e.runsID} {
			_, err := k.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 5})
			must(t, err)
			_, err = k.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
			must(t, err)
		}
		must(t, k.CRI.RemovePod(ctx, e.podID))
	}
	must(t, podEnds(ctx, k.Node, stoppedID))
	must(t, k.CRI.RemovePods(ctx, func(*runtimeapi.PodSandbox) bool { return true }))
	must(t, k.settle(ctx))

	id, err = k.CRI.RunPod(ctx, half)
	must(t, err)
	must(t, k.CRI.RemovePod(ctx, id))
	_, err = newLife(k.Node, true).run(ctx, 0)
	must(t, err)
	must(t, k.settle(ctx))
}

// TestPowerCutLosesNoAddress: containernetworking/cni#1055, containerd#8197, #12923, harvester#7471, kubernetes#133081. The power
// goes while a pod is made. What plugins did is on the disk, and neither the pod's record nor what they have answered is: its
// address is given back all the same, at the next start.
func TestPowerCutLosesNoAddress(t *testing.T) {
	ctx := t.Context()
	configure := func(n *lab.Node) error {
		if err := os.MkdirAll(n.CNIConf(), 0o755); err != nil {
			return err
		}
		conflist := strings.ReplaceAll(n.Conflist(), `"ipMasq": true`, `"ipMasq": false`) // as for TestReboot
		return os.WriteFile(filepath.Join(n.CNIConf(), "10-lab.conflist"), []byte(conflist), 0o644)
	}
	k, err := newBareNode(ctx, t, configure)
	k = killTestNode(t, k, err)
	for _, point := range []string{"plugin.host-local.ADD.after", "plugin.bandwidth.ADD.after", "RunPodSandbox.record.after"} {
		t.Run(point, func(t *testing.T) {
			must(t, configure(k.Node))
			must(t, k.KillBerth())
			must(t, k.StartBerth(ctx, step.EnvKill+"="+point))
			if id, err := k.CRI.RunPod(ctx, k.Pod("cut")); err == nil || !k.died(5*time.Second) {
				t.Fatalf("the daemon did not die: %s, %v", id, err)
			}
			must(t, k.reboot())
			if got := addresses(t, k.Node); len(got) != 1 {
				t.Fatalf("addresses at the cut: %v", got)
			}
			for _, lost := range []string{"pods/*", "cni/results/*"} {
				files, err := filepath.Glob(filepath.Join(k.Root(), lost))
				must(t, err)
				for _, file := range files {
					must(t, os.Remove(file))
				}
			}
			must(t, os.RemoveAll(k.CNIConf())) // nor is there a configuration
			must(t, k.StartBerthUnready(ctx))
			if got := addresses(t, k.Node); len(got) != 0 {
				t.Errorf("addresses after the start: %v", got)
			}
			must(t, k.settle(ctx))
		})
	}
}

var bootField = regexp.MustCompile(`"Boot":"[^"]*"`)

// reboot is what happens to a node when its machine is restarted, less the machine.
func (k *killNode) reboot() error {
	if k.Berth.Alive() {
		if err := k.KillBerth(); err != nil {
			return err
		}
	}
	cgroups, err := filepath.Glob("/sys/fs/cgroup/*" + k.Cgroup() + "/*")
	if err != nil {
		return err
	}
	deeper, err := filepath.Glob("/sys/fs/cgroup/*" + k.Cgroup() + "/*/*")
	if err != nil {
		return err
	}
	onV2, err := filepath.Glob("/sys/fs/cgroup" + k.Cgroup() + "/*")
	if err != nil {
		return err
	}
	dirs := append(append(deeper, cgroups...), onV2...)
	deadline := time.Now().Add(10 * time.Second)
	for left := 1; left > 0; {
		if time.Now().After(deadline) {
			return errors.New("processes outlive SIGKILL")
		}
		left = 0
		for _, dir := range dirs {
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				continue // a file, or gone
			}
			for _, field := range strings.Fields(string(procs)) {
				if pid, err := strconv.Atoi(field); err == nil && pid > 1 && !ended(pid) {
					left++
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(mounts), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if fields := strings.Fields(lines[i]); len(fields) > 4 && strings.HasPrefix(fields[4], k.Run()+"/") {
			if err := unix.Unmount(fields[4], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmount %s: %w", fields[4], err)
			}
		}
	}
	for _, dir := range dirs {
		_ = unix.Rmdir(dir) // a file of cgroupfs is none
	}
	if err := os.RemoveAll(k.Run()); err != nil {
		return err
	}
	for _, what := range []string{"pods", "containers"} {
		records, err := filepath.Glob(filepath.Join(k.Root(), what, "*.json"))
		if err != nil {
			return err
		}
		for _, file := range records {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if !bootField.Match(text) {
				return fmt.Errorf("no boot id in %s", file)
			}
			text = bootField.ReplaceAll(text, []byte(`"Boot":"00000000-0000-0000-0000-000000000000"`))
			if err := os.WriteFile(file, text, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// randomKills is how often the daemon is killed by TestRandomKills, and randomLives how many lives go on meanwhile.
const (
	randomKills = 100
	randomLives = 3
)

// TestRandomKills kills the daemon at random moments, while lives go on side by side, an image comes and goes, and a
// process is executed in the bystander. Each call is repeated until it is answered, and in the end nothing is left.
func TestRandomKills(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	k, err := newKillNode(ctx, t)
	k = killTestNode(t, k, err)
	for _, image := range lifeImages {
		_, err := k.CRI.Pull(ctx, image)
		must(t, err)
	}
	k.before, err = k.snapshot()
	must(t, err)

	var (
		wg          sync.WaitGroup
		done        = make(chan struct{})
		lives, runs atomic.Int32
		pulls       atomic.Int32
	)
	over := func() bool {
		select {
		case <-done:
			return true
		default:
			return t.Failed() || ctx.Err() != nil
		}
	}
	// again repeats a call until there is a daemon that answers it.
	again := func(call func(context.Context) error) error {
		for {
			err := call(ctx)
			if err == nil || !isGone(err) || ctx.Err() != nil || t.Failed() {
				return err
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	for range randomLives {
		wg.Go(func() {
			for !over() {
				l := newLife(k.Node, true)
				for i := range l.acts {
					if err := again(l.acts[i].do); err != nil {
						t.Errorf("%s: %v", l.acts[i].name, err)
						return
					}
				}
				lives.Add(1)
			}
		})
	}
	wg.Go(func() {
		for !over() {
			err := errors.Join(
				again(func(ctx context.Context) error {
					_, err := k.CRI.Pull(ctx, testimages.Nginx)
					return err
				}),
				again(func(ctx context.Context) error {
					_, err := k.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: testimages.Nginx}})
					return err
				}))
			if err != nil {
				t.Errorf("image: %v", err)
				return
			}
			pulls.Add(1)
		}
	})
	wg.Go(func() {
		for !over() {
			err := again(func(ctx context.Context) error {
				resp, err := k.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
					ContainerId: k.ticker.id, Cmd: []string{"sh", "-c", "sleep 0.1; exit 3"}, Timeout: 30,
				})
				if err == nil && resp.ExitCode != 3 {
					err = fmt.Errorf("exit code %d", resp.ExitCode)
				}
				return err
			})
			if err != nil {
				t.Errorf("exec: %v", err)
				return
			}
			runs.Add(1)
		}
	})
	for i := range randomKills {
		select {
		case <-time.After(time.Duration(rand.Int64N(int64(600 * time.Millisecond)))):
		case <-ctx.Done():
		}
		if over() {
			break
		}
		if err := k.KillBerth(); err != nil {
			t.Errorf("kill %d: %v", i, err)
			break
		}
		if err := k.StartBerth(ctx); err != nil {
			t.Errorf("start after kill %d: %v", i, err)
			break
		}
	}
	close(done)
	wg.Wait()
	t.Logf("%d kills: %d lives, %d pulls, %d execs", randomKills, lives.Load(), pulls.Load(), runs.Load())
	if t.Failed() {
		return
	}
	if lives.Load() < randomLives || pulls.Load() == 0 || runs.Load() == 0 {
		t.Error("too little happened between the kills")
	}
	must(t, k.settle(ctx))
	must(t, k.unharmed(ctx))
}

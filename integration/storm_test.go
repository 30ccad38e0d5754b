//go:build integration

package integration

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// What a probe that times out leaves behind, if it is let: processes that ignore SIGTERM, in sessions of their own, the
// children of nobody.
const hostileProbe = `echo >> /tmp/begun; trap '' TERM HUP INT
	setsid sh -c "trap '' TERM; (sleep 86400 &) ; exec sleep 86400" &
	(setsid sh -c "trap '' TERM; sleep 86400" &)
	sleep 86400 & wait; sleep 86400`

// TestProbeStorm has kubelets' probes run in ten pods: a hundred a second are asked for, half of which time out. Like a
// kubelet's, a probe is not begun again before it has ended; what the machine does not manage is told, not hidden.
// Afterwards no process is left, and memory, goroutines and descriptors are what they were.
//
// BERTH_STORM says how long it lasts, and BERTH_STORM_RATE how many are asked for in a second, if not a hundred
// (`make test-storm`: a minute of those, and what two cores can begin for long enough). It wants a machine for itself: the
// processes of containers that get no processor time cannot even die.
func TestProbeStorm(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	s := os.Getenv("BERTH_STORM")
	if s == "" {
		t.Skip("takes a machine for itself: make test-storm")
	}
	lasts, err := time.ParseDuration(s)
	must(t, err)
	rate := 100
	if s := os.Getenv("BERTH_STORM_RATE"); s != "" {
		rate, err = strconv.Atoi(s)
		must(t, err)
	}
	ctx := t.Context()
	_, err = n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	var containers []string
	for i := range 10 {
		pod := n.Pod(fmt.Sprintf("storm-%d", i))
		podID, err := n.CRI.RunPod(ctx, pod)
		must(t, err)
		t.Cleanup(func() {
			if err := n.CRI.RemovePod(context.Background(), podID); err != nil {
				t.Error(err)
			}
		})
		probed := lab.Sleeper("probed")
		probed.Linux.Resources.CpuShares = 1024 // beside others on this machine, the lab's 2 would be starved
		id, err := n.CRI.Start(ctx, podID, pod, probed)
		must(t, err)
		containers = append(containers, id)
	}

	must(t, storm(ctx, n, containers, rate, 5*time.Second).err()) // what is filled once and kept is filled now
	processes := stormProcesses(t, n)
	left, err := n.Processes()
	must(t, err)
	before := figures(t, n, processes)
	begunBefore := begun(t, n, containers)
	r := storm(ctx, n, containers, rate, lasts)
	must(t, r.err())
	ran := begun(t, n, containers) - begunBefore
	t.Logf("%s: asked for %d probes a second, %.1f ended: %d passed, %d timed out, of which %d had begun; the slowest that passed took %s, the latest kill %s",
		lasts, rate, float64(r.passed.Load()+r.late.Load())/r.took.Seconds(), r.passed.Load(), r.late.Load(), ran,
		time.Duration(r.slowest.Load()).Round(time.Millisecond), time.Duration(r.latest.Load()).Round(time.Millisecond))
	if r.passed.Load() == 0 || ran == 0 {
		t.Error("one half of the probes never ended")
	}
	must(t, lab.Eventually(ctx, soon, "no process is left of any probe", func(context.Context) error {
		now, err := n.Processes()
		if err != nil {
			return err
		}
		maps.DeleteFunc(now, func(pid int, _ string) bool { _, ok := left[pid]; return ok })
		if len(now) > 0 {
			return fmt.Errorf("%d: %v", len(now), now)
		}
		return nil
	}))
	wantFlat(ctx, t, n, processes, before)
}

// TestKilledExecsLeaveNothing has an exec time out that goes on forking while it is killed: what it starts meanwhile is
// killed as well, and does not go on as if it had been left behind on purpose.
func TestKilledExecsLeaveNothing(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	p := newStreamingPod(t, n)
	ctx := t.Context()
	id := p.start(t, lab.Container("quiet", "sleep", "86400"))
	must(t, lab.Eventually(ctx, soon, "the pod's containers have all their processes", func(ctx context.Context) error {
		_, err := n.CRI.Exec(ctx, p.sleeper, "pgrep", "sleep")
		return err
	}))
	left, err := n.Processes()
	must(t, err)
	const forking = `trap '' TERM
		f() { for i in $(seq 300); do (setsid sleep 86400 &); done; }
		for i in 1 2 3 4; do (while :; do f; sleep 1; done) & done; exec sleep 86400`
	for range 3 {
		_, err := n.CRI.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", forking}, Timeout: 1})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%v, want DeadlineExceeded", err)
		}
	}
	must(t, lab.Eventually(ctx, soon, "no process is left of any exec", func(context.Context) error {
		now, err := n.Processes()
		if err != nil {
			return err
		}
		maps.DeleteFunc(now, func(pid int, _ string) bool { _, ok := left[pid]; return ok })
		if len(now) > 0 {
			return fmt.Errorf("%d processes: %.300s", len(now), fmt.Sprint(now))
		}
		return nil
	}))
}

// begun counts the hostile probes that have run so far.
func begun(t *testing.T, n *lab.Node, containers []string) int {
	t.Helper()
	lines := 0
	for _, id := range containers {
		out, err := n.CRI.Exec(t.Context(), id, "sh", "-c", "cat /tmp/begun 2>/dev/null | wc -l")
		must(t, err)
		count, err := strconv.Atoi(strings.Fields(out)[0])
		must(t, err)
		lines += count
	}
	return lines
}

// stormResult counts how probes ended.
type stormResult struct {
	passed, late, other atomic.Int64
	slowest, latest     atomic.Int64 // nanoseconds
	took                time.Duration
	wrong               atomic.Pointer[error] // one of the others
}

func (r *stormResult) err() error {
	if r.other.Load() == 0 {
		return nil
	}
	return fmt.Errorf("%d probes ended in another way, one of them: %w", r.other.Load(), *r.wrong.Load())
}

// storm begins rate probes a second, half of each kind, and waits for the last.
func storm(ctx context.Context, n *lab.Node, containers []string, rate int, lasts time.Duration) *stormResult {
	r := &stormResult{}
	began := time.Now()
	until, cancel := context.WithTimeout(ctx, lasts)
	defer cancel()
	var all sync.WaitGroup
	most := func(v *atomic.Int64, d time.Duration) {
		for old := v.Load(); int64(d) > old && !v.CompareAndSwap(old, int64(d)); old = v.Load() {
		}
	}
	probe := func(req *runtimeapi.ExecSyncRequest, late bool) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(ctx, 5*time.Minute) // for one that hangs
		defer cancel()
		resp, err := n.CRI.ExecSync(ctx, req)
		took := time.Since(start)
		switch {
		case late && status.Code(err) == codes.DeadlineExceeded:
			r.late.Add(1)
			most(&r.latest, took-time.Duration(req.Timeout)*time.Second)
		case !late && err == nil && resp.ExitCode == 0 && string(resp.Stdout) == "ok\n":
			r.passed.Add(1)
			most(&r.slowest, took)
		default:
			r.other.Add(1)
			err = fmt.Errorf("probe %q: %v: %w", req.Cmd, resp, err)
			r.wrong.Store(&err)
		}
	}
	// One that times out takes a second at least, so twice as many of them have half the rate.
	worker := func(i int, every time.Duration, late bool) {
		req := &runtimeapi.ExecSyncRequest{ContainerId: containers[i%len(containers)], Cmd: []string{"echo", "ok"}}
		if late {
			req.Cmd, req.Timeout = []string{"sh", "-c", hostileProbe}, 1
		}
		select { // not all at once
		case <-time.After(every * time.Duration(i) / time.Duration(rate/2)):
		case <-until.Done():
			return
		}
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			probe(req, late)
			select {
			case <-tick.C:
			case <-until.Done():
				return
			}
		}
	}
	for i := range rate / 2 {
		all.Go(func() { worker(i, time.Second, false) })
	}
	for i := range rate {
		all.Go(func() { worker(i/2, 2*time.Second, true) })
	}
	all.Wait()
	r.took = time.Since(began)
	return r
}

// stormProcesses are those that live through it all, by what they are.
func stormProcesses(t *testing.T, n *lab.Node) map[string]int {
	t.Helper()
	found := map[string]int{"daemon": n.Berth.PID()}
	entries, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	shims, err := n.Processes()
	must(t, err)
	for _, dir := range entries {
		pid, err := strconv.Atoi(filepath.Base(dir))
		must(t, err)
		cmdline, _ := os.ReadFile(dir + "/cmdline")
		words := strings.Split(string(cmdline), "\x00")
		switch {
		case len(words) < 2 || words[0] != "berth-shim":
		case words[1] == "exec" && readStatus(t, pid)["PPid"] == strconv.Itoa(n.Berth.PID()):
			found["exec server"] = pid
		case words[1] == "shim" && shims[pid] != "":
			found["a shim"] = pid
		}
	}
	if len(found) != 3 {
		t.Fatalf("daemon, exec server and shim: %v", found)
	}
	return found
}

// figure is what a process costs. anon is its memory that no file has: what it shares of its program with other daemons of the
// machine, which come and go, does not change that.
type figure struct{ anon, pss, rss, threads, fds, goroutines int }

func (f figure) String() string {
	s := fmt.Sprintf("%d KiB anonymous, PSS %d KiB, RSS %d KiB, %d threads, %d descriptors", f.anon, f.pss, f.rss, f.threads, f.fds)
	if f.goroutines > 0 {
		s += fmt.Sprintf(", %d goroutines", f.goroutines)
	}
	return s
}

// grown says by what a process has grown more than chance does: a minute of the storm runs thousands of probes, and what
// each leaves would show.
func (f figure) grown(now figure) error {
	switch {
	case now.anon > f.anon+16<<10:
		return fmt.Errorf("%d KiB of anonymous memory, before %d", now.anon, f.anon)
	case now.fds > f.fds+10:
		return fmt.Errorf("%d descriptors, before %d", now.fds, f.fds)
	case now.goroutines > f.goroutines+20:
		return fmt.Errorf("%d goroutines, before %d", now.goroutines, f.goroutines)
	}
	return nil
}

func figures(t *testing.T, n *lab.Node, processes map[string]int) map[string]figure {
	t.Helper()
	out := map[string]figure{}
	for name, pid := range processes {
		out[name] = figureOf(t, pid)
	}
	resp, err := n.CRI.RuntimeServiceClient.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
	must(t, err)
	daemon := out["daemon"]
	daemon.goroutines, err = strconv.Atoi(resp.Info["goroutines"])
	must(t, err)
	out["daemon"] = daemon
	return out
}

func figureOf(t *testing.T, pid int) figure {
	t.Helper()
	size, err := pss(pid)
	must(t, err)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	threads, err := strconv.Atoi(readStatus(t, pid)["Threads"])
	must(t, err)
	return figure{anon: statusKiB(t, pid, "RssAnon"), pss: size, rss: statusKiB(t, pid, "VmRSS"), threads: threads, fds: len(fds)}
}

//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// churnNode is a node on which pods come and go; one of them stays, with a process that was executed in it, so that there is a
// shim and an exec server to be looked at.
func churnNode(t *testing.T) *lab.Node {
	t.Helper()
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	_, _, id := runTrap(t, n, "stays", lab.Sleeper("stays"))
	_, err = n.CRI.Exec(ctx, id, "true")
	must(t, err)
	return n
}

// podsAtOnce is how many pods a kubelet puts on a node, if it is not told otherwise.
const podsAtOnce = 110

// TestPodsAtOnce starts as many pods as a node has, all at the same time: each runs, and answers on an address that no other
// has. They are removed at the same time, and nothing is left of them; the second time takes no more memory than the first.
func TestPodsAtOnce(t *testing.T) {
	n := churnNode(t)
	ctx := t.Context()
	processes := stormProcesses(t, n)
	var before map[string]figure
	for round := range 2 {
		t.Run(fmt.Sprint("round ", round+1), func(t *testing.T) {
			ledger(t, n)
			allAtOnce(t, n)
		})
		if t.Failed() {
			return
		}
		if round == 0 {
			before = figures(t, n, processes)
		}
	}
	wantFlat(ctx, t, n, processes, before)
}

// wantFlat waits until processes are as small as they were: memory that Go has freed goes back to the kernel over some time.
func wantFlat(ctx context.Context, t *testing.T, n *lab.Node, processes map[string]int, before map[string]figure) {
	t.Helper()
	var after map[string]figure
	err := lab.Eventually(ctx, soon, "all is as before", func(context.Context) error {
		after = figures(t, n, processes)
		for name, was := range before {
			if err := was.grown(after[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
	for name, was := range before {
		t.Logf("%-12s before %s; after %s", name, was, after[name])
	}
	must(t, err)
}

func allAtOnce(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	pods := make([]string, podsAtOnce)
	addrs := make([]string, podsAtOnce)
	all := func(what string, do func(i int) error) {
		t.Helper()
		began := time.Now()
		errs := make([]error, podsAtOnce)
		var wg sync.WaitGroup
		for i := range podsAtOnce {
			wg.Go(func() { errs[i] = do(i) })
		}
		wg.Wait()
		t.Logf("%s: %v", what, time.Since(began).Round(time.Millisecond))
		must(t, errors.Join(errs...))
	}
	t.Cleanup(func() {
		for _, id := range pods {
			if id != "" {
				_ = n.CRI.RemovePod(context.Background(), id)
			}
		}
	})
	all("they are started", func(i int) error {
		pod := n.Pod(fmt.Sprintf("at-once-%d", i))
		id, err := n.CRI.RunPod(ctx, pod)
		if err != nil {
			return err
		}
		pods[i] = id
		if addrs[i], err = n.CRI.PodIP(ctx, id); err != nil {
			return err
		}
		_, err = n.CRI.Start(ctx, id, pod, lab.Sh("says", fmt.Sprintf("exec tcpsvd -E 0 8080 echo pod %d", i)))
		return err
	})
	all("they answer", func(i int) error { return says(ctx, soon, addrs[i]+":8080", fmt.Sprintf("pod %d\n", i)) })
	slices.Sort(addrs)
	if different := len(slices.Compact(addrs)); different != podsAtOnce {
		t.Errorf("%d different addresses", different)
	}
	all("they are removed", func(i int) error { return n.CRI.RemovePod(ctx, pods[i]) })
	clear(pods)
}

// says waits so long until what listens at an address says that.
func says(ctx context.Context, within time.Duration, address, want string) error {
	return lab.Eventually(ctx, within, address+" answers", func(ctx context.Context) error {
		d := net.Dialer{Timeout: 5 * time.Second}
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		got, err := io.ReadAll(conn)
		if string(got) != want {
			return fmt.Errorf("it says %q, %v", got, err)
		}
		return nil
	})
}

// churnRate is how many pods a minute come and go, if BERTH_CHURN_RATE does not say.
const churnRate = 200

// mostInFlight bounds how many pods are there at a time, where the machine does not manage the rate.
const mostInFlight = 60

// TestPodChurn has short pods come and go, as jobs do that are started every few seconds, every fourth with a host port that
// others had before: each runs to its end, with its output and its exit code. Afterwards links, addresses, rules, namespaces,
// files and memory are what they were.
//
// BERTH_CHURN says for how long (`make test-churn`: ten minutes); what the machine does not manage is told.
func TestPodChurn(t *testing.T) {
	n := churnNode(t)
	ctx := t.Context()
	lasts, rate := 20*time.Second, churnRate
	var err error
	if s := os.Getenv("BERTH_CHURN"); s != "" {
		lasts, err = time.ParseDuration(s)
		must(t, err)
	}
	if s := os.Getenv("BERTH_CHURN_RATE"); s != "" {
		rate, err = strconv.Atoi(s)
		must(t, err)
	}
	ledger(t, n)
	processes := stormProcesses(t, n)
	c := &churn{n: n}
	must(t, c.run(ctx, rate, max(lasts/10, 5*time.Second), nil)) // what is filled once and kept is filled now
	before, addrs := figures(t, n, processes), addresses(t, n)

	*c = churn{n: n, first: c.first}
	began := time.Now()
	every := max(lasts/10, 10*time.Second)
	must(t, c.run(ctx, rate, lasts, func() {
		if time.Since(began) >= every {
			every += max(lasts/10, 10*time.Second)
			t.Logf("%v: %d pods have come and gone; the daemon: %s", time.Since(began).Round(time.Second), c.done.Load(), figures(t, n, processes)["daemon"])
		}
	}))
	took := time.Since(began)
	t.Logf("asked for %d pods a minute, %.0f ended, %d in all, %d were not begun; the slowest took %v from its start to its removal", rate,
		float64(c.done.Load())/took.Minutes(), c.done.Load(), c.skipped, time.Duration(c.slowest.Load()).Round(time.Millisecond))
	if c.done.Load() == 0 {
		t.Error("no pod has come and gone")
	}
	if now := addresses(t, n); !slices.Equal(addrs, now) {
		t.Errorf("addresses: %v, before: %v", now, addrs)
	}
	wantFlat(ctx, t, n, processes, before)
}

// churn counts pods.
type churn struct {
	n       *lab.Node
	first   int // number of the first pod
	skipped int
	done    atomic.Int64
	slowest atomic.Int64 // nanoseconds
}

// run begins so many pods a minute, and waits for the last.
func (c *churn) run(ctx context.Context, rate int, lasts time.Duration, each func()) error {
	var (
		all    sync.WaitGroup
		mu     sync.Mutex
		failed error
	)
	turns := make(chan struct{}, mostInFlight)
	tick := time.NewTicker(time.Minute / time.Duration(rate))
	defer tick.Stop()
	for end := time.Now().Add(lasts); time.Now().Before(end) && ctx.Err() == nil; <-tick.C {
		if each != nil {
			each()
		}
		mu.Lock()
		stop := failed != nil
		mu.Unlock()
		if stop {
			break
		}
		select {
		case turns <- struct{}{}:
		default:
			c.skipped++
			continue
		}
		c.first++
		number := c.first
		all.Go(func() {
			defer func() { <-turns }()
			began := time.Now()
			if err := c.live(ctx, number); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = errors.Join(failed, fmt.Errorf("pod %d: %w", number, err))
				return
			}
			c.done.Add(1)
			for took, old := int64(time.Since(began)), c.slowest.Load(); took > old && !c.slowest.CompareAndSwap(old, took); old = c.slowest.Load() {
			}
		})
	}
	all.Wait()
	return errors.Join(failed, ctx.Err())
}

// live has a pod run to its end, and removes it.
func (c *churn) live(ctx context.Context, number int) (err error) {
	pod := c.n.Pod(fmt.Sprintf("job-%d", number))
	defer os.RemoveAll(pod.LogDirectory)
	if number%4 == 0 { // twice as many ports as pods that have one at a time
		port := 24000 + 200*(c.n.Index%100) + number/4%(mostInFlight/2)
		pod.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: int32(port)}}
	}
	id, err := c.n.CRI.RunPod(ctx, pod)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.n.CRI.RemovePod(ctx, id)) }()
	code := number % 200
	ctr := lab.Sh("job", fmt.Sprintf("echo number %d; exit %d", number, code))
	ctrID, err := c.n.CRI.Start(ctx, id, pod, ctr)
	if err != nil {
		return err
	}
	status, err := c.n.CRI.WaitExit(ctx, ctrID, soon)
	if err != nil {
		return err
	}
	lines, err := lab.Log(pod, ctr)
	if err != nil {
		return err
	}
	if int(status.ExitCode) != code || len(lines) != 1 || lines[0].Text != strings.TrimSpace(fmt.Sprint("number ", number)) {
		return fmt.Errorf("exit code %d, output %q", status.ExitCode, lines)
	}
	return nil
}

//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// BenchmarkCompare measures berth beside containerd and kube-proxy in one run, the same calls on the same images in turn, so that ratios hold
// where the machine's speed drifts, and prints a table. BERTH_COMPARE has the numbers of Services beside which proxies are measured.
// BERTH_BENCH_ROUNDS and BERTH_BENCH_PODS (idle pods beside which others are measured) make it shorter.
func BenchmarkCompare(b *testing.B) {
	services := numbers(b, "BERTH_COMPARE")
	if services == nil {
		b.Skip("make compare runs it")
	}
	c := &comparison{rounds: numberOr(b, "BERTH_BENCH_ROUNDS", 30), crowd: numberOr(b, "BERTH_BENCH_PODS", 100)}
	c.table.head = []string{"median", "berth", "containerd, kube-proxy", "ratio"}
	// What goes wrong in one part leaves the others their rows.
	b.Run("pods", c.pods)
	b.Run("pulls", c.pulls)
	b.Run("proxies", func(b *testing.B) { c.proxies(b, services) })
	c.table.publish(b, "compare.md", "make compare")
}

type comparison struct {
	rounds, crowd int
	table         benchTable
}

// add makes a row, and tells it at once.
func (c *comparison) add(name string, ours, theirs float64, show func(float64) string) {
	row := []string{name, show(ours), show(theirs), fmt.Sprintf("%.2f", ours/theirs)}
	c.table.add(row...)
	fmt.Println(strings.Join(row, "\t"))
}

// times compares medians.
func (c *comparison) times(name string, ours, theirs []time.Duration) {
	if len(ours) > 1 {
		name += fmt.Sprintf(", n=%d", len(ours))
	}
	c.add(name, float64(median(ours)), float64(median(theirs)), func(d float64) string { return showTime(time.Duration(d)) })
}

// side is one of both runtimes.
type side struct {
	n     *lab.Node
	times times
}

func (s side) daemon() int {
	if s.n.Berth != nil {
		return s.n.Berth.PID()
	}
	return s.n.Containerd().PID()
}

// plain is a pod as a kubelet asks for it where nobody says anything of security.
func (s side) plain(name string, ctr *runtimeapi.ContainerConfig) (*runtimeapi.PodSandboxConfig, *runtimeapi.ContainerConfig) {
	pod := s.n.Pod(name)
	pod.Linux.SecurityContext.Seccomp, ctr.Linux.SecurityContext.Seccomp = nil, nil
	ctr.Linux.Resources.MemoryLimitInBytes = 128 << 20
	return pod, ctr
}

// start has a pod run, and tells its id and its container's.
func (s side) start(ctx context.Context, name string) (podID, id string, err error) {
	pod, ctr := s.plain(name, lab.Sleeper("c"))
	if podID, err = s.n.CRI.RunPod(ctx, pod); err != nil {
		return "", "", err
	}
	id, err = s.n.CRI.Start(ctx, podID, pod, ctr)
	return podID, id, err
}

// startMany has so many pods run, some of them started at a time.
func (s side) startMany(ctx context.Context, name string, count, atOnce int) ([]string, error) {
	ids, errs := make([]string, count), make([]error, count)
	var all sync.WaitGroup
	turns := make(chan struct{}, atOnce)
	for i := range count {
		turns <- struct{}{}
		all.Go(func() {
			ids[i], _, errs[i] = s.start(ctx, fmt.Sprintf("%s-%d", name, i))
			<-turns
		})
	}
	all.Wait()
	return ids, errors.Join(errs...)
}

func (s side) remove(ctx context.Context, ids []string) error {
	for _, id := range ids {
		if err := s.n.CRI.RemovePod(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// pods compares the runtimes with each other.
func (c *comparison) pods(b *testing.B) {
	ctx := b.Context()
	both := []side{{idleNode(b, lab.Options{}), times{}}, {idleNode(b, lab.Options{Containerd: true}), times{}}}
	must(b, both[0].n.StartRegistry(ctx))
	must(b, both[1].n.UseRegistry(both[0].n.Registry))
	for _, s := range both {
		must(b, s.n.StartBerth(ctx))
		_, err := s.n.CRI.Pull(ctx, testimages.Busybox)
		must(b, err)
	}
	c.lives(b, both, "")
	c.execs(b, both)
	c.logs(b, both)
	c.density(b, both)
	crowds := make([][]string, len(both))
	for i, s := range both {
		var err error
		crowds[i], err = s.startMany(ctx, "idle", c.crowd, 1)
		must(b, err)
	}
	c.lives(b, both, fmt.Sprintf(" beside %d idle pods of each", c.crowd))
	for i, s := range both {
		must(b, s.remove(ctx, crowds[i]))
	}
}

// lives starts and removes pods, by themselves and four at a time.
func (c *comparison) lives(b *testing.B, both []side, beside string) {
	ctx := b.Context()
	for _, s := range both {
		clear(s.times)
		pod, ctr := s.plain("first", lab.Sleeper("c"))
		must(b, times{}.podLife(ctx, s.n, pod, ctr)) // what is done once is done now
	}
	for i := range c.rounds {
		for _, s := range both {
			pod, ctr := s.plain(fmt.Sprintf("life-%d", i), lab.Sleeper("c"))
			must(b, s.times.podLife(ctx, s.n, pod, ctr))
		}
	}
	ours, theirs := both[0].times, both[1].times
	for _, row := range []struct{ name, of string }{
		{"pod start: the next three calls", "pod-start"}, {"RunPodSandbox", "run-sandbox"}, {"CreateContainer", "create"}, {"StartContainer", "start"}, {"pod removal", "pod-removal"},
	} {
		c.times(row.name+beside, ours[row.of], theirs[row.of])
	}
	const atOnce, batches = 4, 3
	for i := range batches {
		for _, s := range both {
			began := time.Now()
			ids, err := s.startMany(ctx, fmt.Sprintf("batch-%d", i), c.rounds, atOnce)
			must(b, err)
			s.times["batch"] = append(s.times["batch"], time.Since(began)/time.Duration(c.rounds))
			must(b, s.remove(ctx, ids))
		}
	}
	c.times(fmt.Sprintf("pods started %d at a time, each of %d%s", atOnce, c.rounds, beside), ours["batch"], theirs["batch"])
}

func (c *comparison) execs(b *testing.B, both []side) {
	ctx := b.Context()
	pods, ctrs := make([]string, len(both)), make([]string, len(both))
	for i, s := range both {
		var err error
		pods[i], ctrs[i], err = s.start(ctx, "exec")
		must(b, err)
	}
	for range 3 * c.rounds {
		for i, s := range both {
			must(b, s.times.measure("exec", func() error { _, err := s.n.CRI.Exec(ctx, ctrs[i], "true"); return err }))
		}
	}
	for i, s := range both {
		must(b, s.n.CRI.RemovePod(ctx, pods[i]))
	}
	c.times("ExecSync of `true`", both[0].times["exec"], both[1].times["exec"])
}

func (c *comparison) logs(b *testing.B, both []side) {
	ctx := b.Context()
	for i := range 3 {
		for _, s := range both {
			pod, ctr := s.plain(fmt.Sprintf("log-%d", i), lab.Sh("c", logScript))
			podID, err := s.n.CRI.RunPod(ctx, pod)
			must(b, err)
			must(b, s.times.measure("log", func() error { return runs(ctx, s.n, podID, pod, ctr) }))
			log, err := os.Stat(filepath.Join(pod.LogDirectory, ctr.LogPath))
			must(b, err)
			if log.Size() < 100<<20 {
				b.Fatalf("the log of 100 MiB on node %d has %d bytes", s.n.Index, log.Size())
			}
			must(b, s.n.CRI.RemovePod(ctx, podID))
			must(b, os.RemoveAll(pod.LogDirectory))
		}
	}
	c.times("100 MiB of log lines", both[0].times["log"], both[1].times["log"])
}

// density has half as many pods as a crowd run, on one runtime after the other, and asks for lists of them four times a second, as monitoring does.
func (c *comparison) density(b *testing.B, both []side) {
	ctx := b.Context()
	count := max(c.crowd/2, 1)
	var own, processes, daemon, busy [2]float64
	for i, s := range both {
		ids, err := s.startMany(ctx, "dense", count, 1)
		must(b, err)
		kib, shims := podsOwn(b, s.n)
		size, err := pss(s.daemon())
		must(b, err)
		own[i], processes[i], daemon[i] = float64(kib)/float64(count), float64(shims)/float64(count), float64(size)
		const asked = 40
		tick := time.NewTicker(time.Second / 4)
		took, began := s.processorTime(b), time.Now()
		for range asked {
			<-tick.C
			must(b, s.times.measure("lists-of-all", func() error {
				_, err := s.n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
				if err == nil {
					_, err = s.n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
				}
				return err
			}))
			must(b, s.times.measure("stats-of-all", func() error {
				_, err := s.n.CRI.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
				return err
			}))
		}
		tick.Stop()
		lasted := time.Since(began)
		busy[i] = 100 * float64(s.processorTime(b)-took) / float64(lasted)
		must(b, s.remove(ctx, ids))
	}
	pods := fmt.Sprintf(", %d pods", count)
	number := func(format string) func(float64) string {
		return func(f float64) string { return fmt.Sprintf(format, f) }
	}
	c.add("PSS of a pod's own processes"+pods, own[0], own[1], showMiB)
	c.add("these processes"+pods, processes[0], processes[1], number("%.1f"))
	c.add("PSS of the daemon"+pods, daemon[0], daemon[1], showMiB)
	c.times("ListPodSandbox and ListContainers"+pods, both[0].times["lists-of-all"], both[1].times["lists-of-all"])
	c.times("ListContainerStats"+pods, both[0].times["stats-of-all"], both[1].times["stats-of-all"])
	c.add("one processor's time while all three are asked for 4 times a second"+pods, busy[0], busy[1], number("%.1f %%"))
}

// processorTime is what the daemon and all processes of its pods have taken.
func (s side) processorTime(b *testing.B) time.Duration {
	all, err := s.n.Processes()
	must(b, err)
	sum := cpu(b, s.daemon())
	for pid, cmdline := range all {
		if processPart(cmdline) != "" {
			sum += cpu(b, pid)
		}
	}
	return sum
}

func (c *comparison) pulls(b *testing.B) {
	berth, containerd := pullNodes(b)
	var ours, theirs pulls
	for range pullRounds {
		ours.measure(b, berth, berth.Berth.PID(), testimages.Layers, "")
		theirs.measure(b, containerd, containerd.Containerd().PID(), testimages.Layers, "")
	}
	c.times("pull of 8 layers", ours.took, theirs.took)
}

func (c *comparison) proxies(b *testing.B, services []int) {
	programs, crowd := proxyPrograms(b), newProxyCrowd(b)
	for _, n := range services {
		crowd.grow(b, n)
		var all []*proxyFigures
		for _, p := range programs {
			all = append(all, crowd.measure(b, p, min(c.rounds, changeRounds)))
		}
		ours, theirs, beside := all[0], all[1], fmt.Sprintf(", %d Services", n)
		d := func(d ...time.Duration) []time.Duration { return d }
		c.times("first sync of a proxy"+beside, d(ours.first), d(theirs.first))
		c.times("the same where its rules are there"+beside, d(ours.again), d(theirs.again))
		c.times("a Service created"+beside, ours.created, theirs.created)
		c.times("an endpoint moved"+beside, ours.moved, theirs.moved)
		c.times("a Service deleted"+beside, ours.deleted, theirs.deleted)
		c.add("RSS of a proxy"+beside, float64(ours.rss), float64(theirs.rss), showMiB)
		c.add("its peak"+beside, float64(ours.peak), float64(theirs.peak), showMiB)
		c.times("processor time of the first sync"+beside, d(ours.firstCPU), d(theirs.firstCPU))
		c.times("of a change"+beside, d(ours.changeCPU), d(theirs.changeCPU))
	}
}

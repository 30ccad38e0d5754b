//go:build integration

package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// Each benchmark makes a fixed number of rounds and reports medians: machines are noisy, and a pod's life has too many parts
// for the mean to tell anything. With BERTH_TEST_ENDPOINT the same is measured on another runtime, to compare.
const rounds = 25

// benchNode is a node whose images are there.
func benchNode(b *testing.B) *lab.Node {
	b.Helper()
	n := idleNode(b, lab.Options{})
	ctx := b.Context()
	must(b, n.StartRegistry(ctx))
	must(b, n.StartBerth(ctx))
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(b, err)
	return n
}

// times collects durations by the name of what took them.
type times map[string][]time.Duration

func (t times) measure(name string, what func() error) error {
	began := time.Now()
	err := what()
	t[name] = append(t[name], time.Since(began))
	return err
}

func (t times) report(b *testing.B) {
	for name, all := range t {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "ms/"+name)
	}
	b.ReportMetric(0, "ns/op") // of all rounds and their preparation: of no use
}

// BenchmarkPod is the life of a pod with one container.
func BenchmarkPod(b *testing.B) {
	n := benchNode(b)
	t := times{}
	for i := range rounds {
		must(b, t.podLife(b.Context(), n, n.Pod(fmt.Sprintf("bench-%d", i)), lab.Sleeper("c")))
	}
	t.report(b)
}

// podLife is the life of a pod with one container, call by call, with an ExecSync in the middle.
func (t times) podLife(ctx context.Context, n *lab.Node, pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) error {
	var podID, id string
	for _, phase := range []struct {
		name  string // of all calls together
		calls []call
	}{
		{"pod-start", []call{
			{"run-sandbox", func() (err error) { podID, err = n.CRI.RunPod(ctx, pod); return err }},
			{"create", func() (err error) { id, err = n.CRI.Create(ctx, podID, pod, ctr); return err }},
			{"start", func() error {
				_, err := n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
				return err
			}},
		}},
		{"while-it-runs", []call{
			{"exec-sync", func() error { _, err := n.CRI.Exec(ctx, id, "true"); return err }},
			{"stats", func() error {
				_, err := n.CRI.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
				return err
			}},
		}},
		{"pod-removal", []call{
			{"stop-container", func() error {
				_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 10})
				return err
			}},
			{"stop-and-remove-pod", func() error { return n.CRI.RemovePod(ctx, podID) }},
		}},
	} {
		if err := t.measure(phase.name, func() error {
			for _, c := range phase.calls {
				if err := t.measure(c.name, c.do); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

type call struct {
	name string
	do   func() error
}

// BenchmarkIdlePods is the memory that an idle pod adds: the proportional set size of all its processes but its own.
func BenchmarkIdlePods(b *testing.B) {
	n := benchNode(b)
	if n.Foreign() {
		b.Skip("which processes belong to a pod of another runtime is not known here")
	}
	ctx := b.Context()
	for i := range rounds {
		pod := n.Pod(fmt.Sprintf("idle-%d", i))
		podID, err := n.CRI.RunPod(ctx, pod)
		must(b, err)
		_, err = n.CRI.Start(ctx, podID, pod, lab.Sleeper("c"))
		must(b, err)
	}
	kib, shims := podsOwn(b, n)
	b.ReportMetric(float64(kib)/rounds, "KiB-PSS/pod")
	b.ReportMetric(float64(shims)/rounds, "processes/pod")
	b.ReportMetric(0, "ns/op")
}

// podsOwn are the processes that a runtime has for its pods, beside those of containers, and their proportional set size in KiB.
func podsOwn(t testing.TB, n *lab.Node) (kib, count int) {
	t.Helper()
	processes, err := n.Processes()
	must(t, err)
	for pid, cmdline := range processes {
		if processPart(cmdline) != podProcesses {
			continue
		}
		size, err := pss(pid)
		must(t, err)
		kib += size
		count++
	}
	return kib, count
}

// pss reads the proportional set size of a process, in KiB.
func pss(pid int) (int, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var kib int
		if _, err := fmt.Sscanf(lines.Text(), "Pss: %d kB", &kib); err == nil {
			return kib, nil
		}
	}
	return 0, fmt.Errorf("smaps_rollup of %d has no Pss line", pid)
}

// logScript writes 100 MiB of log lines.
const logScript = "yes 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | head -c 104857600"

// BenchmarkLog is how long a container takes to write 100 MiB of log lines, beside what it takes to write them to a file.
func BenchmarkLog(b *testing.B) {
	n := benchNode(b)
	ctx := b.Context()
	pod := n.Pod("log")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(b, err)
	t := times{}
	for i := range 5 {
		for _, way := range []struct{ name, script string }{{"log", logScript}, {"plain-file", logScript + " > /tmp/x"}} {
			ctr := lab.Sh(fmt.Sprintf("%s-%d", way.name, i), way.script)
			must(b, t.measure(way.name+"-100MiB", func() error { return runs(ctx, n, podID, pod, ctr) }))
		}
	}
	t.report(b)
	must(b, n.CRI.RemovePod(context.WithoutCancel(ctx), podID))
}

// runs has a container run to its end.
func runs(ctx context.Context, n *lab.Node, podID string, pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) error {
	id, err := n.CRI.Start(ctx, podID, pod, ctr)
	if err != nil {
		return err
	}
	for {
		status, err := n.CRI.ContainerState(ctx, id)
		if err != nil || status.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

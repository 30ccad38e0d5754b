//go:build integration

package integration

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
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

// BenchmarkPod is the life of a pod with one container, call by call, with an ExecSync in the middle.
func BenchmarkPod(b *testing.B) {
	n := benchNode(b)
	ctx := b.Context()
	t := times{}
	for i := range rounds {
		pod, ctr := n.Pod(fmt.Sprintf("bench-%d", i)), lab.Sleeper("c")
		var podID, id string
		began := time.Now()
		must(b, t.measure("run-sandbox", func() (err error) { podID, err = n.CRI.RunPod(ctx, pod); return err }))
		must(b, t.measure("create", func() (err error) { id, err = n.CRI.Create(ctx, podID, pod, ctr); return err }))
		must(b, t.measure("start", func() error {
			_, err := n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
			return err
		}))
		t["pod-start"] = append(t["pod-start"], time.Since(began))
		must(b, t.measure("exec-sync", func() error { _, err := n.CRI.Exec(ctx, id, "true"); return err }))
		must(b, t.measure("stats", func() error {
			_, err := n.CRI.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
			return err
		}))
		must(b, t.measure("stop-container", func() error {
			_, err := n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 10})
			return err
		}))
		must(b, t.measure("stop-and-remove-pod", func() error { return n.CRI.RemovePod(ctx, podID) }))
	}
	t.report(b)
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
	processes, err := n.Processes()
	must(b, err)
	var kib, shims int
	for pid, name := range processes {
		if !strings.HasPrefix(name, "berth-shim") || strings.Contains(name, " exec") {
			continue
		}
		size, err := pss(pid)
		must(b, err)
		kib += size
		shims++
	}
	b.ReportMetric(float64(kib)/rounds, "KiB-PSS/pod")
	b.ReportMetric(float64(shims)/rounds, "processes/pod")
	b.ReportMetric(0, "ns/op")
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

// BenchmarkLog is how long a container takes to write 100 MiB of log lines, beside what it takes to write them to a file.
func BenchmarkLog(b *testing.B) {
	n := benchNode(b)
	ctx := b.Context()
	const script = "yes 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | head -c 104857600"
	pod := n.Pod("log")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(b, err)
	t := times{}
	for i := range 5 {
		for _, way := range []struct{ name, script string }{{"log", script}, {"plain-file", script + " > /tmp/x"}} {
			ctr := lab.Sh(fmt.Sprintf("%s-%d", way.name, i), way.script)
			must(b, t.measure(way.name+"-100MiB", func() error {
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
			}))
		}
	}
	t.report(b)
	must(b, n.CRI.RemovePod(context.WithoutCancel(ctx), podID))
}

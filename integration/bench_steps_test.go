//go:build integration

package integration

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// crowd is how many idle pods are on the node when a pod is measured for the second time. The bound is 1.1 times.
const crowd = 100

// BenchmarkPodSteps says where each millisecond of a pod's start and of its removal goes, by the steps that the daemon logs, on
// a node without other pods and beside a hundred idle ones. shim and network are done side by side.
//
//	make bench RUN=PodSteps
func BenchmarkPodSteps(b *testing.B) {
	n := idleNode(b, lab.Options{Serve: []string{"--log-level", "debug"}})
	if n.Foreign() {
		b.Skip("other runtimes log no steps")
	}
	ctx := b.Context()
	must(b, n.StartRegistry(ctx))
	must(b, n.StartBerth(ctx))
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(b, err)
	start := func(name string) string {
		b.Helper()
		pod := n.Pod(name)
		id, err := n.CRI.RunPod(ctx, pod)
		must(b, err)
		_, err = n.CRI.Start(ctx, id, pod, lab.Sleeper("c"))
		must(b, err)
		return id
	}
	log, err := os.Open(filepath.Join(n.Dir, "berth.log"))
	must(b, err)
	defer log.Close() //nolint:errcheck // opened for reading
	measure := func(name string) times {
		b.Helper()
		_, err := readSteps(log) // those of before
		must(b, err)
		calls := times{}
		for i := range rounds {
			var id string
			must(b, calls.measure("start", func() error { id = start(fmt.Sprintf("%s-%d", name, i)); return nil }))
			must(b, calls.measure("stop", func() error {
				_, err := n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
				return err
			}))
			must(b, calls.measure("remove", func() error { return n.CRI.RemovePod(ctx, id) }))
		}
		t, err := readSteps(log)
		must(b, err)
		maps.Copy(t, calls)
		return t
	}
	alone := measure("alone")
	for i := range crowd {
		start(fmt.Sprintf("idle-%d", i))
	}
	beside := measure("beside")
	b.Logf("%-45s %19s %19s", "ms, median and fastest", "alone", fmt.Sprintf("beside %d pods", crowd))
	for _, name := range slices.Sorted(maps.Keys(alone)) {
		b.Logf("%-45s %9.2f %9.2f %9.2f %9.2f", name, alone.median(name), alone.fastest(name), beside.median(name), beside.fastest(name))
	}
	for _, call := range []string{"start", "stop", "remove"} {
		b.ReportMetric(alone.median(call), "ms/"+call)
		b.ReportMetric(beside.median(call), fmt.Sprintf("ms/%s-beside-%d", call, crowd))
	}
	b.ReportMetric(0, "ns/op")
}

// median is in milliseconds.
func (t times) median(name string) float64 { return t.nth(name, len(t[name])/2) }

// fastest is in milliseconds; on a machine that others use it says more.
func (t times) fastest(name string) float64 { return t.nth(name, 0) }

func (t times) nth(name string, n int) float64 {
	all := slices.Sorted(slices.Values(t[name]))
	if len(all) == 0 {
		return 0
	}
	return float64(all[n].Microseconds()) / 1000
}

var stepEnds = regexp.MustCompile(`msg="(step ends|step is undone)" call=(\S+) step=(\S+) .*took=(\S+)`)

// readSteps reads how long steps took from what the daemon has logged since the last time.
func readSteps(log *os.File) (times, error) {
	t := times{}
	lines := bufio.NewScanner(log)
	for lines.Scan() {
		m := stepEnds.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		took, err := time.ParseDuration(strings.Trim(m[4], `"`))
		if err != nil {
			return nil, err
		}
		name := "  " + m[2] + " " + m[3]
		if m[1] != "step ends" {
			name += " (undo)"
		}
		t[name] = append(t[name], took)
	}
	return t, lines.Err()
}

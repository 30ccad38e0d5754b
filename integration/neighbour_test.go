//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
)

// TestEKSAMI985_PullsLeaveTheNodeToOthers: while an image of very many files is pulled, a container on the same disk has its
// writes on the disk soon, and one that wants the processor gets it (awslabs/amazon-eks-ami#985, containerd#5675, #6692, #8698).
// The bound is that of a probe's timeout; the figures are in docs/results.md.
func TestEKSAMI985_PullsLeaveTheNodeToOthers(t *testing.T) {
	const layers, files, quiet = 4, 50_000, 5 * time.Second
	n := newNode(t)
	ctx := t.Context()
	reg := imagestest.NewRegistry(t)
	var blobs []imagestest.LayerBlob
	for i := range layers {
		entries := make([]imagestest.Entry, 0, files)
		for j := range files {
			entries = append(entries, imagestest.File(fmt.Sprintf("l%d/d%d/f%d", i, j/100, j), fmt.Sprintf("file %d of layer %d", j, i)))
		}
		blobs = append(blobs, imagestest.Layer(entries...))
	}
	reg.Push("many", "1", imagestest.NewImage(blobs...))

	pod := n.Pod("neighbours")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
	dir := filepath.Join(n.Dir, "neighbour") // on the disk of the images
	buildNeighbour(t, dir)
	var neighbours []*runtimeapi.ContainerConfig
	for _, c := range []*runtimeapi.ContainerConfig{
		lab.Container("fsync", "/neighbour/neighbour", "fsync", "/neighbour/file"),
		lab.Container("nap", "/neighbour/neighbour", "nap"),
	} {
		c.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/neighbour"}}
		c.Linux.Resources.CpuShares = 1024
		_, err := n.CRI.Start(ctx, podID, pod, c)
		must(t, err)
		neighbours = append(neighbours, c)
	}
	time.Sleep(quiet)
	began := time.Now()
	_, err = n.CRI.Pull(ctx, reg.Host()+"/many:1")
	must(t, err)
	ended := time.Now()
	t.Logf("%d layers of %d files were pulled in %v", layers, files, ended.Sub(began).Round(time.Millisecond))
	time.Sleep(time.Second) // for the logs
	for _, c := range neighbours {
		all, err := readLatencies(pod, c)
		must(t, err)
		before, during := all.between(began.Add(-quiet), began), all.between(began, ended)
		t.Logf("%s: without the pull %v, with it %v", c.Metadata.Name, before, during)
		if len(before) == 0 || len(during) == 0 || during.percentile(99) > time.Second {
			t.Errorf("%s: %d times before the pull, %d during it, p99 %v: want less than a second", c.Metadata.Name, len(before), len(during), during.percentile(99))
		}
	}
}

// buildNeighbour builds the program that a neighbour is, statically, into a directory that is made.
func buildNeighbour(t *testing.T, dir string) {
	t.Helper()
	must(t, os.Mkdir(dir, 0o755))
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "neighbour"), "./neighbour")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
}

// latency is how long something took that began at a time.
type latency struct {
	at   time.Time
	took time.Duration
}

type latencies []latency

func readLatencies(pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) (latencies, error) {
	lines, err := lab.Log(pod, ctr)
	if err != nil {
		return nil, err
	}
	var all latencies
	for _, line := range lines {
		var at, took int64
		if _, err := fmt.Sscan(line.Text, &at, &took); err != nil {
			return nil, fmt.Errorf("%q: %w", line.Text, err)
		}
		all = append(all, latency{time.Unix(0, at), time.Duration(took)})
	}
	return all, nil
}

// between returns those that began then, the shortest first.
func (l latencies) between(from, to time.Time) latencies {
	some := slices.DeleteFunc(slices.Clone(l), func(x latency) bool { return x.at.Before(from) || !x.at.Before(to) })
	slices.SortFunc(some, func(a, b latency) int { return int(a.took - b.took) })
	return some
}

func (l latencies) percentile(n int) time.Duration {
	if len(l) == 0 {
		return 0
	}
	return l[(len(l)-1)*n/100].took
}

// String implements fmt.Stringer.
func (l latencies) String() string {
	parts := []string{fmt.Sprintf("n=%d", len(l))}
	for _, n := range []int{50, 99, 100} {
		parts = append(parts, fmt.Sprintf("p%d %v", n, l.percentile(n).Round(10*time.Microsecond)))
	}
	return strings.Join(parts, ", ")
}

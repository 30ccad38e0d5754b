//go:build integration

package integration

import (
	"context"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

const pullRounds = 3

// BenchmarkPull pulls images of several forms on berth and on containerd in turn, from one registry on loopback, and tells
// medians, what a daemon's memory grows to, and the ratios of both.
func BenchmarkPull(b *testing.B) {
	if os.Getenv("BERTH_TEST_ENDPOINT") != "" {
		b.Skip("it compares two runtimes of its own")
	}
	berth, containerd := pullNodes(b)
	for _, form := range []struct{ name, image, before string }{
		{name: "8-layers", image: testimages.Layers},
		{name: "7-of-8-shared", image: testimages.LayersNext, before: testimages.Layers},
		{name: "zstd", image: testimages.LayersZstd},
		{name: "one-layer", image: testimages.OneLayer},
		{name: "60-layers", image: testimages.ManyLayers},
	} {
		b.Run(form.name, func(b *testing.B) {
			var ours, theirs pulls
			for range pullRounds {
				ours.measure(b, berth, berth.Berth.PID(), form.image, form.before)
				theirs.measure(b, containerd, containerd.Containerd().PID(), form.image, form.before)
			}
			b.ReportMetric(median(ours.took).Seconds(), "s/berth")
			b.ReportMetric(median(theirs.took).Seconds(), "s/containerd")
			b.ReportMetric(median(ours.took).Seconds()/median(theirs.took).Seconds(), "time-ratio")
			b.ReportMetric(float64(slices.Max(ours.peaks))/1024, "MiB/berth")
			b.ReportMetric(float64(slices.Max(theirs.peaks))/1024, "MiB/containerd")
			b.ReportMetric(0, "ns/op") // of all rounds together: of no use
		})
	}
}

// pullNodes run berth and containerd, and have one registry with the images for measurements of pulls.
func pullNodes(b *testing.B) (berth, containerd *lab.Node) {
	b.Helper()
	berth = idleNode(b, lab.Options{})
	must(b, berth.StartEmptyRegistry(b.Context()))
	builder, err := berth.Builder()
	must(b, err)
	must(b, builder.PushLayers(b.Context()))
	containerd = idleNode(b, lab.Options{Containerd: true})
	must(b, containerd.UseRegistry(berth.Registry))
	for _, n := range []*lab.Node{berth, containerd} {
		must(b, n.StartBerth(b.Context()))
	}
	return berth, containerd
}

func median(all []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(all))[len(all)/2]
}

// pulls are those of one image on one runtime.
type pulls struct {
	took  []time.Duration
	peaks []int // the daemon's highest resident memory while it pulled, KiB
}

// measure pulls an image on a node that does not have it, and perhaps has another one.
func (p *pulls) measure(b *testing.B, n *lab.Node, daemon int, image, before string) {
	b.Helper()
	ctx := b.Context()
	if before != "" {
		_, err := n.CRI.Pull(ctx, before)
		must(b, err)
	}
	unix.Sync() // what one runtime left to be written is not the other's to wait for
	residentKiB(b, daemon)
	began := time.Now()
	_, err := n.CRI.Pull(ctx, image)
	must(b, err)
	p.took = append(p.took, time.Since(began))
	p.peaks = append(p.peaks, peakKiB(b, daemon))
	for _, gone := range []string{image, before} {
		if gone != "" {
			must(b, removeImage(ctx, n, gone))
		}
	}
}

func removeImage(ctx context.Context, n *lab.Node, image string) error {
	_, err := n.CRI.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	return err
}

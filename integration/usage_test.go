//go:build integration

package integration

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// TestStatsTakeNoWalk: what a container has written is counted in the background. Statistics are told as fast while 200,000
// files are counted as one would expect, and not after a walk over them.
func TestStatsTakeNoWalk(t *testing.T) {
	const dirs, each = 200, 1000
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	p := newStreamingPod(t, n)
	pid, err := containerPID(ctx, n, p.sleeper)
	must(t, err)
	ask := func(ctx context.Context) (inodes uint64, took time.Duration, err error) {
		began := time.Now()
		resp, err := n.CRI.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
		if err != nil || len(resp.Stats) != 1 {
			return 0, 0, fmt.Errorf("%d containers: %w", len(resp.GetStats()), err)
		}
		return resp.Stats[0].GetWritableLayer().GetInodesUsed().GetValue(), time.Since(began), nil
	}
	root := fmt.Sprintf("/proc/%d/root/many", pid)
	for i := range dirs {
		dir := filepath.Join(root, fmt.Sprint(i))
		must(t, os.MkdirAll(dir, 0o755))
		for j := range each {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(j)), nil, 0o644))
		}
	}
	began := time.Now()
	must(t, filepath.WalkDir(root, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			_, err = d.Info()
		}
		return err
	}))
	walk := time.Since(began)
	var all []time.Duration
	must(t, lab.Eventually(ctx, 3*time.Minute, "all are counted", func(ctx context.Context) error {
		for range 10 {
			inodes, took, err := ask(ctx)
			if err != nil {
				return err
			}
			all = append(all, took)
			if inodes >= dirs*each {
				return nil
			}
		}
		return fmt.Errorf("not yet")
	}))
	slices.Sort(all)
	median := all[len(all)/2]
	t.Logf("a walk took %v, %d answers %v in the middle and %v at most", walk, len(all), median, all[len(all)-1])
	if median > walk/10 {
		t.Errorf("an answer takes %v, a walk over what it counts %v", median, walk)
	}
}

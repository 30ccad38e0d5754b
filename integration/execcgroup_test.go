//go:build integration

package integration

import (
	"context"
	"strings"
	"sync"
	"testing"

	"github.com/berth-run/berth/integration/lab"
)

// TestExecIsInItsContainersCgroups: an exec'd process is under its container's limits from its first instruction, in
// every hierarchy that limits, and in one of its own where it is killed by.
func TestExecIsInItsContainersCgroups(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	ledger(t, n)
	pod := n.Pod("execs")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	t.Cleanup(func() { must(t, n.CRI.RemovePod(context.Background(), podID)) })
	id, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("target"))
	must(t, err)
	inits := memberships(t, ctx, n, id, "1")

	var wg sync.WaitGroup
	for range 8 { // side by side, too
		wg.Go(func() {
			execs := memberships(t, ctx, n, id, "self")
			own := 0
			for hierarchy, path := range execs {
				want := inits[hierarchy]
				switch {
				case strings.HasPrefix(path, strings.TrimSuffix(want, "/")+"/exec-"):
					own++
				case hierarchy == "" && !onCgroup2(): // the hierarchy of a hybrid machine that limits nothing
				case path != want:
					t.Errorf("%q: an exec is in %s, its container in %s", hierarchy, path, want)
				}
			}
			if own != 1 {
				t.Errorf("an exec is in %d cgroups of its own: %v", own, execs)
			}
		})
	}
	wg.Wait()
}

// memberships are the cgroups of a process of a container by the controllers of their hierarchies.
func memberships(t *testing.T, ctx context.Context, n *lab.Node, id, pid string) map[string]string {
	out, err := n.CRI.Exec(ctx, id, "cat", "/proc/"+pid+"/cgroup")
	if err != nil {
		t.Error(err)
	}
	found := map[string]string{}
	for line := range strings.Lines(out) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 3); len(f) == 3 {
			found[f[1]] = f[2]
		}
	}
	return found
}

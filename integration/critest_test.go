//go:build integration

package integration

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/testimages"
)

// unfit are the cases of critest that cannot pass here with any runtime.
var unfit = []struct{ name, why string }{
	{"public image with digest should be pulled and removed", "its upstream digest cannot be made again from Debian packages; TestPullByDigest tests the same"},
}

// absent are the cases that critest skips by itself, by the beginning of their names. A case that it skips for a reason not
// listed here is a failure: nothing is to fall out of the suite unseen.
var absent = []struct{ name, why string }{
	{"[k8s.io] AppArmor", noAppArmor},
	{"[k8s.io] Container benchmark", benchmarks},
	{"[k8s.io] Image benchmark", benchmarks},
	{"[k8s.io] PodSandbox benchmark", benchmarks},
	{"[k8s.io] SELinux", noSELinux},
}

const (
	noAppArmor = "AppArmor is not on in this machine's kernel"
	noSELinux  = "SELinux is not on in this machine's kernel"
	benchmarks = "benchmarks run with -benchmark only: TestCritestBenchmarks"
)

// TestCritest runs the conformance suite of the CRI and demands that every case passes, except those that cannot.
func TestCritest(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
	defer cancel()
	ledger(t, n)
	reasons := map[string]int{}
	var skip []string
	for _, u := range unfit {
		skip = append(skip, regexp.QuoteMeta(u.name))
	}
	r, err := n.Critest(ctx, "", strings.Join(skip, "|"), "-nri-socket", n.NRISocket())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range r.SkippedNames {
		if why := whySkipped(name); why == "" {
			t.Errorf("skipped for a reason that is not known: %s", name)
		} else {
			reasons[why]++
		}
	}
	for why, count := range reasons {
		t.Logf("critest: %d skipped: %s", count, why)
	}
	for name, why := range r.Failures {
		t.Errorf("failed: %s\n%s", name, why)
	}
	t.Logf("critest: %d passed, %d failed, %d skipped in %v", r.Passed, r.Failed, r.Skipped, r.Took.Round(time.Second))
	if r.Passed < 100 {
		t.Errorf("only %d cases ran: critest has more than a hundred", r.Passed)
	}
}

func whySkipped(name string) string {
	for _, u := range unfit {
		if strings.Contains(name, u.name) {
			return u.why
		}
	}
	for _, a := range absent {
		if strings.HasPrefix(name, a.name) && (a.why != noAppArmor || !appArmor()) && (a.why != noSELinux || !seLinux()) {
			return a.why
		}
	}
	return ""
}

// TestCritestOverWebSocket runs critest's cases of streaming with its clients of WebSocket.
func TestCritestOverWebSocket(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	ledger(t, n)
	r, err := n.Critest(ctx, "Streaming", "", "-websocket-exec", "-websocket-attach", "-websocket-portforward")
	if err != nil {
		t.Fatal(err)
	}
	for name, why := range r.Failures {
		t.Errorf("failed: %s\n%s", name, why)
	}
	t.Logf("critest over WebSocket: %d passed, %d failed in %v", r.Passed, r.Failed, r.Took.Round(time.Second))
	if r.Passed < 5 {
		t.Errorf("only %d cases of streaming ran", r.Passed)
	}
}

// TestCritestBenchmarks runs critest's benchmarks: what they do has to work, however long it takes on a busy machine.
func TestCritestBenchmarks(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	ledger(t, n)
	settings := filepath.Join(t.TempDir(), "benchmarks.yaml")
	must(t, os.WriteFile(settings, []byte(`
containersNumber: 8
containersNumberParallel: 2
podsNumber: 8
podsNumberParallel: 2
imagesNumber: 6
imagePullingBenchmarkImage: `+testimages.Httpd+`
imageListingBenchmarkImages: [`+testimages.Busybox+`, `+testimages.Nginx+`]
containerBenchmarkTimeoutSeconds: 300
podBenchmarkTimeoutSeconds: 300
imageBenchmarkTimeoutSeconds: 300
podContainerStartBenchmarkTimeoutSeconds: 60
`), 0o644))
	r, err := n.Critest(ctx, "benchmark", "", "-benchmark", "-benchmarking-params-file", settings)
	if err != nil {
		t.Fatal(err)
	}
	for name, why := range r.Failures {
		t.Errorf("failed: %s\n%s", name, why)
	}
	t.Logf("critest's benchmarks: %d passed, %d failed in %v", r.Passed, r.Failed, r.Took.Round(time.Second))
	if r.Passed < 5 {
		t.Errorf("only %d benchmarks ran", r.Passed)
	}
}

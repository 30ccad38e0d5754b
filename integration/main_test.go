//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/berth-run/berth/integration/lab"
)

// tools are built before the first test, with their progress told, so that no test's time counts it.
var tools *lab.Tools

func TestMain(m *testing.M) {
	if os.Getenv(api.PluginNameEnvVar) != "" {
		os.Exit(nriWatcher()) // started by berth serve, see nri_test.go
	}
	if os.Geteuid() != 0 {
		fmt.Println("integration tests need root: sudo make test-integration")
		os.Exit(1)
	}
	var err error
	// BERTH_TOOLS names what the tests that are asked for need; else all is built, which takes long on a new machine.
	if tools, err = lab.BuildTools(context.Background(), os.Stderr, strings.Fields(os.Getenv("BERTH_TOOLS"))...); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	code := m.Run()
	lab.RemoveDefaultParent()
	os.Exit(code)
}

// newNode starts a node with the test images and its runtime. At the end of the test all is taken down, and the runtime
// must have left nothing behind.
func newNode(t *testing.T) *lab.Node {
	t.Helper()
	return startNode(t, lab.Options{})
}

func startNode(t *testing.T, o lab.Options) *lab.Node {
	t.Helper()
	n := idleNode(t, o)
	must(t, n.StartRegistry(t.Context()))
	must(t, n.StartBerth(t.Context()))
	return n
}

// idleNode makes a node that runs nothing yet. At the end of the test it is taken down, and its log is shown where that has
// failed.
func idleNode(t testing.TB, o lab.Options) *lab.Node {
	t.Helper()
	o.Tools, o.Log = tools, t.Logf
	n, err := lab.New(o)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() && n.Berth != nil {
			t.Logf("the end of the log of berth serve:\n%s", n.Berth.Tail(40))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// ledger notes what is there now, and makes the test fail when, at its end, something else is. Tests of another runtime
// than berth do without: what it leaves behind is not ours to judge.
func ledger(t *testing.T, n *lab.Node) {
	t.Helper()
	if n.Foreign() {
		return
	}
	before, err := n.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := n.Settle(ctx, before); err != nil {
			t.Error(err)
		}
	})
}

// must fails the test on an error.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

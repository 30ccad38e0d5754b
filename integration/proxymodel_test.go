//go:build integration

package integration

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/berth-run/berth/integration/lab"
)

// TestProxyModelIsKubeProxys compares what the proxy's model does with packets with what kube-proxy's own rules do, for 150 random clusters,
// with what a real kernel makes of these rules and of those of its mode iptables, for 2, and runs the tables of kube-proxy's own tests (make test-proxy-differential: 2,500
// and 50). The tests are those of proxy/model and proxy/nodetest, whose worlds are nobody else's.
func TestProxyModelIsKubeProxys(t *testing.T) {
	programs, err := lab.BuildTools(t.Context(), os.Stderr, "kubeproxy-tests")
	must(t, err)
	root, err := lab.RepoRoot()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), "go", "test", "-tags", "integration", "-count=1", "-v", "-run", "^TestKubeProxy", "./proxy/model", "./proxy/nodetest")
	cmd.Dir = filepath.Clean(root)
	cmd.Env = append(os.Environ(), "BERTH_KUBEPROXY="+programs.KubeProxyTests)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	must(t, err)
	if n := bytes.Count(out, []byte("--- PASS: TestKubeProxy")); n < 5 {
		t.Errorf("%d tests passed, want 5", n)
	}
}

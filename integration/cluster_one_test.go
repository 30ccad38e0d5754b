//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
)

// TestClusterOfOne is the smallest of clusters: one node and one Deployment behind a Service. A cluster of an index that is in use is
// refused, and its end is not that of the other.
func TestClusterOfOne(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER") == "" {
		t.Skip("make test-cluster runs it")
	}
	const index = 7
	dir := filepath.Join(t.TempDir(), "cluster")
	leavesNothing(t, index, dir)
	began := time.Now()
	log := func(format string, args ...any) {
		t.Logf("%6.1f s %s", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	c, err := cluster.Start(t.Context(), cluster.Options{Dir: dir, Index: index, Nodes: 1, Images: true, Log: log, Tools: clusterTools()})
	if c != nil {
		t.Cleanup(func() {
			if t.Failed() {
				tellCluster(t, c)
			}
		})
	}
	must(t, err)
	s := story{t, c}
	must(t, c.Apply(t.Context(), clusterManifest))
	web := s.ready("web", 2, 2*time.Minute, onNodes("node-1", "node-1"))
	log("the Deployment is ready")
	address, port, _ := strings.Cut(s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"), " ")
	s.answers("the cluster IP, from this machine", web, fromHost(address))
	s.answers("the node port", web, fromHost(c.Nodes[0].Address()+":"+port))
	log("the Service answers with each pod")
	other := filepath.Join(t.TempDir(), "other")
	if _, err := cluster.Start(t.Context(), cluster.Options{Dir: other, Index: index, Tools: clusterTools()}); err == nil || !strings.Contains(err.Error(), "index: 7 is another cluster's") {
		t.Errorf("a second cluster of the same index: %v", err)
	}
	must(t, cluster.Down(other)) // which is none, and takes nothing of this one down
	s.killContainer()
	log("a killed container was started again")
}

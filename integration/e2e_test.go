//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
)

// e2eSelection is what is run of Kubernetes' end-to-end tests.
type e2eSelection struct {
	index   int    // of its cluster
	label   string // of its tests, or none
	focus   string // what their names match; BERTH_E2E_FOCUS wins
	leftOut []e2eLeftOut
	timeout string // BERTH_E2E_TIMEOUT wins
}

// e2eLeftOut are tests that are not run, with the reason.
type e2eLeftOut struct{ pattern, reason string }

// e2eServices is what is about Services, and what a proxy does beside.
var e2eServices = e2eSelection{
	index: 2,
	focus: `\[sig-network\] (Services|EndpointSlice|EndpointSliceMirroring|Endpoints|EndpointsController|Conntrack|HostPort|Networking|Proxy|KubeProxy|` +
		`Traffic Distribution|Topology Hints|Service CIDRs|ServiceCIDR and IPAddress API|Service endpoints latency|Connectivity Pod Lifecycle|LocalhostNodePorts|NoSNAT) `,
	timeout: "100m",
	leftOut: []e2eLeftOut{
		{`\[Feature:LoadBalancer\]`, "needs a cloud's load balancers"},
		{`\[Feature:(IPv6DualStack|Networking-IPv6)\]`, "the cluster has IPv4 alone"},
		{`\[Feature:(Networking-Performance|PerformanceDNS)\]`, "measures, and wants a machine for it"},
		{`\[Feature:Networking-IPv4\]|\[Feature:Networking-DNS\]|should provide Internet connection`, "asks the internet"},
		{`\[Disruptive\]`, "restarts programs of the node over SSH"},
		{`\[Feature:SCTPConnectivity\]`, "wants SCTP sockets in the kernel for programs"},
		{`should set TCP CLOSE_WAIT timeout`, "needs the image distroless-iptables, which is not served"},
		{`should let a node pull an image from a registry exposed via localhost NodePort`, "the image agnhost here has no registry's content"},
	},
}

// e2eConformance is what every cluster must pass that calls itself Kubernetes. Ginkgo runs those that want to be alone after the others.
var e2eConformance = e2eSelection{
	index: 6, label: "Conformance", focus: ".", timeout: "220m",
	leftOut: []e2eLeftOut{
		{`ImageVolume should succeed with pod and pull policy of Always`, "wants Alpine's /etc/os-release in the image kitten, which is made of Debian here"},
	},
}

// TestUpstreamServices runs Kubernetes' own end-to-end tests of Services.
func TestUpstreamServices(t *testing.T) {
	if os.Getenv("BERTH_E2E") == "" {
		t.Skip("make test-e2e-proxy runs it")
	}
	e2eServices.run(t)
}

// TestConformance runs Kubernetes' own tests of conformance.
func TestConformance(t *testing.T) {
	if os.Getenv("BERTH_E2E") == "" {
		t.Skip("make test-conformance runs it")
	}
	e2eConformance.run(t)
}

// cluster is one of three nodes, each in a zone of its own, with CoreDNS and the tests' images, or the one that BERTH_CLUSTER_DIR names.
func (s e2eSelection) cluster(t *testing.T, logs string) *cluster.Cluster {
	t.Helper()
	var c *cluster.Cluster
	if dir := os.Getenv("BERTH_CLUSTER_DIR"); dir != "" {
		var err error
		c, err = cluster.Open(dir, t.Logf)
		must(t, err)
	} else {
		dir := filepath.Join(t.TempDir(), "cluster")
		t.Cleanup(func() {
			if os.Getenv("BERTH_E2E_LOGS") != "" {
				if err := os.CopyFS(filepath.Join(logs, "cluster"), os.DirFS(filepath.Join(dir, "logs"))); err != nil {
					t.Log(err)
				}
			}
			must(t, cluster.Down(dir))
		})
		var err error
		c, err = cluster.Start(t.Context(), cluster.Options{Dir: dir, Index: s.index, Nodes: 3, Images: true, Log: t.Logf, Tools: clusterTools()})
		must(t, err)
	}
	for i, n := range c.Nodes {
		_, err := c.Kubectl(t.Context(), "label", "--overwrite", "node", n.Name, fmt.Sprintf("topology.kubernetes.io/zone=zone-%d", i+1))
		must(t, err)
	}
	must(t, c.PushTestImages(t.Context(), tools.E2E))
	if tools.SampleAPIServer != "" {
		must(t, c.PushSampleAPIServer(t.Context(), tools.SampleAPIServer))
	}
	must(t, c.StartDNS(t.Context(), tools.DNS))
	return c
}

// run runs them, and tells what became of each.
func (s e2eSelection) run(t *testing.T) {
	logs := os.Getenv("BERTH_E2E_LOGS")
	if logs == "" {
		logs = t.TempDir()
	}
	must(t, os.MkdirAll(logs, 0o755))
	if only := os.Getenv("BERTH_E2E_FOCUS"); only != "" {
		s.focus = only
	}
	if timeout := os.Getenv("BERTH_E2E_TIMEOUT"); timeout != "" { // what has not begun by then is not run
		s.timeout = timeout
	}
	_, err := regexp.Compile(s.focus)
	if err != nil {
		t.Fatalf("BERTH_E2E_FOCUS: %v", err)
	}
	c := s.cluster(t, logs)
	out, err := os.Create(filepath.Join(logs, "e2e.log"))
	must(t, err)
	defer func() { _ = out.Close() }()
	args := []string{
		"--procs", "4", "--timeout", s.timeout, "--no-color", "--silence-skips", "--focus", s.focus, "--label-filter", s.label,
		"--json-report", "report.json", "--output-dir", logs,
	}
	if len(s.leftOut) > 0 {
		args = append(args, "--skip", s.leaveOut())
	}
	args = append(args, filepath.Join(tools.E2E, "e2e.test"), "--",
		"--kubeconfig", c.Kubeconfig(), "--provider", "local", "--num-nodes", strconv.Itoa(len(c.Nodes)), "--kubectl-path", filepath.Join(c.Dir, "bin", "kubectl"),
		"--delete-namespace-on-failure", "--node-schedulable-timeout", "2m", "--dns-domain", "cluster.local")
	began := time.Now()
	cmd := exec.CommandContext(t.Context(), filepath.Join(tools.E2E, "ginkgo"), args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = t.TempDir()
	ended := cmd.Run()
	counts, err := s.counts(filepath.Join(logs, "report.json"))
	if err != nil {
		t.Fatalf("%v (%v)\n%s", err, ended, lab.Tail(out.Name(), 40))
	}
	var lines []string
	for _, what := range []string{"passed", "failed", "skipped", "left out"} {
		lines = append(lines, fmt.Sprintf("%d %s", len(counts[what]), what))
	}
	t.Logf("%s, in %.0f s", strings.Join(lines, ", "), time.Since(began).Seconds())
	for _, what := range []string{"passed", "skipped", "left out"} {
		slices.Sort(counts[what])
		t.Logf("%s:\n  %s", what, strings.Join(counts[what], "\n  "))
	}
	for _, name := range counts["failed"] {
		t.Errorf("failed: %s", name)
	}
	if len(counts["passed"]) == 0 {
		t.Errorf("nothing passed: %v", ended)
	}
}

// leaveOut is what the names of tests that are left out match.
func (s e2eSelection) leaveOut() string {
	var patterns []string
	for _, l := range s.leftOut {
		patterns = append(patterns, l.pattern)
	}
	return strings.Join(patterns, "|")
}

// counts reads ginkgo's report: names of tests by what became of them.
func (s e2eSelection) counts(file string) (map[string][]string, error) {
	focus := regexp.MustCompile(s.focus)
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts  []string
			ContainerHierarchyLabels [][]string
			LeafNodeText             string
			LeafNodeLabels           []string
			LeafNodeType             string
			State                    string
			RunTime                  time.Duration
			Failure                  struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	counts := map[string][]string{}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			name := strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")
			labels := slices.Concat(append(spec.ContainerHierarchyLabels, spec.LeafNodeLabels)...)
			message, _, _ := strings.Cut(spec.Failure.Message, "\n")
			switch {
			case spec.LeafNodeType != "It" && spec.State == "failed":
				return nil, fmt.Errorf("%s: %s", spec.LeafNodeType, spec.Failure.Message)
			case spec.LeafNodeType != "It" || !focus.MatchString(name) || s.label != "" && !slices.Contains(labels, s.label):
			case spec.State == "passed":
				counts["passed"] = append(counts["passed"], fmt.Sprintf("%s (%.0f s)", name, spec.RunTime.Seconds()))
			case spec.State == "skipped" && message != "":
				counts["skipped"] = append(counts["skipped"], name+": "+message)
			case spec.State == "skipped":
				counts["left out"] = append(counts["left out"], name+": "+s.reason(name))
			case spec.State == "pending":
				counts["left out"] = append(counts["left out"], name+": upstream has it turned off")
			default:
				counts["failed"] = append(counts["failed"], fmt.Sprintf("%s: %s: %.600s", name, spec.State, spec.Failure.Message))
			}
		}
	}
	return counts, nil
}

func (s e2eSelection) reason(name string) string {
	for _, l := range s.leftOut {
		if regexp.MustCompile(l.pattern).MatchString(name) {
			return l.reason
		}
	}
	return "not run"
}

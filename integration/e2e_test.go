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
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
)

// e2eFocus is what of Kubernetes' end-to-end tests is about Services and what a proxy does beside.
const e2eFocus = `\[sig-network\] (Services|EndpointSlice|EndpointSliceMirroring|Endpoints|EndpointsController|Conntrack|HostPort|Networking|Proxy|KubeProxy|` +
	`Traffic Distribution|Topology Hints|Service CIDRs|ServiceCIDR and IPAddress API|Service endpoints latency|Connectivity Pod Lifecycle|LocalhostNodePorts|NoSNAT) `

// e2eLeftOut are those that are not run, with the reason.
var e2eLeftOut = []struct{ pattern, reason string }{
	{`\[Feature:LoadBalancer\]`, "needs a cloud's load balancers"},
	{`\[Feature:(IPv6DualStack|Networking-IPv6)\]`, "the cluster has IPv4 alone"},
	{`\[Feature:(Networking-Performance|PerformanceDNS)\]`, "measures, and wants a machine for it"},
	{`\[Feature:Networking-IPv4\]|\[Feature:Networking-DNS\]|should provide Internet connection`, "asks the internet"},
	{`\[Disruptive\]`, "restarts programs of the node over SSH"},
	{`\[Feature:SCTPConnectivity\]`, "wants SCTP sockets in the kernel for programs"},
	{`should set TCP CLOSE_WAIT timeout`, "needs the image distroless-iptables, which is not served"},
	{`should let a node pull an image from a registry exposed via localhost NodePort`, "the image agnhost here has no registry's content"},
}

// TestUpstreamServices runs Kubernetes' own end-to-end tests of Services on a cluster of three nodes, each in a zone of its own.
func TestUpstreamServices(t *testing.T) {
	if os.Getenv("BERTH_E2E") == "" {
		t.Skip("make test-e2e-proxy runs it")
	}
	dir := filepath.Join(t.TempDir(), "cluster")
	t.Cleanup(func() { must(t, cluster.Down(dir)) })
	c, err := cluster.Start(t.Context(), cluster.Options{Dir: dir, Index: 2, Nodes: 3, Images: true, Log: t.Logf, Tools: clusterTools()})
	must(t, err)
	for i, n := range c.Nodes {
		_, err := c.Kubectl(t.Context(), "label", "node", n.Name, fmt.Sprintf("topology.kubernetes.io/zone=zone-%d", i+1))
		must(t, err)
	}
	must(t, c.PushTestImages(t.Context(), tools.E2E))
	must(t, c.StartDNS(t.Context(), tools.DNS))

	focus := e2eFocus
	if only := os.Getenv("BERTH_E2E_FOCUS"); only != "" {
		focus = only
	}
	var leaveOut []string
	for _, l := range e2eLeftOut {
		leaveOut = append(leaveOut, l.pattern)
	}
	logs := os.Getenv("BERTH_E2E_LOGS")
	if logs == "" {
		logs = t.TempDir()
	}
	timeout := os.Getenv("BERTH_E2E_TIMEOUT") // what has not begun by then is not run
	if timeout == "" {
		timeout = "100m"
	}
	out, err := os.Create(filepath.Join(logs, "e2e.log"))
	must(t, err)
	defer func() { _ = out.Close() }()
	began := time.Now()
	cmd := exec.CommandContext(t.Context(), filepath.Join(tools.E2E, "ginkgo"),
		"--procs", "4", "--timeout", timeout, "--no-color", "--silence-skips", "--focus", focus, "--skip", strings.Join(leaveOut, "|"),
		"--json-report", "report.json", "--output-dir", logs, filepath.Join(tools.E2E, "e2e.test"), "--",
		"--kubeconfig", c.Kubeconfig(), "--provider", "local", "--num-nodes", "3", "--kubectl-path", filepath.Join(c.Dir, "bin", "kubectl"),
		"--dump-logs-on-failure=false", "--delete-namespace-on-failure", "--node-schedulable-timeout", "2m", "--dns-domain", "cluster.local")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = t.TempDir()
	ended := cmd.Run()
	counts, err := e2eCounts(filepath.Join(logs, "report.json"), regexp.MustCompile(focus))
	if err != nil {
		log, _ := exec.Command("tail", "-n", "40", out.Name()).Output()
		t.Fatalf("%v (%v)\n%s", err, ended, log)
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

// e2eCounts reads ginkgo's report: names of tests by what became of them.
func e2eCounts(file string, focus *regexp.Regexp) (map[string][]string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeText            string
			LeafNodeType            string
			State                   string
			RunTime                 time.Duration
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	counts := map[string][]string{}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			name := strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")
			message, _, _ := strings.Cut(spec.Failure.Message, "\n")
			switch {
			case spec.LeafNodeType != "It" && spec.State == "failed":
				return nil, fmt.Errorf("%s: %s", spec.LeafNodeType, spec.Failure.Message)
			case spec.LeafNodeType != "It" || !focus.MatchString(name):
			case spec.State == "passed":
				counts["passed"] = append(counts["passed"], fmt.Sprintf("%s (%.0f s)", name, spec.RunTime.Seconds()))
			case spec.State == "skipped" && message != "":
				counts["skipped"] = append(counts["skipped"], name+": "+message)
			case spec.State == "skipped":
				counts["left out"] = append(counts["left out"], name+": "+e2eReason(name))
			case spec.State == "pending":
				counts["left out"] = append(counts["left out"], name+": upstream has it turned off")
			default:
				counts["failed"] = append(counts["failed"], fmt.Sprintf("%s: %s: %.600s", name, spec.State, spec.Failure.Message))
			}
		}
	}
	return counts, nil
}

func e2eReason(name string) string {
	for _, l := range e2eLeftOut {
		if regexp.MustCompile(l.pattern).MatchString(name) {
			return l.reason
		}
	}
	return "not run"
}

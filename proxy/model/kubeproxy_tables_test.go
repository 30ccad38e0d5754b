//go:build integration

package model

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/integration/kubeproxy"
)

// What is read, with what is done with it here.
type (
	flowTable struct{ kubeproxy.FlowTable }
	flowCase  struct{ kubeproxy.FlowCase }
	choice    struct{ *kubeproxy.Choice }
	joined    struct{ *kubeproxy.Joined }
)

// readTables runs some of kube-proxy's own tests, which note their tables; they must pass themselves.
func readTables[T any](t *testing.T, program string, which ...string) []T {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tables")
	cmd := exec.Command(filepath.Join(kubeProxyPrograms(t), program), which...)
	cmd.Env = append(os.Environ(), "BERTH_TABLES="+path)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kube-proxy's own tests: %v\n%s", err, out)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list []T
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, len(text)+1)
	for lines.Scan() {
		var one T
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil {
			t.Fatal(err)
		}
		list = append(list, one)
	}
	return list
}

// TestKubeProxyPacketFlows runs the tables of kube-proxy's own nftables tests on the model.
func TestKubeProxyPacketFlows(t *testing.T) {
	passed, left := 0, map[string]int{}
	tests := map[string]bool{}
	for _, table := range readTables[flowTable](t, "nftables", "-test.skip", "Localhost|Cleanup|BerthOracle") {
		if why := table.leftOut(); why != "" {
			left[why] += len(table.Cases)
			continue
		}
		m := table.model(t)
		name, _, _ := strings.Cut(table.Test, "/")
		tests[name] = true
		for _, c := range table.Cases {
			v := Decide(m.State(), table.packet(&c))
			want := flowCase{c}.output()
			if got, masq := flowOutput(&v); got != want || masq != c.Masquerade && v.Action == Forward {
				t.Errorf("%s/%s: %s %s -> %s:%d: %q, masquerade %t, want %q, %t (%s)\n%s", table.Test, c.Name, c.Protocol, c.Src, c.Dst, c.Port,
					got, masq, want, c.Masquerade, v.Reason, m.State())
				continue
			}
			passed++
		}
	}
	t.Logf("%d cases of %d tests (%s)", passed, len(tests), strings.Join(slices.Sorted(maps.Keys(tests)), ", "))
	for why, n := range left {
		t.Logf("%d left out: %s", n, why)
	}
	if passed < 200 {
		t.Error("too few: their tests have been changed, or are not read any more")
	}
}

// leftOut is why a table is none for the model.
func (table *flowTable) leftOut() string {
	if table.Bare {
		return "of their tracer alone, with rules that no proxier has made"
	}
	return ""
}

// model is a model that was told what a table's proxier was.
func (table *flowTable) model(t *testing.T) *Model {
	c := Config{
		NodeName: table.NodeName, IPv4: !table.IPv6, IPv6: table.IPv6, MasqueradeAll: table.MasqueradeAll,
		NodePortAddresses: strings.Fields(strings.Trim(table.NodePortAddresses, "[]")),
	}
	switch words := slices.DeleteFunc(table.Local, func(w string) bool { return w == "ip" || w == "ip6" }); {
	case len(words) == 2 && words[0] == "saddr":
		c.DetectLocal, c.ClusterCIDRs = ModeClusterCIDR, words[1:]
	case len(words) == 2 && words[0] == "iifname":
		c.DetectLocal, c.InterfaceNamePrefix = ModeInterfaceNamePrefix, strings.TrimSuffix(words[1], "*")
	case len(words) > 0:
		t.Fatalf("local traffic is %q", words)
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	m.SetNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: table.NodeName, Labels: table.Labels},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: table.NodeIP}}},
	})
	if table.ServiceCIDRs != "" {
		m.SetServiceCIDR(serviceCIDR("kubernetes", strings.Split(table.ServiceCIDRs, ",")...))
	}
	for _, s := range table.Services {
		m.SetService(s)
	}
	for _, s := range table.Slices {
		m.SetSlice(s)
	}
	m.Commit()
	return m
}

func (table *flowTable) packet(c *kubeproxy.FlowCase) Packet {
	p := Packet{
		Src: netip.MustParseAddr(c.Src), Dst: netip.MustParseAddr(c.Dst), Port: c.Port, Protocol: TCP, Interface: "eth0",
		SrcLocal: slices.Contains(table.NodeIPs, c.Src), DstLocal: slices.Contains(table.NodeIPs, c.Dst),
	}
	p.Protocol, _ = parseProtocol(corev1.Protocol(c.Protocol))
	if p.SrcLocal {
		p.Interface = ""
	}
	return p
}

// output is the case's, its endpoints sorted.
func (c flowCase) output() string {
	list := strings.Split(c.Output, ", ")
	slices.Sort(list)
	return strings.Join(list, ", ")
}

// flowOutput is a verdict as their tables have it.
func flowOutput(v *Verdict) (string, bool) {
	switch v.Action {
	case Reject:
		return "REJECT", false
	case Drop:
		return "DROP", false
	}
	var list []string
	masq := false
	for _, e := range v.Endpoints {
		list = append(list, e.AddrPort().String())
	}
	if len(v.Endpoints) > 0 {
		// Their tracer follows the first one.
		masq = v.Masquerades(v.Endpoints[0])
	}
	slices.Sort(list)
	return strings.Join(list, ", "), masq
}

// TestKubeProxyChoices runs what kube-proxy's own tests ask about a port's endpoints (topology_test.go) and about a Service's slices
// (endpointslicecache_test.go, endpointschangetracker_test.go) on the model's functions for these.
func TestKubeProxyChoices(t *testing.T) {
	choices, joins, gated, typeless := 0, 0, 0, 0
	for _, table := range readTables[kubeproxy.ProxyTable](t, "proxy", "-test.run", "Endpoint|EsDataChanged") {
		switch {
		case table.Joined != nil && slices.ContainsFunc(table.Joined.Slices, func(s *discoveryv1.EndpointSlice) bool { return s.AddressType == "" }):
			typeless++
		case table.Joined != nil:
			joins++
			joined{table.Joined}.check(t)
		case !table.Choice.NodeHints && (choice{table.Choice}).hintsNodes():
			// A feature gate that is on and cannot be turned off any more: their tests still do, of an older version.
			gated++
		default:
			choices++
			choice{table.Choice}.check(t)
		}
	}
	t.Logf("%d choices among a port's endpoints, %d joins of a Service's slices", choices, joins)
	t.Logf("%d left out: hints for nodes turned off; %d: slices without an address type, which no API server has", gated, typeless)
	if choices < 25 || joins < 100 {
		t.Error("too few: their tests have been changed, or are not read any more")
	}
}

func (c choice) hintsNodes() bool {
	return slices.ContainsFunc(c.Endpoints, func(e kubeproxy.EndpointFacts) bool { return len(e.Nodes) > 0 })
}

func (c choice) check(t *testing.T) {
	t.Helper()
	// As buildPort has it.
	useCluster, useLocal := !c.InternalLocal || c.Reachable, c.InternalLocal || c.ExternalLocal && c.Reachable
	if useCluster != c.UsesCluster || useLocal != c.UsesLocal {
		t.Errorf("uses cluster %t, local %t: %+v", useCluster, useLocal, *c.Choice)
	}
	var all []candidate
	for _, e := range c.Endpoints {
		all = append(all, candidateOf(t, &e, c.NodeName))
	}
	u := usableEndpoints(all, useCluster, useLocal, c.Zone, nil)
	if cluster, local := written(u.cluster), written(u.local); !sameElements(cluster, c.Cluster) || !sameElements(local, c.Local) || u.any != c.Any {
		t.Errorf("cluster %v, local %v, any %t: %+v", cluster, local, u.any, *c.Choice)
	}
}

// candidateOf is an endpoint as the model has it after it has read slices.
func candidateOf(t *testing.T, e *kubeproxy.EndpointFacts, node string) candidate {
	at, err := netip.ParseAddrPort(e.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	from := discoveryv1.Endpoint{Hints: &discoveryv1.EndpointHints{}, Conditions: discoveryv1.EndpointConditions{
		Ready: &e.Ready, Serving: &e.Serving, Terminating: &e.Terminating,
	}}
	for _, z := range e.Zones {
		from.Hints.ForZones = append(from.Hints.ForZones, discoveryv1.ForZone{Name: z})
	}
	for _, n := range e.Nodes {
		from.Hints.ForNodes = append(from.Hints.ForNodes, discoveryv1.ForNode{Name: n})
	}
	c := candidate{
		Endpoint: Endpoint{Addr: at.Addr(), Port: at.Port(), Local: e.Local}, conditions: readConditions(&from, node), weight: 1,
	}
	if e.Local {
		c.conditions |= isLocal
	}
	if zones := readZones(&from, 0, &problems{}); zones != "" {
		c.zones, c.conditions = unique.Make(zones), c.conditions|hasZones
	}
	return c
}

func written(list []Endpoint) []string {
	var out []string
	for _, e := range list {
		out = append(out, e.AddrPort().String())
	}
	return out
}

func sameElements(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

func (j joined) check(t *testing.T) {
	t.Helper()
	var list []*slice
	for _, s := range j.Slices {
		if r, _ := reduceSlice(s, j.NodeName); r != nil {
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b *slice) int { return strings.Compare(a.name, b.name) })
	sources := indexSlices(nil, list)
	got := map[string][]string{}
	for _, s := range sources.list {
		key := s.key.name.Value() + "/" + strings.ToUpper(s.key.protocol.String())
		var all []string
		for _, c := range gather(nil, &sources, s.key) {
			all = append(all, sayCandidate(&c))
		}
		got[key] = all
	}
	want := map[string][]string{}
	for key, list := range j.Endpoints {
		for _, e := range list {
			c := candidateOf(t, &e, j.NodeName)
			want[key] = append(want[key], sayCandidate(&c))
		}
	}
	for key := range want {
		if !sameElements(got[key], want[key]) {
			t.Errorf("%s: %v, want %v", key, got[key], want[key])
		}
	}
	for key, list := range got {
		if len(list) > 0 && want[key] == nil {
			t.Errorf("%s: %v, want none", key, list)
		}
	}
}

func sayCandidate(c *candidate) string {
	zones := ""
	if c.conditions.all(hasZones) {
		list := strings.FieldsFunc(c.zones.Value(), func(r rune) bool { return r == 0 })
		slices.Sort(list)
		zones = strings.Join(list, " ")
	}
	return fmt.Sprintf("%s %b %s", c.Endpoint, c.conditions, zones)
}

package explain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/berth-run/berth/proxy/iptables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// cluster is what the tests ask about: the node node-1 in zone a, at 192.0.2.1, with pods in 10.1.0.0/16.
const cluster = `
kind: Service
metadata: {namespace: default, name: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  externalTrafficPolicy: Local
  healthCheckNodePort: 31000
  loadBalancerSourceRanges: [192.0.2.0/24]
  ports: [{name: http, port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 203.0.113.1}]}}
---
kind: Service
metadata: {namespace: default, name: sticky, annotations: {berth.run/port-ranges: 5000-5100}}
spec:
  clusterIP: 10.96.0.2
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 3600}}
  ports: [{port: 443}]
---
kind: Service
metadata: {namespace: default, name: nowhere}
spec:
  type: NodePort
  clusterIP: 10.96.0.3
  externalIPs: [203.0.113.1]
  ports: [{name: http, port: 80, nodePort: 30090}, {name: dns, port: 53, protocol: UDP}]
---
kind: Service
metadata: {namespace: default, name: canary, annotations: {berth.run/weights: 10.2.0.1=0}}
spec:
  type: NodePort
  clusterIP: 10.96.0.4
  internalTrafficPolicy: Local
  ports: [{name: http, port: 80, nodePort: 30070}]
---
kind: EndpointSlice
metadata: {namespace: default, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.1.2], nodeName: node-1}
- {addresses: [10.1.2.2], nodeName: node-2}
- {addresses: [10.1.3.2], nodeName: node-2, conditions: {ready: false}}
- {addresses: [10.1.4.2], nodeName: node-1, conditions: {ready: false, serving: true, terminating: true}}
---
kind: EndpointSlice
metadata: {namespace: default, name: sticky-1, labels: {kubernetes.io/service-name: sticky}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints: [{addresses: [10.1.1.2], nodeName: node-1}, {addresses: [10.1.2.2], nodeName: node-1}]
---
kind: EndpointSlice
metadata: {namespace: default, name: canary-1, labels: {kubernetes.io/service-name: canary}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.2.0.1], nodeName: node-2, hints: {forZones: [{name: a}]}}
- {addresses: [10.2.0.2], nodeName: node-2, hints: {forZones: [{name: a}]}}
- {addresses: [10.2.0.3], nodeName: node-3, hints: {forZones: [{name: b}]}}
---
kind: ServiceCIDR
metadata: {name: kubernetes}
spec: {cidrs: [10.96.0.0/12]}
---
kind: Node
metadata: {name: node-1, labels: {topology.kubernetes.io/zone: a}}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
`

func modelOf(t testing.TB) *model.Model {
	t.Helper()
	m, err := model.New(model.Config{NodeName: "node-1", IPv4: true, IPv6: true, DetectLocal: model.ModeClusterCIDR, ClusterCIDRs: []string{"10.1.0.0/16"}, NodePortAddresses: []string{"primary"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range strings.Split(cluster, "---") {
		var kind metav1.TypeMeta
		into := func(o any) {
			if err := yaml.Unmarshal([]byte(text), o); err != nil {
				t.Fatal(err)
			}
		}
		switch into(&kind); kind.Kind {
		case "Service":
			s := &corev1.Service{}
			into(s)
			m.SetService(s)
		case "EndpointSlice":
			s := &discoveryv1.EndpointSlice{}
			into(s)
			m.SetSlice(s)
		case "ServiceCIDR":
			c := &networkingv1.ServiceCIDR{}
			into(c)
			m.SetServiceCIDR(c)
		case "Node":
			n := &corev1.Node{}
			into(n)
			m.SetNode(n)
		}
	}
	m.Commit()
	return m
}

// host is the node of the tests.
type host struct{}

func (host) Local(a netip.Addr) bool {
	return a.IsLoopback() || a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("192.0.2.9")
}

func (host) Interface(netip.Addr) string { return "eth0" }

func serverOf(t testing.TB) *Server {
	return &Server{
		Model: modelOf(t), Look: &sync.Mutex{}, Mode: "nftables", Host: host{},
		Counters: func() (map[program.Counted]program.Count, error) {
			web := program.Counted{Service: types.NamespacedName{Namespace: "default", Name: "web"}, Port: "http", Protocol: model.TCP}
			refused := web
			refused.Cause = program.SourceRanges
			return map[program.Counted]program.Count{web: {Packets: 12}, refused: {Packets: 3}}, nil
		},
	}
}

// say is an Answer's text, with one space between words.
func say(t testing.TB, s *Server, target, from string) (string, *Answer) {
	t.Helper()
	a, err := s.Answer(Question{target, from})
	if err != nil {
		t.Fatalf("%s from %s: %v", target, from, err)
	}
	var b strings.Builder
	if err := a.Text(&b); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.Join(strings.Fields(lines[i]), " ")
	}
	return strings.Join(lines, "\n"), a
}

func TestAnswers(t *testing.T) {
	s := serverOf(t)
	for _, c := range []struct {
		target, from string
		found        bool
		want         []string
		not          []string
	}{
		{"10.96.0.1:80", "", true, []string{
			"10.96.0.1:80/tcp ClusterIP of default/web:http", "from anyone forwarded: the traffic policy's endpoints, policy cluster",
			"masqueraded unless a pod sends it: source in 10.1.0.0/16", "10.1.1.2:8080 50.0% ready, this node", "10.1.2.2:8080 50.0% ready\n",
			"10.1.3.2:8080 0.0% not ready", "10.1.4.2:8080 0.0% terminating, and others are ready, this node",
			"counted 12 connections, 3 packets refused (source-ranges), at all IPv4 addresses of the port",
		}, []string{"session affinity", "policy local", "10.96.0.1:80/udp"}},
		{"10.96.0.1:80/tcp", "10.1.1.9", true, []string{"from 10.1.1.9 forwarded", "masqueraded no: a pod sends it"}, nil},
		{"10.96.0.1:80", "10.1.1.2", true, []string{"yes where it is sent to itself"}, nil},
		{"10.96.0.1:80", "198.51.100.7", true, []string{"masqueraded yes: no pod sends it (source in 10.1.0.0/16)"}, nil},
		{"203.0.113.1:80", "", true, []string{
			"LoadBalancer of default/web:http", "claimed by default/nowhere, too", "only from 192.0.2.0/24, 203.0.113.1/32; others are DROPPED", "from others forwarded: the traffic policy's endpoints, policy local",
			"masqueraded no: externalTrafficPolicy Local keeps the source", "from pods (source in 10.1.0.0/16) forwarded: all endpoints, since a pod sends it",
			"from this node forwarded: all endpoints", "endpoints, policy local\n10.1.1.2:8080 100.0% ready, this node\n10.1.2.2:8080 0.0% on another node, and the policy is Local",
			"endpoints, policy cluster\n10.1.1.2:8080 50.0%",
		}, nil},
		{"203.0.113.1:80", "198.51.100.7", true, []string{"from 198.51.100.7 DROPPED: the source is in none of loadBalancerSourceRanges"}, []string{"masqueraded"}},
		{"203.0.113.1:80", "192.0.2.1", true, []string{"from 192.0.2.1 forwarded: all endpoints, since the node sends it", "masqueraded yes: the node sends it past the policy Local", "50.0%"}, nil},
		{"192.0.2.1:30080", "192.0.2.7", true, []string{"0.0.0.0:30080/tcp NodePort of default/web:http", "policy local", "10.1.1.2:8080 100.0%"}, nil},
		{":30080", "", true, []string{"NodePort of default/web:http"}, nil},
		{"192.0.2.9:30080", "", false, []string{"node ports are not served at 192.0.2.9 (nodePortAddresses: [192.0.2.1/32])", "no Service's"}, nil},
		{"127.0.0.1:30080/tcp", "", false, []string{"30080/tcp is a node port of default/web, but at 127.0.0.1 neither a rule serves it nor the proxy itself"}, nil},
		{"192.0.2.99:30080/tcp", "", false, []string{"30080/tcp is a node port of default/web, but 192.0.2.99 is no address of this node"}, nil},
		{"default/nowhere:dns", "", true, []string{"10.96.0.3:53/udp ClusterIP of default/nowhere:dns", "from anyone REJECTED: the Service has no endpoint anywhere", "endpoints none in any EndpointSlice"}, []string{"tcp"}},
		{"default/nowhere:53", "", true, []string{"10.96.0.3:53/udp"}, []string{":80"}},
		{"default/nowhere", "", true, []string{"10.96.0.3:53/udp", "10.96.0.3:80/tcp", "0.0.0.0:30090/tcp"}, nil},
		{"default/nowhere/udp", "", true, []string{"10.96.0.3:53/udp"}, []string{"tcp"}},
		{"default/web:nosuch", "", false, []string{`default/web has no port "nosuch": http=80/tcp, http=30080/tcp`}, nil},
		{"default/none", "", false, []string{"default/none is no Service that this proxy does anything for"}, nil},
		{"10.96.0.4:80", "", true, []string{"from anyone DROPPED: the traffic policy is Local", "10.2.0.1:8080 0.0% on another node"}, nil},
		{":30070", "", true, []string{
			"topology hints are followed: endpoints for this node's zone, a", "10.2.0.1:8080 0.0% weight 0, weight 0, hinted for a", "10.2.0.2:8080 100.0% ready, for this zone", "10.2.0.3:8080 0.0% for other zones, by its hints, hinted for b",
			"masqueraded yes: externalTrafficPolicy Cluster",
		}, nil},
		{"10.96.0.2", "10.1.1.9", true, []string{"10.96.0.2:443/tcp ClusterIP of default/sticky\n", "session affinity by client address, for 1h0m0s"}, nil},
		{"10.96.0.2:5005", "10.1.1.9", true, []string{"10.96.0.2:5000-5100/tcp ClusterIP of default/sticky\n", "10.1.1.2 50.0% ready"}, []string{"session affinity", "8080"}},
		{"10.96.0.2:444", "", false, []string{"no Service's", "REJECTED: the Service has no such port", "note 10.96.0.2 is the cluster IP of default/sticky, which has 443/tcp"}, nil},
		{"10.97.0.2:80", "", false, []string{"DROPPED: no Service has the cluster IP"}, nil},
		{"10.97.0.2", "", false, []string{"no Service has the address 10.97.0.2"}, nil},
		{"10.1.1.2:8080", "", false, []string{"left alone: no Service has the address", "10.1.1.2:8080 is an endpoint of default/web:http", "is an endpoint of default/sticky\n"}, nil},
		{"", "", true, []string{
			"node node-1, zone a, mode nftables", "Services 4, with 5 ports", "IPv4 pods: source in 10.1.0.0/16; node ports at 192.0.2.1/32; cluster IPs in 10.96.0.0/12",
			"rejecting default/nowhere ClusterIP 10.96.0.3:80/tcp", "dropping default/canary ClusterIP 10.96.0.4:80/tcp", "left out Service default/nowhere", "counted 3 packets refused (source-ranges)",
			"kernel not read: mode nftables",
		}, []string{"IPv6"}},
	} {
		text, a := say(t, s, c.target, c.from)
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s from %q lacks %q:\n%s", c.target, c.from, want, text)
			}
		}
		for _, not := range c.not {
			if strings.Contains(text, not) {
				t.Errorf("%s from %q has %q:\n%s", c.target, c.from, not, text)
			}
		}
		if a.Found() != c.found {
			t.Errorf("%s from %q: found %t:\n%s", c.target, c.from, a.Found(), text)
		}
	}
}

// Counts are a port's, whose addresses are three here.
func TestCountsAreToldOnce(t *testing.T) {
	for target, addresses := range map[string]int{"default/web": 3, "default/web:http": 3, "203.0.113.1:80": 1} {
		text, a := say(t, serverOf(t), target, "")
		if n := strings.Count(text, "counted 12 connections"); n != 1 || len(a.Addresses) != addresses {
			t.Errorf("%s: told %d times at %d addresses:\n%s", target, n, len(a.Addresses), text)
		}
	}
}

// A kernel has IPv6 whether the cluster does it or not.
func TestAFamilyWithoutAnythingHasNoLine(t *testing.T) {
	s := serverOf(t)
	if text, a := say(t, s, "", ""); strings.Contains(text, "IPv6") || len(a.Summary.Families) != 2 || !a.Summary.Families[0].Used || a.Summary.Families[1].Used {
		t.Errorf("%+v\n%s", a.Summary.Families, text)
	}
	s.Model.SetServiceCIDR(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "more"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"fd96::/108"}}})
	s.Model.Commit()
	if text, _ := say(t, s, "", ""); !strings.Contains(text, "IPv6 pods: none; node ports at ::/0; cluster IPs in fd96::/108") {
		t.Error(text)
	}
}

func TestQuestionsThatMakeNoSense(t *testing.T) {
	s := serverOf(t)
	for _, q := range []Question{
		{"10.96.0.1:0", ""}, {"10.96.0.1:99999", ""}, {"web", ""}, {"/web", ""}, {"default/", ""}, {"default/web:a:b", ""}, {":http", ""}, {":0", ""},
		{"fd00::1:80x", ""}, {"10.96.0.1:80/icmp", ""}, {"10.96.0.1/icmp", ""}, {"10.96.0.1:80", "web"}, {"10.96.0.1:80", "10.1.0.0/16"},
		{"10.96.0.1:80", "fd00::1"}, {"10.96.0.1", "fd00::1"}, {"10.97.0.2:80", "fd00::1"}, {"fd96::1", "10.1.0.1"}, {"default/web", "fd00::1"},
	} {
		if a, err := s.Answer(q); !errors.Is(err, ErrQuestion) {
			t.Errorf("%+v: %+v, %v", q, a, err)
		}
	}
}

func TestKnowledgeThatIsOldIsTold(t *testing.T) {
	s := serverOf(t)
	var err error
	s.Silent = func() (time.Time, error) { return time.Now().Add(-42 * time.Minute), err }
	if text, a := say(t, s, "10.96.0.1:80", ""); a.Silent != nil || strings.Contains(text, "SILENT") {
		t.Error(text)
	}
	err = errors.New("Service: connection refused")
	if text, a := say(t, s, "10.96.0.1:80", ""); a.Silent == nil || !strings.Contains(text, "(42m") || !strings.Contains(text, ") the API server does not tell what changes: Service: connection refused") || !strings.Contains(text, "10.1.1.2:8080 50.0%") {
		t.Error(text)
	}
}

func TestNodePortsThatTheProxyItselfServes(t *testing.T) {
	s := serverOf(t)
	s.Loopback = func(p model.Protocol, at netip.AddrPort) bool {
		return p == model.TCP && at == netip.MustParseAddrPort("127.0.0.1:30080")
	}
	for _, from := range []string{"", "127.0.0.1"} {
		text, a := say(t, s, "127.0.0.1:30080", from)
		if want := "127.0.0.1:30080/tcp NodePort of default/web:http\nfrom programs of this node forwarded: the proxy itself listens there, policy local\n"; !a.Found() || !strings.HasPrefix(text, want) || !strings.Contains(text, "10.1.1.2:8080 100.0%") {
			t.Errorf("from %q: %s", from, text)
		}
	}
	for target, want := range map[string]string{"127.0.0.1:30090": "the proxy itself does not listen at 127.0.0.1", "127.0.0.2:30080": "does not listen at 127.0.0.2", "192.0.2.1:30080": "0.0.0.0:30080/tcp NodePort"} {
		if text, a := say(t, s, target, ""); a.Found() != strings.HasPrefix(target, "192") || !strings.Contains(text, want) {
			t.Errorf("%s: %s", target, text)
		}
	}
}

func TestANameThatNoNodeHasIsTold(t *testing.T) {
	s := serverOf(t)
	if text, _ := say(t, s, "", ""); strings.Contains(text, "no Node") {
		t.Error(text)
	}
	s.Model.SetNode(nil)
	s.Model.Commit()
	for _, target := range []string{"", "10.96.0.1:80"} {
		if text, _ := say(t, s, target, ""); !strings.Contains(text, "note no Node has the name node-1") {
			t.Error(text)
		}
	}
}

func TestTargets(t *testing.T) {
	for text, want := range map[string]string{
		"10.96.0.1:80/TCP": "10.96.0.1 80 tcp", "[fd96::1]:53/udp": "fd96::1 53 udp", "fd96::1": "fd96::1 0 0", "10.96.0.1/udp": "10.96.0.1 0 udp",
		":30080": "invalid IP 30080 0", "a/b": "a/b : 0", "a/b:http/sctp": "a/b :http sctp", "a/udp": "a/udp : 0", "a/b/tcp": "a/b : tcp", "::ffff:10.0.0.1": "10.0.0.1 0 0",
	} {
		x, err := readTarget(text)
		got := fmt.Sprintf("%s %d %s", x.addr, x.port, x.protocol)
		if x.byName() {
			got = fmt.Sprintf("%s :%s %s", x.service, x.portName, x.protocol)
		}
		if err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", text, got, err, want)
		}
	}
}

// asked is a proxy of the test's cluster with real rules, which is asked by its socket.
func asked(t *testing.T, l *nodetest.Lab) (ask func(target, from string) (string, *Answer), p *nft.Programmer) {
	t.Helper()
	s := serverOf(t)
	err := l.Node.Do(func() (err error) { p, err = nft.Open(nft.Options{Counters: true}); return err })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	if _, err := p.Sync(s.Model.State()); err != nil {
		t.Fatal(err)
	}
	s.Inspector, s.Counters = p.Inspector(), p.Counters().Read
	return answers(t, s), p
}

// answers has a Server be asked by its socket.
func answers(t *testing.T, s *Server) (ask func(target, from string) (string, *Answer)) {
	t.Helper()
	at := filepath.Join(t.TempDir(), "s", "proxy.sock")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, at, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return func(target, from string) (string, *Answer) {
		t.Helper()
		var a *Answer
		var err error
		for deadline := time.Now().Add(nodetest.Patience); ; time.Sleep(10 * time.Millisecond) {
			if a, err = Ask(t.Context(), at, Question{target, from}); err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(deadline) {
				break // it listens, not just has the socket
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := a.Text(&b); err != nil {
			t.Fatal(err)
		}
		return b.String(), a
	}
}

// With real rules and packets: what the kernel has, whom it remembers, and what somebody else has done to it.
func TestExplainReadsTheKernel(t *testing.T) {
	l := nodetest.New(t, 2)
	ask, p := asked(t, l)
	answer := l.Client.Ask("tcp4", "10.96.0.2:443")
	text, a := ask("10.96.0.2:443", nodetest.Families[0].Client)
	at := &a.Addresses[0]
	if !a.Kernel.Read || len(a.Kernel.Differences) != 0 || a.Kernel.Elements == 0 || at.Client == nil || at.Client.By != "affinity" {
		t.Fatalf("%s", text)
	}
	if pod := "pod" + strings.Split(at.Client.Endpoint, ".")[2] + " "; !strings.HasPrefix(answer, pod) || at.Counts["connections"] != 1 {
		t.Errorf("%q answered; %s", answer, text)
	}
	if !strings.Contains(strings.Join(a.Kernel.Have, "\n"), `ip frontends: 10.96.0.2 . tcp . 443 comment "default/sticky" counter packets 1`) {
		t.Errorf("%q", a.Kernel.Have)
	}
	// An endpoint of somebody else's: packets go there, and nobody has told the proxy.
	l.Node.Run("nft", "add", "element", "ip", nft.Table, "endpoints", "{ 10.96.0.1 . tcp . 80 . 2 : 198.51.100.66 . 80 }")
	for target, differs := range map[string]bool{"default/web": true, "10.96.0.1:80": true, "default/sticky": false, "": true} {
		text, a := ask(target, "")
		if found := len(a.Kernel.Differences) == 1 && strings.Contains(text, "not berth's: is 10.96.0.1 . tcp . 80 . 2 : 198.51.100.66 . 80"); found != differs {
			t.Errorf("%s: %s", target, text)
		}
	}
	// Another port of a Service is not asked about.
	l.Node.Run("nft", "add", "element", "ip", nft.Table, "dropped", "{ 10.96.0.3 . tcp . 80 }")
	for target, other := range map[string]bool{"default/nowhere": true, "default/nowhere:http": true, "default/nowhere:dns": false, "10.96.0.3:53/udp": false} {
		text, a := ask(target, "")
		if found := len(a.Kernel.Differences) == 1; found != other || strings.Contains(text, "10.96.0.3 . tcp . 80") != other {
			t.Errorf("%s: %s", target, text)
		}
		if dns := strings.Contains(text, "ip frontends: 10.96.0.3 . udp . 53"); dns == strings.HasSuffix(target, "http") {
			t.Errorf("%s: %s", target, text)
		}
	}
	// A rule of somebody else's is in the way of all.
	l.Node.Run("nft", "insert", "rule", "ip", nft.Table, "services", "tcp", "dport", "443", "accept")
	if text, _ := ask("default/sticky", ""); !strings.Contains(text, "DIFFERS") || !strings.Contains(text, "chain services: other rules") {
		t.Error(text)
	}
	if _, err := p.Verify(); err != nil {
		t.Fatal(err)
	}
	if text, a := ask("", ""); len(a.Kernel.Differences) != 0 || !strings.Contains(text, "as it should be") {
		t.Error(text)
	}
}

// inside is an Inspector in a network namespace.
type inside struct {
	program.Inspector
	*nodetest.Space
}

func (i inside) Inspect(scope program.Scope) (found *program.Inspection, err error) {
	_ = i.Do(func() error { found, err = i.Inspector.Inspect(scope); return nil })
	return found, err
}

// The same in mode iptables: nothing differs before anything was programmed; then what the kernel has, and what somebody else has done to it.
func TestExplainReadsTheRulesOfIptables(t *testing.T) {
	node := nodetest.NewSpace(t, "node")
	if err := node.Do(func() error { return iptables.Supported(model.IPv4) }); err != nil {
		t.Skip(err)
	}
	p, err := iptables.Open(iptables.Options{MasqueradeBit: 14})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	s := serverOf(t)
	s.Mode, s.Inspector, s.Counters = "iptables", inside{p.Inspector(), node}, nil
	ask := answers(t, s)
	for _, target := range []string{"", "default/web"} {
		if text, a := ask(target, ""); !a.Loading || a.Kernel.Read || !strings.Contains(text, "not read: Services are being programmed for the first time") {
			t.Errorf("before the first sync has ended: %s", text)
		}
	}
	sync := func(do func() (program.Report, error)) {
		t.Helper()
		if err := node.Do(func() error { _, err := do(); return err }); err != nil {
			t.Fatal(err)
		}
	}
	sync(func() (program.Report, error) { return p.Sync(s.Model.State()) })
	text, a := ask("10.96.0.2:443", nodetest.Families[0].Client)
	if len(a.Kernel.Differences) > 0 || !a.Kernel.Read || a.Loading {
		t.Error(text)
	}
	for _, want := range []string{
		"as it should be: all rules, ", "ip nat KUBE-SERVICES: -d 10.96.0.2/32 -p tcp", "(50.0% to 10.1.1.2:8080) counter packets 0", "(50.0% to 10.1.2.2:8080)",
		"session affinity of 192.0.2.2: mode iptables: where clients are remembered is in /proc/net/xt_recent/KUBE-SEP-",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if text, _ := ask("203.0.113.1:80", ""); !strings.Contains(text, ": -s 192.0.2.0/24 ") || !strings.Contains(text, "ip filter KUBE-PROXY-FIREWALL: -d 203.0.113.1/32") {
		t.Errorf("who may send, and who else may not:\n%s", text)
	}
	if text, _ := ask("default/nowhere:dns", ""); !strings.Contains(text, "ip filter KUBE-SERVICES: -d 10.96.0.3/32 -p udp") || !strings.Contains(text, "-j REJECT") || strings.Contains(text, "-p tcp") {
		t.Errorf("what is rejected:\n%s", text)
	}
	node.Run("iptables", "-t", "nat", "-I", "KUBE-SERVICES", "-d", "10.96.0.1", "-p", "tcp", "--dport", "80", "-j", "DNAT", "--to-destination", "198.51.100.66:80")
	for target, differs := range map[string]bool{"default/web": true, "10.96.0.1:80": true, "default/sticky": false, "": true} {
		text, a := ask(target, "")
		if found := len(a.Kernel.Differences) == 1 && strings.Contains(text, "not berth's: is -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 198.51.100.66:80"); found != differs {
			t.Errorf("%s: %s", target, text)
		}
	}
	sync(p.Verify)
	if text, a := ask("", ""); len(a.Kernel.Differences) != 0 || !strings.Contains(text, "as it should be") {
		t.Error(text)
	}
}

func TestJSONHasAllThatTextHas(t *testing.T) {
	s := serverOf(t)
	_, a := say(t, s, "203.0.113.1:80", "192.0.2.7")
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"service":"default/web"`, `"kind":"LoadBalancer"`, `"action":"forward"`, `"policy":"local"`, `"share":1`, `"why":"on another node, and the policy is Local"`, `"from":"192.0.2.7"`, `"kernel":{"read":false`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	_, err := Ask(t.Context(), filepath.Join(t.TempDir(), "none.sock"), Question{})
	if err == nil || !strings.Contains(err.Error(), "no berth proxy answers at") || !strings.Contains(err.Error(), "start it") {
		t.Error(err)
	}
}

//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

// TestProxyPackets has packets go through what two proxies have made of Services, and holds what becomes of them to what the API says of
// Services: not to the proxy's own idea of it. Each mode has the same table.
func TestProxyPackets(t *testing.T) {
	t.Parallel() // with TestProxyThroughFaults: both wait for most of their time
	w := newProxyWorld(t)
	for _, s := range services {
		w.serve(s)
	}
	w.places["node-1"].serve(t, 8090) // a program of the host
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			w := w.on(t)
			for _, n := range w.nodes {
				n.start(mode, "--nodeport-addresses", "localhost", "--socket", n.socket()) // beside primary ones
			}
			// These have to wait for time to pass, and do so beside the others.
			var beside sync.WaitGroup
			beside.Go(func() { w.affinity(byName("sticky")) })
			w.checkAll(append(promises[:len(promises):len(promises)], atLoopback[mode]...))
			w.healthChecks()
			w.explains()
			beside.Wait()
			if !t.Failed() {
				t.Run("changes", func(t *testing.T) { w.on(t).changes(mode, byName("moving")) })
			}
			for _, n := range w.nodes {
				must(t, n.proxy.Stop())
				n.clean()
				// The rule against packets to the node's loopback is the kubelet's, too, and stays.
				if left := script(t, n.ns, "nft list ruleset 2>/dev/null | grep -v KUBE-FIREWALL | grep -i -e berth -e KUBE || true"); left != "" {
					t.Errorf("%s: --cleanup leaves\n%s", n.name, left)
				}
			}
		})
	}
}

// services are all that there are at once.
var services = []*service{
	{name: "web", number: 10, backends: pods("a1 b1")},
	{name: "ports", number: 11, backends: pods("a1"), ports: []map[string]any{
		{"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 5353},
		{"name": "dns-tcp", "protocol": "TCP", "port": 53, "targetPort": 8081},
		{"name": "http", "protocol": "TCP", "port": 80, "targetPort": 8080, "appProtocol": "http"},
	}},
	{name: "node-port", number: 12, backends: pods("a1 b1"), spec: apiObject{"type": "NodePort"}},
	{name: "load", number: 13, backends: pods("a1 b1"), spec: apiObject{
		"type": "LoadBalancer", "externalIPs": []string{"198.51.100.13", "fd05::13"},
	}},
	{name: "proxied", number: 14, backends: pods("a1 b1"), spec: apiObject{"type": "LoadBalancer"}, proxied: true},
	{name: "ranges", number: 15, backends: pods("a1 b1"), spec: apiObject{
		"type": "LoadBalancer", "loadBalancerSourceRanges": []string{"10.94.0.11/32", "fd94::11/128"},
	}},
	{name: "local", number: 16, backends: pods("a1"), spec: apiObject{
		"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31016, "externalIPs": []string{"198.51.100.16", "fd05::16"},
	}},
	{name: "local-both", number: 17, backends: pods("a1 a2 b1"), spec: apiObject{
		"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31017,
	}},
	{name: "inside", number: 18, backends: pods("a1 b1"), spec: apiObject{"internalTrafficPolicy": "Local"}},
	{name: "inside-one", number: 19, backends: pods("a1"), spec: apiObject{"internalTrafficPolicy": "Local", "type": "NodePort"}},
	{name: "empty", number: 20, spec: apiObject{"type": "LoadBalancer", "externalIPs": []string{"198.51.100.20", "fd05::20"}}},
	{name: "empty-local", number: 21, spec: apiObject{"type": "LoadBalancer", "externalTrafficPolicy": "Local", "internalTrafficPolicy": "Local", "healthCheckNodePort": 31021}},
	{name: "zones", number: 22, spec: apiObject{"type": "NodePort", "trafficDistribution": "PreferSameZone"}, backends: []backend{
		{at: "a1", zones: "zone-1"}, {at: "b1", zones: "zone-2"},
	}},
	{name: "half-hinted", number: 23, backends: []backend{{at: "a1", zones: "zone-1"}, {at: "b1"}}},
	{name: "other-zone", number: 24, backends: []backend{{at: "a1", zones: "zone-3"}, {at: "b1", zones: "zone-3"}}},
	{name: "nodes", number: 25, spec: apiObject{"trafficDistribution": "PreferSameNode"}, backends: []backend{
		{at: "a1", zones: "zone-1", onNode: "node-1"}, {at: "b1", zones: "zone-1", onNode: "node-2"},
	}},
	{name: "ending", number: 26, backends: []backend{{at: "a1"}, {at: "b1", state: "ending"}}},
	{name: "all-ending", number: 27, backends: []backend{{at: "a1", state: "ending"}, {at: "a2", state: "notReady"}, {at: "b1", state: "ended"}}},
	{name: "ended", number: 28, backends: []backend{{at: "a1", state: "ended"}, {at: "b1", state: "notReady"}}},
	{name: "local-ending", number: 29, backends: []backend{{at: "a1", state: "ending"}, {at: "b1"}}, spec: apiObject{
		"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31029,
	}},
	{name: "headless", number: 31, backends: pods("a1"), spec: apiObject{"clusterIP": "None", "clusterIPs": []string{"None"}}},
	{name: "others", number: 32, backends: pods("a1"), labels: apiObject{"service.kubernetes.io/service-proxy-name": "another"}},
	{name: "host", number: 33, backends: []backend{{at: "node-1", port: 8090}}, spec: apiObject{"type": "NodePort"}},
	{name: "four", number: 34, backends: pods("a1 b1"), spec: apiObject{
		"ipFamilyPolicy": "SingleStack", "ipFamilies": []string{"IPv4"}, "clusterIPs": []string{"10.93.0.34"},
	}},
	{name: "six", number: 35, backends: pods("a1 b1"), spec: apiObject{
		"ipFamilyPolicy": "SingleStack", "ipFamilies": []string{"IPv6"}, "clusterIP": "fd93::35", "clusterIPs": []string{"fd93::35"},
	}},
	{name: "no-node-port", number: 37, backends: pods("a1 b1"), spec: apiObject{"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false}},
	{name: "sticky", number: 40, backends: pods("a1 a2 b1 b2"), spec: apiObject{
		"type": "LoadBalancer", "sessionAffinity": "ClientIP", "sessionAffinityConfig": apiObject{"clientIP": apiObject{"timeoutSeconds": stickySeconds}},
	}},
	{name: "moving", number: 41, backends: pods("a1"), spec: apiObject{"type": "LoadBalancer"}},
}

func byName(name string) *service {
	i := slices.IndexFunc(services, func(s *service) bool { return s.name == name })
	return services[i]
}

// promise is a row of what the API promises: whoever asks at one of the addresses is answered by all of some, and by nobody else, or not.
type promise struct {
	service, from, to string // to is cluster, load, external, or the name of a place, with a port; node:port is the Service's node port
	want              string // names of who answers, with a port where it is another than 8080; or rejected, silence, unreachable
	source            string // own: the client's address is seen, also by way of a load balancer; other: it is not; "" says nothing
	over              string // networks, if not all, with a family (tcp4) if not in both
}

var promises = []promise{
	// A cluster IP leads to all ready endpoints, from pods with their own source; what is not of the cluster is let in, too, and comes
	// back by the node. An endpoint that asks itself is answered.
	{"web", "a2 b2 a1 b1", "cluster:80", "a1 b1", "own", ""},
	{"web", "node-1 node-2", "cluster:80", "a1 b1", "", ""},
	{"web", "out1 out2", "cluster:80", "a1 b1", "other", ""},
	{"web", "a2 node-1 out1", "cluster:81", rejected, "", ""},
	{"web", "a2 out1", "unused:80", silence, "", "tcp udp"}, // KEP-3866
	{"ports", "b2 out2 node-2", "cluster:80", "a1", "", "tcp"},
	{"ports", "b2 out2 node-2", "cluster:53", "a1:5353", "", "udp"},
	{"ports", "b2 out2 node-2", "cluster:53", "a1:8081", "", "tcp"},
	{"four", "a2 out1", "cluster:80", "a1 b1", "", ""},
	{"six", "a2 out1", "cluster:80", "a1 b1", "", ""},

	{"node-port", "out1 a2 node-1", "node-1:port", "a1 b1", "", ""},
	{"node-port", "out1 b2 node-2", "node-2:port", "a1 b1", "", ""},
	{"node-port", "out1 out2", "node-2:port", "a1 b1", "other", ""},
	{"node-port", "out1 a2", "node-1:30999", rejected, "", "tcp udp"},
	{"node-port", "a1 b2", "cluster:80", "a1 b1", "own", ""},

	{"load", "out1 out2 a1 a2 b2 node-1 node-2", "load:80", "a1 b1", "", ""},
	{"load", "out1 out2 a1 a2 b2 node-1 node-2", "external:80", "a1 b1", "", ""},
	{"load", "out1 out2", "load:80", "a1 b1", "other", ""},
	{"load", "out1 a2", "node-2:port", "a1 b1", "", ""},
	{"load", "out1 a2", "load:81", unreachable, "", "tcp"},
	// What a load balancer that is a proxy has for an address is no node's.
	{"proxied", "out1 a2 node-1", "load:80", unreachable, "", "tcp"},
	{"proxied", "out1 a2", "node-1:port", "a1 b1", "", ""},
	{"no-node-port", "out1 a2 node-2", "load:80", "a1 b1", "", ""},
	{"no-node-port", "out1 a2", "node-1:port", rejected, "", "tcp udp"},

	// loadBalancerSourceRanges are for the load balancer's addresses alone.
	{"ranges", "out1", "load:80", "a1 b1", "", ""},
	{"ranges", "out2 a2 b1 node-1", "load:80", silence, "", ""},
	{"ranges", "out2 a2", "node-2:port", "a1 b1", "", ""},
	{"ranges", "out2 a2", "cluster:80", "a1 b1", "", ""},

	// externalTrafficPolicy Local keeps the client's source, and stays on the node. The node and its pods are not outside.
	{"local", "out1", "load:80", "a1", "own", ""},
	{"local", "out1", "external:80", "a1", "own", ""},
	{"local", "out1 out2", "node-1:port", "a1", "own", ""},
	{"local", "out2", "load:80", silence, "", ""},
	{"local", "out2", "external:80", silence, "", ""},
	{"local", "out1 out2", "node-2:port", silence, "", ""},
	{"local", "a2 b1 b2", "load:80", "a1", "own", ""},
	{"local", "a1 node-1 node-2", "load:80", "a1", "", ""},
	{"local", "out2 b2 node-2", "cluster:80", "a1", "", ""},
	{"local-both", "out1", "load:80", "a1 a2", "own", ""},
	{"local-both", "out2", "load:80", "b1", "own", ""},
	{"local-both", "out1", "node-2:port", "b1", "own", ""},
	{"local-both", "out2", "node-1:port", "a1 a2", "own", ""},
	{"local-both", "a1 b2", "load:80", "a1 a2 b1", "own", ""},
	{"local-both", "node-2", "load:80", "a1 a2 b1", "", ""},
	{"local-ending", "out1", "load:80", "a1", "own", ""},
	{"local-ending", "out2", "load:80", "b1", "own", ""},
	{"local-ending", "a2 b2 node-1", "cluster:80", "b1", "", ""},

	// internalTrafficPolicy Local stays on the node of whoever asks.
	{"inside", "a1 a2", "cluster:80", "a1", "own", ""},
	{"inside", "b1 b2", "cluster:80", "b1", "own", ""},
	{"inside", "node-1 out1", "cluster:80", "a1", "", ""},
	{"inside", "node-2 out2", "cluster:80", "b1", "", ""},
	{"inside-one", "a1 a2 node-1", "cluster:80", "a1", "", ""},
	{"inside-one", "b2 node-2 out2", "cluster:80", silence, "", ""},
	{"inside-one", "out1 out2", "node-2:port", "a1", "", ""},

	// A Service without endpoints says so at once, wherever it is asked, also where the policy is Local.
	{"empty", "out1 a2 node-1 node-2", "cluster:80", rejected, "", ""},
	{"empty", "out1 a2 node-1 node-2", "load:80", rejected, "", ""},
	{"empty", "out1 a2 node-1 node-2", "external:80", rejected, "", ""},
	{"empty", "out1 out2 a2 node-1", "node-2:port", rejected, "", ""},
	{"empty-local", "out1 a2 node-2", "cluster:80", rejected, "", ""},
	{"empty-local", "out1 a2 node-2", "load:80", rejected, "", ""},
	{"empty-local", "out1 a2 node-2", "node-1:port", rejected, "", ""},

	// Hints count if all endpoints have them and one is for this zone.
	{"zones", "a2 node-1 out1", "cluster:80", "a1", "", ""},
	{"zones", "b2 node-2 out2", "cluster:80", "b1", "", ""},
	{"zones", "out2", "node-1:port", "a1", "", ""},
	{"half-hinted", "a2 b2", "cluster:80", "a1 b1", "", ""},
	{"other-zone", "a2 b2", "cluster:80", "a1 b1", "", ""},
	{"nodes", "a2 node-1", "cluster:80", "a1", "", ""},
	{"nodes", "b2 node-2", "cluster:80", "b1", "", ""},

	// What ends serves on as long as nothing else does (KEP-1669).
	{"ending", "a2 b2 out1", "cluster:80", "a1", "", ""},
	{"all-ending", "a2 b2 out1", "cluster:80", "a1", "", ""},
	{"ended", "a2 b2 out1 node-2", "cluster:80", rejected, "", ""},

	// These are not this proxy's.
	{"headless", "a2 b2", "a1:8080", "a1", "own", ""},
	{"others", "a2 out1", "cluster:80", silence, "", "tcp"},

	{"host", "a2 b2 node-1 node-2 out1 out2", "cluster:80", "node-1:8090", "", "tcp udp"},
	{"host", "out1 out2 a1 b1", "node-2:port", "node-1:8090", "", "tcp udp"},
	{"host", "out1 a1 node-2", "node-1:port", "node-1:8090", "", "tcp udp"},
}

// atLoopback are promises of node ports at 127.0.0.1 and ::1, by mode: by rules in IPv4 alone, as in kube-proxy's, or by the proxy itself.
var atLoopback = map[string][]promise{
	"iptables": {
		{"node-port", "node-1 node-2", "loopback:port", "a1 b1", "", "tcp4 udp4 sctp4"},
		{"node-port", "node-1 node-2", "loopback:port", rejected, "", "tcp6 udp6"},
		{"local", "node-1 node-2", "loopback:port", "a1", "", "tcp4 udp4"},
		{"ranges", "node-1 node-2", "loopback:port", "a1 b1", "", "tcp4 udp4"},
		{"empty", "node-1 node-2", "loopback:port", rejected, "", "tcp4 udp4"},
		{"web", "node-1", "loopback:80", rejected, "", "tcp udp"}, // a cluster IP's port is no node port
	},
	"nftables": {
		{"node-port", "node-1 node-2", "loopback:port", "a1 b1", "", "tcp udp"},
		{"local", "node-1 node-2", "loopback:port", "a1", "", "tcp udp"},
		{"local-both", "node-1", "loopback:port", "a1 a2", "", "tcp udp"}, // the node's own come first
		{"local-both", "node-2", "loopback:port", "b1", "", "tcp udp"},
		{"ranges", "node-1 node-2", "loopback:port", "a1 b1", "", "tcp udp"},
		{"web", "node-1", "loopback:80", rejected, "", "tcp udp"},
	},
}

// address is where a promise's client asks, in a family.
func (p *promise) address(w *proxyWorld, s *service, family int) string {
	host, port, _ := strings.Cut(p.to, ":")
	switch host {
	case "cluster":
		host = s.clusterIP(family)
	case "unused":
		host = []string{"10.93.0.250", "fd93::250"}[family]
	case "load":
		host = s.loadIP(family)
	case "external":
		host = s.externalIP(family)
	case "loopback":
		host = []string{"127.0.0.1", "::1"}[family]
	default:
		host = w.places[host].addr[family]
	}
	if port == "port" {
		port = fmt.Sprint(s.nodePort())
	}
	return net.JoinHostPort(host, port)
}

// checkAll checks all rows at once.
func (w *proxyWorld) checkAll(rows []promise) {
	w.t.Helper()
	began := time.Now()
	asked, wrong := w.differences(rows)
	for _, line := range wrong {
		w.t.Error(line)
	}
	w.t.Logf("%d rows, %d questions, in %v", len(rows), asked, time.Since(began).Round(time.Millisecond))
}

// eventually waits until what is promised holds.
func (w *proxyWorld) eventually(rows ...promise) {
	w.t.Helper()
	must(w.t, lab.Eventually(w.t.Context(), soon, fmt.Sprint(rows), func(context.Context) error {
		if _, wrong := w.differences(rows); len(wrong) > 0 {
			return errors.New(strings.Join(wrong, "; "))
		}
		return nil
	}))
}

// differences checks all rows at once, and says how many questions were asked, and what is not as promised.
func (w *proxyWorld) differences(rows []promise) (asked int64, wrong []string) {
	var all sync.WaitGroup
	var mu sync.Mutex
	turn := make(chan struct{}, 48)
	for _, p := range rows {
		s := byName(p.service)
		if p.over == "" {
			p.over = "tcp udp sctp"
		}
		for _, from := range strings.Fields(p.from) {
			for _, over := range strings.Fields(p.over) {
				for _, f := range s.families() {
					protocol := strings.TrimRight(over, "46")
					network := fmt.Sprint(protocol, []int{4, 6}[f])
					if over != protocol && over != network {
						continue
					}
					all.Go(func() {
						turn <- struct{}{}
						defer func() { <-turn }()
						to := p.address(w, s, f)
						n, difference := w.check(&p, w.places[from], network, f, to)
						mu.Lock()
						defer mu.Unlock()
						asked += n
						if difference != "" {
							wrong = append(wrong, fmt.Sprintf("%s, %s by %s to %s (%s): %s, want %s", p.service, from, network, p.to, to, difference, p.want))
						}
					})
				}
			}
		}
	}
	all.Wait()
	return asked, wrong
}

// check asks until all have answered who should, and says what is not as promised.
func (w *proxyWorld) check(p *promise, from *place, network string, family int, to string) (asked int64, difference string) {
	onNode := strings.HasPrefix(from.name, "node")
	switch p.want {
	case rejected, silence, unreachable:
		wait := patient
		if p.want == silence {
			wait = briefly
		}
		got := from.ask(network, to, wait)
		// The node is told of its own datagrams that they may not leave, before an answer could be made.
		if got != p.want && (got != denied || !onNode || p.want == unreachable) {
			difference = got
		}
		return 1, difference
	}
	missing := map[string]bool{}
	for _, name := range strings.Fields(p.want) {
		if !strings.Contains(name, ":") {
			name += ":8080"
		}
		missing[name] = true
	}
	wanted := maps.Clone(missing)
	least := int64(4 * len(missing)) // as many to find one that should not answer
	for ; asked < least || len(missing) > 0; asked++ {
		if asked == 120 { // that a half, or a third, answers none of them is less than once in 10^20 runs
			return asked, fmt.Sprintf("nothing from %v in %d questions", slices.Collect(maps.Keys(missing)), asked)
		}
		got := from.ask(network, to, patient)
		word := strings.Fields(got)
		if len(word) != 3 || !wanted[word[0]+":"+word[1]] {
			return asked, got
		}
		delete(missing, word[0]+":"+word[1])
		own := word[2] == from.addr[family]
		switch {
		case word[0] == from.name:
			if own && !onNode {
				return asked, "an endpoint that reaches itself sees its own address"
			}
		case p.source == "own" && !own, p.source == "other" && own:
			return asked, fmt.Sprintf("%q, whose source should be its %s", got, p.source)
		}
	}
	return asked, ""
}

// healthChecks asks what load balancers ask the nodes.
func (w *proxyWorld) healthChecks() {
	for _, row := range []struct {
		service   string
		endpoints [2]int // of both nodes
	}{{"local", [2]int{1, 0}}, {"local-both", [2]int{2, 1}}, {"empty-local", [2]int{0, 0}}, {"local-ending", [2]int{0, 1}}} {
		for i, n := range w.nodes {
			for _, addr := range n.addr {
				code, header, body, err := w.get("out1", fmt.Sprintf("http://%s/healthz", net.JoinHostPort(addr, fmt.Sprint(byName(row.service).checkPort()))))
				want := http.StatusOK
				if row.endpoints[i] == 0 {
					want = http.StatusServiceUnavailable
				}
				var answer struct {
					Service             struct{ Namespace, Name string }
					LocalEndpoints      int
					ServiceProxyHealthy bool
				}
				if err = errors.Join(err, json.Unmarshal(body, &answer)); err != nil {
					w.t.Error(err)
				} else if code != want || header.Get("X-Load-Balancing-Endpoint-Weight") != fmt.Sprint(row.endpoints[i]) || answer.LocalEndpoints != row.endpoints[i] ||
					answer.Service.Name != row.service || answer.Service.Namespace != "default" || !answer.ServiceProxyHealthy {
					w.t.Errorf("health check of %s on %s: %d, %v, %s", row.service, n.name, code, header, body)
				}
			}
		}
	}
	// The whole node's.
	n := w.nodes[0]
	w.wantHealth(n, http.StatusOK, http.StatusOK)
	w.patch("/api/v1/nodes/"+n.name, apiObject{"spec": apiObject{"taints": []apiObject{{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}}}})
	w.wantHealth(n, http.StatusServiceUnavailable, http.StatusOK)
	w.patch("/api/v1/nodes/"+n.name, apiObject{"spec": apiObject{"taints": nil}})
	w.wantHealth(n, http.StatusOK, http.StatusOK)
}

// wantHealth waits until a node's proxy answers so.
func (w *proxyWorld) wantHealth(n *worldNode, healthz, livez int) {
	w.t.Helper()
	must(w.t, lab.Eventually(w.t.Context(), soon, "health of "+n.name, func(context.Context) error {
		for path, want := range map[string]int{"/healthz": healthz, "/livez": livez} {
			code, _, body, err := w.get("out1", "http://"+net.JoinHostPort(n.addr[0], "10256")+path)
			if err == nil && code != want {
				err = fmt.Errorf("%s: %d, want %d: %s", path, code, want, body)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

// get is an HTTP request from a place.
func (w *proxyWorld) get(from, url string) (int, http.Header, []byte, error) {
	client := http.Client{Timeout: patient, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, to string) (net.Conn, error) {
			return w.places[from].dial(network, to, patient)
		},
	}}
	resp, err := client.Get(url)
	if err != nil {
		return 0, nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, body, err
}

func (n *worldNode) socket() string { return filepath.Join(n.world.dir, n.name+".sock") }

// explains asks a node's proxy what the kernel has counted, and whether it has what it should have of all Services.
func (w *proxyWorld) explains() {
	w.t.Helper()
	for service, counted := range map[string]string{"node-port": `\d+ connections`, "empty": `\d+ connections, \d+ packets refused \(no-endpoints\)`} {
		want := regexp.MustCompile(`(?m)^ +counted +` + counted + `, at all IPv4 addresses of the port$`)
		must(w.t, lab.Eventually(w.t.Context(), soon, service+" is counted", func(context.Context) error {
			out := w.nodes[0].berth("explain", "--socket", w.nodes[0].socket(), "default/"+service)
			if !want.MatchString(out) {
				return fmt.Errorf("no %s in\n%s", want, out)
			}
			return nil
		}))
	}
	if out := w.nodes[0].berth("explain", "--socket", w.nodes[0].socket()); !regexp.MustCompile(`(?m)^kernel +as it should be: all rules, [1-9]`).MatchString(out) {
		w.t.Errorf("the kernel has something else:\n%s", out)
	}
}

// stickySeconds is for how long a client is remembered.
const stickySeconds = 4

// affinity has clients come back to where they were sent, for as long as they do so in time, and be free when they were away for longer.
func (w *proxyWorld) affinity(s *service) {
	type client struct {
		from    *place
		network string
		to      []string
		first   string
	}
	var clients []*client
	for _, from := range []string{"a1", "b2", "out1", "out2", "node-2"} {
		for _, network := range []string{"tcp4", "tcp6", "udp4", "udp6", "sctp4", "sctp6"} {
			f := 0
			if strings.HasSuffix(network, "6") {
				f = 1
			}
			c := &client{from: w.places[from], network: network, to: []string{net.JoinHostPort(s.clusterIP(f), "80")}}
			if strings.HasPrefix(from, "out") { // one source by all ways
				c.to = append(c.to, net.JoinHostPort(s.loadIP(f), "80"), net.JoinHostPort(w.nodeOf(map[string]string{"out1": "a", "out2": "b"}[from]).addr[f], fmt.Sprint(s.nodePort())))
			}
			clients = append(clients, c)
		}
	}
	who := func(c *client, to string) string {
		got, _, _ := strings.Cut(c.from.ask(c.network, to, patient), " ")
		return got
	}
	const lasts = stickySeconds * time.Second
	var all sync.WaitGroup
	var free, late atomic.Int64
	for _, c := range clients {
		all.Go(func() {
			c.first = who(c, c.to[0])
			last := time.Now()
			for i, began := 1, last; time.Since(began) < lasts*3/2; i++ {
				time.Sleep(lasts / 5)
				asked := time.Now()
				got := who(c, c.to[i%len(c.to)])
				if got != c.first {
					if asked.Sub(last) > lasts*3/4 { // the machine was too busy to come back in time
						late.Add(1)
						return
					}
					w.t.Errorf("affinity: %s by %s to %s was sent to %s, then to %s", c.from.name, c.network, c.to[i%len(c.to)], c.first, got)
					return
				}
				last = asked
			}
			time.Sleep(lasts + time.Second)
			if who(c, c.to[0]) != c.first {
				free.Add(1)
			}
		})
	}
	all.Wait()
	if free.Load() == 0 { // of thirty, each with one chance in four
		w.t.Error("affinity: no client is free after the timeout")
	}
	w.t.Logf("affinity: %d clients, %d of them sent elsewhere after the timeout, %d too late to be judged", len(clients), free.Load(), late.Load())
}

// changes has clients connect while the Service that they ask is changed, and the proxies are killed and started: none fails, and who
// is connected stays so.
func (w *proxyWorld) changes(mode string, s *service) {
	type client struct {
		from        *place
		network, to string
	}
	var clients []client
	for f := range 2 {
		tcp := fmt.Sprint("tcp", []int{4, 6}[f])
		for _, from := range []string{"a2", "b2", "out1", "node-2"} {
			clients = append(clients, client{w.places[from], tcp, net.JoinHostPort(s.clusterIP(f), "80")})
		}
		for _, from := range []string{"out1", "out2"} {
			clients = append(clients, client{w.places[from], tcp, net.JoinHostPort(s.loadIP(f), "80")})
		}
		clients = append(clients, client{w.places["out2"], tcp, net.JoinHostPort(w.nodes[0].addr[f], fmt.Sprint(s.nodePort()))})
	}
	stop := make(chan struct{})
	var all sync.WaitGroup
	var asked, failed atomic.Int64
	for _, c := range clients {
		all.Go(func() {
			open, err := c.from.dial(c.network, c.to, patient)
			if err != nil {
				w.t.Error(err)
				return
			}
			defer func() { _ = open.Close() }()
			first, _, _ := strings.Cut(askAgain(open, patient), " ")
			for {
				select {
				case <-stop:
					return
				default:
				}
				got := c.from.ask(c.network, c.to, patient)
				asked.Add(1)
				if word := strings.Fields(got); len(word) != 3 {
					failed.Add(1)
					w.t.Errorf("%s by %s to %s while it changes: %q", c.from.name, c.network, c.to, got)
					return
				}
				if still, _, _ := strings.Cut(askAgain(open, patient), " "); still != first {
					failed.Add(1)
					w.t.Errorf("%s by %s to %s: a connection to %s is one to %q", c.from.name, c.network, c.to, first, still)
					return
				}
			}
		})
	}
	shapes := []string{"a1 b1", "b1", "a1 a2 b1 b2", "b2", "a2 b2", "a1"}
	for i := range 36 {
		w.move(s, pods(shapes[i%len(shapes)])...)
		switch i % 6 {
		case 1:
			w.patch(servicesPath+"/"+s.name, apiObject{"spec": apiObject{"sessionAffinity": []string{"ClientIP", "None"}[i/6%2]}})
		case 3:
			w.patch(servicesPath+"/"+s.name, apiObject{"spec": apiObject{"internalTrafficPolicy": "Cluster", "externalIPs": []string{fmt.Sprintf("198.51.100.%d", 100+i)}}})
		case 5:
			n := w.nodes[i/6%2]
			must(w.t, n.proxy.Kill())
			n.start(mode)
		}
		time.Sleep(20 * time.Millisecond)
	}
	w.move(s, pods("b2")...)
	w.patch(servicesPath+"/"+s.name, apiObject{"spec": apiObject{"sessionAffinity": "None"}})
	close(stop)
	all.Wait()
	w.t.Logf("%d connections during 36 changes and 6 restarts of a proxy by SIGKILL, %d failed", asked.Load(), failed.Load())
	deadline := time.Now().Add(soon)
	for _, c := range clients {
		settled := false
		for ; !settled && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			settled = strings.HasPrefix(c.from.ask(c.network, c.to, patient), "b2 ")
		}
		if !settled {
			w.t.Errorf("%s by %s to %s is not at the only endpoint that is left", c.from.name, c.network, c.to)
		}
	}
}

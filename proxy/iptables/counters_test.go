package iptables

import (
	"maps"
	"net"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// countedAt names a port of a test's Service.
func countedAt(f nodetest.Family, service string, p model.Protocol, c program.Cause) program.Counted {
	return program.Counted{Service: types.NamespacedName{Namespace: "test", Name: service}, Port: "p", Family: f.Of, Protocol: p, Cause: c}
}

// wantCounts reads counters now, of a family; zeros may lack.
func wantCounts(t *testing.T, c *Counters, f nodetest.Family, what string, want map[program.Counted]uint64) {
	t.Helper()
	c.mu.Lock()
	c.at = time.Time{}
	c.mu.Unlock()
	all, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	got, wanted := map[program.Counted]uint64{}, maps.Clone(want)
	for of, n := range all {
		if of.Family == f.Of && n.Packets > 0 {
			got[of] = n.Packets
		}
		if (n.Packets == 0) != (n.Bytes == 0) {
			t.Errorf("%v: %+v", of, n)
		}
	}
	maps.DeleteFunc(wanted, func(_ program.Counted, n uint64) bool { return n == 0 })
	if !maps.Equal(got, wanted) {
		t.Errorf("%s:\n%v, want\n%v", what, got, wanted)
	}
}

// Each connection is counted once, and each refusal by its cause, as in package nft; changes of others and of endpoints leave all as it is.
func TestServicesAreCounted(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		for _, f := range nodetest.Families {
			l := nodetest.New(t, 2)
			p := openAt(l.Node, backend)
			c := p.Counters()
			away, restricted, none, lost := nodetest.LocalPolicy(f.NodePort(30090)), f.LoadBalancer(53), nodetest.ClusterIP(nodetest.At(f.Cluster, 90)), f.LoadBalancer(90)
			away.Action, none.Action, lost.Action = model.Drop, model.Reject, model.Reject
			restricted.Restricted, restricted.Sources = true, prefixes(f.Narrow)
			web := func(pods ...int) *model.Service {
				return nodetest.ServiceOf("web",
					nodetest.PortOf(model.TCP, f.Pods(pods...), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080)),
					nodetest.PortOf(model.UDP, f.Pods(pods...), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), restricted))
			}
			empty, full := nodetest.ServiceOf("empty", nodetest.PortOf(model.UDP, nil, none, lost)), nodetest.ServiceOf("empty", nodetest.PortOf(model.UDP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 90))))
			both := web(1, 2)
			s := nodetest.NewState(both, empty, nodetest.ServiceOf("away", nodetest.PortOf(model.UDP, f.Pods(1), away)))
			if _, err := p.Sync(s); err != nil {
				t.Fatal(err)
			}
			wantCounts(t, c, f, "before", nil)
			want := map[program.Counted]uint64{}
			step := func(what string) {
				t.Helper()
				for _, from := range []*nodetest.Space{l.Client, l.Pods[0], l.Node} {
					for _, to := range []string{nodetest.At(f.Cluster, 80), nodetest.At(f.LoadIP, 80), nodetest.At(f.Node, 30080)} {
						if got := from.Ask(f.TCP, to); !strings.HasPrefix(got, "pod") {
							t.Errorf("%s to %s: %s", from.Name, to, got)
						}
					}
				}
				l.Client.Ask(f.UDP, nodetest.At(f.Cluster, 80))
				l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 53), nodetest.Silence)
				l.Want(l.Client, f.UDP, nodetest.At(f.Node, 30090), nodetest.Silence)
				l.Want(l.Client, f.UDP, nodetest.At(f.Other, 53), nodetest.Silence)
				want[countedAt(f, "web", model.TCP, program.Connections)] += 9
				want[countedAt(f, "web", model.UDP, program.Connections)]++
				want[countedAt(f, "web", model.UDP, program.SourceRanges)]++
				want[countedAt(f, "away", model.UDP, program.Connections)]++
				want[countedAt(f, "away", model.UDP, program.NoLocal)]++
				want[program.Counted{Family: f.Of, Cause: program.Unallocated}]++
				wantCounts(t, c, f, what, want)
			}
			l.Want(l.Client, f.UDP, nodetest.At(f.Cluster, 90), nodetest.Refused)
			l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 90), nodetest.Refused)
			want[countedAt(f, "empty", model.UDP, program.Connections)] = 2
			want[countedAt(f, "empty", model.UDP, program.NoEndpoints)] = 2
			step("refused and forwarded")
			apply := func(old, next *model.Service) {
				t.Helper()
				if _, err := p.Apply(s.Delta(old, next)); err != nil {
					t.Fatal(err)
				}
			}
			apply(both, web(2))
			apply(empty, full)
			step("other endpoints, and some where there were none")
			// What others flush is written anew, and begins at nothing.
			l.Node.Run(programs{family: f.Of, backend: backend}.name(""), "-t", "nat", "-F", services)
			if _, err := p.Verify(); err != nil {
				t.Fatal(err)
			}
			step("after a flush")
			apply(full, nil)
			delete(want, countedAt(f, "empty", model.UDP, program.Connections))
			delete(want, countedAt(f, "empty", model.UDP, program.NoEndpoints))
			step("a Service is gone")
		}
	})
}

// kube-proxy's counters of its own rules: packets that conntrack takes for invalid, and node ports at 127.0.0.1.
func TestInvalidPacketsAndLoopbackAreCounted(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		l := nodetest.New(t, 1)
		p := openAt(l.Node, backend)
		s := nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, ip4.Pods(1), ip4.NodePort(30080))))
		s.All.Family[model.IPv4].NodePorts.Loopback = true
		if _, err := p.Sync(s); err != nil {
			t.Fatal(err)
		}
		for _, to := range []string{"127.0.0.1:30080", "127.0.0.2:30080", nodetest.At(ip4.Node, 30080)} {
			if got := l.Node.Ask(ip4.TCP, to); !strings.HasPrefix(got, "pod1 ") {
				t.Errorf("%s: %q", to, got)
			}
		}
		l.Node.Ask(ip4.TCP, "127.0.0.1:30081") // is nobody's
		err := l.Client.Do(func() error {
			conn, err := net.Dial("ip4:tcp", ip4.PodIP(1))
			if err != nil {
				return err
			}
			defer conn.Close()
			// An acknowledgement of nothing, with a wrong sum.
			_, err = conn.Write([]byte{4, 210, 31, 144, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, 1 << 4, 1, 0, 0, 0, 0, 0})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		wantCounts(t, p.Counters(), ip4, "invalid and loopback", map[program.Counted]uint64{
			countedAt(ip4, "web", model.TCP, program.Connections): 3,
			{Family: model.IPv4, Cause: program.AtLoopback}:       2,
			{Family: model.IPv4, Cause: program.Invalid}:          1,
		})
		if r, err := p.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// What is added up, without a kernel.
func TestSumsOfRules(t *testing.T) {
	at := func(rule string) ruleAt { return ruleAt{rule: rule} }
	of := func(name string, c program.Cause) program.Counted {
		return program.Counted{Service: types.NamespacedName{Name: name}, Cause: c}
	}
	n := func(packets uint64) program.Count { return program.Count{Packets: packets, Bytes: 100 * packets} }
	type owners = map[ruleAt][]program.Counted
	type kernel = map[ruleAt]program.Count
	type sums = map[program.Counted]program.Count
	a, b, none, ranges := of("a", program.Connections), of("b", program.Connections), of("a", program.NoEndpoints), of("a", program.SourceRanges)
	invalid := program.Counted{Cause: program.Invalid}
	for name, steps := range map[string][]struct {
		owners owners
		now    kernel
		want   sums
	}{
		"two rules, and one of nobody's": {
			{owners{at("1"): {a}, at("2"): {a}, at("3"): {invalid}}, kernel{at("1"): n(3), at("2"): n(4), at("9"): n(9)}, sums{a: n(7), invalid: {}}},
		},
		"a refusal is a connection, and stays": {
			{owners{at("1"): {none, a}}, kernel{at("1"): n(3)}, sums{a: n(3), none: n(3)}},
			{owners{at("2"): {a}}, kernel{at("2"): n(1)}, sums{a: n(4), none: n(3)}},
			{owners{at("1"): {none, a}}, kernel{at("1"): n(0)}, sums{a: n(4), none: n(3)}},
		},
		"a chain is written anew": {
			{owners{at("1"): {a}}, kernel{at("1"): n(3)}, sums{a: n(3)}},
			{owners{at("1"): {a}}, kernel{at("1"): n(1)}, sums{a: n(4)}},
			{owners{at("1"): {a}}, nil, sums{a: n(4)}},
			{owners{at("1"): {a}}, kernel{at("1"): n(0)}, sums{a: n(4)}},
		},
		"who may not send has no connection": {
			{owners{at("1"): {a}, at("2"): {ranges}}, kernel{at("1"): n(5), at("2"): n(2)}, sums{a: n(3), ranges: n(2)}},
			{owners{at("1"): {a}, at("2"): {ranges}}, kernel{at("1"): n(5), at("2"): n(3)}, sums{a: n(3), ranges: n(3)}}, // never less
			{owners{at("1"): {a}, at("2"): {ranges}}, kernel{at("1"): n(7), at("2"): n(3)}, sums{a: n(4), ranges: n(3)}},
		},
		"a Service goes, and its count": {
			{owners{at("1"): {a}, at("2"): {b}}, kernel{at("1"): n(3), at("2"): n(1)}, sums{a: n(3), b: n(1)}},
			{owners{at("2"): {b}}, kernel{at("2"): n(1)}, sums{b: n(1)}},
			{owners{at("1"): {a}, at("2"): {b}}, kernel{at("1"): n(0), at("2"): n(1)}, sums{a: {}, b: n(1)}},
		},
	} {
		var c counts
		for i, s := range steps {
			c.add(s.owners, s.now)
			if !maps.Equal(c.sum, s.want) {
				t.Errorf("%s, step %d: %v, want %v", name, i, c.sum, s.want)
			}
		}
	}
}

func TestCountedRule(t *testing.T) {
	for line, want := range map[string]string{
		`-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "a -c 1 2" -m tcp --dport 80 -c 5 300 -j KUBE-SVC-A`: `-d 10.96.0.1/32 -p tcp -m comment --comment "a -c 1 2" -m tcp --dport 80 -j KUBE-SVC-A`,
		`-A KUBE-SERVICES -c 5 300 -j X`: `-j X`,
		`-A KUBE-SERVICES -j X`:          "",
		`-A OTHER -c 5 300 -j X`:         "",
		`-A KUBE-SERVICES -c 5 y -j X`:   "",
		`-N KUBE-SERVICES`:               "",
	} {
		rule, n, ok := countedRule(line, services)
		if !ok {
			rule = ""
		}
		if rule != want || ok && n != (program.Count{Packets: 5, Bytes: 300}) {
			t.Errorf("%s: %q, %v", line, rule, n)
		}
	}
}

package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// sticky is a Port with session affinity.
func sticky(d time.Duration, p model.Port) model.Port {
	p.Affinity = d
	return p
}

func TestSessionAffinity(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		now := serviceOf("web",
			sticky(3*time.Hour, portOf(model.TCP, f.pods(1, 2), clusterIP(at(f.cluster, 80)), f.loadBalancer(80), f.nodePort(30080))),
			sticky(3*time.Hour, portOf(model.UDP, f.pods(1, 2), clusterIP(at(f.cluster, 80)))))
		s := newState(now)
		l.sync(s)
		// By whichever frontend a client comes, it is sent to the endpoint where it was sent first.
		for _, from := range []*space{l.client, l.pods[2], l.node} {
			got := map[string]int{}
			for range 12 {
				for _, to := range []string{at(f.cluster, 80), at(f.loadIP, 80), at(f.node, 30080)} {
					got[strings.Fields(from.ask(f.tcp, to) + " ")[0]]++
				}
			}
			if len(got) != 1 && from != l.node { // the node has several addresses
				t.Errorf("%s: %v", from.name, got)
			}
			if got := l.spread(from, f.udp, at(f.cluster, 80), 20); len(got) != 1 {
				t.Errorf("%s by UDP: %v", from.name, got)
			}
		}
		// Its endpoint goes: it is sent to another one, and stays there when the first comes back.
		first := strings.Fields(l.client.ask(f.tcp, at(f.loadIP, 80)))[0]
		left := map[string]int{"pod1": 2, "pod2": 1}[first]
		next := serviceOf("web", sticky(3*time.Hour, portOf(model.TCP, f.pods(left), clusterIP(at(f.cluster, 80)), f.loadBalancer(80), f.nodePort(30080))))
		l.apply(s, now, next)
		for range 5 {
			if a := l.client.ask(f.tcp, at(f.loadIP, 80)); !strings.HasPrefix(a, fmt.Sprintf("pod%d ", left)) {
				t.Fatalf("its endpoint has gone: %q", a)
			}
		}
		l.apply(s, next, now)
		for range 15 {
			if a := l.client.ask(f.tcp, at(f.loadIP, 80)); !strings.HasPrefix(a, fmt.Sprintf("pod%d ", left)) {
				t.Fatalf("the first endpoint is back: %q", a)
			}
		}
		if r, err := l.p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

// Who was remembered before a Service lost its session affinity, or while the proxy was away, is not when it has it again.
func TestSessionAffinityDoesNotComeBack(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		front := f.loadBalancer(80)
		one := serviceOf("web", sticky(time.Hour, portOf(model.TCP, f.pods(1), front)))
		plain := serviceOf("web", portOf(model.TCP, f.pods(2), front))
		two := serviceOf("web", sticky(time.Hour, portOf(model.TCP, f.pods(2), front)))
		for _, restart := range []bool{false, true} {
			l.sync(newState(one))
			if a := l.client.ask(f.tcp, at(f.loadIP, 80)); !strings.HasPrefix(a, "pod1 ") {
				t.Fatal(a)
			}
			s := newState(plain)
			if restart {
				l.p.Close()
				l.p = l.node.program(Options{})
			}
			l.sync(s)
			l.apply(s, plain, two)
			for range 3 {
				if a := l.client.ask(f.tcp, at(f.loadIP, 80)); !strings.HasPrefix(a, "pod2 ") {
					t.Errorf("%q", a)
				}
			}
		}
	})
}

// The timeout begins anew with each connection, and a client is free when it is over.
func TestSessionAffinityEnds(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		const lasts = 2 * time.Second
		l.sync(newState(serviceOf("web", sticky(lasts, portOf(model.TCP, f.pods(1, 2), f.loadBalancer(80)))),
			serviceOf("other", sticky(time.Hour, portOf(model.TCP, f.pods(1, 2), clusterIP(at(f.cluster, 80)))))))
		first := l.client.ask(f.tcp, at(f.loadIP, 80))
		for end := time.Now().Add(2 * lasts); time.Now().Before(end); time.Sleep(lasts / 4) {
			l.want(l.client, f.tcp, at(f.loadIP, 80), first)
		}
		stayed := true
		for i := 0; stayed && i < 12; i++ {
			time.Sleep(lasts + 500*time.Millisecond)
			stayed = l.client.ask(f.tcp, at(f.loadIP, 80)) == first
		}
		if stayed {
			t.Errorf("still %q after 12 times the timeout", first)
		}
	})
}

// Clients of a local policy stay with local endpoints, whatever they are remembered for elsewhere.
func TestSessionAffinityKeepsPolicies(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		backends := []string{f.pod(1) + "*", f.pod(2)}
		l.sync(newState(serviceOf("web", sticky(time.Hour, portOf(model.TCP, backends, clusterIP(at(f.cluster, 80)), local(f.loadBalancer(80)), local(f.nodePort(30080)))))))
		got := l.spread(l.client, f.tcp, at(f.cluster, 80), 10)
		if len(got) != 1 {
			t.Errorf("to the cluster IP: %v", got)
		}
		for range 6 {
			l.want(l.client, f.tcp, at(f.loadIP, 80), "pod1 "+f.client)
			l.want(l.client, f.tcp, at(f.node, 30080), "pod1 "+f.client)
		}
		// The node's pods are exempt from the policy, and remembered by all frontends together.
		all := map[string]int{}
		for range 8 {
			for _, to := range []string{at(f.cluster, 80), at(f.loadIP, 80), at(f.node, 30080)} {
				all[l.pods[2].ask(f.tcp, to)]++
			}
		}
		if len(all) != 1 {
			t.Errorf("from a pod: %v", all)
		}
	})
}

// A client that has come by one policy is sent to the same endpoint by the other, if that is one of its endpoints.
func TestSessionAffinityIsForAllFrontends(t *testing.T) {
	eachFamily(t, 4, func(t *testing.T, l *lab, f family) {
		backends := []string{f.pod(1) + "*", f.pod(2) + "*", f.pod(3)}
		for n := range 8 { // Services that the client has not seen yet
			s := newState(serviceOf(fmt.Sprint("web", n), sticky(time.Hour, portOf(model.TCP, backends, clusterIP(at(f.cluster, 80)), local(f.loadBalancer(80))))))
			l.sync(s)
			who := func(to string) string { return strings.Fields(l.client.ask(f.tcp, at(to, 80)) + " ")[0] }
			if n%2 == 0 {
				if a, b := who(f.loadIP), who(f.cluster); a != b {
					t.Errorf("by the load balancer %s, by the cluster IP %s", a, b)
				}
				continue
			}
			a, b := who(f.cluster), who(f.loadIP)
			if a != b && a != "pod3" || b == "pod3" {
				t.Errorf("by the cluster IP %s, by the load balancer %s", a, b)
			}
			if c := who(f.cluster); c != a {
				t.Errorf("by the cluster IP %s, then %s", a, c)
			}
		}
	})
}

// Two names of the same number get different ones, and names get theirs again.
func TestGroupsAreApart(t *testing.T) {
	g := newGroups()
	seen := map[uint32]bool{}
	var services []*model.Service
	for i := range 2000 {
		s := serviceOf(fmt.Sprint(i), sticky(time.Hour, portOf(model.TCP, nil, model.Frontend{Addr: netip.MustParseAddrPort("10.96.0.1:80")})))
		services = append(services, s)
		for _, policy := range []model.Policy{model.Cluster, model.Local} {
			n := g.of(s, &s.Ports[0], policy)
			if seen[n] || n < firstGroup {
				t.Fatalf("%d is given twice, or too small", n)
			}
			seen[n] = true
		}
	}
	one := g.of(services[7], &services[7].Ports[0], model.Cluster)
	if again := newGroups().of(services[7], &services[7].Ports[0], model.Cluster); one != again {
		t.Errorf("%d, after a restart %d", one, again)
	}
	g.forget(services[7], nil)
	g.taken[one] = groupOf{}
	if n := g.of(services[7], &services[7].Ports[0], model.Cluster); n == one {
		t.Error("a number that is taken is given again")
	}
}

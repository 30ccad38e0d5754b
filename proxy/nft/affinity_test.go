package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

func TestSessionAffinity(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		now := nodetest.ServiceOf("web",
			nodetest.Sticky(3*time.Hour, nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080))),
			nodetest.Sticky(3*time.Hour, nodetest.PortOf(model.UDP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))
		s := nodetest.NewState(now)
		l.sync(s)
		// By whichever frontend a client comes, it is sent to the endpoint where it was sent first.
		for _, from := range []*nodetest.Space{l.Client, l.Pods[2], l.Node} {
			got := map[string]int{}
			for range 12 {
				for _, to := range []string{nodetest.At(f.Cluster, 80), nodetest.At(f.LoadIP, 80), nodetest.At(f.Node, 30080)} {
					got[strings.Fields(from.Ask(f.TCP, to) + " ")[0]]++
				}
			}
			if len(got) != 1 && from != l.Node { // the node has several addresses
				t.Errorf("%s: %v", from.Name, got)
			}
			if got := l.Spread(from, f.UDP, nodetest.At(f.Cluster, 80), 20); len(got) != 1 {
				t.Errorf("%s by UDP: %v", from.Name, got)
			}
		}
		// Its endpoint goes: it is sent to another one, and stays there when the first comes back.
		first := strings.Fields(l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)))[0]
		left := map[string]int{"pod1": 2, "pod2": 1}[first]
		next := nodetest.ServiceOf("web", nodetest.Sticky(3*time.Hour, nodetest.PortOf(model.TCP, f.Pods(left), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080))))
		l.apply(s, now, next)
		for range 5 {
			if a := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)); !strings.HasPrefix(a, fmt.Sprintf("pod%d ", left)) {
				t.Fatalf("its endpoint has gone: %q", a)
			}
		}
		l.apply(s, next, now)
		for range 15 {
			if a := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)); !strings.HasPrefix(a, fmt.Sprintf("pod%d ", left)) {
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
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		front := f.LoadBalancer(80)
		one := nodetest.ServiceOf("web", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1), front)))
		plain := nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, f.Pods(2), front))
		two := nodetest.ServiceOf("web", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(2), front)))
		for _, restart := range []bool{false, true} {
			l.sync(nodetest.NewState(one))
			if a := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)); !strings.HasPrefix(a, "pod1 ") {
				t.Fatal(a)
			}
			s := nodetest.NewState(plain)
			if restart {
				l.p.Close()
				l.p = openAt(l.Node, Options{Counters: true})
			}
			l.sync(s)
			l.apply(s, plain, two)
			for range 3 {
				if a := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)); !strings.HasPrefix(a, "pod2 ") {
					t.Errorf("%q", a)
				}
			}
		}
	})
}

// The timeout begins anew with each connection, and a client is free when it is over.
func TestSessionAffinityEnds(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		const lasts = 2 * time.Second
		l.sync(nodetest.NewState(nodetest.ServiceOf("web", nodetest.Sticky(lasts, nodetest.PortOf(model.TCP, f.Pods(1, 2), f.LoadBalancer(80)))),
			nodetest.ServiceOf("other", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))))
		first := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80))
		for end := time.Now().Add(2 * lasts); time.Now().Before(end); time.Sleep(lasts / 4) {
			l.Want(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), first)
		}
		stayed := true
		for i := 0; stayed && i < 12; i++ {
			time.Sleep(lasts + 500*time.Millisecond)
			stayed = l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)) == first
		}
		if stayed {
			t.Errorf("still %q after 12 times the timeout", first)
		}
	})
}

// Clients of a local policy stay with local endpoints, whatever they are remembered for elsewhere.
func TestSessionAffinityKeepsPolicies(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		backends := []string{f.Pod(1) + "*", f.Pod(2)}
		l.sync(nodetest.NewState(nodetest.ServiceOf("web", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), nodetest.LocalPolicy(f.LoadBalancer(80)), nodetest.LocalPolicy(f.NodePort(30080)))))))
		got := l.Spread(l.Client, f.TCP, nodetest.At(f.Cluster, 80), 10)
		if len(got) != 1 {
			t.Errorf("to the cluster IP: %v", got)
		}
		for range 6 {
			l.Want(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), "pod1 "+f.Client)
			l.Want(l.Client, f.TCP, nodetest.At(f.Node, 30080), "pod1 "+f.Client)
		}
		// The node's pods are exempt from the policy, and remembered by all frontends together.
		all := map[string]int{}
		for range 8 {
			for _, to := range []string{nodetest.At(f.Cluster, 80), nodetest.At(f.LoadIP, 80), nodetest.At(f.Node, 30080)} {
				all[l.Pods[2].Ask(f.TCP, to)]++
			}
		}
		if len(all) != 1 {
			t.Errorf("from a pod: %v", all)
		}
	})
}

// A client that has come by one policy is sent to the same endpoint by the other, if that is one of its endpoints.
func TestSessionAffinityIsForAllFrontends(t *testing.T) {
	eachFamily(t, 4, func(t *testing.T, l *lab, f nodetest.Family) {
		backends := []string{f.Pod(1) + "*", f.Pod(2) + "*", f.Pod(3)}
		for n := range 8 { // Services that the client has not seen yet
			s := nodetest.NewState(nodetest.ServiceOf(fmt.Sprint("web", n), nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), nodetest.LocalPolicy(f.LoadBalancer(80))))))
			l.sync(s)
			who := func(to string) string { return strings.Fields(l.Client.Ask(f.TCP, nodetest.At(to, 80)) + " ")[0] }
			if n%2 == 0 {
				if a, b := who(f.LoadIP), who(f.Cluster); a != b {
					t.Errorf("by the load balancer %s, by the cluster IP %s", a, b)
				}
				continue
			}
			a, b := who(f.Cluster), who(f.LoadIP)
			if a != b && a != "pod3" || b == "pod3" {
				t.Errorf("by the cluster IP %s, by the load balancer %s", a, b)
			}
			if c := who(f.Cluster); c != a {
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
		s := nodetest.ServiceOf(fmt.Sprint(i), nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, nil, model.Frontend{Addr: netip.MustParseAddrPort("10.96.0.1:80")})))
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

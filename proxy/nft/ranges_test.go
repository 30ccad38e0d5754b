package nft

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// What is sent to a port of a range reaches a pod at the same port, from wherever, and a port of its own within is that.
func TestK8s23864_PortRanges(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		for _, pod := range l.Pods {
			for _, port := range []int{10000, 15000, 20000} {
				pod.Serve(port)
			}
		}
		service := func(change func(*model.Frontend), last uint16, pods ...string) *model.Service {
			var ports []model.Port
			for _, protocol := range []model.Protocol{model.TCP, model.UDP} {
				cluster, lb := nodetest.ClusterIP(nodetest.At(f.Cluster, 10000)), f.LoadBalancer(10000)
				change(&lb)
				p := withRange(nodetest.PortOf(protocol, pods, cluster, lb), last)
				p.Frontends = []model.Frontend{nodetest.ClusterIP(nodetest.At(f.Cluster, 10001)), f.NodePort(30080)}
				ports = append(ports, p)
			}
			s := nodetest.ServiceOf("rtp", ports...)
			return s
		}
		nothing := func(*model.Frontend) {}
		was := service(nothing, 20000, f.Pod(1)+"*", f.Pod(2))
		s := nodetest.NewState(was)
		for _, p := range []model.Protocol{model.TCP, model.UDP} {
			s.HairpinList = append(s.HairpinList, nodetest.HairpinOf(p, nodetest.At(f.PodIP(1), 0)))
		}
		l.sync(s)
		// What rules keep in a packet's priority meanwhile is gone when it leaves.
		l.Node.Run("nft", `table inet test {
			counter left { }
			chain c { type filter hook postrouting priority 300; meta priority >= 65536 counter name left; }
		}`)
		for _, network := range []string{f.TCP, f.UDP} {
			for _, port := range []int{10000, 15000, 20000} {
				for _, ip := range []string{f.Cluster, f.LoadIP} {
					for _, from := range []*nodetest.Space{l.Pods[2], l.Client, l.Node} {
						got := l.Spread(from, network, nodetest.At(ip, port), 24)
						if len(got) != 2 || got["pod1"] < 2 || got["pod2"] < 2 {
							t.Errorf("%s from %s to %s port %d: %v", network, from.Name, ip, port, got)
						}
					}
				}
			}
			if a := l.Pods[2].Ask(network, nodetest.At(f.Cluster, 15000)); !strings.HasSuffix(a, f.PodIP(3)) {
				t.Errorf("%s: a pod's source is not its own: %q", network, a)
			}
			if a := l.Client.Ask(network, nodetest.At(f.LoadIP, 15000)); !strings.HasPrefix(a, "pod") || strings.HasSuffix(a, f.Client) {
				t.Errorf("%s: from outside: %q", network, a)
			}
			for range 6 { // a pod that reaches itself sees the node
				if a := l.Pods[0].Ask(network, nodetest.At(f.Cluster, 15000)); a == "pod1 "+f.PodIP(1) || !strings.HasPrefix(a, "pod") {
					t.Errorf("%s: hairpin: %q", network, a)
				}
			}
			l.Want(l.Pods[2], network, nodetest.At(f.Cluster, 9999), nodetest.Refused)
			l.Want(l.Pods[2], network, nodetest.At(f.Cluster, 20001), nodetest.Refused)
			if a := l.Pods[2].Ask(network, nodetest.At(f.Cluster, 10001)); !strings.HasPrefix(a, "pod") {
				t.Errorf("%s: a port of its own in the range: %q", network, a)
			}
		}
		if out := l.Node.Run("nft", "list", "counter", "inet", "test", "left"); !strings.Contains(out, "packets 0 ") {
			t.Errorf("packets leave with a group's number for a priority: %s", out)
		}
		apply := func(next *model.Service) {
			l.apply(s, was, next)
			was = next
		}
		// The range is another one: what is not in it any more goes to nobody, in one step.
		apply(service(nothing, 16000, f.Pod(1)+"*", f.Pod(2)))
		l.Want(l.Pods[2], f.TCP, nodetest.At(f.Cluster, 20000), nodetest.Refused)
		// Local endpoints alone from outside, all from pods; the client's source is kept.
		apply(service(func(lb *model.Frontend) { *lb = nodetest.LocalPolicy(*lb) }, 16000, f.Pod(1)+"*", f.Pod(2)))
		for range 8 {
			l.Want(l.Client, f.TCP, nodetest.At(f.LoadIP, 15000), "pod1 "+f.Client)
		}
		if got := l.Spread(l.Pods[2], f.TCP, nodetest.At(f.LoadIP, 15000), 24); len(got) != 2 {
			t.Errorf("from a pod: %v", got)
		}
		if got := l.Spread(l.Node, f.TCP, nodetest.At(f.LoadIP, 15000), 24); len(got) != 2 {
			t.Errorf("from the node: %v", got)
		}
		// Who may send; no endpoint; none here.
		for _, c := range []struct {
			change func(*model.Frontend)
			answer string
		}{
			{func(lb *model.Frontend) { lb.Restricted, lb.Sources = true, prefixes(f.Narrow) }, nodetest.Silence},
			{func(lb *model.Frontend) { lb.Action = model.Reject }, nodetest.Refused},
			{func(lb *model.Frontend) { lb.Action = model.Drop }, nodetest.Silence},
		} {
			apply(service(c.change, 16000, f.Pod(1)+"*", f.Pod(2)))
			for _, network := range []string{f.TCP, f.UDP} {
				l.Want(l.Client, network, nodetest.At(f.LoadIP, 15000), c.answer)
			}
		}
		apply(service(func(lb *model.Frontend) { lb.Restricted, lb.Sources = true, prefixes(f.Narrow, f.Wide) }, 16000, f.Pod(1)+"*", f.Pod(2)))
		if a := l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 15000)); !strings.HasPrefix(a, "pod") {
			t.Errorf("who may send: %q", a)
		}
		if r, err := l.p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

// Ranges are rules and sets of their own as long as there are any, as many for one Service as for thirty; a restart changes
// nothing; and so it is with hashes, and with more elements than one transaction has room for.
func TestPortRangesComeAndGo(t *testing.T) {
	p := openAt(nodetest.NewSpace(t, "node"), Options{})
	s := nodetest.NewState()
	none, err := p.Sync(s)
	if err != nil {
		t.Fatal(err)
	}
	objects := 0
	for i := range 30 {
		ip := netip.AddrFrom4([4]byte{10, 96, 1, byte(i)}).String()
		next := nodetest.ServiceOf("range"+ip, withRange(nodetest.PortOf(model.UDP, []string{"10.1.0.1:80", "10.1.0.2:80"}, nodetest.ClusterIP(nodetest.At(ip, 1000+i))), uint16(10000+i)))
		next.Ports[0].Hash = model.Hash{By: model.BySource, Buckets: 251}
		r, err := p.Apply(s.Delta(nil, next))
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			objects = r.Objects
		} else if r.Objects != 0 || r.Transactions != 1 {
			t.Errorf("%+v", r)
		}
	}
	if r, err := p.Sync(s); err != nil || r != (Report{}) {
		t.Errorf("a restart: %+v, %v", r, err)
	}
	// All of them are other ranges, at the same addresses: what is new overlaps with what goes.
	for _, svc := range s.ServiceList {
		moved := withRange(svc.Ports[0], svc.Ports[0].Ranges[0].Last+5)
		svc.Ports[0].Ranges = moved.Ranges[1:]
	}
	if r, err := p.Sync(s); err != nil || r.Elements == 0 || r.Objects != 0 {
		t.Errorf("other ranges: %+v, %v", r, err)
	}
	if r, err := p.Sync(s); err != nil || r != (Report{}) {
		t.Errorf("again: %+v, %v", r, err)
	}
	r, err := p.Sync(nodetest.NewState())
	if err != nil || r.Objects == 0 || objects == 0 || objects > none.Objects {
		t.Errorf("%+v, %v: %d objects for the first range", r, err, objects)
	}
}

package nodetest

import (
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Open opens a Programmer for a node; it ends with the test.
type Open func(testing.TB, *Space) program.Programmer

// bench is a Lab with a Programmer of its node.
type bench struct {
	*Lab
	programmer program.Programmer
}

func newBench(t testing.TB, open Open, pods int) *bench {
	l := New(t, pods)
	return &bench{Lab: l, programmer: open(t, l.Node)}
}

func (l *bench) sync(s *State) {
	l.T.Helper()
	if _, err := l.programmer.Sync(s); err != nil {
		l.T.Fatal(err)
	}
}

// apply has a Service be another one.
func (l *bench) apply(s *State, old, next *model.Service) {
	l.T.Helper()
	if _, err := l.programmer.Apply(s.Delta(old, next)); err != nil {
		l.T.Fatal(err)
	}
}

// eachFamily runs a test on a lab for both families.
func eachFamily(t *testing.T, open Open, pods int, test func(*testing.T, *bench, Family)) {
	for _, f := range Families {
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			test(t, newBench(t, open, pods), f)
		})
	}
}

// Packets tests what becomes of packets, which is the same whoever programs the kernel.
func Packets(t *testing.T, open Open) {
	for name, test := range map[string]func(*testing.T, Open){
		"ClusterIP": testClusterIP, "NoEndpoints": testNoEndpoints, "NodePorts": testNodePorts,
		"FrontendPrecedesNodePort": testFrontendPrecedesNodePort, "ExternalPolicyLocal": testExternalPolicyLocal,
		"InternalPolicyLocal": testInternalPolicyLocal, "SourceRanges": testSourceRanges,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open)
		})
	}
}

func testClusterIP(t *testing.T, open Open) {
	eachFamily(t, open, 3, func(t *testing.T, l *bench, f Family) {
		s := NewState(ServiceOf("web",
			PortOf(model.TCP, f.Pods(1, 2), ClusterIP(At(f.Cluster, 80))),
			PortOf(model.UDP, f.Pods(1, 2), ClusterIP(At(f.Cluster, 80)))))
		s.HairpinList = []model.Hairpin{HairpinOf(model.TCP, f.Pod(1)), HairpinOf(model.UDP, f.Pod(1))}
		l.sync(s)
		for _, network := range []string{f.TCP, f.UDP} {
			got := l.Spread(l.Pods[2], network, At(f.Cluster, 80), 60)
			if len(got) != 2 || got["pod1"] < 12 || got["pod2"] < 12 {
				t.Errorf("%s: not evenly: %v", network, got)
			}
			if a := l.Pods[2].Ask(network, At(f.Cluster, 80)); !strings.HasSuffix(a, f.PodIP(3)) {
				t.Errorf("%s: a pod's source is not its own: %q", network, a)
			}
			// What is not a pod is masqueraded by the node's address of the way.
			if a := l.Client.Ask(network, At(f.Cluster, 80)); !strings.HasPrefix(a, "pod") || strings.HasSuffix(a, f.Client) {
				t.Errorf("%s: from outside: %q", network, a)
			}
			if a := l.Node.Ask(network, At(f.Cluster, 80)); !strings.HasPrefix(a, "pod") {
				t.Errorf("%s: from the node: %q", network, a)
			}
			for range 6 { // a pod that reaches itself sees the node
				if a := l.Pods[0].AskFor(2*time.Second, network, At(f.Cluster, 80)); a == "pod1 "+f.PodIP(1) || !strings.HasPrefix(a, "pod") {
					t.Errorf("%s: hairpin: %q", network, a)
				}
			}
			// Another port, and an address that no Service has.
			var all sync.WaitGroup
			for _, from := range []*Space{l.Pods[2], l.Client, l.Node} {
				all.Go(func() { l.Want(from, network, At(f.Cluster, 81), Refused) })
				all.Go(func() { l.Want(from, network, At(f.Other, 80), Silence) })
			}
			all.Wait()
		}
	})
}

func testNoEndpoints(t *testing.T, open Open) {
	eachFamily(t, open, 1, func(t *testing.T, l *bench, f Family) {
		frontends := []model.Frontend{ClusterIP(At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080), ClusterIP(At(f.Cluster, 90)), f.LoadBalancer(90), f.NodePort(30090)}
		for i := range frontends {
			frontends[i].Action = model.Reject
			if i >= 3 {
				frontends[i].Action = model.Drop
			}
		}
		l.sync(NewState(ServiceOf("empty", PortOf(model.TCP, nil, frontends...), PortOf(model.UDP, nil, frontends...))))
		var all sync.WaitGroup
		for _, network := range []string{f.TCP, f.UDP} {
			for _, from := range []*Space{l.Client, l.Pods[0], l.Node} {
				for port, answer := range map[int]string{80: Refused, 90: Silence} {
					for _, to := range []string{At(f.Cluster, port), At(f.LoadIP, port), At(f.Node, 30000+port)} {
						all.Go(func() { l.Want(from, network, to, answer) })
					}
				}
			}
		}
		all.Wait()
	})
}

func testNodePorts(t *testing.T, open Open) {
	eachFamily(t, open, 2, func(t *testing.T, l *bench, f Family) {
		s := NewState(ServiceOf("web",
			PortOf(model.TCP, f.Pods(1), ClusterIP(At(f.Cluster, 80)), f.NodePort(30080)),
			PortOf(model.UDP, f.Pods(1), ClusterIP(At(f.Cluster, 80)), f.NodePort(30080))))
		l.sync(s)
		gateway := map[model.Family]string{model.IPv4: "10.1.1.1", model.IPv6: "fd01:0:0:1::1"}[f.Of]
		for _, network := range []string{f.TCP, f.UDP} {
			for _, from := range []*Space{l.Client, l.Pods[1]} {
				l.Want(from, network, At(f.Node, 30080), "pod1 "+gateway)
			}
			if a := l.Node.Ask(network, At(f.Node, 30080)); a != "pod1 "+gateway {
				t.Errorf("from the node: %q", a)
			}
			l.Want(l.Client, network, At(f.Node, 30081), Refused)
			// A pod's own address is none of the node's.
			l.Want(l.Client, network, At(f.PodIP(2), 30080), Refused)
		}
		// Only addresses in the prefixes have node ports.
		s.All.Family[f.Of].NodePorts.Prefixes = []netip.Prefix{netip.MustParsePrefix(f.Narrow)}
		l.sync(s)
		l.Want(l.Client, f.TCP, At(f.Node, 30080), Refused)
		s.All.Family[f.Of].NodePorts.Prefixes = []netip.Prefix{netip.MustParsePrefix(f.Wide)}
		l.sync(s)
		l.Want(l.Client, f.TCP, At(f.Node, 30080), "pod1 "+gateway)
	})
}

// An address and port of a Service precedes a node port of the same number, also at an address of the node.
func testFrontendPrecedesNodePort(t *testing.T, open Open) {
	eachFamily(t, open, 2, func(t *testing.T, l *bench, f Family) {
		external := f.LoadBalancer(30080)
		external.Kind, external.Addr = model.ExternalIP, netip.MustParseAddrPort(At(f.Node, 30080))
		none := external
		none.Addr, none.Action = netip.MustParseAddrPort(At(f.Node, 30081)), model.Reject
		l.sync(NewState(
			ServiceOf("a", PortOf(model.TCP, f.Pods(1), f.NodePort(30080), f.NodePort(30081))),
			ServiceOf("b", PortOf(model.TCP, f.Pods(2), external, none))))
		if a := l.Client.Ask(f.TCP, At(f.Node, 30080)); !strings.HasPrefix(a, "pod2 ") {
			t.Errorf("to the external IP: %q", a)
		}
		l.Want(l.Client, f.TCP, At(f.Node, 30081), Refused)
	})
}

// externalTrafficPolicy Local: from outside to local endpoints with the client's source, from the node and its pods to all.
func testExternalPolicyLocal(t *testing.T, open Open) {
	eachFamily(t, open, 3, func(t *testing.T, l *bench, f Family) {
		backends := []string{f.Pod(1) + "*", f.Pod(2)}
		with := ServiceOf("some",
			PortOf(model.TCP, backends, ClusterIP(At(f.Cluster, 80)), LocalPolicy(f.LoadBalancer(80)), LocalPolicy(f.NodePort(30080))),
			PortOf(model.UDP, backends, ClusterIP(At(f.Cluster, 80)), LocalPolicy(f.LoadBalancer(80)), LocalPolicy(f.NodePort(30080))))
		none := func(a model.Frontend) model.Frontend { a = LocalPolicy(a); a.Action = model.Drop; return a }
		without := ServiceOf("none", PortOf(model.TCP, f.Pods(2), none(f.LoadBalancer(90)), none(f.NodePort(30090))))
		l.sync(NewState(with, without))
		for _, network := range []string{f.TCP, f.UDP} {
			for _, to := range []string{At(f.LoadIP, 80), At(f.Node, 30080)} {
				for range 8 {
					l.Want(l.Client, network, to, "pod1 "+f.Client)
				}
				got := l.Spread(l.Pods[2], network, to, 40)
				if len(got) != 2 || got["pod2"] == 0 {
					t.Errorf("%s from a pod to %s: %v", network, to, got)
				}
				if a := l.Pods[2].Ask(network, to); !strings.HasSuffix(a, " "+f.PodIP(3)) {
					t.Errorf("%s from a pod to %s: %q", network, to, a)
				}
				if got := l.Spread(l.Node, network, to, 40); len(got) != 2 || got["pod2"] == 0 {
					t.Errorf("%s from the node to %s: %v", network, to, got)
				}
			}
		}
		for _, to := range []string{At(f.LoadIP, 90), At(f.Node, 30090)} {
			l.Want(l.Client, f.TCP, to, Silence)
			l.Want(l.Pods[2], f.TCP, to, "pod2 "+f.PodIP(3))
			if a := l.Node.Ask(f.TCP, to); !strings.HasPrefix(a, "pod2 ") {
				t.Errorf("from the node to %s: %q", to, a)
			}
		}
	})
}

// internalTrafficPolicy Local is the endpoints of the frontend, or none.
func testInternalPolicyLocal(t *testing.T, open Open) {
	eachFamily(t, open, 3, func(t *testing.T, l *bench, f Family) {
		front := ClusterIP(At(f.Cluster, 80))
		front.Policy = model.Local
		l.sync(NewState(ServiceOf("web", PortOf(model.TCP, []string{f.Pod(1) + "*", f.Pod(2)}, front))))
		for range 8 {
			l.Want(l.Pods[2], f.TCP, At(f.Cluster, 80), "pod1 "+f.PodIP(3))
		}
	})
}

func testSourceRanges(t *testing.T, open Open) {
	eachFamily(t, open, 2, func(t *testing.T, l *bench, f Family) {
		front := f.LoadBalancer(80)
		front.Restricted = true
		build := func(sources ...string) *model.Service {
			g := front
			for _, s := range sources {
				g.Sources = append(g.Sources, netip.MustParsePrefix(s))
			}
			return ServiceOf("web", PortOf(model.TCP, f.Pods(1), ClusterIP(At(f.Cluster, 80)), g), PortOf(model.UDP, f.Pods(1), ClusterIP(At(f.Cluster, 80)), g))
		}
		single := netip.PrefixFrom(netip.MustParseAddr(f.Client), netip.MustParseAddr(f.Client).BitLen()).String()
		now := build(f.Narrow)
		s := NewState(now)
		l.sync(s)
		for _, step := range []struct {
			sources []string
			client  bool
		}{
			{[]string{f.Narrow, f.Wide}, true},
			{[]string{f.Narrow}, false},
			{nil, false},
			{[]string{single}, true},
			{[]string{single, f.Wide, f.Narrow}, true}, // one in the other
			{[]string{f.Wide}, true},
			{[]string{f.Narrow}, false},
		} {
			next := build(step.sources...)
			l.apply(s, now, next)
			now = next
			var all sync.WaitGroup
			for _, network := range []string{f.TCP, f.UDP} {
				all.Go(func() {
					d := Quiet
					if step.client {
						d = Patience
					}
					got := l.Client.AskFor(d, network, At(f.LoadIP, 80))
					if want := step.client; want != strings.HasPrefix(got, "pod1 ") || !want && got != Silence {
						t.Errorf("%s from %v: %q", network, step.sources, got)
					}
				})
			}
			all.Go(func() { l.Want(l.Pods[1], f.TCP, At(f.LoadIP, 80), Silence) })
			all.Wait()
			l.Want(l.Pods[1], f.TCP, At(f.Cluster, 80), "pod1 "+f.PodIP(2))
		}
		if r, err := l.programmer.Verify(); err != nil || r != (program.Report{}) {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

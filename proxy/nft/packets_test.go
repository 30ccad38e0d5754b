package nft

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

type modelService = model.Service

// family is what a test needs to say the same about IPv4 and IPv6.
type family struct {
	name                   string
	of                     model.Family
	tcp, udp               string
	pod                    func(int) string
	podIP                  func(int) string
	node, client           string // addresses
	cluster, other, loadIP string // a cluster IP, one that no Service has, and an address of a load balancer
	wide, narrow           string // a prefix with the client, and one without
}

var families = []family{
	{"IPv4", model.IPv4, "tcp4", "udp4", pod4, podIP4, nodeIP4, clientIP4, "10.96.0.1", "10.96.9.9", "203.0.113.1", "192.0.2.0/24", "198.51.100.0/24"},
	{"IPv6", model.IPv6, "tcp6", "udp6", pod6, podIP6, nodeIP6, clientIP6, "fd96::1", "fd96::9", "fd03::1", "fd02::/64", "fd04::/64"},
}

func at(ip string, port int) string { return net.JoinHostPort(ip, fmt.Sprint(port)) }

func (f family) nodePort(port int) model.Frontend {
	any := netip.IPv4Unspecified()
	if f.of == model.IPv6 {
		any = netip.IPv6Unspecified()
	}
	return model.Frontend{Kind: model.NodePort, Addr: netip.AddrPortFrom(any, uint16(port)), Action: model.Forward, Masquerade: model.Always}
}

func (f family) loadBalancer(port int) model.Frontend {
	return model.Frontend{Kind: model.LoadBalancer, Addr: netip.MustParseAddrPort(at(f.loadIP, port)), Action: model.Forward, Masquerade: model.Always}
}

// local is a frontend with externalTrafficPolicy Local.
func local(f model.Frontend) model.Frontend {
	f.Policy, f.Masquerade, f.ShortCircuit = model.Local, model.Never, true
	return f
}

func (f family) pods(n ...int) (all []string) {
	for _, i := range n {
		all = append(all, f.pod(i))
	}
	return all
}

// eachFamily runs a test on a lab for both families.
func eachFamily(t *testing.T, pods int, test func(*testing.T, *lab, family)) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			test(t, newLab(t, pods), f)
		})
	}
}

func hairpinOf(p model.Protocol, at string) model.Hairpin {
	return model.Hairpin{Protocol: p, Endpoint: netip.MustParseAddrPort(at)}
}

func TestClusterIP(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		s := newState(serviceOf("web",
			portOf(model.TCP, f.pods(1, 2), clusterIP(at(f.cluster, 80))),
			portOf(model.UDP, f.pods(1, 2), clusterIP(at(f.cluster, 80)))))
		s.hairpins = []model.Hairpin{hairpinOf(model.TCP, f.pod(1)), hairpinOf(model.UDP, f.pod(1))}
		l.sync(s)
		for _, network := range []string{f.tcp, f.udp} {
			got := l.spread(l.pods[2], network, at(f.cluster, 80), 60)
			if len(got) != 2 || got["pod1"] < 12 || got["pod2"] < 12 {
				t.Errorf("%s: not evenly: %v", network, got)
			}
			if a := l.pods[2].ask(network, at(f.cluster, 80)); !strings.HasSuffix(a, f.podIP(3)) {
				t.Errorf("%s: a pod's source is not its own: %q", network, a)
			}
			// What is not a pod is masqueraded by the node's address of the way.
			if a := l.client.ask(network, at(f.cluster, 80)); !strings.HasPrefix(a, "pod") || strings.HasSuffix(a, f.client) {
				t.Errorf("%s: from outside: %q", network, a)
			}
			if a := l.node.ask(network, at(f.cluster, 80)); !strings.HasPrefix(a, "pod") {
				t.Errorf("%s: from the node: %q", network, a)
			}
			for range 6 { // a pod that reaches itself sees the node
				if a := l.pods[0].askFor(2*time.Second, network, at(f.cluster, 80)); a == "pod1 "+f.podIP(1) || !strings.HasPrefix(a, "pod") {
					t.Errorf("%s: hairpin: %q", network, a)
				}
			}
			// Another port, and an address that no Service has.
			for _, from := range []*space{l.pods[2], l.client, l.node} {
				l.want(from, network, at(f.cluster, 81), refused)
				l.want(from, network, at(f.other, 80), silence)
			}
		}
	})
}

func TestNoEndpoints(t *testing.T) {
	eachFamily(t, 1, func(t *testing.T, l *lab, f family) {
		frontends := []model.Frontend{clusterIP(at(f.cluster, 80)), f.loadBalancer(80), f.nodePort(30080), clusterIP(at(f.cluster, 90)), f.loadBalancer(90), f.nodePort(30090)}
		for i := range frontends {
			frontends[i].Action = model.Reject
			if i >= 3 {
				frontends[i].Action = model.Drop
			}
		}
		l.sync(newState(serviceOf("empty", portOf(model.TCP, nil, frontends...), portOf(model.UDP, nil, frontends...))))
		for _, network := range []string{f.tcp, f.udp} {
			for _, from := range []*space{l.client, l.pods[0], l.node} {
				for port, answer := range map[int]string{80: refused, 90: silence} {
					l.want(from, network, at(f.cluster, port), answer)
					l.want(from, network, at(f.loadIP, port), answer)
					l.want(from, network, at(f.node, 30000+port), answer)
				}
			}
		}
	})
}

func TestNodePorts(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		s := newState(serviceOf("web",
			portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80)), f.nodePort(30080)),
			portOf(model.UDP, f.pods(1), clusterIP(at(f.cluster, 80)), f.nodePort(30080))))
		l.sync(s)
		gateway := map[model.Family]string{model.IPv4: "10.1.1.1", model.IPv6: "fd01:0:0:1::1"}[f.of]
		for _, network := range []string{f.tcp, f.udp} {
			for _, from := range []*space{l.client, l.pods[1]} {
				l.want(from, network, at(f.node, 30080), "pod1 "+gateway)
			}
			if a := l.node.ask(network, at(f.node, 30080)); a != "pod1 "+gateway {
				t.Errorf("from the node: %q", a)
			}
			l.want(l.client, network, at(f.node, 30081), refused)
			// A pod's own address is none of the node's.
			l.want(l.client, network, at(f.podIP(2), 30080), refused)
		}
		// Only addresses in the prefixes have node ports.
		s.globals.Family[f.of].NodePorts.Prefixes = []netip.Prefix{netip.MustParsePrefix(f.narrow)}
		l.sync(s)
		l.want(l.client, f.tcp, at(f.node, 30080), refused)
		s.globals.Family[f.of].NodePorts.Prefixes = []netip.Prefix{netip.MustParsePrefix(f.wide)}
		l.sync(s)
		l.want(l.client, f.tcp, at(f.node, 30080), "pod1 "+gateway)
	})
}

// An address and port of a Service precedes a node port of the same number, also at an address of the node.
func TestFrontendPrecedesNodePort(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		external := f.loadBalancer(30080)
		external.Kind, external.Addr = model.ExternalIP, netip.MustParseAddrPort(at(f.node, 30080))
		none := external
		none.Addr, none.Action = netip.MustParseAddrPort(at(f.node, 30081)), model.Reject
		l.sync(newState(
			serviceOf("a", portOf(model.TCP, f.pods(1), f.nodePort(30080), f.nodePort(30081))),
			serviceOf("b", portOf(model.TCP, f.pods(2), external, none))))
		if a := l.client.ask(f.tcp, at(f.node, 30080)); !strings.HasPrefix(a, "pod2 ") {
			t.Errorf("to the external IP: %q", a)
		}
		l.want(l.client, f.tcp, at(f.node, 30081), refused)
	})
}

// externalTrafficPolicy Local: from outside to local endpoints with the client's source, from the node and its pods to all.
func TestExternalPolicyLocal(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		backends := []string{f.pod(1) + "*", f.pod(2)}
		with := serviceOf("some",
			portOf(model.TCP, backends, clusterIP(at(f.cluster, 80)), local(f.loadBalancer(80)), local(f.nodePort(30080))),
			portOf(model.UDP, backends, clusterIP(at(f.cluster, 80)), local(f.loadBalancer(80)), local(f.nodePort(30080))))
		none := func(a model.Frontend) model.Frontend { a = local(a); a.Action = model.Drop; return a }
		without := serviceOf("none", portOf(model.TCP, f.pods(2), none(f.loadBalancer(90)), none(f.nodePort(30090))))
		l.sync(newState(with, without))
		for _, network := range []string{f.tcp, f.udp} {
			for _, to := range []string{at(f.loadIP, 80), at(f.node, 30080)} {
				for range 8 {
					l.want(l.client, network, to, "pod1 "+f.client)
				}
				got := l.spread(l.pods[2], network, to, 40)
				if len(got) != 2 || got["pod2"] == 0 {
					t.Errorf("%s from a pod to %s: %v", network, to, got)
				}
				if a := l.pods[2].ask(network, to); !strings.HasSuffix(a, " "+f.podIP(3)) {
					t.Errorf("%s from a pod to %s: %q", network, to, a)
				}
				if got := l.spread(l.node, network, to, 40); len(got) != 2 || got["pod2"] == 0 {
					t.Errorf("%s from the node to %s: %v", network, to, got)
				}
			}
		}
		for _, to := range []string{at(f.loadIP, 90), at(f.node, 30090)} {
			l.want(l.client, f.tcp, to, silence)
			l.want(l.pods[2], f.tcp, to, "pod2 "+f.podIP(3))
			if a := l.node.ask(f.tcp, to); !strings.HasPrefix(a, "pod2 ") {
				t.Errorf("from the node to %s: %q", to, a)
			}
		}
	})
}

// internalTrafficPolicy Local is the endpoints of the frontend, or none.
func TestInternalPolicyLocal(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		front := clusterIP(at(f.cluster, 80))
		front.Policy = model.Local
		l.sync(newState(serviceOf("web", portOf(model.TCP, []string{f.pod(1) + "*", f.pod(2)}, front))))
		for range 8 {
			l.want(l.pods[2], f.tcp, at(f.cluster, 80), "pod1 "+f.podIP(3))
		}
	})
}

func TestSourceRanges(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		front := f.loadBalancer(80)
		front.Restricted = true
		make := func(sources ...string) *model.Service {
			g := front
			for _, s := range sources {
				g.Sources = append(g.Sources, netip.MustParsePrefix(s))
			}
			return serviceOf("web", portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80)), g), portOf(model.UDP, f.pods(1), clusterIP(at(f.cluster, 80)), g))
		}
		single := netip.PrefixFrom(netip.MustParseAddr(f.client), netip.MustParseAddr(f.client).BitLen()).String()
		now := make(f.narrow)
		s := newState(now)
		l.sync(s)
		for _, step := range []struct {
			sources []string
			client  bool
		}{
			{[]string{f.narrow, f.wide}, true},
			{[]string{f.narrow}, false},
			{nil, false},
			{[]string{single}, true},
			{[]string{single, f.wide, f.narrow}, true}, // one in the other
			{[]string{f.wide}, true},
			{[]string{f.narrow}, false},
		} {
			next := make(step.sources...)
			l.apply(s, now, next)
			now = next
			for _, network := range []string{f.tcp, f.udp} {
				d := quiet
				if step.client {
					d = patience
				}
				got := l.client.askFor(d, network, at(f.loadIP, 80))
				if want := step.client; want != strings.HasPrefix(got, "pod1 ") || !want && got != silence {
					t.Errorf("%s from %v: %q", network, step.sources, got)
				}
			}
			l.want(l.pods[1], f.tcp, at(f.loadIP, 80), silence)
			l.want(l.pods[1], f.tcp, at(f.cluster, 80), "pod1 "+f.podIP(2))
		}
		if r, err := l.p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

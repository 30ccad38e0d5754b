package nft

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/proxy/model"
)

// world makes random Services and slices for the pods of a lab; pods 1 and 2 are local.
type world struct{ *rand.Rand }

func (r world) in(n int) bool { return r.IntN(n) == 0 }

func pick[T any](r world, of ...T) T { return of[r.IntN(len(of))] }

func (r world) config() model.Config {
	return model.Config{
		NodeName: "here", IPv4: true, IPv6: true, MasqueradeAll: r.in(4),
		DetectLocal:  pick(r, model.ModeNone, model.ModeClusterCIDR, model.ModeClusterCIDR, model.ModeBridgeInterface, model.ModeInterfaceNamePrefix),
		ClusterCIDRs: []string{"10.1.0.0/16", "fd01::/48"}, BridgeInterface: "pod1", InterfaceNamePrefix: "pod",
		NodePortAddresses: pick(r, nil, []string{"primary"}, []string{"192.0.2.0/24", "fd02::/64"}),
	}
}

func (r world) service(n int) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("s%d", n)}}
	s.Spec.ClusterIPs = []string{fmt.Sprintf("10.96.0.%d", n+1), fmt.Sprintf("fd96::%d", n+1)}
	s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	s.Spec.Type = pick(r, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer)
	for i, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		port := corev1.ServicePort{Name: strings.ToLower(string(p)), Protocol: p, Port: int32(pick(r, 80, 81))}
		if s.Spec.Type != corev1.ServiceTypeClusterIP && !r.in(4) {
			port.NodePort = int32(30000 + 2*n + i)
		}
		s.Spec.Ports = append(s.Spec.Ports, port)
	}
	if r.in(3) {
		s.Spec.ExternalIPs = []string{pick(r, "203.0.113.9", nodeIP4, "10.96.0.77"), pick(r, "fd03::9", nodeIP6)}
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, ip := range []string{fmt.Sprintf("203.0.113.%d", 100+n), fmt.Sprintf("fd03::10%d", n)} {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
		if r.in(2) {
			s.Spec.LoadBalancerSourceRanges = pick(r, []string{"192.0.2.0/24", "fd02::/64"}, []string{"10.1.0.0/16"}, []string{"10.1.1.0/24", "10.1.0.0/16", "fd01::/48"})
		}
	}
	s.Spec.ExternalTrafficPolicy = pick(r, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	internal := pick(r, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	s.Spec.InternalTrafficPolicy = &internal
	if r.in(3) {
		s.Annotations = map[string]string{model.WeightsAnnotation: pick(r, "node/here=3", "node/there=0", "10.1.1.2=0,fd01::/62=0", "*=0")}
	}
	if r.in(4) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		seconds := int32(pick(r, 10800, 60))
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	return s
}

func (r world) slice(n, pods int, kind discoveryv1.AddressType) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: fmt.Sprintf("s%d-%s", n, strings.ToLower(string(kind))), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%d", n)},
		},
		AddressType: kind,
	}
	for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		name, port := strings.ToLower(string(p)), int32(podPort)
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port, Protocol: &p})
	}
	for pod := 1; pod <= pods; pod++ {
		if r.in(2) {
			continue
		}
		node := "here"
		if pod > 2 {
			node = "there"
		}
		e := discoveryv1.Endpoint{Addresses: []string{podIP4(pod)}, NodeName: &node}
		if kind == discoveryv1.AddressTypeIPv6 {
			e.Addresses[0] = podIP6(pod)
		}
		if r.in(5) {
			no, yes := false, true
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// A try is a packet of a lab, and who sends it.
type try struct {
	from    *space
	network string
	packet  model.Packet
}

// tries are packets to all that Services answer at, and beside.
func (l *lab) tries(m *model.Model) (all []try) {
	dst := map[netip.AddrPort]bool{}
	for s := range m.State().Services() {
		for i := range s.Ports {
			for _, f := range s.Ports[i].Frontends {
				a := f.Addr
				if f.Kind == model.NodePort {
					a = netip.AddrPortFrom(netip.MustParseAddr(nodeIP4), a.Port())
					if f.Addr.Addr().Is6() {
						a = netip.AddrPortFrom(netip.MustParseAddr(nodeIP6), a.Port())
					}
				}
				dst[a] = true
				if f.Kind == model.ClusterIP {
					dst[netip.AddrPortFrom(a.Addr(), 99)] = true
				}
			}
		}
	}
	dst[netip.MustParseAddrPort("10.96.9.9:80")] = true
	dst[netip.MustParseAddrPort("[fd96::99]:80")] = true
	for to := range dst {
		local := to.Addr() == netip.MustParseAddr(nodeIP4) || to.Addr() == netip.MustParseAddr(nodeIP6)
		for _, from := range []*space{l.client, l.pods[0], l.pods[2], l.node} {
			p := model.Packet{Dst: to.Addr(), Port: to.Port(), DstLocal: local, SrcLocal: from == l.node, Interface: from.name}
			v4 := map[string]string{"client": clientIP4, "node": nodeIP4, "pod1": podIP4(1), "pod3": podIP4(3)}
			v6 := map[string]string{"client": clientIP6, "node": nodeIP6, "pod1": podIP6(1), "pod3": podIP6(3)}
			p.Src = netip.MustParseAddr(v4[from.name])
			if to.Addr().Is6() {
				p.Src = netip.MustParseAddr(v6[from.name])
			}
			switch from {
			case l.node:
				p.Interface = ""
			case l.client:
				p.Interface = "out0"
			}
			for network, protocol := range map[string]model.Protocol{"tcp": model.TCP, "udp": model.UDP} {
				p.Protocol = protocol
				all = append(all, try{from, network, p})
			}
		}
	}
	return all
}

// ask sends a try from its source, and says what becomes of it.
func (y try) ask(d time.Duration) string {
	dialer := net.Dialer{Timeout: d, LocalAddr: &net.TCPAddr{IP: y.packet.Src.AsSlice()}}
	if y.network == "udp" {
		dialer.LocalAddr = &net.UDPAddr{IP: y.packet.Src.AsSlice()}
	}
	var c net.Conn
	err := y.from.do(func() (err error) {
		c, err = dialer.Dial(y.network, netip.AddrPortFrom(y.packet.Dst, y.packet.Port).String())
		return err
	})
	if err != nil {
		return wrong(err)
	}
	defer c.Close()
	return againFor(d, c)
}

// judge says what is wrong with what became of a try; empty if nothing is.
func (y try) judge(s *model.State) string {
	v := model.Decide(s, y.packet)
	var got string
	switch v.Action {
	case model.Forward:
		// A pod of another node that is sent back to itself by this one is not of this world.
		if slices.ContainsFunc(v.Endpoints, func(e model.Endpoint) bool { return e.Addr == y.packet.Src && !e.Local }) {
			return ""
		}
		got = y.ask(patience)
		who, seen, _ := strings.Cut(got, " ")
		for _, e := range v.Endpoints {
			n, _ := strconv.Atoi(strings.TrimPrefix(who, "pod"))
			if e.Addr.String() != podIP4(n) && e.Addr.String() != podIP6(n) {
				continue
			}
			if v.Masquerades(e) == (seen == y.packet.Src.String()) && y.from.name != "node" {
				return fmt.Sprintf("%q, masqueraded should be %v", got, v.Masquerades(e))
			}
			return ""
		}
	case model.Reject:
		for range 8 { // the kernel sends so many errors a second
			if got = y.ask(quiet); got == refused || got == denied {
				return ""
			}
		}
	case model.Drop:
		if got = y.ask(quiet); got == silence || got == denied {
			return ""
		}
	case model.Pass:
		if got = y.ask(quiet); !strings.HasPrefix(got, "pod") {
			return ""
		}
	}
	return fmt.Sprintf("%q, not %v %v (%s)", got, v.Action, v.Endpoints, v.Reason)
}

// What the kernel does to packets is what the model says, for random Services, slices and configurations, at first and after
// changes. BERTH_WORLDS is how many there are.
func TestKernelDoesWhatTheModelSays(t *testing.T) {
	worlds := 6
	if n, err := strconv.Atoi(os.Getenv("BERTH_WORLDS")); err == nil {
		worlds = n
	}
	l := newLab(t, 4)
	packets := 0
	for seed := range worlds {
		r := world{rand.New(rand.NewPCG(uint64(seed), 1))}
		m, err := model.New(r.config())
		if err != nil {
			t.Fatal(err)
		}
		m.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "here"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: nodeIP4},
			{Type: corev1.NodeInternalIP, Address: nodeIP6},
		}}})
		m.SetServiceCIDR(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd96::/108"}}})
		for step := range 3 {
			for n := range 4 {
				if step > 0 && !r.in(3) {
					continue
				}
				m.SetService(r.service(n))
				m.SetSlice(r.slice(n, 4, discoveryv1.AddressTypeIPv4))
				m.SetSlice(r.slice(n, 4, discoveryv1.AddressTypeIPv6))
			}
			d := m.Commit()
			if step == 0 {
				_, err = l.p.Sync(m.State())
			} else {
				_, err = l.p.Apply(&d)
			}
			if err != nil {
				t.Fatal(err)
			}
			if r, err := l.p.Verify(); err != nil || r.Elements != 0 {
				t.Fatalf("seed %d, step %d: the kernel has not what it should: %+v, %v", seed, step, r, err)
			}
			// Another package looks after what conntrack remembers of UDP.
			if err := l.node.do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
				t.Fatal(err)
			}
			tries := l.tries(m)
			packets += len(tries)
			var wait sync.WaitGroup
			turn := make(chan struct{}, 64)
			for _, y := range tries {
				wait.Add(1)
				turn <- struct{}{}
				go func() {
					defer func() { <-turn; wait.Done() }()
					if bad := y.judge(m.State()); bad != "" {
						t.Errorf("seed %d, step %d: %s %s to %s: %s", seed, step, y.from.name, y.network, netip.AddrPortFrom(y.packet.Dst, y.packet.Port), bad)
					}
				}()
			}
			wait.Wait()
			if t.Failed() {
				t.Fatalf("seed %d, step %d:\n%s", seed, step, m.State())
			}
		}
	}
	t.Logf("%d packets in %d worlds", packets, worlds)
}

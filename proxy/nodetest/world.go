package nodetest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/proxy/model"
)

// World makes random Services and slices for the pods of a lab; pods 1 and 2 are local.
type World struct{ *rand.Rand }

// NewWorld is the same for the same seed.
func NewWorld(seed int) World { return World{rand.New(rand.NewPCG(uint64(seed), 1))} }

// In is true once in n times.
func (r World) In(n int) bool { return r.IntN(n) == 0 }

// OneOf picks one of several.
func OneOf[T any](r World, of ...T) T { return of[r.IntN(len(of))] }

// Config is a random configuration.
func (r World) Config() model.Config {
	return model.Config{
		NodeName: "here", IPv4: true, IPv6: true, MasqueradeAll: r.In(4),
		DetectLocal:  OneOf(r, model.ModeNone, model.ModeClusterCIDR, model.ModeClusterCIDR, model.ModeBridgeInterface, model.ModeInterfaceNamePrefix),
		ClusterCIDRs: []string{"10.1.0.0/16", "fd01::/48"}, BridgeInterface: "pod1", InterfaceNamePrefix: "pod",
		NodePortAddresses: OneOf(r, nil, []string{"primary"}, []string{"192.0.2.0/24", "fd02::/64"}),
	}
}

// Service is a random Service, by its number.
func (r World) Service(n int) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("s%d", n)}}
	s.Spec.ClusterIPs = []string{fmt.Sprintf("10.96.0.%d", n+1), fmt.Sprintf("fd96::%d", n+1)}
	s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	s.Spec.Type = OneOf(r, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer)
	for i, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		port := corev1.ServicePort{Name: strings.ToLower(string(p)), Protocol: p, Port: int32(OneOf(r, 80, 81))}
		if s.Spec.Type != corev1.ServiceTypeClusterIP && !r.In(4) {
			port.NodePort = int32(30000 + 2*n + i)
		}
		s.Spec.Ports = append(s.Spec.Ports, port)
	}
	if r.In(3) {
		s.Spec.ExternalIPs = []string{OneOf(r, "203.0.113.9", NodeIP4, "10.96.0.77"), OneOf(r, "fd03::9", NodeIP6)}
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, ip := range []string{fmt.Sprintf("203.0.113.%d", 100+n), fmt.Sprintf("fd03::10%d", n)} {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
		if r.In(2) {
			s.Spec.LoadBalancerSourceRanges = OneOf(r, []string{"192.0.2.0/24", "fd02::/64"}, []string{"10.1.0.0/16"}, []string{"10.1.1.0/24", "10.1.0.0/16", "fd01::/48"})
		}
	}
	s.Spec.ExternalTrafficPolicy = OneOf(r, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	internal := OneOf(r, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal)
	s.Spec.InternalTrafficPolicy = &internal
	s.Annotations = map[string]string{}
	if r.In(3) {
		s.Annotations[model.WeightsAnnotation] = OneOf(r, "node/here=3", "node/there=0", "10.1.1.2=0,fd01::/62=0", "*=0")
	}
	if r.In(3) {
		s.Annotations[model.HashAnnotation] = OneOf(r, "source", "source/251", "source-and-port/251")
	}
	if r.In(3) {
		s.Annotations[model.PortRangesAnnotation] = OneOf(r, "tcp=8000-9000", "udp=8080-8080,tcp=1000-8080", "tcp=1-79,udp=8079-65535")
	}
	if r.In(4) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		seconds := int32(OneOf(r, 10800, 60))
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	return s
}

// Slice is a random slice of a Service, by its number.
func (r World) Slice(n, pods int, kind discoveryv1.AddressType) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: fmt.Sprintf("s%d-%s", n, strings.ToLower(string(kind))), Labels: map[string]string{discoveryv1.LabelServiceName: fmt.Sprintf("s%d", n)},
		},
		AddressType: kind,
	}
	for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		name, port := strings.ToLower(string(p)), int32(PodPort)
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port, Protocol: &p})
	}
	for pod := 1; pod <= pods; pod++ {
		if r.In(2) {
			continue
		}
		node := "here"
		if pod > 2 {
			node = "there"
		}
		e := discoveryv1.Endpoint{Addresses: []string{PodIP4(pod)}, NodeName: &node}
		if kind == discoveryv1.AddressTypeIPv6 {
			e.Addresses[0] = PodIP6(pod)
		}
		if r.In(5) {
			no, yes := false, true
			e.Conditions = discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// Try is a packet of a lab, and who sends it.
type Try struct {
	From    *Space
	Network string
	Packet  model.Packet
}

// Tries are packets to all that Services answer at, and beside.
func (l *Lab) Tries(m *model.Model) (all []Try) {
	dst := map[netip.AddrPort]bool{}
	for s := range m.State().Services() {
		for i := range s.Ports {
			for _, f := range s.Ports[i].Frontends {
				a := f.Addr
				if f.Kind == model.NodePort {
					a = netip.AddrPortFrom(netip.MustParseAddr(NodeIP4), a.Port())
					if f.Addr.Addr().Is6() {
						a = netip.AddrPortFrom(netip.MustParseAddr(NodeIP6), a.Port())
					}
				}
				dst[a] = true
				if f.Kind == model.ClusterIP {
					dst[netip.AddrPortFrom(a.Addr(), 99)] = true
				}
			}
			for _, f := range s.Ports[i].Ranges {
				if f.Addr.Port() <= PodPort && PodPort <= f.Last { // pods have no other port
					dst[netip.AddrPortFrom(f.Addr.Addr(), PodPort)] = true
				}
			}
		}
	}
	dst[netip.MustParseAddrPort("10.96.9.9:80")] = true
	dst[netip.MustParseAddrPort("[fd96::99]:80")] = true
	for to := range dst {
		local := to.Addr() == netip.MustParseAddr(NodeIP4) || to.Addr() == netip.MustParseAddr(NodeIP6)
		for _, from := range []*Space{l.Client, l.Pods[0], l.Pods[2], l.Node} {
			p := model.Packet{Dst: to.Addr(), Port: to.Port(), DstLocal: local, SrcLocal: from == l.Node, Interface: from.Name}
			v4 := map[string]string{"client": ClientIP4, "node": NodeIP4, "pod1": PodIP4(1), "pod3": PodIP4(3)}
			v6 := map[string]string{"client": ClientIP6, "node": NodeIP6, "pod1": PodIP6(1), "pod3": PodIP6(3)}
			p.Src = netip.MustParseAddr(v4[from.Name])
			if to.Addr().Is6() {
				p.Src = netip.MustParseAddr(v6[from.Name])
			}
			switch from {
			case l.Node:
				p.Interface = ""
			case l.Client:
				p.Interface = "out0"
			}
			for network, protocol := range map[string]model.Protocol{"tcp": model.TCP, "udp": model.UDP} {
				p.Protocol = protocol
				all = append(all, Try{from, network, p})
			}
		}
	}
	return all
}

// Ask sends a try from its source, and says what becomes of it.
func (y Try) Ask(d time.Duration) string {
	dialer := net.Dialer{Timeout: d, LocalAddr: &net.TCPAddr{IP: y.Packet.Src.AsSlice()}}
	if y.Network == "udp" {
		dialer.LocalAddr = &net.UDPAddr{IP: y.Packet.Src.AsSlice()}
	}
	var c net.Conn
	err := y.From.Do(func() (err error) {
		c, err = dialer.Dial(y.Network, netip.AddrPortFrom(y.Packet.Dst, y.Packet.Port).String())
		return err
	})
	if err != nil {
		return Wrong(err)
	}
	defer c.Close()
	return AgainFor(d, c)
}

// Judge says what is wrong with what became of a try; empty if nothing is.
func (y Try) Judge(s *model.State) string {
	v := model.Decide(s, y.Packet)
	var got string
	switch v.Action {
	case model.Forward:
		// A pod of another node that is sent back to itself by this one is not of this world.
		if slices.ContainsFunc(v.Endpoints, func(e model.Endpoint) bool { return e.Addr == y.Packet.Src && !e.Local }) {
			return ""
		}
		got = y.Ask(Patience)
		who, seen, _ := strings.Cut(got, " ")
		for _, e := range v.Endpoints {
			n, _ := strconv.Atoi(strings.TrimPrefix(who, "pod"))
			if e.Addr.String() != PodIP4(n) && e.Addr.String() != PodIP6(n) {
				continue
			}
			if v.Masquerades(e) == (seen == y.Packet.Src.String()) && y.From.Name != "node" {
				return fmt.Sprintf("%q, masqueraded should be %v", got, v.Masquerades(e))
			}
			return ""
		}
	case model.Reject:
		for range 8 { // the kernel sends so many errors a second
			if got = y.Ask(Quiet); got == Refused || got == Denied {
				return ""
			}
		}
	case model.Drop:
		if got = y.Ask(Quiet); got == Silence || got == Denied {
			return ""
		}
	case model.Pass:
		if got = y.Ask(Quiet); !strings.HasPrefix(got, "pod") {
			return ""
		}
	}
	return fmt.Sprintf("%q, not %v %v (%s)", got, v.Action, v.Endpoints, v.Reason)
}

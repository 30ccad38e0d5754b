package model

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// The node of these tests: node1 in zone1, at 192.168.0.1 and fd00::1, with pods in 10.1.0.0/16 of 10.0.0.0/8.
var testConfig = Config{
	NodeName: "node1", IPv4: true, IPv6: true, DetectLocal: ModeClusterCIDR, ClusterCIDRs: []string{"10.0.0.0/8", "fd10::/16"},
	NodePortAddresses: []string{"primary"},
}

func testNode() *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "node1", Labels: map[string]string{corev1.LabelTopologyZone: "zone1"}},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/16", "fd10:1::/64"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeExternalIP, Address: "203.0.113.1"},
			{Type: corev1.NodeInternalIP, Address: "192.168.0.1"},
			{Type: corev1.NodeInternalIP, Address: "fd00::1"},
		}},
	}
}

// Sources and addresses that tests send from and to.
const (
	podHere     = "10.1.0.5" // a pod of this node
	podFar      = "10.2.0.5" // one of another
	nodeSelf    = "192.168.0.1"
	outside     = "198.51.100.7"
	here        = "10.1.0.1:8080" // an endpoint of this node
	far         = "10.2.0.1:8080" // one of another
	webIP       = "172.30.0.10"
	lbIP        = "203.0.113.50"
	externalIP  = "203.0.113.60"
	webNodePort = 30080
)

type serviceOption func(*corev1.Service)

// web is a Service default/web with a cluster IP and port 80, named http.
func web(options ...serviceOption) *corev1.Service { return service("web", webIP, options...) }

func service(name, ip string, options ...serviceOption) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1000, 0))},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
		},
	}
	if strings.Contains(ip, ":") {
		s.Spec.IPFamilies[0] = corev1.IPv6Protocol
	}
	for _, o := range options {
		o(s)
	}
	return s
}

func withNodePort(s *corev1.Service) {
	s.Spec.Type = corev1.ServiceTypeNodePort
	s.Spec.Ports[0].NodePort = webNodePort
}

func withLB(ips ...string) serviceOption {
	return func(s *corev1.Service) {
		withNodePort(s)
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		for _, ip := range ips {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
	}
}

func withExternalIPs(ips ...string) serviceOption {
	return func(s *corev1.Service) { s.Spec.ExternalIPs = ips }
}

func withSources(cidrs ...string) serviceOption {
	return func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = cidrs }
}

func internalLocal(s *corev1.Service) {
	s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicyLocal)
}

func externalLocal(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	s.Spec.HealthCheckNodePort = 31234
}

func withProtocol(p corev1.Protocol) serviceOption {
	return func(s *corev1.Service) { s.Spec.Ports[0].Protocol = p }
}

// endpoint reads an endpoint's address and port, and words: far (on node2), notready, dying (terminating, serving), dead
// (terminating, not serving), zone=NAME, node=NAME.
func endpoint(text string) (discoveryv1.Endpoint, int32) {
	words := strings.Fields(text)
	at := netip.MustParseAddrPort(words[0])
	e := discoveryv1.Endpoint{Addresses: []string{at.Addr().String()}, NodeName: ptr("node1")}
	e.Conditions.Ready, e.Conditions.Serving, e.Conditions.Terminating = ptr(true), ptr(true), ptr(false)
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "far":
			e.NodeName = ptr("node2")
		case "notready":
			e.Conditions.Ready, e.Conditions.Serving = ptr(false), ptr(false)
		case "dying":
			e.Conditions.Ready, e.Conditions.Terminating = ptr(false), ptr(true)
		case "dead":
			e.Conditions.Ready, e.Conditions.Serving, e.Conditions.Terminating = ptr(false), ptr(false), ptr(true)
		case "zone", "node":
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			if key == "zone" {
				e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: value})
			} else {
				e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: value})
			}
		default:
			panic(w)
		}
	}
	return e, int32(at.Port())
}

// slice1 is an EndpointSlice of a Service for its port http, TCP; the family and the port are those of the first endpoint.
func slice1(service string, endpoints ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP)}},
	}
	for i, text := range endpoints {
		e, port := endpoint(text)
		if i == 0 {
			s.Ports[0].Port = ptr(port)
		}
		if strings.Contains(e.Addresses[0], ":") {
			s.AddressType, s.Name = discoveryv1.AddressTypeIPv6, service+"-v6"
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

func sliceProtocol(s *discoveryv1.EndpointSlice, p corev1.Protocol) *discoveryv1.EndpointSlice {
	s.Ports[0].Protocol = &p
	return s
}

// modelOf computes the State of the test's node with some objects; a Config among them replaces testConfig.
func modelOf(t testing.TB, list ...any) *Model {
	t.Helper()
	c := testConfig
	for _, o := range list {
		if other, ok := o.(Config); ok {
			c = other
		}
	}
	m, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	m.SetNode(testNode())
	for _, o := range list {
		switch o := o.(type) {
		case *corev1.Service:
			m.SetService(o)
		case *discoveryv1.EndpointSlice:
			m.SetSlice(o)
		case *networkingv1.ServiceCIDR:
			m.SetServiceCIDR(o)
		case *corev1.Node:
			m.SetNode(o)
		case Config:
		default:
			t.Fatalf("%T", o)
		}
	}
	m.Commit()
	return m
}

// serviceCIDR is one of that name.
func serviceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs}}
}

// packet is one from where to where, told by what the addresses are: pods of this node come in by cni0, what the node sends
// by nothing, all else by eth0.
func packet(t testing.TB, src, dst string) Packet {
	t.Helper()
	p := Packet{Src: netip.MustParseAddr(src), Protocol: TCP, Interface: "eth0"}
	if rest, ok := strings.CutPrefix(dst, "udp "); ok {
		p.Protocol, dst = UDP, rest
	} else if rest, ok := strings.CutPrefix(dst, "sctp "); ok {
		p.Protocol, dst = SCTP, rest
	}
	at := netip.MustParseAddrPort(dst)
	p.Dst, p.Port = at.Addr(), at.Port()
	node := []string{nodeSelf, "203.0.113.1", "fd00::1", "127.0.0.1", "::1", "192.168.7.7"}
	p.SrcLocal, p.DstLocal = slices.Contains(node, src), slices.Contains(node, at.Addr().String())
	switch {
	case p.SrcLocal:
		p.Interface = ""
	case strings.HasPrefix(src, "10.1.") || strings.HasPrefix(src, "fd10:1:"):
		p.Interface = "cni0"
	}
	return p
}

// verdict writes a Verdict as tests have it: endpoints, each with the word masq if it is masqueraded, or what else becomes of
// the packet.
func verdict(v Verdict) string {
	if v.Action != Forward {
		return v.Action.String()
	}
	var out []string
	for _, e := range v.Endpoints {
		s := e.AddrPort().String()
		if v.Masquerades(e) {
			s += " masq"
		}
		out = append(out, s)
	}
	return strings.Join(out, ", ")
}

// flow is a packet and what should become of it.
type flow struct{ src, dst, want string }

func check(t *testing.T, m *Model, flows ...flow) {
	t.Helper()
	sound(t, m.State())
	for _, f := range flows {
		v := Decide(m.State(), packet(t, f.src, f.dst))
		if got := verdict(v); got != f.want {
			t.Errorf("%s -> %s: %q (%s), want %q", f.src, f.dst, got, v.Reason, f.want)
		}
	}
	if t.Failed() {
		t.Logf("state:\n%s", m.State())
	}
}

// named is an object's name.
func named(o metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: o.GetNamespace(), Name: o.GetName()}
}

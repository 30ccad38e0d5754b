package model

import (
	"fmt"
	"maps"
	"math/rand/v2"
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

func ptr[T any](v T) *T { return &v }

// objects is what an API server has.
type objects struct {
	config   Config
	node     *corev1.Node
	services map[types.NamespacedName]*corev1.Service
	slices   map[types.NamespacedName]*discoveryv1.EndpointSlice
	cidrs    map[string]*networkingv1.ServiceCIDR
}

func newObjects(c Config) *objects {
	return &objects{
		config:   c,
		services: map[types.NamespacedName]*corev1.Service{},
		slices:   map[types.NamespacedName]*discoveryv1.EndpointSlice{},
		cidrs:    map[string]*networkingv1.ServiceCIDR{},
	}
}

// model computes all of it anew.
func (o *objects) model(t testing.TB) (*Model, Delta) {
	t.Helper()
	m, err := New(o.config)
	if err != nil {
		t.Fatal(err)
	}
	if o.node != nil {
		m.SetNode(o.node)
	}
	for _, c := range o.cidrs {
		m.SetServiceCIDR(c)
	}
	for _, s := range o.slices {
		m.SetSlice(s)
	}
	for _, s := range o.services {
		m.SetService(s)
	}
	return m, m.Commit()
}

// chance makes random objects out of so few names, addresses and ports that they meet all the time.
type chance struct {
	*rand.Rand
	// evil is whether there are values that the API server would refuse.
	evil bool
}

func (r chance) in(n int) bool { return r.IntN(n) == 0 }

func one[T any](r chance, of ...T) T { return of[r.IntN(len(of))] }

func (r chance) some(of ...string) []string {
	var out []string
	for _, s := range of {
		if r.in(3) {
			out = append(out, s)
		}
	}
	return out
}

func (r chance) name() types.NamespacedName {
	return types.NamespacedName{Namespace: one(r, "a", "a", "a", "b"), Name: one(r, "web", "db", "dns")}
}

// sliceName is that of a slice: a Service has several.
func (r chance) sliceName() types.NamespacedName {
	n := r.name()
	n.Name += one(r, "-1", "-2", "-3")
	return n
}

// portName and protocol are mostly the same, so that slices are mostly for a port that there is.
func (r chance) portName() string {
	if !r.in(8) {
		return "http"
	}
	return one(r, "", "dns")
}

func (r chance) protocol() corev1.Protocol {
	if !r.in(5) {
		return corev1.ProtocolTCP
	}
	return one(r, corev1.ProtocolUDP, corev1.ProtocolSCTP)
}

func (r chance) config() Config {
	c := Config{
		NodeName: "node1", IPv4: !r.in(6), IPv6: !r.in(3), MasqueradeAll: r.in(4), NoExternalIPs: r.in(6), NoHash: r.in(8), NoRanges: r.in(8), Resets: r.in(4), NoResets: r.in(8),
		DetectLocal:  one(r, ModeNone, ModeClusterCIDR, ModeNodeCIDR, ModeBridgeInterface, ModeInterfaceNamePrefix),
		ClusterCIDRs: r.some("10.0.0.0/8", "fd10::/16"), BridgeInterface: "cni0", InterfaceNamePrefix: "veth",
		NodePortAddresses: r.some("primary", "localhost", "all", "192.168.0.0/16", "fd00::/8"), LoopbackNodePorts: r.in(2),
	}
	if r.in(4) {
		c.BindAddress = netip.MustParseAddr(one(r, "192.168.9.9", "fd09::9", "0.0.0.0", "::"))
	}
	return c
}

func (r chance) node() *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}}
	if !r.in(3) {
		n.Labels = map[string]string{corev1.LabelTopologyZone: one(r, "z1", "z2", "")}
	}
	for _, a := range r.some("192.168.0.1", "192.168.0.2", "fd00::1", "10.9.9.9") {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{
			Type: one(r, corev1.NodeInternalIP, corev1.NodeExternalIP, corev1.NodeHostName), Address: a,
		})
	}
	n.Spec.PodCIDRs = r.some("10.1.0.0/16", "fd10:1::/64")
	if r.evil && r.in(3) {
		n.Spec.PodCIDRs = append(n.Spec.PodCIDRs, "10/8", "")
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "localhost"})
	}
	return n
}

func (r chance) serviceCIDR() *networkingv1.ServiceCIDR {
	c := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: one(r, "kubernetes", "more")}}
	c.Spec.CIDRs = r.some("172.30.0.0/16", "172.31.0.0/24", "fd30::/108")
	if r.evil && r.in(3) {
		c.Spec.CIDRs = append(c.Spec.CIDRs, "0.0.0.0/0", "x")
	}
	return c
}

func (r chance) service(name types.NamespacedName) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{
		Namespace: name.Namespace, Name: name.Name, CreationTimestamp: metav1.NewTime(time.Unix(int64(r.IntN(3)), 0)),
	}}
	v4, v6 := fmt.Sprintf("172.30.0.%d", 1+r.IntN(5)), fmt.Sprintf("fd30::%d", 1+r.IntN(5))
	switch r.IntN(4) {
	case 0:
		s.Spec.IPFamilies, s.Spec.ClusterIPs = []corev1.IPFamily{corev1.IPv4Protocol}, []string{v4}
	case 1:
		s.Spec.IPFamilies, s.Spec.ClusterIPs = []corev1.IPFamily{corev1.IPv6Protocol}, []string{v6}
	case 2:
		s.Spec.IPFamilies, s.Spec.ClusterIPs = []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}, []string{v6, v4}
	case 3:
		s.Spec.ClusterIPs = []string{v4}
	}
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	s.Spec.Type = one(r, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer)
	if r.in(12) {
		s.Spec.ClusterIP, s.Spec.Type = one(r, "", "None", v4), corev1.ServiceTypeExternalName
	}
	if r.in(12) {
		s.Labels = map[string]string{ServiceProxyNameLabel: "other"}
	}
	for range (1 + r.IntN(6)) / 2 {
		p := corev1.ServicePort{
			Name: r.portName(), Protocol: r.protocol(), Port: int32(one(r, 53, 80, 443)),
		}
		if s.Spec.Type != corev1.ServiceTypeClusterIP && !r.in(4) {
			p.NodePort = int32(30000 + r.IntN(4))
		}
		s.Spec.Ports = append(s.Spec.Ports, p)
	}
	s.Spec.ExternalIPs = r.some("1.1.1.1", "2.2.2.2", "fd99::1", v4, v6)
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, ip := range r.some("5.5.5.5", "1.1.1.1", "192.168.0.1", "fd99::5", v4) {
			in := corev1.LoadBalancerIngress{IP: ip}
			if r.in(2) {
				in.IPMode = ptr(one(r, corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy))
			}
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, in)
		}
		s.Spec.LoadBalancerSourceRanges = r.some("10.0.0.0/8", " 192.168.0.0/24 ", "0.0.0.0/0", "fd00::/8", "10.0.0.0/8")
		s.Spec.HealthCheckNodePort = int32(r.IntN(3) * 31000)
	}
	s.Spec.ExternalTrafficPolicy = one(r, "", corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	if r.in(2) {
		s.Spec.InternalTrafficPolicy = ptr(one(r, corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal))
	}
	if r.in(3) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(1 + r.IntN(86400)))}}
	}
	r.annotate(s)
	if r.evil {
		r.spoilService(s)
	}
	return s
}

// annotate has a Service ask for what Kubernetes has no field for.
func (r chance) annotate(s *corev1.Service) {
	set := func(name string, values ...string) {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations[name] = one(r, values...)
	}
	if r.in(3) {
		set(WeightsAnnotation, "node/node1=3,*=2", "zone/z1=0, zone/z2=6", "10.1.0.1=1000,10.1.0.0/29=0,fd10:1::/64=5", "pod/web=2", "pod/web-7d-a=0,*=4")
	}
	if r.in(4) {
		set(HashAnnotation, "source", "source/251", "source-and-port", "source-and-port/4093")
	}
	if r.in(3) {
		set(PortRangesAnnotation, "http=70-90", "http=85-99/TCP", "http=440-450,http=50-60", "dns=50-60/udp", "10-12", "http=300-301")
	}
	if r.evil && r.in(8) {
		set(PortRangesAnnotation, "", "http=", "http=0-10", "http=9-8", "http=1-65536", "none=1-2", "http=1-5,http=5-6", "=", "http=1-2/ICMP",
			"http=1-1,http=2-2,http=3-3,http=4-4,http=5-5,http=6-6,http=7-7,http=8-8,http=9-9")
	}
	if r.in(4) {
		set(ResetAnnotation, "true", "false")
	}
	if r.evil && r.in(8) {
		set(ResetAnnotation, "", "yes", "TRUE", "\x00")
	}
	if r.evil && r.in(8) {
		set(HashAnnotation, "", "source/", "source/0", "source/257", "Source", "port", "source/99999999999")
	}
	if r.evil && r.in(8) {
		set(WeightsAnnotation, "", ",", "x=1", "node/=1", "*=1001", "*=-1", "*=1,", "*", "pod/web=\x00", "=", strings.Repeat("*=1,", 200)+"*=1")
	}
}

// spoilService puts in what the API server would refuse.
func (r chance) spoilService(s *corev1.Service) {
	text := one(r, "", " ", "x", "None", "0.0.0.0", "::", "127.0.0.1", "::1", "169.254.169.254", "fe80::1%eth0", "224.0.0.1", "999.1.1.1",
		"010.0.0.1", "::ffff:1.1.1.1", "1.1.1.1/33", "::ffff:10.0.0.0/104", "\x00", "255.255.255.255")
	number := one(r, int32(0), -1, 1, 65535, 65536, 1<<31-1, -1<<31)
	switch r.IntN(14) {
	case 0:
		s.Spec.ClusterIP = text
	case 1:
		s.Spec.ClusterIPs = []string{text}
	case 2:
		s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, text, text)
	case 3:
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: text})
	case 4:
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress,
			corev1.LoadBalancerIngress{IP: "6.6.6.6", IPMode: ptr(corev1.LoadBalancerIPMode(text))})
	case 5:
		s.Spec.LoadBalancerSourceRanges = append(s.Spec.LoadBalancerSourceRanges, text, text+"/8")
	case 6:
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Port: number, NodePort: 30000, Protocol: "TCP", Name: text})
	case 7:
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Port: 80, NodePort: number, Protocol: corev1.Protocol(text)})
	case 8:
		s.Spec.SessionAffinity = corev1.ServiceAffinity(text)
	case 9:
		s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = corev1.ServiceAffinityClientIP, one(r, nil, &corev1.SessionAffinityConfig{},
			&corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{}},
			&corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &number}})
	case 10:
		s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicy(text)
	case 11:
		s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicy(text))
	case 12:
		s.Spec.Type, s.Spec.HealthCheckNodePort = corev1.ServiceType(text), number
	case 13:
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPFamily(text), corev1.IPv4Protocol, corev1.IPv6Protocol)
	}
}

func (r chance) slice(name types.NamespacedName) *discoveryv1.EndpointSlice {
	service := r.name()
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: name.Namespace, Name: name.Name, Labels: map[string]string{discoveryv1.LabelServiceName: service.Name},
		},
		AddressType: one(r, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6),
	}
	if r.in(12) {
		s.Labels[HeadlessLabel] = ""
	}
	s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: ptr("http"), Port: ptr(int32(80)), Protocol: ptr(corev1.ProtocolTCP)})
	for range r.IntN(3) {
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{
			Name: ptr(r.portName()), Port: ptr(int32(one(r, 53, 8080))), Protocol: ptr(r.protocol()),
		})
	}
	if r.in(6) {
		s.Annotations = map[string]string{WeightAnnotation: one(r, "0", "3", "7")}
	}
	if r.evil && r.in(6) {
		s.Annotations = map[string]string{WeightAnnotation: one(r, "", "-1", "1001", "one", "99999999999999999999")}
	}
	hinted := one(r, 0, 1, 2, 3)
	for range r.IntN(9) {
		e := discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.0.%d", 1+r.IntN(9))}}
		if s.AddressType == discoveryv1.AddressTypeIPv6 {
			e.Addresses[0] = fmt.Sprintf("fd10:1::%d", 1+r.IntN(9))
		}
		if !r.in(4) {
			e.NodeName = ptr(one(r, "node1", "node2", ""))
		}
		if r.in(2) {
			e.Zone = ptr(one(r, "z1", "z2", ""))
			e.TargetRef = &corev1.ObjectReference{Kind: one(r, "Pod", "Node"), Name: one(r, "web-7d-a", "web-7d-b", "db-0", "-", "")}
		}
		if !r.in(3) {
			e.Conditions = discoveryv1.EndpointConditions{
				Ready: ptr(!r.in(3)), Serving: ptr(!r.in(3)), Terminating: ptr(r.in(3)),
			}
		}
		if hinted > 0 && !r.in(6) {
			e.Hints = &discoveryv1.EndpointHints{}
			if hinted&1 != 0 {
				e.Hints.ForZones = []discoveryv1.ForZone{{Name: one(r, "z1", "z2", "")}}
			}
			if hinted&2 != 0 {
				e.Hints.ForNodes = []discoveryv1.ForNode{{Name: one(r, "node1", "node2")}}
			}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	if r.evil {
		r.spoilSlice(s)
	}
	return s
}

func (r chance) spoilSlice(s *discoveryv1.EndpointSlice) {
	text := one(r, "", "x", "0.0.0.0", "127.0.0.1", "fe80::1", "1.1.1.1", "fd99::1", "::ffff:1.1.1.1", "\x00", "ff02::1")
	switch r.IntN(7) {
	case 0:
		s.AddressType = discoveryv1.AddressType(one(r, text, "FQDN"))
	case 1:
		s.Labels = nil
	case 2:
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{text}}, discoveryv1.Endpoint{})
	case 3:
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{}, discoveryv1.EndpointPort{Name: &text},
			discoveryv1.EndpointPort{Name: &text, Port: ptr(one(r, int32(0), -1, 65536, 80))})
	case 4:
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: ptr("http"), Port: ptr(int32(80)), Protocol: ptr(corev1.Protocol(text))})
	case 5:
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{"10.1.0.1"}, NodeName: &text, Hints: &discoveryv1.EndpointHints{
			ForZones: []discoveryv1.ForZone{{Name: text}}, ForNodes: []discoveryv1.ForNode{{Name: text}},
		}})
	case 6:
		s.Ports = nil
	}
}

// step changes one object, of the API server and of a model.
func (o *objects) step(t testing.TB, r chance, m *Model) {
	switch r.IntN(30) {
	case 0:
		o.node = r.node()
		m.SetNode(o.node)
	case 1:
		o.config = r.config()
		if err := m.SetConfig(o.config); err != nil {
			t.Fatal(err)
		}
	case 2:
		c := r.serviceCIDR()
		o.cidrs[c.Name] = c
		m.SetServiceCIDR(c)
	case 3:
		name := one(r, "kubernetes", "more")
		delete(o.cidrs, name)
		m.DeleteServiceCIDR(name)
	case 4, 5:
		name := r.name()
		delete(o.services, name)
		m.DeleteService(name)
	case 6, 7:
		name := r.sliceName()
		delete(o.slices, name)
		m.DeleteSlice(name)
	case 8, 9, 10, 11, 12:
		name := r.name()
		o.services[name] = r.service(name)
		m.SetService(o.services[name])
	case 13:
		// As an informer does now and then: the same once more.
		for _, s := range o.services {
			m.SetService(s.DeepCopy())
		}
		for _, s := range o.slices {
			m.SetSlice(s.DeepCopy())
		}
	case 14:
		// Of a Service one thing changes, most likely.
		for _, name := range slices.SortedFunc(maps.Keys(o.services), compareNames) {
			if r.in(2) {
				s, other := o.services[name].DeepCopy(), r.service(name)
				switch r.IntN(7) {
				case 0:
					s.CreationTimestamp = other.CreationTimestamp
				case 1:
					s.Spec.LoadBalancerSourceRanges = other.Spec.LoadBalancerSourceRanges
				case 2:
					s.Spec.ExternalIPs = other.Spec.ExternalIPs
				case 3:
					s.Spec.ExternalTrafficPolicy, s.Spec.InternalTrafficPolicy = other.Spec.ExternalTrafficPolicy, other.Spec.InternalTrafficPolicy
				case 4:
					s.Spec.Ports = other.Spec.Ports
				case 5:
					s.Status = other.Status
				case 6:
					s.Annotations = other.Annotations
				}
				o.services[name] = s
				m.SetService(s)
				return
			}
		}
	case 15, 16:
		// Of a slice one endpoint changes.
		for _, name := range slices.SortedFunc(maps.Keys(o.slices), compareNames) {
			if s, other := o.slices[name].DeepCopy(), r.slice(name); r.in(2) && len(s.Endpoints) > 0 && len(other.Endpoints) > 0 {
				s.Endpoints[r.IntN(len(s.Endpoints))] = other.Endpoints[0]
				o.slices[name] = s
				m.SetSlice(s)
				return
			}
		}
	default:
		name := r.sliceName()
		o.slices[name] = r.slice(name)
		m.SetSlice(o.slices[name])
	}
}

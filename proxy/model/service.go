package model

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/internal/spell"
)

// serviceSpec is what the model keeps of a Service.
type serviceSpec struct {
	// created is in seconds; of two Services that claim the same, the older one has it.
	created       int64
	family        [Families]*familySpec
	ports         []portSpec
	affinity      uint32 // seconds
	healthCheck   uint16
	internalLocal bool
	externalLocal bool
	weights       []weightRule
	hash          Hash
	// rangesHash is that hash was asked for by nobody: ranges with session affinity need one.
	rangesHash bool
	ranges     []portRange
	resets     wish
	// even is that endpoints have no weights, whatever their slices say, for it has too many addresses and ports.
	even bool
}

// familySpec is a Service's addresses in one family.
type familySpec struct {
	clusterIP     netip.Addr
	externalIPs   []netip.Addr
	loadBalancers []netip.Addr
	restricted    bool
	sources       []netip.Prefix
}

// portSpec is a port of a Service.
type portSpec struct {
	name     unique.Handle[string]
	protocol Protocol
	port     uint16
	nodePort uint16
}

// The API server fills in three hours, and takes a day at most.
const (
	defaultAffinity = 3 * 60 * 60
	maxAffinity     = 24 * 60 * 60
)

// A Service has so many addresses and ports together: what an object of the API server's size could ask for otherwise
// (30,000 ports at 30,000 external IPs) is more than a node has memory for.
const maxFrontends = 1 << 17

// reduceService reads a Service; it is nil where there is nothing to be done for it.
func reduceService(s *corev1.Service) (*serviceSpec, []Problem) {
	if _, other := s.Labels[ServiceProxyNameLabel]; other {
		return nil, nil
	}
	if s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone || s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, nil
	}
	bad := problems{kind: "Service", object: types.NamespacedName{Namespace: s.Namespace, Name: s.Name}}
	spec := &serviceSpec{created: s.CreationTimestamp.Unix()}
	for f := range Family(Families) {
		if ip, ok := clusterIP(s, f, &bad); ok {
			spec.family[f] = &familySpec{clusterIP: ip}
		}
	}
	spec.ports = reducePorts(s, &bad)
	if len(spec.ports) == 0 || spec.family == [Families]*familySpec{} {
		return nil, bad.list
	}
	spec.readExternalIPs(s, &bad)
	spec.readLoadBalancers(s, &bad)
	if n := spec.frontends(); n > maxFrontends {
		bad.add("spec.ports", strconv.Itoa(n)+" addresses and ports", "are more than "+strconv.Itoa(maxFrontends)+"; the Service is left out")
		return nil, bad.list
	}
	spec.readSources(s, &bad)
	spec.readPolicies(s, &bad)
	spec.readAffinity(s, &bad)
	spec.readAnnotations(s, &bad)
	return spec, bad.list
}

// annotation is the field of an annotation.
func annotation(name string) string { return "metadata.annotations[" + name + "]" }

// AnnotationPrefix is that of annotations that are for berth.
const AnnotationPrefix = "berth.run/"

// known are those of a Service.
var known = []string{HashAnnotation, PortRangesAnnotation, ResetAnnotation, WeightsAnnotation}

// unknown tells of annotations for berth that it does not have: somebody meant another one, which is not there then.
func unknown(s *corev1.Service, bad *problems) {
	var names []string
	for name := range s.Annotations {
		if strings.HasPrefix(name, AnnotationPrefix) && !slices.Contains(known, name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		bad.add(annotation(name), s.Annotations[name], "is unknown, the nearest known is "+spell.Nearest(name, known)+"; it is as if it were not there")
	}
}

// drawn is what is done where no hash can be used.
const drawn = "endpoints are drawn"

// Weights and hashes multiply what the rules of a Service take: so many numbers for all addresses and ports together.
const maxNumbers = 1 << 20

var errTooManyFrontends = errors.New("addresses and ports of the Service are too many for it")

// readAnnotations reads what Kubernetes has no field for. A mistake there is as if it were not there.
func (spec *serviceSpec) readAnnotations(s *corev1.Service, bad *problems) {
	unknown(s, bad)
	frontends := spec.frontends()
	if text, ok := s.Annotations[ResetAnnotation]; ok {
		var err error
		if spec.resets, err = readWish(text); err != nil {
			bad.add(annotation(ResetAnnotation), text, err.Error()+"; it is as if it were not there")
		}
	}
	if text, ok := s.Annotations[PortRangesAnnotation]; ok {
		var err error
		spec.ranges, err = readRanges(text, spec.ports)
		if err == nil && len(spec.ranges)*spec.addresses() > maxRanges {
			err = errTooManyFrontends
		}
		if err != nil {
			spec.ranges = nil
			bad.add(annotation(PortRangesAnnotation), text, err.Error()+"; there are no ranges")
		}
		frontends += len(spec.ranges) * spec.addresses()
	}
	spec.even = frontends*fewShares > maxNumbers
	if text, ok := s.Annotations[WeightsAnnotation]; ok {
		var err error
		if spec.even {
			bad.add(annotation(WeightsAnnotation), text, errTooManyFrontends.Error()+"; all endpoints have the same weight")
		} else if spec.weights, err = readWeights(text); err != nil {
			bad.add(annotation(WeightsAnnotation), text, err.Error()+"; all endpoints have their slice's weight")
		}
	}
	if len(spec.ranges) > 0 && spec.affinity > 0 {
		// A client has to reach the same endpoint at all ports of a range, which clients are not remembered for.
		spec.hash, spec.rangesHash = Hash{BySource, defaultBuckets}, true
	}
	if text, ok := s.Annotations[HashAnnotation]; ok {
		var err error
		spec.rangesHash = false
		spec.hash, err = readHash(text)
		if err == nil && frontends*int(spec.hash.Buckets) > maxNumbers {
			spec.hash, err = Hash{}, errTooManyFrontends
		}
		if err != nil {
			bad.add(annotation(HashAnnotation), text, err.Error()+"; "+drawn)
		}
	}
}

// clusterIP is the cluster IP of a family. A Service without ipFamilies is from before dual stack.
func clusterIP(s *corev1.Service, f Family, bad *problems) (netip.Addr, bool) {
	want := corev1.IPv4Protocol
	if f == IPv6 {
		want = corev1.IPv6Protocol
	}
	field, value := "spec.clusterIP", s.Spec.ClusterIP
	if len(s.Spec.IPFamilies) > 0 {
		i := slices.Index(s.Spec.IPFamilies, want)
		if i < 0 || i >= len(s.Spec.ClusterIPs) {
			return netip.Addr{}, false
		}
		field, value = "spec.clusterIPs["+strconv.Itoa(i)+"]", s.Spec.ClusterIPs[i]
	}
	ip, ok := parseAddr(value)
	switch {
	case !ok:
		bad.add(field, value, "is no IP address; the Service is not served there")
	case len(s.Spec.IPFamilies) == 0 && FamilyOf(ip) != f:
		return ip, false
	case FamilyOf(ip) != f:
		bad.add(field, value, "is no "+f.String()+" address; the Service is not served in that family")
	case ip.IsUnspecified() || ip.IsLoopback():
		bad.add(field, value, special(ip)+"; the Service is not served there")
	default:
		return ip, true
	}
	return ip, false
}

// reducePorts reads the ports, in the order protocol, number, name.
func reducePorts(s *corev1.Service, bad *problems) []portSpec {
	type key struct {
		name     unique.Handle[string]
		protocol Protocol
	}
	seen := make(map[key]bool, len(s.Spec.Ports))
	ports := make([]portSpec, 0, len(s.Spec.Ports))
	for i, p := range s.Spec.Ports {
		proto, ok := parseProtocol(p.Protocol)
		switch {
		case !ok:
			bad.at("spec.ports", i, ".protocol", string(p.Protocol), "is none of TCP, UDP, SCTP; the port is left out")
			continue
		case p.Port < 1 || p.Port > 65535:
			bad.at("spec.ports", i, ".port", strconv.Itoa(int(p.Port)), "is not between 1 and 65535; the port is left out")
			continue
		}
		spec := portSpec{name: unique.Make(p.Name), protocol: proto, port: uint16(p.Port)}
		if seen[key{spec.name, proto}] {
			bad.at("spec.ports", i, ".name", p.Name, "is there twice; the later port is left out")
			continue
		}
		seen[key{spec.name, proto}] = true
		if p.NodePort < 0 || p.NodePort > 65535 {
			bad.at("spec.ports", i, ".nodePort", strconv.Itoa(int(p.NodePort)), "is not between 1 and 65535; there is no node port")
		} else {
			spec.nodePort = uint16(p.NodePort)
		}
		ports = append(ports, spec)
	}
	slices.SortStableFunc(ports, func(a, b portSpec) int {
		if a.protocol != b.protocol {
			return int(a.protocol) - int(b.protocol)
		}
		return int(a.port) - int(b.port)
	})
	return slices.Clip(ports)
}

// parseProtocol reads a protocol; the API server fills in TCP.
func parseProtocol(p corev1.Protocol) (Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
	}
	return 0, false
}

func (spec *serviceSpec) readExternalIPs(s *corev1.Service, bad *problems) {
	for i, text := range s.Spec.ExternalIPs {
		ip, ok := parseAddr(text)
		if !ok {
			bad.at("spec.externalIPs", i, "", text, "is no IP address; it is left out")
		} else if why := special(ip); why != "" {
			bad.at("spec.externalIPs", i, "", text, why+"; it is left out")
		} else if f := spec.family[FamilyOf(ip)]; f != nil {
			f.externalIPs = append(f.externalIPs, ip)
		}
	}
	for _, f := range spec.family {
		if f != nil {
			f.externalIPs = tidyAddrs(f.externalIPs)
		}
	}
}

// readLoadBalancers reads the addresses whose packets reach the node unchanged (KEP-1860); of others (ipMode Proxy) there is
// nothing to be done.
func (spec *serviceSpec) readLoadBalancers(s *corev1.Service, bad *problems) {
	for i, in := range s.Status.LoadBalancer.Ingress {
		if in.IP == "" {
			continue
		}
		if in.IPMode != nil && *in.IPMode != corev1.LoadBalancerIPModeVIP {
			if *in.IPMode != corev1.LoadBalancerIPModeProxy {
				bad.at("status.loadBalancer.ingress", i, ".ipMode", string(*in.IPMode), "is neither VIP nor Proxy; the address is left out")
			}
			continue
		}
		ip, ok := parseAddr(in.IP)
		if !ok {
			bad.at("status.loadBalancer.ingress", i, ".ip", in.IP, "is no IP address; it is left out")
		} else if ip.IsUnspecified() || ip.IsLoopback() {
			// The API server lets them pass. The first would be all addresses, the second those of the node's own programs.
			bad.at("status.loadBalancer.ingress", i, ".ip", in.IP, special(ip)+"; it is left out")
		} else if f := spec.family[FamilyOf(ip)]; f != nil {
			f.loadBalancers = append(f.loadBalancers, ip)
		}
	}
	for _, f := range spec.family {
		if f != nil {
			f.loadBalancers = tidyAddrs(f.loadBalancers)
		}
	}
}

// readSources reads who may send to the load balancers. A range that cannot be read lets nobody in, in either family: left
// out, it could be the only one, and then all may.
func (spec *serviceSpec) readSources(s *corev1.Service, bad *problems) {
	var lists [Families][]netip.Prefix
	var all [Families]bool
	unread := false
	for i, text := range s.Spec.LoadBalancerSourceRanges {
		if blank(text) {
			continue
		}
		p, ok := parsePrefix(strings.TrimSpace(text))
		if !ok {
			unread = true
			bad.at("spec.loadBalancerSourceRanges", i, "", text, "is no CIDR; nobody is let in by it")
			continue
		}
		f := FamilyOf(p.Addr())
		all[f] = all[f] || whole(p)
		lists[f] = append(lists[f], p)
	}
	for f, fs := range spec.family {
		if fs != nil && !all[f] && (unread || len(lists[f]) > 0) {
			fs.restricted, fs.sources = true, tidy(lists[f])
		}
	}
}

func (spec *serviceSpec) readPolicies(s *corev1.Service, bad *problems) {
	if p := s.Spec.InternalTrafficPolicy; p != nil {
		spec.internalLocal = *p == corev1.ServiceInternalTrafficPolicyLocal
		if !spec.internalLocal && *p != corev1.ServiceInternalTrafficPolicyCluster {
			bad.add("spec.internalTrafficPolicy", string(*p), "is neither Cluster nor Local; it is taken for Cluster")
		}
	}
	reachable := s.Spec.Type == corev1.ServiceTypeLoadBalancer || s.Spec.Type == corev1.ServiceTypeNodePort ||
		s.Spec.Type == corev1.ServiceTypeClusterIP && len(s.Spec.ExternalIPs) > 0
	switch s.Spec.Type {
	case corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeNodePort, corev1.ServiceTypeClusterIP, "":
	default:
		bad.add("spec.type", string(s.Spec.Type), "is not known; it is taken for ClusterIP")
	}
	switch p := s.Spec.ExternalTrafficPolicy; p {
	case corev1.ServiceExternalTrafficPolicyLocal:
		spec.externalLocal = reachable
	case corev1.ServiceExternalTrafficPolicyCluster, "":
	default:
		bad.add("spec.externalTrafficPolicy", string(p), "is neither Cluster nor Local; it is taken for Cluster")
	}
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer || !spec.externalLocal {
		return
	}
	switch p := s.Spec.HealthCheckNodePort; {
	case p < 1 || p > 65535:
		bad.add("spec.healthCheckNodePort", strconv.Itoa(int(p)), "is not between 1 and 65535; there is no health check")
	default:
		spec.healthCheck = uint16(p)
	}
}

func (spec *serviceSpec) readAffinity(s *corev1.Service, bad *problems) {
	switch s.Spec.SessionAffinity {
	case corev1.ServiceAffinityNone, "":
		return
	case corev1.ServiceAffinityClientIP:
	default:
		bad.add("spec.sessionAffinity", string(s.Spec.SessionAffinity), "is neither None nor ClientIP; it is taken for None")
		return
	}
	const field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
	spec.affinity = defaultAffinity
	c := s.Spec.SessionAffinityConfig
	switch {
	case c == nil || c.ClientIP == nil || c.ClientIP.TimeoutSeconds == nil:
		bad.add(field, "", "is not there; it is taken for "+strconv.Itoa(defaultAffinity))
	case *c.ClientIP.TimeoutSeconds < 1 || *c.ClientIP.TimeoutSeconds > maxAffinity:
		bad.add(field, strconv.Itoa(int(*c.ClientIP.TimeoutSeconds)),
			"is not between 1 and "+strconv.Itoa(maxAffinity)+"; it is taken for "+strconv.Itoa(defaultAffinity))
	default:
		spec.affinity = uint32(*c.ClientIP.TimeoutSeconds)
	}
}

// families is in how many families it is served.
func (spec *serviceSpec) families(c *circumstances) int {
	n := 0
	for f, fs := range spec.family {
		if fs != nil && c.enabled[f] {
			n++
		}
	}
	return n
}

// frontends is how many addresses and ports there are at most.
func (spec *serviceSpec) frontends() int {
	n := 0
	for _, f := range spec.family {
		if f != nil {
			n += len(spec.ports) * (2 + len(f.externalIPs) + len(f.loadBalancers))
		}
	}
	return n
}

// addresses is how many there are, but for node ports.
func (spec *serviceSpec) addresses() int {
	n := 0
	for _, f := range spec.family {
		if f != nil {
			n += 1 + len(f.externalIPs) + len(f.loadBalancers)
		}
	}
	return n
}

// equal is whether two Services are the same to the model.
func (spec *serviceSpec) equal(o *serviceSpec) bool {
	if spec == nil || o == nil {
		return spec == o
	}
	for f := range Families {
		a, b := spec.family[f], o.family[f]
		if (a == nil) != (b == nil) {
			return false
		}
		if a == nil {
			continue
		}
		if a.clusterIP != b.clusterIP || a.restricted != b.restricted || !slices.Equal(a.externalIPs, b.externalIPs) ||
			!slices.Equal(a.loadBalancers, b.loadBalancers) || !slices.Equal(a.sources, b.sources) {
			return false
		}
	}
	return spec.created == o.created && spec.hash == o.hash && spec.resets == o.resets && spec.even == o.even && spec.affinity == o.affinity && spec.healthCheck == o.healthCheck &&
		spec.internalLocal == o.internalLocal && spec.externalLocal == o.externalLocal && slices.Equal(spec.ports, o.ports) &&
		slices.Equal(spec.weights, o.weights) && slices.Equal(spec.ranges, o.ranges)
}

package model

import (
	"net/netip"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// circumstances is all that a Service's frontends depend on beside itself and its slices. It is comparable.
type circumstances struct {
	enabled       [Families]bool
	detects       [Families]bool
	nodeIP        [Families]netip.Addr
	zone          string
	masqueradeAll bool
	noExternalIPs bool
	noHash        bool
	noRanges      bool
	resets        bool
	noResets      bool
	// nodeIPs are all addresses of the node, each between spaces.
	nodeIPs string
}

// scratch is memory that is used again for each Service.
type scratch struct {
	sources    []source
	candidates []candidate
}

// build computes what is to be done for a Service, as if there were no other. What it was before, if anything, lends memory
// that has not changed.
func build(name types.NamespacedName, spec *serviceSpec, from []*slice, c *circumstances, old *Service, tmp *scratch) (*Service, error) {
	if spec == nil {
		return nil, nil
	}
	s := &Service{Name: name}
	was, room := indexPorts(old), maxEndpoints
	sources := indexSlices(tmp.sources, from)
	tmp.sources = sources.list
	sources.weights, sources.even = spec.weights, spec.even
	for f := range Family(Families) {
		fs := spec.family[f]
		if fs == nil || !c.enabled[f] {
			continue
		}
		if s.Ports == nil {
			s.Ports = make([]Port, 0, len(spec.ports)*spec.families(c))
		}
		s.ClusterIPs = append(s.ClusterIPs, fs.clusterIP)
		for _, p := range spec.ports {
			key := portKey{f, p.protocol, p.name}
			tmp.candidates = gather(tmp.candidates, &sources, key)
			if room -= len(tmp.candidates); room < 0 {
				return nil, errTooManyEndpoints
			}
			s.Ports = append(s.Ports, buildPort(spec, fs, p, f, tmp.candidates, c, was.find(key)))
		}
		if spec.healthCheck != 0 {
			s.HealthCheck.Port = spec.healthCheck
			s.HealthCheck.Endpoints[f] = localReady(&tmp.candidates, &sources, f)
		}
	}
	if len(s.Ports) == 0 {
		return nil, nil
	}
	return s, nil
}

func buildPort(spec *serviceSpec, fs *familySpec, p portSpec, f Family, all []candidate, c *circumstances, old *Port) Port {
	external := fs.externalIPs
	if c.noExternalIPs {
		external = nil
	}
	reachable := p.nodePort != 0 || len(fs.loadBalancers) > 0 || len(external) > 0
	// Packets of pods and of the node take all endpoints, whatever externalTrafficPolicy says: so both are used with Local.
	u := usableEndpoints(all, !spec.internalLocal || reachable, spec.internalLocal || spec.externalLocal && reachable, c.zone, old)
	out := Port{
		Family: f, Protocol: p.protocol, Name: p.name.Value(), Affinity: time.Duration(spec.affinity) * time.Second,
		Cluster: u.cluster, Local: u.local,
	}
	if h := spec.hashAt(c); h.fits(u.cluster) && h.fits(u.local) {
		out.Hash = h
	}
	if p.protocol == UDP {
		if out.Serving = serving(all, old); slices.Equal(out.Serving, out.Cluster) {
			out.Serving = out.Cluster
		}
	}
	if p.protocol == TCP && spec.resets.or(c.resets) && !c.noResets {
		out.Resets = true
		if out.Members = members(all, old); slices.Equal(out.Members, out.Cluster) {
			out.Members = out.Cluster
		}
	}
	inside := Frontend{
		Kind: ClusterIP, Addr: netip.AddrPortFrom(fs.clusterIP, p.port), Masquerade: Never,
	}
	inside.Action, inside.Policy = u.act(spec.internalLocal)
	switch {
	case c.masqueradeAll:
		inside.Masquerade = Always
	case c.detects[f]:
		// Somebody outside may have a route for cluster IPs to this node, and answers have to come back through it.
		inside.Masquerade = OffCluster
	}
	outside := Frontend{Masquerade: Never}
	outside.Action, outside.Policy = u.act(spec.externalLocal)
	if spec.externalLocal {
		outside.ShortCircuit = u.any
	} else {
		// The endpoint may be on another node.
		outside.Masquerade = Always
	}
	out.Frontends = make([]Frontend, 0, 1+len(fs.loadBalancers)+len(external)+min(1, int(p.nodePort)))
	out.addFrontends(inside, outside, fs, external, p, c.nodeIP[f])
	out.Ranges, _ = spec.rangesOf(&out, c)
	return out
}

// act is what becomes of packets under a traffic policy.
func (u *usable) act(local bool) (Action, Policy) {
	switch {
	case !u.any && local:
		return Reject, Local
	case !u.any:
		return Reject, Cluster
	case !local:
		return Forward, Cluster
	case len(u.local) == 0:
		return Drop, Local
	}
	return Forward, Local
}

// addFrontends lists the addresses, in order. One that is there as several kinds is so once: as a cluster IP it has the
// stronger claim on the address, as an external one it says what to do, and as a load balancer who may.
func (p *Port) addFrontends(inside, outside Frontend, fs *familySpec, external []netip.Addr, ps portSpec, nodeIP netip.Addr) {
	restricted := outside
	if fs.restricted {
		restricted.Restricted, restricted.Sources = true, fs.allowed(nodeIP)
	}
	if holds(fs.loadBalancers, fs.clusterIP) {
		restricted.asClusterIP(&inside)
	} else if holds(external, fs.clusterIP) {
		outside.asClusterIP(&inside)
	}
	p.Frontends = append(p.Frontends, inside)
	add := func(f Frontend, kind Kind, ips []netip.Addr, but []netip.Addr) {
		for _, ip := range ips {
			if ip != fs.clusterIP && !holds(but, ip) {
				f.Kind, f.Addr = kind, netip.AddrPortFrom(ip, ps.port)
				p.Frontends = append(p.Frontends, f)
			}
		}
	}
	add(restricted, LoadBalancer, fs.loadBalancers, nil)
	add(outside, ExternalIP, external, fs.loadBalancers)
	if ps.nodePort != 0 {
		// Who may send to a load balancer may not be asked of a node port: kube-proxy never did.
		outside.Kind, outside.Addr = NodePort, netip.AddrPortFrom(unspecified(p.Family), ps.nodePort)
		p.Frontends = append(p.Frontends, outside)
	}
}

// asClusterIP makes of the frontend of a cluster IP one of an external address that is the same.
func (f Frontend) asClusterIP(inside *Frontend) {
	f.Kind, f.Addr, f.Masquerade = ClusterIP, inside.Addr, max(f.Masquerade, inside.Masquerade)
	*inside = f
}

// allowed is who may send to the load balancers. A node that may does so with the load balancer's address for a source, where
// that is bound to the node.
func (fs *familySpec) allowed(nodeIP netip.Addr) []netip.Prefix {
	if !within(fs.sources, nodeIP) {
		return fs.sources
	}
	out := slices.Clone(fs.sources)
	for _, ip := range fs.loadBalancers {
		out = append(out, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return tidy(out)
}

// equal is whether both say the same.
func (s *Service) equal(o *Service) bool {
	if s == nil || o == nil || s == o {
		return s == o
	}
	return s.HealthCheck == o.HealthCheck && slices.Equal(s.ClusterIPs, o.ClusterIPs) &&
		slices.EqualFunc(s.Ports, o.Ports, func(a, b Port) bool { return a.equal(&b) })
}

func (p *Port) equal(o *Port) bool {
	return p.Family == o.Family && p.Protocol == o.Protocol && p.Name == o.Name && p.Affinity == o.Affinity && p.Hash == o.Hash &&
		slices.Equal(p.Cluster, o.Cluster) && slices.Equal(p.Local, o.Local) && slices.Equal(p.Serving, o.Serving) &&
		p.Resets == o.Resets && slices.Equal(p.Members, o.Members) &&
		slices.EqualFunc(p.Frontends, o.Frontends, Frontend.equal) && slices.EqualFunc(p.Ranges, o.Ranges, Frontend.equal)
}

func (f Frontend) equal(o Frontend) bool {
	return f.Kind == o.Kind && f.Addr == o.Addr && f.Last == o.Last && f.Action == o.Action && f.Policy == o.Policy && f.Masquerade == o.Masquerade &&
		f.ShortCircuit == o.ShortCircuit && f.Restricted == o.Restricted && slices.Equal(f.Sources, o.Sources)
}

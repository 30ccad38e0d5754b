package model

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"
)

// Packet is the first packet of a connection, as it reaches the node or leaves a program of it.
type Packet struct {
	Src, Dst netip.Addr
	Protocol Protocol
	// Port is the destination's. SrcPort is the source's; 0 if it is not known.
	Port, SrcPort uint16
	// Interface is what it came in by; empty for a packet that a program on the node, in its network namespace, sends.
	Interface string
	// SrcLocal and DstLocal are whether the node has the address itself (fib saddr type local, fib daddr type local).
	SrcLocal, DstLocal bool
}

// Verdict is what becomes of a Packet.
type Verdict struct {
	Action Action
	// Reason says why, for people.
	Reason Reason
	// Service and Port are whose packet it is; none for addresses that no Service has.
	Service types.NamespacedName
	Port    *Port
	// Frontend is the address that it was sent to.
	Frontend *Frontend
	// Endpoints are where it may be sent to, with the shares that Shares says unless session affinity knows the source; none but
	// with Forward. It is one where a hash says it, and none but that is known.
	Endpoints []Endpoint
	// Masquerade is whether the source is replaced, whatever the endpoint.
	Masquerade bool

	src      netip.Addr
	protocol Protocol
	hairpins map[Hairpin]int32
}

// Reason is why a packet is treated so.
type Reason string

// The reasons.
const (
	NoService    Reason = "no Service has the address"
	SourceRanges Reason = "the source is in none of loadBalancerSourceRanges"
	NoEndpoints  Reason = "the Service has no endpoint anywhere"
	NoLocal      Reason = "the traffic policy is Local, and the Service has endpoints on other nodes only"
	UnknownPort  Reason = "the Service has no such port"
	Unallocated  Reason = "no Service has the cluster IP"
	ByPolicy     Reason = "the traffic policy's endpoints"
	FromPod      Reason = "all endpoints, since a pod sends it: the external traffic policy Local is for packets from outside"
	FromNode     Reason = "all endpoints, since the node sends it: the external traffic policy Local is for packets from outside"
)

// Masquerades is whether the source is replaced if the packet is sent to that endpoint. It asks the State, as of now. An endpoint that
// another Service has on this node is on this node: a kernel has one set of them.
func (v *Verdict) Masquerades(e Endpoint) bool {
	return v.Action == Forward && (v.Masquerade || e.Addr == v.src && (v.reaches(e.AddrPort()) || v.reaches(netip.AddrPortFrom(e.Addr, 0))))
}

func (v *Verdict) reaches(itself netip.AddrPort) bool {
	return v.hairpins[Hairpin{v.protocol, itself}] > 0
}

// Decide says what becomes of a packet in a State.
func Decide(s *State, p Packet) Verdict {
	p.Src, p.Dst = p.Src.Unmap(), p.Dst.Unmap()
	v := Verdict{Reason: NoService, src: p.Src, protocol: p.Protocol, hairpins: s.hairpins}
	if !p.Dst.IsValid() {
		return v
	}
	g := &s.globals.Family[FamilyOf(p.Dst)]
	svc, port, f := s.Lookup(p.Protocol, netip.AddrPortFrom(p.Dst, p.Port))
	if f == nil && p.DstLocal && g.NodePorts.Match(p.Dst) {
		svc, port, f = s.Lookup(p.Protocol, netip.AddrPortFrom(unspecified(FamilyOf(p.Dst)), p.Port))
	}
	if f != nil {
		v.Service, v.Port, v.Frontend = svc.Name, port, f
		v.decide(g, &p)
		v.choose(&p)
		return v
	}
	// Packets for the node itself are left to it.
	if p.DstLocal && p.Interface != "" {
		return v
	}
	if s.IsClusterIP(p.Dst) {
		v.Action, v.Reason = Reject, UnknownPort
	} else if within(g.ServiceCIDRs, p.Dst) {
		v.Action, v.Reason = Drop, Unallocated
	}
	return v
}

// decide is for a packet to a frontend.
func (v *Verdict) decide(g *FamilyGlobals, p *Packet) {
	f := v.Frontend
	pod := g.Detector.Pod(p.Src, p.Interface)
	switch {
	case f.Restricted && !within(f.Sources, p.Src):
		v.Action, v.Reason = Drop, SourceRanges
	case f.ShortCircuit && pod:
		v.Action, v.Reason, v.Endpoints = Forward, FromPod, v.Port.Cluster
		v.Masquerade = f.Masquerade == Always
	case f.ShortCircuit && p.SrcLocal:
		v.Action, v.Reason, v.Endpoints, v.Masquerade = Forward, FromNode, v.Port.Cluster, true
	case f.Action == Reject:
		v.Action, v.Reason = Reject, NoEndpoints
	case f.Action == Drop:
		v.Action, v.Reason = Drop, NoLocal
	default:
		v.Action, v.Reason, v.Endpoints = Forward, ByPolicy, v.Port.Endpoints(f)
		v.Masquerade = f.Masquerade == Always || f.Masquerade == OffCluster && !pod
	}
}

// choose leaves the endpoint alone that a hash says. What is sent to a range keeps its port.
func (v *Verdict) choose(p *Packet) {
	h, ranged := v.Port.Hash, v.Frontend.Last != 0
	if ranged && v.Action == Forward {
		v.Endpoints = slices.Clone(v.Endpoints)
		for i := range v.Endpoints {
			v.Endpoints[i].Port = p.Port
		}
	}
	if v.Port.Affinity > 0 && !ranged || h.By == BySourcePort && p.SrcPort == 0 {
		return
	}
	if table := h.Table(v.Endpoints); table != nil {
		i := table[h.Bucket(p.Src, p.SrcPort)]
		v.Endpoints = v.Endpoints[i : i+1]
	}
}

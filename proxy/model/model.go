package model

import (
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Family is a family of addresses. It indexes arrays that have one item for each.
type Family uint8

// The two families, and how many there are.
const (
	IPv4 Family = iota
	IPv6
	Families = 2
)

// Protocol is a transport protocol by its number (IANA), as in meta l4proto.
type Protocol uint8

// The protocols that Services know.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// Kind is what sort of address a Frontend has. A smaller one precedes a larger one where two Services claim the same address
// and port: the API server gives out cluster IPs, a controller of load balancers their addresses, while external IPs are
// what a user of a namespace has written down (CVE-2020-8554).
type Kind uint8

// The kinds of addresses.
const (
	ClusterIP Kind = iota
	LoadBalancer
	ExternalIP
	NodePort
)

// Action is what becomes of a packet.
type Action uint8

// What can become of a packet.
const (
	// Pass leaves it alone: it is no Service's.
	Pass Action = iota
	// Forward sends it to an endpoint, each with the share that Shares says.
	Forward
	// Reject answers it with an error: the Service has no endpoint anywhere.
	Reject
	// Drop says nothing: the policy allows local endpoints only and there are some elsewhere alone; a source that may not; an
	// address for Services that none has.
	Drop
)

// Policy is which of a Port's endpoints a packet may be sent to.
type Policy uint8

// The policies of internalTrafficPolicy and externalTrafficPolicy.
const (
	Cluster Policy = iota
	Local
)

// Masquerade is which packets get the node's address for a source. Whatever it says, a packet that an endpoint of this node
// sends to its own Service and gets back is masqueraded as well (hairpin; Hairpin).
type Masquerade uint8

// Which packets are masqueraded.
const (
	// Never: none.
	Never Masquerade = iota
	// OffCluster: those whose source the Detector of the family does not take for a pod of the node or the cluster.
	OffCluster
	// Always: all.
	Always
)

// Endpoint is one address that packets are sent to. It is comparable; its order is by address, then port.
type Endpoint struct {
	Addr netip.Addr
	Port uint16
	// Local is whether it runs on this node.
	Local bool
	// Weight is its share of new connections beside the others of a list; 0 in lists of endpoints that all have the same
	// (WeightsAnnotation, WeightAnnotation; Shares).
	Weight uint16
}

// AddrPort is the endpoint's address and port.
func (e Endpoint) AddrPort() netip.AddrPort { return netip.AddrPortFrom(e.Addr, e.Port) }

// Frontend is one address and port that a Port of a Service answers at.
type Frontend struct {
	Kind Kind
	// Addr is the address and port that a packet is sent to. That of a node port has the family's unspecified address (0.0.0.0
	// or ::) and stands for all that NodePortAddresses of the family matches; an exact address of another Frontend precedes it.
	Addr netip.AddrPort
	// Last is the last port of a range that begins with Addr's (PortRangesAnnotation); 0 where there is one port, as in all
	// Frontends of a Port. What is sent to a range keeps its port, whatever that of the endpoint is, and session affinity does not
	// count for it.
	Last uint16
	// Action is Forward, Reject or Drop; Forward sends packets to the endpoints of Policy, of which there is one at least.
	Action Action
	Policy Policy
	// Masquerade is for the packets that Action forwards.
	Masquerade Masquerade
	// ShortCircuit is set for externalTrafficPolicy Local where the Service has endpoints anywhere. It goes before Action and
	// Masquerade, never before Sources: what the family's Detector takes for a pod's packet goes to the Cluster endpoints with
	// its source; else, what has an address of the node for a source goes there masqueraded.
	ShortCircuit bool
	// Restricted is set where only Sources may send; others are dropped, whatever Action is. Only load balancers have it.
	Restricted bool
	// Sources are prefixes of the family, masked, sorted, without repetition. They may overlap, and be none at all: nobody may.
	Sources []netip.Prefix
}

// Port is one port of a Service in one family. Session affinity and counters are for a Port, whatever its Frontends.
type Port struct {
	Family   Family
	Protocol Protocol
	// Name is the name of the Service's port, empty if it has none.
	Name string
	// Affinity is for how long after its last new connection a client's address is sent to the same endpoint again, as long as
	// that is among the endpoints that the packet may be sent to; zero without session affinity. It is remembered by source
	// address for all Frontends together.
	Affinity time.Duration
	// Hash is how one of the endpoints is chosen for a new connection, whose client session affinity does not know.
	Hash Hash
	// Cluster and Local are the endpoints for each Policy, sorted, each once. Local is only filled where a Frontend may use it,
	// Cluster too. Where what they hold is the same, they may be the same memory.
	Cluster, Local []Endpoint
	// Serving is, for UDP, all endpoints that serve, terminating or not, of this node or not: entries of conntrack that lead
	// from one of Frontends to anywhere else are stale. It is nil for other protocols.
	Serving []Endpoint
	// Resets is, for TCP, whether connections that lead from one of Frontends to anywhere but Members are to be reset
	// (ResetAnnotation). Members are all endpoints that there are then, whatever their conditions; without Resets it is nil.
	Resets  bool
	Members []Endpoint
	// Frontends are sorted by Kind and address. Those that another Service holds (Problem) are left out.
	Frontends []Frontend
	// Ranges are Frontends of more ports than one, sorted by first port, Kind and address. A Frontend of one port precedes them,
	// which is one of the same Service; no other has any in them, nor do they overlap.
	Ranges []Frontend
}

// Endpoints are what the packets that Action forwards are sent to.
func (p *Port) Endpoints(f *Frontend) []Endpoint {
	switch {
	case f.Action != Forward:
		return nil
	case f.Policy == Local:
		return p.Local
	}
	return p.Cluster
}

// HealthCheck is what a Service's health check node port answers with (spec.healthCheckNodePort).
type HealthCheck struct {
	// Port is where to listen, in the families that the Service has Ports of; 0 without a health check.
	Port uint16
	// Endpoints is how many addresses of ready endpoints this node has, by family, whatever their ports.
	Endpoints [Families]int
}

// Service is what is to be done for one Service. It is never changed once it is handed out.
type Service struct {
	Name types.NamespacedName
	// Ports are in the order family, protocol, number, name.
	Ports []Port
	// ClusterIPs are the cluster IPs of Ports, each of one Service of a State alone: packets to other ports of them are
	// rejected (where they are forwarded or sent by the node).
	ClusterIPs []netip.Addr
	// HealthCheck has Port 0 without one.
	HealthCheck HealthCheck
}

// Hairpin is an endpoint of this node that packets are sent to by some Port: if such a packet's source is the endpoint's own
// address, it has to be masqueraded, or the answer would not come back through the node.
//
// Port 0 stands for all ports, of an endpoint that ranges of ports are sent to.
type Hairpin struct {
	Protocol Protocol
	Endpoint netip.AddrPort
}

// Detector tells packets of pods from others (kube-proxy's detectLocalMode). The zero value takes none for a pod's, and then
// OffCluster is on no Frontend.
type Detector struct {
	// CIDR, if it is valid: the source address is in it (ClusterCIDR, NodeCIDR).
	CIDR netip.Prefix
	// Interface, if it is not empty: the packet came in by it (BridgeInterface).
	Interface string
	// InterfacePrefix, if it is not empty: the packet came in by an interface whose name begins so (InterfaceNamePrefix).
	InterfacePrefix string
}

// NodePortAddresses are the addresses that node ports are served at: local addresses of the node (fib daddr type local) that
// are in one of Prefixes.
type NodePortAddresses struct {
	// Prefixes are masked and sorted, without repetition. One of length 0 matches all, and is alone then.
	Prefixes []netip.Prefix
	// Loopback is whether loopback addresses in Prefixes are served, too. If not, they never are.
	Loopback bool
}

// FamilyGlobals is what goes for all Services in one family.
type FamilyGlobals struct {
	// Enabled is whether the node does the family at all. Without it there are no Ports of it.
	Enabled   bool
	Detector  Detector
	NodePorts NodePortAddresses
	// ServiceCIDRs are where cluster IPs are given out, masked, sorted, without repetition: packets to an address there that is
	// in no Service's ClusterIPs are dropped (where they are forwarded or sent by the node).
	ServiceCIDRs []netip.Prefix
}

// Globals is what goes for all Services.
type Globals struct {
	Family [Families]FamilyGlobals
}

// Change is a Service that differs from the last Commit.
type Change struct {
	Name types.NamespacedName
	// Old is nil for a Service that was not there, New for one that is no more. Both are as Service describes, so that each
	// address and port, and each cluster IP, is in one Old and one New of a Delta at most, though they may be those of
	// different Services: remove what is in any Old and in no New first, or put each key in one place.
	Old, New *Service
}

// Delta is all that differs from the last Commit.
type Delta struct {
	// Services are sorted by name.
	Services []Change
	// Globals is nil if it is as it was.
	Globals *Globals
	// HairpinAdded and HairpinRemoved are sorted.
	HairpinAdded, HairpinRemoved []Hairpin
	// Problems are those of objects that were set, or of Services whose addresses another holds, since the last Commit, that
	// had not been told of before.
	Problems []Problem
}

// Empty is whether there is nothing to be programmed. There may be Problems.
func (d *Delta) Empty() bool {
	return len(d.Services) == 0 && d.Globals == nil && len(d.HairpinAdded) == 0 && len(d.HairpinRemoved) == 0
}

// Problem is a part of an object that was left out.
type Problem struct {
	// Kind and Object name it: Service, EndpointSlice, ServiceCIDR or Node.
	Kind   string
	Object types.NamespacedName
	// Field is its path in the object, and Value what is there, shortened.
	Field, Value string
	// Reason is what is wrong with it, and what is done instead.
	Reason string
}

// Mode is how packets of pods are told from others.
type Mode string

// The modes of kube-proxy's detectLocalMode.
const (
	ModeNone                Mode = ""
	ModeClusterCIDR         Mode = "ClusterCIDR"
	ModeNodeCIDR            Mode = "NodeCIDR"
	ModeBridgeInterface     Mode = "BridgeInterface"
	ModeInterfaceNamePrefix Mode = "InterfaceNamePrefix"
)

// Config is what the model needs of kube-proxy's configuration.
type Config struct {
	// NodeName is the name of the Node this is: endpoints that have it are local. It cannot be changed.
	NodeName string
	// IPv4 and IPv6 are whether the node does the family.
	IPv4, IPv6 bool
	// BindAddress, if it is valid and not unspecified, is the node's address of its family instead of the Node's.
	BindAddress netip.Addr
	// MasqueradeAll masquerades all packets to cluster IPs.
	MasqueradeAll bool
	// DetectLocal is the mode; of the three after it, the one that belongs to it is read. Of ClusterCIDRs it is the first of
	// each family, as in kube-proxy; NodeCIDR takes the Node's spec.podCIDRs.
	DetectLocal         Mode
	ClusterCIDRs        []string
	BridgeInterface     string
	InterfaceNamePrefix string
	// NodePortAddresses are CIDRs, primary (the node's addresses), localhost or all. Without any of a family it is all of it.
	NodePortAddresses []string
	// LoopbackNodePorts serves node ports at 127.0.0.0/8 where NodePortAddresses has it, as kube-proxy's iptables mode does.
	LoopbackNodePorts bool
	// NoRanges is that there are no ranges of ports: Services that ask for them are told of.
	NoRanges bool
	// Resets is ResetAnnotation of Services that do not have it. NoResets is that nothing can be reset: Services that ask for it
	// are told of.
	Resets, NoResets bool
	// NoHash is that endpoints cannot be chosen by a hash: Services that ask for it are told of, and drawn for.
	NoHash bool
	// NoExternalIPs takes no notice of spec.externalIPs (the feature gate AllowServiceExternalIPs, turned off).
	NoExternalIPs bool
}

// ServiceProxyNameLabel is on Services that another proxy looks after; they are as good as absent.
const ServiceProxyNameLabel = "service.kubernetes.io/service-proxy-name"

// HeadlessLabel is on EndpointSlices of headless Services; they are as good as absent.
const HeadlessLabel = corev1.IsHeadlessService

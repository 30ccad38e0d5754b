package routes

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/berth-run/berth/network"
)

// Mode says how other nodes are reached.
type Mode string

// The modes.
const (
	// Off: not at all.
	Off Mode = "off"
	// HostGateway: as the next hop, those in a subnet of this node's.
	HostGateway Mode = "host-gw"
	// VXLAN: through the tunnel.
	VXLAN Mode = "vxlan"
	// Auto: those in a subnet of this node's as the next hop, the others through the tunnel.
	Auto Mode = "auto"
)

// Modes are all of them.
func Modes() []string { return []string{string(Off), string(HostGateway), string(VXLAN), string(Auto)} }

// Tunnelled says whether pods must leave room in their packets for the tunnel's.
func (m Mode) Tunnelled() bool { return m == VXLAN || m == Auto }

// What others of the same kind do not have: flannel's identifier is 1 on port 8472, Calico's 4096 and Docker's from 4096 on on
// port 4789.
const (
	// Protocol is that of the routes (rtm_protocol); iproute2 shows "proto 98".
	Protocol = 98
	// VNI is the VXLAN network identifier.
	VNI = 48711
	// Port is the one that IANA has given to VXLAN: network cards that compute checksums and segments of what is inside
	// know it without being told.
	Port = 4789
	// Tunnel4 and Tunnel6 are the links, for nodes that reach each other by IPv4, and by IPv6 alone: a VXLAN link has one
	// family.
	Tunnel4 = "berth.vxlan"
	// Tunnel6 is that of IPv6.
	Tunnel6 = "berth.vxlan6"
)

// Links are the names of the tunnels' links.
func Links() []string { return []string{Tunnel4, Tunnel6} }

// Link is a link of this node that is up.
type Link struct {
	Index int
	Name  string
	MTU   int
	// Addrs are its addresses with the lengths of their subnets.
	Addrs []netip.Prefix
}

// Input is all that routes are computed from.
type Input struct {
	Mode Mode
	// Self is the name of this node's object.
	Self string
	// PodCIDRs are those that this node's pods have their addresses of.
	PodCIDRs []netip.Prefix
	Nodes    []Node
	// Links are those of this node, without its pods' and the tunnels.
	Links []Link
	// Keep are addresses that no range may take away, and what they are: next hops, the API server.
	Keep map[netip.Addr]string
}

// Plan is what should be.
type Plan struct {
	Tunnels []Tunnel
	Routes  []Route
	// Own are the ranges of this node's pods, Others those that routes lead to: between them nothing is masqueraded.
	Own, Others []netip.Prefix
	// Nodes are the addresses of all nodes: nobody else sends through the tunnel.
	Nodes []netip.Addr
	// LeftOut is what of the Node objects cannot be right, or cannot be reached.
	LeftOut []LeftOut
}

// Tunnel is a VXLAN link.
type Tunnel struct {
	Name  string
	Local netip.Addr
	MAC   net.HardwareAddr
	MTU   int
	// Addrs are what the node itself sends from.
	Addrs []netip.Addr
	Peers []Peer
}

// Peer is a node at the other end.
type Peer struct {
	Node netip.Addr
	MAC  net.HardwareAddr
	// Hops are the next hops of routes that stand for MAC.
	Hops []netip.Addr
}

// Route leads to pods of one node.
type Route struct {
	Dst netip.Prefix
	Via netip.Addr
	// Link is the tunnel's name; "" is the link whose Index is LinkIndex.
	Link      string
	LinkIndex int
	// Src is what the node itself sends from, if valid.
	Src netip.Addr
}

// errWaiting is of what cannot be computed yet, or not at present.
var errWaiting = errors.New("node routes wait")

// Compute is the plan. Its error says what it waits for.
func Compute(in Input) (*Plan, error) {
	all, out := members(in.Self, in.Nodes, reserved(in.Links, in.Keep))
	p := &planner{Input: in, plan: Plan{Own: in.PodCIDRs, LeftOut: out}}
	i := slices.IndexFunc(all, func(m member) bool { return m.name == in.Self })
	switch {
	case i < 0:
		return nil, fmt.Errorf("%w for Node object %s, this node's (--node-name)", errWaiting, in.Self)
	case len(all[i].podCIDRs) == 0:
		return nil, fmt.Errorf("%w for spec.podCIDRs of Node object %s, this node's", errWaiting, in.Self)
	case len(in.PodCIDRs) == 0:
		return nil, fmt.Errorf("%w for a pod CIDR of this node", errWaiting)
	}
	if err := p.begin(all[i]); err != nil {
		return nil, err
	}
	for _, m := range all {
		p.plan.addNode(m)
		if m.name != in.Self {
			p.reach(m)
		}
	}
	p.plan.sort()
	return &p.plan, nil
}

// reserved is where no pods of other nodes are: what the links lead to by themselves, and what this node depends on.
func reserved(links []Link, keep map[netip.Addr]string) map[netip.Prefix]string {
	all := map[netip.Prefix]string{}
	for a, what := range keep {
		all[netip.PrefixFrom(a, a.BitLen())] = fmt.Sprintf("%s, %s", a, what)
	}
	for _, l := range links {
		for _, a := range l.Addrs {
			if a.Bits() < a.Addr().BitLen() { // addresses of nodes are checked by themselves
				all[a.Masked()] = fmt.Sprintf("subnet %s of link %s", a.Masked(), l.Name)
			}
		}
	}
	return all
}

type planner struct {
	Input
	plan Plan
	self member
}

// begin makes this node's ends of tunnels.
func (p *planner) begin(self member) error {
	p.self = self
	if !sameRanges(self.podCIDRs, p.PodCIDRs) {
		p.leave(self, "pod CIDRs "+joined(self.podCIDRs), fmt.Sprintf("pods of this node have addresses of %s: other nodes do not find them", joined(p.PodCIDRs)))
	}
	if !p.Mode.Tunnelled() {
		return nil
	}
	for _, v6 := range []bool{false, true} {
		local := self.addr(v6)
		if !local.IsValid() {
			continue
		}
		link, ok := holder(p.Links, local)
		if !ok {
			p.leave(self, "address "+local.String(), "no link of this node has it: no tunnel begins there")
			continue
		}
		name := Tunnel4
		if v6 {
			name = Tunnel6
		}
		t := Tunnel{Name: name, Local: local, MAC: macOf(local)}
		if link.MTU > 0 {
			t.MTU = link.MTU - network.TunnelOverhead(v6)
		}
		for _, own := range p.PodCIDRs {
			t.Addrs = append(t.Addrs, gateway(own))
		}
		p.plan.Tunnels = append(p.plan.Tunnels, t)
	}
	if len(p.plan.Tunnels) == 0 {
		return fmt.Errorf("%w for an InternalIP of Node object %s that a link of this node has", errWaiting, p.Self)
	}
	return nil
}

// reach makes routes to a node's pods, of the families that pods have here.
func (p *planner) reach(m member) {
	for _, dst := range m.podCIDRs {
		own := slices.IndexFunc(p.PodCIDRs, func(own netip.Prefix) bool { return own.Addr().Is6() == dst.Addr().Is6() })
		if own < 0 {
			continue
		}
		via := m.addr(dst.Addr().Is6())
		link, near := beside(p.Links, via)
		if near && p.Mode != VXLAN {
			p.plan.Routes = append(p.plan.Routes, Route{Dst: dst, Via: via, LinkIndex: link.Index})
		} else if why := p.tunnel(m, dst, gateway(p.PodCIDRs[own])); why != "" {
			p.leave(m, "pod CIDR "+dst.String(), why)
			continue
		}
		p.plan.Others = append(p.plan.Others, dst)
	}
}

// tunnel leads to a range through the tunnel, or says why not.
func (p *planner) tunnel(m member, dst netip.Prefix, src netip.Addr) string {
	if !p.Mode.Tunnelled() {
		via := m.addr(dst.Addr().Is6())
		if !via.IsValid() {
			return "the node has no InternalIP of this family"
		}
		return fmt.Sprintf("%s is in no subnet of this node: mode %s or %s leads there", via, Auto, VXLAN)
	}
	i := slices.IndexFunc(p.plan.Tunnels, func(t Tunnel) bool { return m.addr(t.Local.Is6()).IsValid() })
	if i < 0 {
		return "no family in which both nodes have an InternalIP"
	}
	t := &p.plan.Tunnels[i]
	node := m.addr(t.Local.Is6())
	mac := macOf(node)
	hop := gateway(dst)
	if dst.Addr().Is6() {
		hop = linkLocal(mac)
	}
	if last := len(t.Peers) - 1; last >= 0 && t.Peers[last].Node == node {
		t.Peers[last].Hops = append(t.Peers[last].Hops, hop)
	} else {
		t.Peers = append(t.Peers, Peer{Node: node, MAC: mac, Hops: []netip.Addr{hop}})
	}
	p.plan.Routes = append(p.plan.Routes, Route{Dst: dst, Via: hop, Link: t.Name, Src: src})
	return ""
}

func (p *planner) leave(m member, what, why string) {
	p.plan.LeftOut = append(p.plan.LeftOut, LeftOut{m.name, what, why})
}

func (p *Plan) addNode(m member) {
	for _, a := range []netip.Addr{m.addr4, m.addr6} {
		if a.IsValid() {
			p.Nodes = append(p.Nodes, a)
		}
	}
}

// sort makes plans of the same content equal.
func (p *Plan) sort() {
	slices.SortFunc(p.Routes, func(a, b Route) int { return comparePrefixes(a.Dst, b.Dst) })
	slices.SortFunc(p.Others, comparePrefixes)
	slices.SortFunc(p.Nodes, netip.Addr.Compare)
	for _, t := range p.Tunnels {
		slices.SortFunc(t.Peers, func(a, b Peer) int { return a.Node.Compare(b.Node) })
	}
	slices.SortFunc(p.LeftOut, func(a, b LeftOut) int { return strings.Compare(a.String(), b.String()) })
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// gateway is the address that the default network's bridge has: the first one.
func gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// holder is the link that has an address.
func holder(links []Link, a netip.Addr) (Link, bool) {
	i := slices.IndexFunc(links, func(l Link) bool {
		return slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Addr() == a })
	})
	if i < 0 {
		return Link{}, false
	}
	return links[i], true
}

// beside is the link with a subnet that an address is in; of several the smallest subnet, which is where the kernel sends.
func beside(links []Link, a netip.Addr) (best Link, found bool) {
	longest := -1
	for _, l := range links {
		for _, p := range l.Addrs {
			if p.Bits() < p.Addr().BitLen() && p.Bits() > longest && p.Masked().Contains(a) {
				best, longest = l, p.Bits()
			}
		}
	}
	return best, longest >= 0
}

func sameRanges(a, b []netip.Prefix) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, comparePrefixes)
	slices.SortFunc(b, comparePrefixes)
	return slices.Equal(a, b)
}

func joined(all []netip.Prefix) string {
	var texts []string
	for _, p := range all {
		texts = append(texts, p.String())
	}
	return strings.Join(texts, ",")
}

package routes

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Node is what a Node object says that matters here, not checked.
type Node struct {
	Name string
	// Created is when the API server took it: of two that claim the same, the older one has it.
	Created time.Time
	// PodCIDRs are spec.podCIDRs.
	PodCIDRs []string
	// Addresses are those of status.addresses that are of type InternalIP.
	Addresses []string
}

// LeftOut is something of a Node object that no route is made for.
type LeftOut struct {
	Node, What, Why string
}

func (l LeftOut) String() string { return fmt.Sprintf("node %s: %s: %s", l.Node, l.What, l.Why) }

// member is a node with what was found right of it: one address and one range of a family at most.
type member struct {
	name     string
	addr4    netip.Addr
	addr6    netip.Addr
	podCIDRs []netip.Prefix
}

// addr is the node's address of a family, not valid if it has none.
func (m member) addr(v6 bool) netip.Addr {
	if v6 {
		return m.addr6
	}
	return m.addr4
}

// The largest ranges that a node can have: what is larger leads away from the cluster.
const (
	minBits4 = 8
	minBits6 = 32
	// minHostBits leave room for the gateway, which is the first address.
	minHostBits = 2
)

// never are ranges that are no pods' whatever a Node object says.
var never = prefixes("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/16", "fe80::/10", "ff00::/8")

func prefixes(texts ...string) (all []netip.Prefix) {
	for _, t := range texts {
		all = append(all, netip.MustParsePrefix(t))
	}
	return all
}

// members checks Node objects in the order of their seniority, this node's first: of two that claim the same address or range,
// and of a range and an address in it, the first one keeps it. No pods are where reserved is, with what that is.
func members(self string, nodes []Node, reserved map[netip.Prefix]string) (all []member, out []LeftOut) {
	nodes = slices.Clone(nodes)
	slices.SortStableFunc(nodes, func(a, b Node) int {
		switch {
		case a.Name == b.Name:
			return 0
		case a.Name == self:
			return -1
		case b.Name == self:
			return 1
		}
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Name, b.Name))
	})
	c := given{}
	for p, what := range reserved {
		c.reserved.add(p, what)
	}
	for _, n := range nodes {
		m := member{name: n.Name}
		leave := func(what, why string) { out = append(out, LeftOut{n.Name, what, why}) }
		for _, text := range n.Addresses {
			if why := m.takeAddress(text, &c); why != "" {
				leave("address "+quote(text), why)
			}
		}
		for _, text := range n.PodCIDRs {
			if why := m.takeCIDR(text, &c, n.Name == self); why != "" {
				leave("pod CIDR "+quote(text), why)
			}
		}
		all = append(all, m)
	}
	return all, out
}

// given is what is somebody's already.
type given struct{ addrs, ranges, reserved claims }

// quote keeps what others wrote to one line of bounded length.
func quote(text string) string {
	const longest = 64
	if len(text) > longest {
		text = text[:longest] + "…"
	}
	return strings.Trim(fmt.Sprintf("%q", text), `"`)
}

// takeAddress says why the node does not get that address, "" if it does, or has another one of the family.
func (m *member) takeAddress(text string, c *given) string {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return "it is no IP address"
	}
	have := &m.addr4
	if a.Is6() {
		have = &m.addr6
	}
	switch {
	case have.IsValid():
		return "" // one of a family is enough
	case overlapsAny(netip.PrefixFrom(a, a.BitLen()), never):
		return "it is none of a node in a network"
	}
	own := netip.PrefixFrom(a, a.BitLen())
	if whose := cmp.Or(c.addrs.overlap(own), c.ranges.overlap(own)); whose != "" {
		return "it is, or is in, " + whose
	}
	c.addrs.add(own, fmt.Sprintf("address %s of node %s", a, m.name))
	*have = a
	return ""
}

// takeCIDR says why the node does not get that range.
func (m *member) takeCIDR(text string, c *given, self bool) string {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return "it is no address range"
	}
	p = p.Masked()
	smallest := minBits4
	if p.Addr().Is6() {
		smallest = minBits6
	}
	switch {
	case p.Bits() < smallest:
		return fmt.Sprintf("it is larger than a /%d", smallest)
	case p.Addr().BitLen()-p.Bits() < minHostBits:
		return "it is too small for a gateway and a pod"
	case overlapsAny(p, never):
		return "it has addresses that are no pod's"
	case slices.ContainsFunc(m.podCIDRs, func(o netip.Prefix) bool { return o.Addr().Is6() == p.Addr().Is6() }):
		return "the node has another one of this family"
	}
	// What this node's pods have are their addresses, whoever else has claimed them: the network is made of them.
	if whose := cmp.Or(c.ranges.overlap(p), c.addrs.overlap(p), c.reserved.overlap(p)); whose != "" && !self {
		return "it overlaps " + whose
	}
	c.ranges.add(p, fmt.Sprintf("pod CIDR %s of node %s", p, m.name))
	m.podCIDRs = append(m.podCIDRs, p)
	return ""
}

func overlapsAny(p netip.Prefix, all []netip.Prefix) bool {
	return slices.ContainsFunc(all, p.Overlaps)
}

// claims are ranges and whose they are, sorted by their first addresses.
type claims struct{ all []claim }

type claim struct {
	netip.Prefix
	whose string
}

func byFirst(c claim, p netip.Prefix) int {
	return cmp.Or(c.Addr().Compare(p.Addr()), cmp.Compare(c.Bits(), p.Bits()))
}

func (c *claims) add(p netip.Prefix, whose string) {
	p = p.Masked()
	i, _ := slices.BinarySearchFunc(c.all, p, byFirst)
	c.all = slices.Insert(c.all, i, claim{p, whose})
}

// overlap says whose range overlaps p, "" if none does.
func (c *claims) overlap(p netip.Prefix) string {
	// Two ranges overlap when one begins inside the other: those that begin in p follow each other, ...
	i, _ := slices.BinarySearchFunc(c.all, netip.PrefixFrom(p.Addr(), 0), func(c claim, p netip.Prefix) int { return c.Addr().Compare(p.Addr()) })
	if i < len(c.all) && p.Contains(c.all[i].Addr()) {
		return c.all[i].whose
	}
	// ... and p begins in one of those larger than p, each of which has one place only.
	for bits := p.Bits(); bits >= 0; bits-- {
		larger := netip.PrefixFrom(p.Addr(), bits).Masked()
		if i, ok := slices.BinarySearchFunc(c.all, larger, byFirst); ok {
			return c.all[i].whose
		}
	}
	return ""
}

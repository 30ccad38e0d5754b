package model

import (
	"net/netip"
	"slices"
	"strings"

	utilnet "k8s.io/utils/net"
)

// FamilyOf is the family of an unmapped address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// unspecified is the address that stands for all those of node ports.
func unspecified(f Family) netip.Addr {
	if f == IPv4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// parseAddr reads an address as the API server does: leading zeros are decimal, an IPv4 address in IPv6 is an IPv4 address.
func parseAddr(s string) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(utilnet.ParseIPSloppy(s))
	return a.Unmap(), ok
}

// parsePrefix reads a CIDR in the same way; host bits are cleared.
func parsePrefix(s string) (netip.Prefix, bool) {
	_, n, err := utilnet.ParseCIDRSloppy(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if addr.Is4In6() {
		// ::ffff:10.0.0.0/104 is 10.0.0.0/8.
		addr, ones, bits = addr.Unmap(), ones-96, bits-96
	}
	if !ok || ones < 0 || bits != addr.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(addr, ones).Masked(), true
}

// special says why an address must not be an endpoint or an external IP; the API server refuses the same ones.
func special(a netip.Addr) string {
	switch {
	case a.IsUnspecified():
		return "is the unspecified address"
	case a.IsLoopback():
		return "is a loopback address"
	case a.IsLinkLocalUnicast(), a.IsLinkLocalMulticast():
		return "is a link-local address"
	}
	return ""
}

// tidy sorts prefixes and leaves out repetitions.
func tidy(p []netip.Prefix) []netip.Prefix {
	slices.SortFunc(p, netip.Prefix.Compare)
	return slices.Clip(slices.Compact(p))
}

// tidyAddrs sorts addresses and leaves out repetitions.
func tidyAddrs(a []netip.Addr) []netip.Addr {
	slices.SortFunc(a, netip.Addr.Compare)
	return slices.Clip(slices.Compact(a))
}

// holds is whether a sorted list has the address.
func holds(sorted []netip.Addr, a netip.Addr) bool {
	_, ok := slices.BinarySearchFunc(sorted, a, netip.Addr.Compare)
	return ok
}

// within is whether an address is in one of the prefixes.
func within(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// whole is whether a prefix is all of its family.
func whole(p netip.Prefix) bool { return p.Bits() == 0 }

// blank is whether there is nothing but white space.
func blank(s string) bool { return strings.TrimSpace(s) == "" }

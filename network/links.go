package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
)

// Addresses far away, which the kernel is asked the route to. Nothing is sent there.
var (
	far4 = net.IPv4(1, 1, 1, 1)
	far6 = net.ParseIP("2606:4700:4700::1111")
)

// wayOutMTU is the largest packet that leaves the node whole by the routes of the ranges' families: the smaller of both, 0
// where there is no route out (yet).
func wayOutMTU(cidrs []netip.Prefix) int {
	mtu := 0
	for _, p := range cidrs {
		far := far6
		if p.Addr().Is4() {
			far = far4
		}
		mtu = smaller(mtu, routeMTU(far))
	}
	return mtu
}

// smaller is the smaller of two MTUs, of which 0 says nothing.
func smaller(a, b int) int {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// routeMTU is the MTU of the route, where it has one (from a router's advertisement, say), and of its links.
func routeMTU(to net.IP) int {
	// The entry of the table, not what the kernel has come to know about this one address.
	routes, err := netlink.RouteGetWithOptions(to, &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil {
		return 0 // there is none
	}
	mtu := 0
	for _, r := range routes {
		mtu = smaller(mtu, smaller(r.MTU, linkMTU(r.LinkIndex)))
		for _, hop := range r.MultiPath {
			mtu = smaller(mtu, linkMTU(hop.LinkIndex))
		}
	}
	return mtu
}

func linkMTU(index int) int {
	if index == 0 {
		return 0
	}
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return 0
	}
	return link.Attrs().MTU
}

// takenElsewhere says which link, other than the bridge, has an address of the pods' ranges: that of another runtime's
// network, or of one that was here before. Two bridges of one range leave the pods of one of them without a network, and
// nothing tells. A former default network's bridge without a pod is removed.
func takenElsewhere(cidrs []netip.Prefix, bridge string, log *slog.Logger) error {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("addresses of the node: %w", err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		for _, p := range cidrs {
			if !p.Contains(ip) {
				continue
			}
			link, err := netlink.LinkByIndex(a.LinkIndex)
			if err != nil || link.Attrs().Name == bridge {
				continue // gone meanwhile, or ours
			}
			if removeUnused(link) {
				log.Info("the bridge of a former default network, without pods, is removed", "link", link.Attrs().Name)
				continue
			}
			return fmt.Errorf("pod CIDR %s: link %s has %s of it: another network is, or was, made of the same addresses; remove what uses the link, and the link",
				p, link.Attrs().Name, ip)
		}
	}
	return nil
}

// removeUnused removes the bridge of a default network that no pod is connected to.
func removeUnused(link netlink.Link) bool {
	if link.Type() != "bridge" || !strings.HasPrefix(link.Attrs().Name, defaultPrefix) {
		return false
	}
	all, err := netlink.LinkList()
	if err != nil {
		return false
	}
	for _, l := range all {
		if l.Attrs().MasterIndex == link.Attrs().Index {
			return false
		}
	}
	return netlink.LinkDel(link) == nil
}

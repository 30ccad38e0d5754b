package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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
		mtu = smaller(mtu, r.MTU)
		for _, link := range linksOf(r) {
			mtu = smaller(mtu, link.Attrs().MTU)
		}
	}
	return mtu
}

// linksOf are the links by which a route leads out.
func linksOf(r netlink.Route) (links []netlink.Link) {
	indexes := []int{r.LinkIndex}
	for _, hop := range r.MultiPath {
		indexes = append(indexes, hop.LinkIndex)
	}
	for _, index := range indexes {
		if link, err := netlink.LinkByIndex(index); err == nil {
			links = append(links, link)
		}
	}
	return links
}

// keepAdvertised has the node keep its IPv6 route out where a router advertises it: the kernel drops such routes, and takes no
// more, as soon as the node forwards packets, which it does for pods, unless accept_ra is 2.
func keepAdvertised(log *slog.Logger) error {
	routes, err := netlink.RouteGetWithOptions(far6, &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil {
		return nil //nolint:nilerr // there is none
	}
	for _, r := range routes {
		if r.Protocol != unix.RTPROT_RA {
			continue
		}
		for _, link := range linksOf(r) {
			setting := "/proc/sys/net/ipv6/conf/" + link.Attrs().Name + "/accept_ra"
			if now, err := os.ReadFile(setting); err != nil || strings.TrimSpace(string(now)) != "1" {
				continue // somebody else takes them, such as systemd-networkd
			}
			if err := os.WriteFile(setting, []byte("2"), 0o600); err != nil {
				return fmt.Errorf("the advertised IPv6 route out of the node would go: %w", err)
			}
			log.Info("the node goes on to take its IPv6 route from a router's advertisements, also when it forwards packets of pods", "setting", setting, "value", 2)
		}
	}
	return nil
}

// takenElsewhere says which link, other than the bridge, has an address of the pods' ranges: that of another runtime's
// network, or of one that was here before. Two bridges of one range leave the pods of one of them without a network, and
// nothing tells. A former default network's bridge without a pod is removed. Links of the node's routes may have one.
func takenElsewhere(cidrs []netip.Prefix, bridge string, log *slog.Logger, nodeLinks ...string) error {
	t, err := linkWith(cidrs, func(l netlink.Link) bool {
		return l.Attrs().Name != bridge && !slices.Contains(nodeLinks, l.Attrs().Name)
	}, log)
	if err != nil || t == nil {
		return err
	}
	return fmt.Errorf("pod CIDR %s: link %s has %s of it: another network is, or was, made of the same addresses; remove what uses the link, and the link",
		t.cidr, t.link, t.ip)
}

// taken is an address of a range that a link has.
type taken struct {
	cidr netip.Prefix
	link string
	ip   netip.Addr
}

// linkWith finds a link that counts and has an address of one of some ranges. A former default network's bridge without a pod is
// removed instead.
func linkWith(cidrs []netip.Prefix, counts func(netlink.Link) bool, log *slog.Logger) (*taken, error) {
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("addresses of the node: %w", err)
	}
	for _, a := range addrs {
		ip, _ := netip.AddrFromSlice(a.IP)
		ip = ip.Unmap()
		for _, p := range cidrs {
			if !p.Contains(ip) {
				continue
			}
			link, err := netlink.LinkByIndex(a.LinkIndex)
			if err != nil || !counts(link) {
				continue // gone meanwhile, or ours
			}
			if removeUnused(link) {
				log.Info("the bridge of a former default network, without pods, is removed", "link", link.Attrs().Name)
				continue
			}
			return &taken{p, link.Attrs().Name, ip}, nil
		}
	}
	return nil, nil
}

// removeUnused removes the bridge of a default network that no pod is connected to.
func removeUnused(link netlink.Link) bool {
	if link.Type() != "bridge" || !IsDefaultBridge(link.Attrs().Name) {
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

package routes

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
)

// families are those of the kernel.
var families = []int{unix.AF_INET, unix.AF_INET6}

// untorn lists again until nothing changed meanwhile.
func untorn[T any](list func() ([]T, error)) ([]T, error) {
	for {
		all, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
}

// readLinks are the links of the network that this thread is in by which other nodes may be reached.
func readLinks() ([]Link, error) {
	all, err := untorn(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("links of the node: %w", err)
	}
	addrs, err := untorn(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("addresses of the node: %w", err)
	}
	var links []Link
	for _, l := range all {
		a := l.Attrs()
		if a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 || network.IsDefaultBridge(a.Name) || slices.Contains(Links(), a.Name) {
			continue
		}
		link := Link{Index: a.Index, Name: a.Name, MTU: a.MTU}
		for _, addr := range addrs {
			if p := toPrefix(addr.IPNet); addr.LinkIndex == a.Index && p.IsValid() && p.Addr().IsGlobalUnicast() {
				link.Addrs = append(link.Addrs, p)
			}
		}
		if len(link.Addrs) > 0 {
			links = append(links, link)
		}
	}
	return links, nil
}

// nextHops are those of the node's routes that are not ours: without them it reaches nobody.
func nextHops() (map[netip.Addr]string, error) {
	hops := map[netip.Addr]string{}
	for _, family := range families {
		routes, err := untorn(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return nil, fmt.Errorf("routes of the node: %w", err)
		}
		for _, r := range routes {
			if r.Protocol == Protocol {
				continue
			}
			all := []net.IP{r.Gw}
			for _, hop := range r.MultiPath {
				all = append(all, hop.Gw)
			}
			for _, gw := range all {
				if a := toAddr(gw); a.IsValid() && !a.IsLinkLocalUnicast() {
					hops[a] = "a next hop of this node"
				}
			}
		}
	}
	return hops, nil
}

// toPrefix keeps the host bits. It is not valid of nil.
func toPrefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	ones, size := n.Mask.Size()
	addr := toAddr(n.IP)
	if size == 0 {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(addr, ones-size+addr.BitLen())
}

func toAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func toNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// apply makes the kernel have what the plan says. What fails is told and does not keep the rest from being done.
func (p *Plan) apply() (tableMade bool, err error) {
	indexes := map[string]int{}
	var errs []error
	for _, t := range p.Tunnels {
		index, err := t.apply()
		if err != nil {
			errs = append(errs, fmt.Errorf("link %s: %w", t.Name, err))
			continue
		}
		indexes[t.Name] = index
	}
	// Before routes lead to the others, nobody may masquerade what goes there.
	if tableMade, err = p.rules().apply(); err != nil {
		errs = append(errs, fmt.Errorf("nftables table %s: %w", tableName, err))
	}
	wanted := map[netip.Prefix]netlink.Route{}
	for _, r := range p.Routes {
		if r.Link != "" && indexes[r.Link] == 0 {
			continue // which is told
		}
		wanted[r.Dst] = r.toKernel(indexes)
	}
	errs = append(errs, applyRoutes(wanted), removeTunnels(func(name string) bool {
		return !slices.ContainsFunc(p.Tunnels, func(t Tunnel) bool { return t.Name == name })
	}))
	return tableMade, errors.Join(errs...)
}

// withdraw removes all that any plan can have made.
func withdraw() error {
	errs := []error{applyRoutes(nil)}
	if err := removeTable(); err != nil {
		errs = append(errs, fmt.Errorf("nftables table %s: %w", tableName, err))
	}
	return errors.Join(append(errs, removeTunnels(func(string) bool { return true }))...)
}

func removeTunnels(which func(name string) bool) error {
	var errs []error
	for _, name := range Links() {
		if !which(name) {
			continue
		}
		link, err := netlink.LinkByName(name)
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			continue
		}
		if err == nil && link.Type() == (&netlink.Vxlan{}).Type() {
			err = netlink.LinkDel(link)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove link %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// toKernel is the route as the kernel takes it. Through a tunnel the next hop of IPv4 is in no subnet of the link's.
func (r Route) toKernel(indexes map[string]int) netlink.Route {
	k := netlink.Route{
		Dst: toNet(r.Dst), Gw: r.Via.AsSlice(), LinkIndex: r.LinkIndex, Protocol: Protocol, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST,
	}
	if r.Link != "" {
		k.LinkIndex = indexes[r.Link]
		if r.Via.Is4() {
			k.Flags = int(netlink.FLAG_ONLINK)
		}
	}
	if r.Src.IsValid() {
		k.Src = r.Src.AsSlice()
	}
	return k
}

// sameRoute compares what toKernel sets. IPv6 does not tell FLAG_ONLINK, nor do next hops there need it.
func sameRoute(a, b netlink.Route) bool {
	return a.LinkIndex == b.LinkIndex && a.Gw.Equal(b.Gw) && a.Src.Equal(b.Src) && a.Type == b.Type && len(a.MultiPath) == 0 &&
		a.Flags&int(netlink.FLAG_ONLINK) == b.Flags&int(netlink.FLAG_ONLINK)
}

// applyRoutes makes the wanted routes be all that are ours.
func applyRoutes(wanted map[netip.Prefix]netlink.Route) error {
	var errs []error
	have := map[netip.Prefix]bool{}
	for _, family := range families {
		routes, err := ourRoutes(family)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, r := range routes {
			dst := toPrefix(r.Dst)
			if w, ok := wanted[dst]; ok && !have[dst] && sameRoute(w, r) {
				have[dst] = true
				continue
			}
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("remove route to %s: %w", dst, err))
			}
		}
	}
	for dst, w := range wanted {
		if have[dst] {
			continue
		}
		if err := netlink.RouteAdd(&w); err != nil { // never in place of another's
			if errors.Is(err, unix.EEXIST) {
				err = errors.New("another program has made a route there, which is left alone")
			}
			errs = append(errs, fmt.Errorf("route to %s by %s: %w", dst, toAddr(w.Gw), err))
		}
	}
	return joinSorted(errs)
}

func ourRoutes(family int) ([]netlink.Route, error) {
	filter := &netlink.Route{Protocol: Protocol, Table: unix.RT_TABLE_MAIN}
	routes, err := untorn(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("routes of the node: %w", err)
	}
	// A kernel without IPv6 answers with what it has of IPv4.
	return slices.DeleteFunc(routes, func(r netlink.Route) bool { return toPrefix(r.Dst).Addr().Is6() != (family == unix.AF_INET6) }), nil
}

// joinSorted has errors of a map's elements in one order, so that the same is not told as something new.
func joinSorted(errs []error) error {
	slices.SortFunc(errs, func(a, b error) int { return bytes.Compare(text(a), text(b)) })
	return errors.Join(errs...)
}

func text(err error) []byte {
	if err == nil {
		return nil
	}
	return []byte(err.Error())
}

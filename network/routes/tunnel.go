package routes

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// apply makes the link, with its addresses and peers, and returns its index.
func (t Tunnel) apply() (int, error) {
	link, err := t.ensureLink()
	if err != nil {
		return 0, err
	}
	index := link.Attrs().Index
	if err := t.applyAddrs(link); err != nil {
		return 0, err
	}
	return index, errors.Join(t.applyForwarding(index), t.applyHops(index))
}

// wanted is the link: nothing is learnt from packets, and nothing is sent to all.
func (t Tunnel) wanted() *netlink.Vxlan {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = t.Name, t.MAC
	if t.MTU > 0 {
		attrs.MTU = t.MTU
	}
	return &netlink.Vxlan{LinkAttrs: attrs, VxlanId: VNI, Port: Port, SrcAddr: t.Local.AsSlice(), Learning: false}
}

// ensureLink makes the link anew where it has something that cannot be changed.
func (t Tunnel) ensureLink() (netlink.Link, error) {
	want := t.wanted()
	link, err := netlink.LinkByName(t.Name)
	if err == nil && link.Type() != want.Type() {
		return nil, fmt.Errorf("there is one of type %s, which is not ours: rename or remove it", link.Type())
	}
	if err == nil && !sameTunnel(link, want) {
		if err := netlink.LinkDel(link); err != nil {
			return nil, fmt.Errorf("remove the former one: %w", err)
		}
		err = netlink.LinkNotFoundError{}
	}
	switch {
	case err == nil:
	case errors.As(err, &netlink.LinkNotFoundError{}):
		if err := netlink.LinkAdd(want); err != nil {
			if errors.Is(err, unix.EOPNOTSUPP) {
				err = fmt.Errorf("%w (the kernel has no vxlan: modprobe vxlan)", err)
			}
			return nil, err
		}
		if link, err = netlink.LinkByName(t.Name); err != nil {
			return nil, err
		}
	default:
		return nil, err
	}
	if !bytes.Equal(link.Attrs().HardwareAddr, t.MAC) {
		if err := netlink.LinkSetHardwareAddr(link, t.MAC); err != nil {
			return nil, fmt.Errorf("address %s: %w", t.MAC, err)
		}
	}
	if t.MTU > 0 && link.Attrs().MTU != t.MTU {
		if err := netlink.LinkSetMTU(link, t.MTU); err != nil {
			return nil, fmt.Errorf("MTU %d: %w", t.MTU, err)
		}
	}
	if err := t.settings(); err != nil {
		return nil, err
	}
	if link.Attrs().Flags&net.FlagUp != 0 {
		return link, nil
	}
	return link, netlink.LinkSetUp(link)
}

func sameTunnel(link netlink.Link, want *netlink.Vxlan) bool {
	have, ok := link.(*netlink.Vxlan)
	return ok && have.VxlanId == want.VxlanId && have.Port == want.Port && have.SrcAddr.Equal(want.SrcAddr) && !have.Learning &&
		have.VtepDevIndex == 0 && have.Group == nil && !have.FlowBased
}

// settings keep the kernel from giving the link an IPv6 address of its own, and from taking a router's that somebody sends
// through the tunnel.
func (t Tunnel) settings() error {
	const none = "1" // IN6_ADDR_GEN_MODE_NONE
	values := [][2]string{{"addr_gen_mode", none}, {"accept_ra", "0"}}
	for _, a := range t.Addrs {
		if a.Is6() {
			values = append(values, [2]string{"disable_ipv6", "0"})
		}
	}
	for _, v := range values {
		err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", t.Name, v[0]), []byte(v[1]), 0o600)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a node without IPv6
			return err
		}
	}
	return nil
}

func (t Tunnel) applyAddrs(link netlink.Link) error {
	have, err := untorn(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("addresses: %w", err)
	}
	wanted := map[netip.Prefix]bool{}
	for _, a := range t.Addrs {
		wanted[netip.PrefixFrom(a, a.BitLen())] = true
	}
	for _, a := range have {
		p := toPrefix(a.IPNet)
		if wanted[p] {
			delete(wanted, p)
			continue
		}
		if err := netlink.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s: %w", p, err)
		}
	}
	for p := range wanted {
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: toNet(p), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	return nil
}

// applyForwarding says to which node packets for an Ethernet address go.
func (t Tunnel) applyForwarding(index int) error {
	have, err := untorn(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, unix.AF_BRIDGE) })
	if err != nil {
		return fmt.Errorf("forwarding table: %w", err)
	}
	entry := func(p Peer) *netlink.Neigh {
		return &netlink.Neigh{
			LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, HardwareAddr: p.MAC, IP: p.Node.AsSlice(),
		}
	}
	wanted := map[string]*netlink.Neigh{}
	for _, p := range t.Peers {
		wanted[p.MAC.String()] = entry(p)
	}
	return applyNeighbours(have, wanted, func(n netlink.Neigh) string { return n.HardwareAddr.String() })
}

// applyHops says which Ethernet addresses next hops have.
func (t Tunnel) applyHops(index int) error {
	var errs []error
	for _, family := range families {
		have, err := untorn(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
		if err != nil {
			errs = append(errs, fmt.Errorf("neighbours: %w", err))
			continue
		}
		// A kernel without IPv6 answers with what it has of IPv4.
		have = slices.DeleteFunc(have, func(n netlink.Neigh) bool { return toAddr(n.IP).Is6() != (family == unix.AF_INET6) })
		wanted := map[string]*netlink.Neigh{}
		for _, p := range t.Peers {
			for _, hop := range p.Hops {
				if hop.Is6() == (family == unix.AF_INET6) {
					wanted[hop.String()] = &netlink.Neigh{
						LinkIndex: index, Family: family, State: netlink.NUD_PERMANENT, HardwareAddr: p.MAC, IP: hop.AsSlice(),
					}
				}
			}
		}
		errs = append(errs, applyNeighbours(have, wanted, func(n netlink.Neigh) string { return toAddr(n.IP).String() }))
	}
	return errors.Join(errs...)
}

func applyNeighbours(have []netlink.Neigh, wanted map[string]*netlink.Neigh, key func(netlink.Neigh) string) error {
	var errs []error
	for _, n := range have {
		w := wanted[key(n)]
		switch {
		case n.State&netlink.NUD_NOARP != 0 && n.Family != unix.AF_BRIDGE: // of addresses of groups, the kernel's own
		case w != nil && n.State == w.State && n.IP.Equal(w.IP) && bytes.Equal(n.HardwareAddr, w.HardwareAddr):
			delete(wanted, key(n))
		case w == nil:
			if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove neighbour %s %s: %w", n.IP, n.HardwareAddr, err))
			}
		}
	}
	for _, w := range wanted {
		if err := netlink.NeighSet(w); err != nil {
			errs = append(errs, fmt.Errorf("neighbour %s %s: %w", w.IP, w.HardwareAddr, err))
		}
	}
	return joinSorted(errs)
}

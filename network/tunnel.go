package network

import "net/netip"

// TunnelOverhead is what VXLAN adds to a packet, in bytes: the headers of IP, UDP, VXLAN and, inside, Ethernet (RFC 7348). v6 is
// of the network between the nodes, not of what is inside.
func TunnelOverhead(v6 bool) int {
	const ip4, ip6, udp, vxlan, ethernet = 20, 40, 8, 8, 14
	if v6 {
		return ip6 + udp + vxlan + ethernet
	}
	return ip4 + udp + vxlan + ethernet
}

// podMTU is the largest packet of pods: what leaves the node whole, with room for a tunnel's headers where node routes may need
// one. Tunnels are of IPv4 where the nodes have it.
func (m *Manager) podMTU(cidrs []netip.Prefix) int {
	mtu := wayOutMTU(cidrs)
	if !m.opts.Tunnelled || mtu == 0 {
		return mtu
	}
	return mtu - TunnelOverhead(routeMTU(far4) == 0)
}

// Default says which ranges the default network has, if pods get that, or else the file of the network that they get. Neither
// is known while there is none.
func (m *Manager) Default() (cidrs []netip.Prefix, other string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.conflist == nil:
		return nil, ""
	case m.conflist.byDefault():
		return m.conflist.cidrs, ""
	}
	return nil, m.conflist.file
}

// Changes has a value when [Manager.Default] may say something else than before. It is for one reader.
func (m *Manager) Changes() <-chan struct{} { return m.changed }

// IsDefaultBridge says whether a link's name is one of bridges of default networks.
func IsDefaultBridge(name string) bool {
	return len(name) > len(DefaultPrefix) && name[:len(DefaultPrefix)] == DefaultPrefix
}

package routes

import (
	"crypto/sha256"
	"net"
	"net/netip"
)

// macOf is the Ethernet address of the tunnel's end at a node's address: every node computes it, none has to be told. It is one
// of those that are given locally.
func macOf(node netip.Addr) net.HardwareAddr {
	sum := sha256.Sum256([]byte("berth.vxlan " + node.String()))
	mac := net.HardwareAddr(sum[:6])
	const group, local = 1, 2
	mac[0] = mac[0]&^group | local
	return mac
}

// linkLocal is the IPv6 address that an end of the tunnel is known by as a next hop (RFC 4291, appendix A): one that no route
// can lead elsewhere. The link itself does not have it, it stands for the Ethernet address.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	const universal = 2
	return netip.AddrFrom16([16]byte{
		0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ universal, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5],
	})
}

package cni

import (
	"encoding/binary"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// xtRule is a rule of iptables, of the kinds that the plugins here make. Its two forms are what iptables is told and what it
// makes of that in nf_tables.
type xtRule struct {
	in, out     string // interfaces
	notOut      bool
	src, dst    netip.Prefix
	notDst      bool
	proto       string // tcp or udp
	comment     string
	dports      []uint16 // any of them
	dport       uint16
	toLocal     bool // to an address of the node
	established bool // of a connection, or belonging to one
	mark        uint32
	target      xtTo
}

// xtTo is what becomes of a packet; one of these.
type xtTo struct {
	chain      string // another chain, or ACCEPT, DROP, RETURN
	masquerade bool
	mark       uint32 // is set
	dnat       netip.AddrPort
}

const (
	protoTCP = unix.IPPROTO_TCP
	protoUDP = unix.IPPROTO_UDP
)

// args are what iptables is told.
func (r xtRule) args() []string {
	var a []string
	if r.in != "" {
		a = append(a, "-i", r.in)
	}
	if r.notOut {
		a = append(a, "!")
	}
	if r.out != "" {
		a = append(a, "-o", r.out)
	}
	if r.comment != "" {
		a = append(a, "-m", "comment", "--comment", r.comment)
	}
	if len(r.dports) > 0 {
		a = append(a, "-m", "multiport", "-p", r.proto, "--destination-ports", joinPorts(r.dports))
	}
	if r.dport != 0 {
		a = append(a, "-p", r.proto, "--dport", strconv.Itoa(int(r.dport)))
	}
	if r.dst.IsValid() {
		if r.notDst {
			a = append(a, "!")
		}
		a = append(a, "-d", host(r.dst))
	}
	if r.src.IsValid() {
		a = append(a, "-s", host(r.src))
	}
	if r.toLocal {
		a = append(a, "-m", "addrtype", "--dst-type", "LOCAL")
	}
	if r.established {
		a = append(a, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED")
	}
	if r.mark != 0 {
		a = append(a, "-m", "mark", "--mark", bits(r.mark))
	}
	return append(a, r.target.args()...)
}

func (t xtTo) args() []string {
	switch {
	case t.masquerade:
		return []string{"-j", "MASQUERADE"}
	case t.mark != 0:
		return []string{"-j", "MARK", "--set-xmark", bits(t.mark)}
	case t.dnat.IsValid():
		return []string{"-j", "DNAT", "--to-destination", t.dnat.String()}
	case t.chain != "":
		return []string{"-j", t.chain}
	}
	return nil
}

func bits(mark uint32) string {
	s := "0x" + strconv.FormatUint(uint64(mark), 16)
	return s + "/" + s
}

// host leaves out the length of a prefix that is a single address.
func host(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func joinPorts(ports []uint16) string {
	var s []string
	for _, p := range ports {
		s = append(s, strconv.Itoa(int(p)))
	}
	return strings.Join(s, ",")
}

// exprs are what iptables makes of a rule in nf_tables.
func (r xtRule) exprs(v6 bool) nftExprs {
	var e nftExprs
	if r.in != "" {
		e = append(e, meta(unix.NFT_META_IIFNAME), cmp(false, str(r.in)))
	}
	if r.out != "" {
		e = append(e, meta(unix.NFT_META_OIFNAME), cmp(r.notOut, str(r.out)))
	}
	if r.proto != "" {
		e = append(e, ofProtocol(r.proto)...)
	}
	e = append(e, address(r.src, false, addressAt(v6, false))...)
	e = append(e, address(r.dst, r.notDst, addressAt(v6, true))...)
	if r.comment != "" {
		info := make([]byte, commentSize)
		copy(info, r.comment)
		e = append(e, xtMatch("comment", 0, info))
	}
	if len(r.dports) > 0 {
		e = append(e, xtMatch("multiport", 1, multiport(r.dports)))
	}
	if r.dport != 0 {
		e = append(e, toPort(r.dport)...)
	}
	if r.toLocal {
		const local, flags = 1 << unix.RTN_LOCAL, 0 // XT_ADDRTYPE_LOCAL; in struct xt_addrtype_info_v1
		e = append(e, xtMatch("addrtype", 1, ne32(ne16(nil, 0, local), flags)))
	}
	if r.established {
		e = append(e, xtMatch("conntrack", 3, conntrackState()))
	}
	if r.mark != 0 {
		e = append(e, meta(unix.NFT_META_MARK), mask(ne32(nil, r.mark)), cmp(false, ne32(nil, r.mark)))
	}
	return append(append(e, counter()), r.target.expr(v6)...)
}

// ofProtocol is true of packets of TCP or UDP.
func ofProtocol(name string) nftExprs {
	return nftExprs{meta(unix.NFT_META_L4PROTO), cmp(false, []byte{protocol(name)})}
}

// toPort is true of packets of TCP and UDP to a port.
func toPort(port uint16) nftExprs {
	return nftExprs{payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, dportAt, 2), cmp(false, binary.BigEndian.AppendUint16(nil, port))}
}

// protocol is the number of one by its name, 0 of none.
func protocol(name string) byte {
	switch name {
	case "tcp":
		return protoTCP
	case "udp":
		return protoUDP
	}
	return 0
}

const (
	commentSize = 256 // XT_MAX_COMMENT_LEN
	dportAt     = 2   // in the headers of TCP and UDP
	maxPorts    = 15  // XT_MULTI_PORTS
)

// addressAt is where an address is in the header, and how long.
type addressPlace struct{ at, size uint32 }

func addressAt(v6, dst bool) addressPlace {
	switch {
	case v6 && dst:
		return addressPlace{24, 16}
	case v6:
		return addressPlace{8, 16}
	case dst:
		return addressPlace{16, 4}
	}
	return addressPlace{12, 4}
}

// address compares as few bytes as a prefix has.
func address(p netip.Prefix, not bool, place addressPlace) nftExprs {
	if !p.IsValid() || p.Bits() == 0 {
		return nil
	}
	value := p.Masked().Addr().AsSlice()
	whole, part := p.Bits()/8, p.Bits()%8
	if part == 0 {
		return nftExprs{payload(unix.NFT_PAYLOAD_NETWORK_HEADER, place.at, uint32(whole)), cmp(not, value[:whole])}
	}
	bits := make([]byte, place.size)
	for i := range whole {
		bits[i] = 0xff
	}
	bits[whole] = 0xff << (8 - part)
	return nftExprs{payload(unix.NFT_PAYLOAD_NETWORK_HEADER, place.at, place.size), mask(bits), cmp(not, value)}
}

// conntrackState is struct xt_conntrack_mtinfo3 for what is of a connection that has been answered, or is related to one.
func conntrackState() []byte {
	const (
		before, size       = 146, 164       // bytes: what may be compared else, and all
		state              = 1              // XT_CONNTRACK_STATE
		established, other = 1 << 1, 1 << 2 // XT_CONNTRACK_STATE_BIT of IP_CT_ESTABLISHED and of IP_CT_RELATED
	)
	info := ne16(make([]byte, before, size), state, 0, established|other)
	return info[:size]
}

// multiport is struct xt_multiport_v1.
func multiport(ports []uint16) []byte {
	const destination = 1 // XT_MULTIPORT_DESTINATION
	info := []byte{destination, byte(len(ports))}
	list := make([]uint16, maxPorts)
	copy(list, ports)
	info = ne16(info, list...)
	return append(info, make([]byte, maxPorts+1)...) // no ranges, not inverted
}

func (t xtTo) expr(v6 bool) nftExprs {
	switch {
	case t.masquerade && v6:
		return nftExprs{xtTarget("MASQUERADE", 0, make([]byte, natRangeSize))}
	case t.masquerade:
		return nftExprs{xtTarget("MASQUERADE", 0, append(ne32(nil, 1), make([]byte, 16)...))} // struct nf_nat_ipv4_multi_range_compat
	case t.mark != 0:
		return nftExprs{xtTarget("MARK", 2, ne32(nil, t.mark, t.mark))} // struct xt_mark_tginfo2
	case t.dnat.IsValid():
		return nftExprs{xtTarget("DNAT", 2, natRange(t.dnat))}
	case t.chain == "ACCEPT":
		return nftExprs{accept()}
	case t.chain == "DROP":
		return nftExprs{drop()}
	case t.chain == "RETURN":
		return nftExprs{ret()}
	}
	return nftExprs{jump(t.chain)}
}

const natRangeSize = 40 // struct nf_nat_range: flags, two addresses, two ports

// natRange is struct nf_nat_range2 for one address and port.
func natRange(to netip.AddrPort) []byte {
	const mapIPs, proto = 1, 2 // NF_NAT_RANGE_MAP_IPS, NF_NAT_RANGE_PROTO_SPECIFIED
	info := ne32(nil, mapIPs|proto)
	addr := append(to.Addr().AsSlice(), make([]byte, 16)...)[:16]
	info = append(append(info, addr...), addr...)
	port := binary.BigEndian.AppendUint16(nil, to.Port())
	info = append(append(info, port...), port...)
	return append(info, 0, 0) // no base
}

// compat tells the kernel the protocol that extensions ask for.
func (r xtRule) compat() []byte {
	return attr(unix.NFTA_RULE_COMPAT, attr(unix.NFTA_RULE_COMPAT_PROTO, be32(uint32(protocol(r.proto)))), attr(unix.NFTA_RULE_COMPAT_FLAGS, be32(0)))
}

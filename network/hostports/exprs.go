package hostports

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// exprs are a rule, or a part of one.
type exprs []expr.Any

// The registers that are used: the first of 16 bytes, and words of 4 bytes, of which it has the first four.
const (
	reg1  = unix.NFT_REG_1
	word1 = unix.NFT_REG32_01
	word2 = unix.NFT_REG32_02
	word4 = unix.NFT_REG32_04
	word5 = unix.NFT_REG32_05
)

func join(parts ...exprs) exprs {
	var all exprs
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func ne32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

// meta loads what is known of a packet into a register; 0 is the first.
func meta(key expr.MetaKey, reg uint32) exprs {
	if reg == 0 {
		reg = reg1
	}
	return exprs{&expr.Meta{Key: key, Register: reg}}
}

func equal(value []byte) exprs {
	return exprs{&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: value}}
}

// isIn is whether the first register is an element of a set.
func isIn(set string) exprs {
	return exprs{&expr.Lookup{SourceRegister: reg1, SetName: set}}
}

func ofFamily(v6 bool) exprs {
	if v6 {
		return join(meta(expr.MetaKeyNFPROTO, 0), equal([]byte{unix.NFPROTO_IPV6}))
	}
	return join(meta(expr.MetaKeyNFPROTO, 0), equal([]byte{unix.NFPROTO_IPV4}))
}

// which of both addresses of a packet.
type which int

const (
	source which = iota
	destination
)

// loadAddress loads an address of the header into the first register.
func loadAddress(v6 bool, w which) exprs {
	e := &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: 12 + 4*uint32(w), Len: 4}
	if v6 {
		e.Offset, e.Len = 8+16*uint32(w), 16
	}
	return exprs{e}
}

// address is true of packets whose address is in a prefix.
func address(p netip.Prefix, w which) exprs {
	v6, value := p.Addr().Is6(), p.Masked().Addr().AsSlice()
	load := join(ofFamily(v6), loadAddress(v6, w))
	if p.IsSingleIP() {
		return join(load, equal(value))
	}
	bits := make([]byte, len(value))
	for i := range p.Bits() {
		bits[i/8] |= 1 << (7 - i%8)
	}
	return join(load, exprs{&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(bits)), Mask: bits, Xor: make([]byte, len(bits))}}, equal(value))
}

// toLocal is true of packets to an address of the node.
func toLocal() exprs {
	return join(exprs{&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true}}, equal(ne32(unix.RTN_LOCAL)))
}

// loadPort loads the port that a packet goes to; TCP, UDP and SCTP have it at the same place.
func loadPort(reg uint32) exprs {
	return exprs{&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
}

// portAtAddress leads to where the map of ports at one address says, and portAtAll to where that of ports at all does.
func portAtAddress(v6 bool) exprs {
	if v6 {
		return join(ofFamily(v6), loadAddress(v6, destination), meta(expr.MetaKeyL4PROTO, word4), loadPort(word5), leadBy(addrs6, v6))
	}
	return join(ofFamily(v6), loadAddress(v6, destination), meta(expr.MetaKeyL4PROTO, word1), loadPort(word2), leadBy(addrs4, v6))
}

func portAtAll(v6 bool) exprs {
	set := ports4
	if v6 {
		set = ports6
	}
	return join(ofFamily(v6), meta(expr.MetaKeyL4PROTO, 0), loadPort(word1), leadBy(set, v6))
}

// leadBy leads to the address and port that a map has; where it has none, the packet goes on to the next rule.
func leadBy(set string, v6 bool) exprs {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg1, RegProtoMin: word1}
	if v6 {
		nat.Family, nat.RegProtoMin = unix.NFPROTO_IPV6, word4
	}
	return exprs{&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: set}, nat}
}

// setMark keeps some bits of the packet's mark, and turns some over.
func setMark(keep, turn uint32) exprs {
	return join(
		meta(expr.MetaKeyMARK, 0),
		exprs{&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: ne32(keep), Xor: ne32(turn)}},
		exprs{&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg1}},
	)
}

func hasMark(bit uint32) exprs {
	return join(
		meta(expr.MetaKeyMARK, 0),
		exprs{&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: ne32(bit), Xor: ne32(0)}},
		equal(ne32(bit)),
	)
}

func masquerade() exprs { return exprs{&expr.Masq{}} }

func verdict(kind expr.VerdictKind, chain string) exprs {
	return exprs{&expr.Verdict{Kind: kind, Chain: chain}}
}

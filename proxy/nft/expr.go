package nft

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
)

// expr is an expression of a rule: its name, and its attributes as the kernel takes them.
type expr struct {
	name  string
	attrs []byte
	// protocols is a lookup in an anonymous set of TCP, UDP and SCTP, which nft wants to see before it reads a port.
	protocols bool
}

// rule is a list of expressions, which a packet goes through until one does not match.
type rule struct {
	exprs   []expr
	comment string
}

// Attributes and values that golang.org/x/sys/unix does not have (linux/netfilter/nf_tables.h).
const (
	nftaBitwiseOp   = 6
	nftaCtDirection = 3

	ctDstIP4 = 20 // NFT_CT_DST_IP
	ctDstIP6 = 22 // NFT_CT_DST_IP6

	natProtoSpecified = 3    // NF_NAT_RANGE_MAP_IPS, NF_NAT_RANGE_PROTO_SPECIFIED
	natFullyRandom    = 0x10 // NF_NAT_RANGE_PROTO_RANDOM_FULLY

	ctStatusDNAT   = 1 << 5 // IPS_DST_NAT
	ctStateInvalid = 1 << 0 // NF_CT_STATE_INVALID_BIT
	ctStateNew     = 1 << 3 // NF_CT_STATE_BIT(IP_CT_NEW)

	nftDynsetOpDelete = 2 // NFT_DYNSET_OP_DELETE

	tcpSYN, tcpRST, tcpACK = 0x02, 0x04, 0x10
	anonymous              = "__set%d"
)

// reg is the register of the n-th four bytes. The kernel names those at multiples of 16 bytes in the old way.
func reg(n int) uint32 {
	if n%4 == 0 {
		return uint32(unix.NFT_REG_1 + n/4)
	}
	return uint32(unix.NFT_REG32_00 + n)
}

// words is how many registers so many bytes take.
func words(size int) int { return (size + 3) / 4 }

// rb builds a rule for one family.
type rb struct {
	f layer
	r rule
}

func (b *rb) add(name string, put func(*nftables.Buffer)) *rb {
	var buf nftables.Buffer
	if put != nil {
		put(&buf)
	}
	b.r.exprs = append(b.r.exprs, expr{name: name, attrs: buf.Encoded()})
	return b
}

// note gives the rule a comment.
func (b *rb) note(comment string) *rb {
	b.r.comment = comment
	return b
}

// A field is a part of a key: it is loaded into registers from the n-th on, and its size is that of its content.
type field struct {
	size int
	load func(b *rb, n int)
}

func payload(base, offset uint32, size int) field {
	return field{size, func(b *rb, n int) {
		b.add("payload", func(a *nftables.Buffer) {
			a.Uint32(unix.NFTA_PAYLOAD_DREG, reg(n))
			a.Uint32(unix.NFTA_PAYLOAD_BASE, base)
			a.Uint32(unix.NFTA_PAYLOAD_OFFSET, offset)
			a.Uint32(unix.NFTA_PAYLOAD_LEN, uint32(size))
		})
	}}
}

func metaField(key uint32, size int) field {
	return field{size, func(b *rb, n int) {
		b.add("meta", func(a *nftables.Buffer) {
			a.Uint32(unix.NFTA_META_KEY, key)
			a.Uint32(unix.NFTA_META_DREG, reg(n))
		})
	}}
}

// ct reads conntrack; original is the direction of the first packet.
func ct(key uint32, size int, original bool) field {
	return field{size, func(b *rb, n int) {
		b.add("ct", func(a *nftables.Buffer) {
			a.Uint32(unix.NFTA_CT_DREG, reg(n))
			a.Uint32(unix.NFTA_CT_KEY, key)
			if original {
				a.Bytes(nftaCtDirection, []byte{0})
			}
		})
	}}
}

// random is a number from offset on, one of so many; of one, it is a constant that may be part of a key.
func random(modulus, offset uint32) field {
	return field{4, func(b *rb, n int) {
		b.add("numgen", func(a *nftables.Buffer) {
			a.Uint32(unix.NFTA_NG_DREG, reg(n))
			a.Uint32(unix.NFTA_NG_MODULUS, modulus)
			a.Uint32(unix.NFTA_NG_TYPE, unix.NFT_NG_RANDOM)
			a.Uint32(unix.NFTA_NG_OFFSET, offset)
		})
	}}
}

func constant(v uint32) field { return random(1, v) }

// hashed is a number from offset on, one of so many, by a hash of a key (model.Hash.Bucket).
func hashed(of key, modulus, offset uint32) field {
	return field{4, func(b *rb, n int) {
		at := n + 5 // as nft does it, so that what it makes of its listing is the same
		end := b.load(of, at)
		b.add("hash", func(a *nftables.Buffer) {
			a.Uint32(unix.NFTA_HASH_SREG, reg(at))
			a.Uint32(unix.NFTA_HASH_DREG, reg(n))
			a.Uint32(unix.NFTA_HASH_LEN, uint32(4*(end-at)))
			a.Uint32(unix.NFTA_HASH_MODULUS, modulus)
			a.Uint32(unix.NFTA_HASH_SEED, model.HashSeed)
			if offset != 0 { // the kernel does not tell of none
				a.Uint32(unix.NFTA_HASH_OFFSET, offset)
			}
			a.Uint32(unix.NFTA_HASH_TYPE, unix.NFT_HASH_JENKINS)
		})
	}}
}

var (
	protocol = metaField(unix.NFT_META_L4PROTO, 1)
	port     = payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2)
	fromPort = payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2)
	tcpFlags = payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1)
	window   = payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 14, 2)
	priority = metaField(unix.NFT_META_PRIORITY, 4)
	iifname  = metaField(unix.NFT_META_IIFNAME, unix.IFNAMSIZ)

	originalProtocol = ct(unix.NFT_CT_PROTOCOL, 1, false)
	originalPort     = ct(unix.NFT_CT_PROTO_DST, 2, true)
)

// Keys of sets.
type key []field

func (f layer) source() field { return payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.saddrAt, f.size) }
func (f layer) destination() field {
	return payload(unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrAt, f.size)
}

func (f layer) originalDestination() field {
	return ct(f.ctDst, f.size, true)
}

// The address and port that a packet is sent to, and that the first one of its connection was sent to, before it was changed.
func (f layer) to() key { return key{f.destination(), protocol, port} }

func (f layer) originally() key { return key{f.originalDestination(), originalProtocol, originalPort} }

func (k key) and(more ...field) key { return append(k[:len(k):len(k)], more...) }

// load puts a key into registers from the n-th on, and says which is free then.
func (b *rb) load(k key, n int) int {
	for _, f := range k {
		f.load(b, n)
		n += words(f.size)
	}
	return n
}

func (b *rb) lookup(set string, not bool, into int) *rb {
	return b.add("lookup", func(a *nftables.Buffer) {
		a.String(unix.NFTA_LOOKUP_SET, set)
		a.Uint32(unix.NFTA_LOOKUP_SREG, reg(0))
		if into >= 0 {
			a.Uint32(unix.NFTA_LOOKUP_DREG, reg(into))
		}
		flags := uint32(0)
		if not {
			flags = unix.NFT_LOOKUP_F_INV
		}
		a.Uint32(unix.NFTA_LOOKUP_FLAGS, flags)
	})
}

// in goes on if the key is in a set.
func (b *rb) in(k key, set string) *rb {
	b.load(k, 0)
	return b.lookup(set, false, -1)
}

// notIn goes on if the key is not in a set.
func (b *rb) notIn(k key, set string) *rb {
	b.load(k, 0)
	return b.lookup(set, true, -1)
}

// isTransport goes on if the packet is TCP, UDP or SCTP. The kernel does not need it; nft does, to read the rule.
func (b *rb) isTransport() *rb {
	b.load(key{protocol}, 0)
	b.lookup(anonymous, false, -1)
	b.r.exprs[len(b.r.exprs)-1].protocols = true
	return b
}

// setPriority has the packet's priority be what a map has for a key, or the rule end.
func (b *rb) setPriority(k key, mapped string) *rb {
	b.load(k, 0)
	b.lookup(mapped, false, 0)
	return b.storePriority()
}

func (b *rb) storePriority() *rb {
	return b.add("meta", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_META_KEY, unix.NFT_META_PRIORITY)
		a.Uint32(unix.NFTA_META_SREG, reg(0))
	})
}

// zeroPriority has the packet's priority be 0.
func (b *rb) zeroPriority() *rb {
	b.add("immediate", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_IMMEDIATE_DREG, reg(0))
		n := a.Open(unix.NFTA_IMMEDIATE_DATA)
		a.Bytes(unix.NFTA_DATA_VALUE, make([]byte, 4))
		a.Close(n)
	})
	return b.storePriority()
}

// dnat sends the packet to the address and port that a map has for a key, or ends the rule.
func (b *rb) dnat(k key, mapped string) *rb {
	b.load(k, 0)
	b.lookup(mapped, false, 0)
	return b.add("nat", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		a.Uint32(unix.NFTA_NAT_FAMILY, uint32(b.f.family))
		a.Uint32(unix.NFTA_NAT_REG_ADDR_MIN, reg(0))
		a.Uint32(unix.NFTA_NAT_REG_ADDR_MAX, reg(0))
		a.Uint32(unix.NFTA_NAT_REG_PROTO_MIN, reg(words(b.f.size)))
		a.Uint32(unix.NFTA_NAT_REG_PROTO_MAX, reg(words(b.f.size)))
		a.Uint32(unix.NFTA_NAT_FLAGS, natProtoSpecified)
	})
}

// dnatAddress sends the packet to the address that a map has for a key, at the port that it was sent to, or ends the rule.
func (b *rb) dnatAddress(k key, mapped string) *rb {
	b.load(k, 0)
	b.lookup(mapped, false, 0)
	return b.add("nat", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		a.Uint32(unix.NFTA_NAT_FAMILY, uint32(b.f.family))
		a.Uint32(unix.NFTA_NAT_REG_ADDR_MIN, reg(0))
		a.Uint32(unix.NFTA_NAT_REG_ADDR_MAX, reg(0))
	})
}

// update puts a key with its value into a dynamic map for a time, or has what is there stay for so long.
func (b *rb) update(k key, value key, mapped string, milliseconds uint64) *rb {
	at := b.load(k, 0)
	b.load(value, at)
	return b.add("dynset", func(a *nftables.Buffer) {
		a.String(unix.NFTA_DYNSET_SET_NAME, mapped)
		a.Uint32(unix.NFTA_DYNSET_OP, unix.NFT_DYNSET_OP_UPDATE)
		a.Uint32(unix.NFTA_DYNSET_SREG_KEY, reg(0))
		a.Uint32(unix.NFTA_DYNSET_SREG_DATA, reg(at))
		a.Uint64(unix.NFTA_DYNSET_TIMEOUT, milliseconds)
	})
}

// forget takes a key out of a dynamic set.
func (b *rb) forget(k key, set string) *rb {
	b.load(k, 0)
	return b.add("dynset", func(a *nftables.Buffer) {
		a.String(unix.NFTA_DYNSET_SET_NAME, set)
		a.Uint32(unix.NFTA_DYNSET_OP, nftDynsetOpDelete)
		a.Uint32(unix.NFTA_DYNSET_SREG_KEY, reg(0))
	})
}

// untracked has conntrack take no notice of the packet.
func (b *rb) untracked() *rb { return b.add("notrack", nil) }

func (b *rb) masquerade() *rb {
	return b.add("masq", func(a *nftables.Buffer) { a.Uint32(unix.NFTA_MASQ_FLAGS, natFullyRandom) })
}

// compare goes on if the first register has a value, or has not.
func (b *rb) compare(not bool, value []byte) *rb {
	return b.add("cmp", func(a *nftables.Buffer) {
		op := uint32(unix.NFT_CMP_EQ)
		if not {
			op = unix.NFT_CMP_NEQ
		}
		a.Uint32(unix.NFTA_CMP_SREG, reg(0))
		a.Uint32(unix.NFTA_CMP_OP, op)
		n := a.Open(unix.NFTA_CMP_DATA)
		a.Bytes(unix.NFTA_DATA_VALUE, value)
		a.Close(n)
	})
}

// mask keeps some bits of the first registers.
func (b *rb) mask(bits []byte) *rb {
	return b.add("bitwise", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_BITWISE_SREG, reg(0))
		a.Uint32(unix.NFTA_BITWISE_DREG, reg(0))
		a.Uint32(unix.NFTA_BITWISE_LEN, uint32(len(bits)))
		a.Uint32(nftaBitwiseOp, 0)
		n := a.Open(unix.NFTA_BITWISE_MASK)
		a.Bytes(unix.NFTA_DATA_VALUE, bits)
		a.Close(n)
		n = a.Open(unix.NFTA_BITWISE_XOR)
		a.Bytes(unix.NFTA_DATA_VALUE, make([]byte, len(bits)))
		a.Close(n)
	})
}

// from goes on if the source is in a prefix, or is not.
func (b *rb) from(p netip.Prefix, not bool) *rb {
	value, size := p.Masked().Addr().AsSlice(), p.Bits()/8
	if p.Bits()%8 == 0 && size > 0 { // nft's way: as many bytes as count
		b.load(key{payload(unix.NFT_PAYLOAD_NETWORK_HEADER, b.f.saddrAt, size)}, 0)
		return b.compare(not, value[:size])
	}
	bits := make([]byte, len(value))
	for i := range p.Bits() {
		bits[i/8] |= 0x80 >> (i % 8)
	}
	b.load(key{b.f.source()}, 0)
	return b.mask(bits).compare(not, value)
}

// through goes on if the packet came in by an interface, or by one whose name begins so, or did not.
func (b *rb) through(name string, prefix, not bool) *rb {
	b.load(key{iifname}, 0)
	value := []byte(name)
	if !prefix {
		value = append(value, make([]byte, unix.IFNAMSIZ-len(value))...)
	}
	return b.compare(not, value)
}

// sourceIsLocal and destinationIsLocal go on if it is an address of the node.
func (b *rb) sourceIsLocal() *rb      { return b.isLocal(unix.NFTA_FIB_F_SADDR) }
func (b *rb) destinationIsLocal() *rb { return b.isLocal(unix.NFTA_FIB_F_DADDR) }

func (b *rb) isLocal(which uint32) *rb {
	b.add("fib", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_FIB_DREG, reg(0))
		a.Uint32(unix.NFTA_FIB_RESULT, unix.NFT_FIB_RESULT_ADDRTYPE)
		a.Uint32(unix.NFTA_FIB_FLAGS, which)
	})
	return b.compare(false, native32(unix.RTN_LOCAL))
}

// isNew goes on for the first packet of a connection, and for more as long as none was answered.
func (b *rb) isNew() *rb { return b.hasBit(unix.NFT_CT_STATE, ctStateNew) }

// isForwarded goes on if the connection's destination was changed.
func (b *rb) isForwarded() *rb { return b.hasBit(unix.NFT_CT_STATUS, ctStatusDNAT) }

// isUnknown goes on for packets of no connection that had an answer.
func (b *rb) isUnknown() *rb { return b.hasBit(unix.NFT_CT_STATE, ctStateNew|ctStateInvalid) }

// hasFlags goes on if these flags of TCP, and no other ones of the mask, are set.
func (b *rb) hasFlags(mask, flags byte) *rb {
	b.load(key{tcpFlags}, 0)
	return b.mask([]byte{mask}).compare(false, []byte{flags})
}

// hasNoWindow goes on if the window of TCP is 0.
func (b *rb) hasNoWindow() *rb {
	b.load(key{window}, 0)
	return b.compare(false, []byte{0, 0})
}

func (b *rb) hasBit(ctKey, bit uint32) *rb {
	b.load(key{ct(ctKey, 4, false)}, 0)
	return b.mask(native32(bit)).compare(true, make([]byte, 4))
}

func (b *rb) isTCP() *rb {
	b.load(key{protocol}, 0)
	return b.compare(false, []byte{unix.IPPROTO_TCP})
}

func (b *rb) count() *rb { return b.add(counterExpr, nil) }

func (b *rb) rejectReset() *rb {
	return b.add("reject", func(a *nftables.Buffer) { a.Uint32(unix.NFTA_REJECT_TYPE, unix.NFT_REJECT_TCP_RST) })
}

func (b *rb) rejectPort() *rb {
	return b.add("reject", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_REJECT_TYPE, unix.NFT_REJECT_ICMP_UNREACH)
		a.Bytes(unix.NFTA_REJECT_ICMP_CODE, []byte{b.f.portUnreachable})
	})
}

func (b *rb) verdict(code int32, chain string) *rb {
	return b.add("immediate", func(a *nftables.Buffer) {
		a.Uint32(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		n := a.Open(unix.NFTA_IMMEDIATE_DATA)
		v := a.Open(unix.NFTA_DATA_VERDICT)
		a.Uint32(unix.NFTA_VERDICT_CODE, uint32(code))
		if chain != "" {
			a.String(unix.NFTA_VERDICT_CHAIN, chain)
		}
		a.Close(v)
		a.Close(n)
	})
}

func (b *rb) jump(chain string) *rb { return b.verdict(unix.NFT_JUMP, chain) }
func (b *rb) goTo(chain string) *rb { return b.verdict(unix.NFT_GOTO, chain) }
func (b *rb) returns() *rb          { return b.verdict(unix.NFT_RETURN, "") }
func (b *rb) drop() *rb             { return b.verdict(0, "") }
func native32(v uint32) []byte      { return binary.NativeEndian.AppendUint32(nil, v) }
func isAnonymous(name string) bool  { return strings.HasPrefix(name, "__") }

// covers says whether what the kernel has is what was asked for: each attribute of want is in got, and in lists nothing
// else. Newer kernels tell more attributes than are sent.
func covers(want, got []byte) bool {
	have := map[uint16][][]byte{}
	nftables.Attrs(got, func(kind uint16, content []byte) { have[kind] = append(have[kind], content) })
	ok := true
	nftables.RawAttrs(want, func(kind uint16, nested bool, content []byte) {
		if len(have[kind]) == 0 {
			ok = false
			return
		}
		other := have[kind][0]
		have[kind] = have[kind][1:]
		switch {
		case bytes.Equal(content, other):
		case nested:
			ok = ok && covers(content, other)
		default:
			ok = false
		}
	})
	return ok
}

// readExprs reads the expressions of a rule that the kernel has.
func readExprs(list []byte) []expr {
	var all []expr
	nftables.Attrs(list, func(_ uint16, elem []byte) {
		var e expr
		nftables.Attrs(elem, func(kind uint16, content []byte) {
			switch kind {
			case unix.NFTA_EXPR_NAME:
				e.name = nftables.Text(content)
			case unix.NFTA_EXPR_DATA:
				e.attrs = bytes.Clone(content)
			}
		})
		all = append(all, e)
	})
	return all
}

// is says whether a rule that the kernel has is this one.
func (r *rule) is(got *rule) bool {
	if r.comment != got.comment || len(r.exprs) != len(got.exprs) {
		return false
	}
	for i := range r.exprs {
		want, have := &r.exprs[i], &got.exprs[i]
		if want.name != have.name {
			return false
		}
		if want.protocols {
			if !isAnonymous(setOf(have.attrs)) {
				return false
			}
			continue
		}
		if !covers(want.attrs, have.attrs) {
			return false
		}
	}
	return true
}

// setOf is the set of a lookup.
func setOf(attrs []byte) (name string) {
	nftables.Attrs(attrs, func(kind uint16, content []byte) {
		if kind == unix.NFTA_LOOKUP_SET {
			name = nftables.Text(content)
		}
	})
	return name
}

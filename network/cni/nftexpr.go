package cni

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// nftExprs are the expressions of a rule, each as an element of the list that the kernel takes and gives: attributes are in
// the order in which the kernel gives them, so that what was taken can be found again by comparison.
type nftExprs [][]byte

func expr(name string, content ...[]byte) []byte {
	return attr(unix.NFTA_LIST_ELEM, attr(unix.NFTA_EXPR_NAME, str(name)), attr(unix.NFTA_EXPR_DATA, content...))
}

// readExprs reads the list of a rule. Counts are set to zero.
func readExprs(list []byte) nftExprs {
	var all nftExprs
	nftables.Attrs(list, func(_ uint16, elem []byte) {
		name, data := exprParts(elem)
		if name == "counter" {
			all = append(all, counter())
			return
		}
		all = append(all, attr(unix.NFTA_LIST_ELEM, attr(unix.NFTA_EXPR_NAME, str(name)), attr(unix.NFTA_EXPR_DATA, data)))
	})
	return all
}

func exprParts(elem []byte) (name string, data []byte) {
	nftables.Attrs(elem, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_EXPR_NAME:
			name = string(bytes.TrimRight(content, "\x00"))
		case unix.NFTA_EXPR_DATA:
			data = content
		}
	})
	return name, data
}

func (e nftExprs) equal(o nftExprs) bool {
	return bytes.Equal(bytes.Join(e, nil), bytes.Join(o, nil))
}

// jumpsTo says whether a rule ends with a jump to a chain.
func (e nftExprs) jumpsTo(chain string) bool {
	return len(e) > 0 && bytes.Equal(e[len(e)-1], jump(chain))
}

// The registers of nf_tables: verdicts are in the first, and what is compared in the first of those of 16 bytes.
const (
	regVerdict = unix.NFT_REG_VERDICT
	reg1       = unix.NFT_REG_1
)

func payload(base, offset, size uint32) []byte {
	return expr("payload", attr(unix.NFTA_PAYLOAD_DREG, be32(reg1)), attr(unix.NFTA_PAYLOAD_BASE, be32(base)),
		attr(unix.NFTA_PAYLOAD_OFFSET, be32(offset)), attr(unix.NFTA_PAYLOAD_LEN, be32(size)))
}

func meta(key uint32) []byte {
	return expr("meta", attr(unix.NFTA_META_KEY, be32(key)), attr(unix.NFTA_META_DREG, be32(reg1)))
}

func cmp(not bool, value []byte) []byte {
	op := uint32(unix.NFT_CMP_EQ)
	if not {
		op = unix.NFT_CMP_NEQ
	}
	return expr("cmp", attr(unix.NFTA_CMP_SREG, be32(reg1)), attr(unix.NFTA_CMP_OP, be32(op)),
		attr(unix.NFTA_CMP_DATA, attr(unix.NFTA_DATA_VALUE, value)))
}

// mask keeps some bits.
func mask(bits []byte) []byte {
	const nftaBitwiseOp = 6 // NFTA_BITWISE_OP; NFT_BITWISE_MASK_XOR is 0
	return expr("bitwise", attr(unix.NFTA_BITWISE_SREG, be32(reg1)), attr(unix.NFTA_BITWISE_DREG, be32(reg1)),
		attr(unix.NFTA_BITWISE_LEN, be32(uint32(len(bits)))), attr(nftaBitwiseOp, be32(0)),
		attr(unix.NFTA_BITWISE_MASK, attr(unix.NFTA_DATA_VALUE, bits)),
		attr(unix.NFTA_BITWISE_XOR, attr(unix.NFTA_DATA_VALUE, make([]byte, len(bits)))))
}

func counter() []byte {
	return expr("counter", attr(unix.NFTA_COUNTER_BYTES, be64(0)), attr(unix.NFTA_COUNTER_PACKETS, be64(0)))
}

func verdict(code int32, chain string) []byte {
	v := [][]byte{attr(unix.NFTA_VERDICT_CODE, be32(uint32(code)))}
	if chain != "" {
		v = append(v, attr(unix.NFTA_VERDICT_CHAIN, str(chain)))
	}
	return expr("immediate", attr(unix.NFTA_IMMEDIATE_DREG, be32(regVerdict)), attr(unix.NFTA_IMMEDIATE_DATA, attr(unix.NFTA_DATA_VERDICT, v...)))
}

func jump(chain string) []byte { return verdict(unix.NFT_JUMP, chain) }

func accept() []byte { return verdict(nfAccept, "") }

func drop() []byte { return verdict(nfDrop, "") }

// xtMatch and xtTarget are extensions of iptables. Their data is that of the C structure, padded to eight bytes.
func xtMatch(name string, rev uint32, info []byte) []byte {
	return expr("match", attr(unix.NFTA_MATCH_NAME, str(name)), attr(unix.NFTA_MATCH_REV, be32(rev)), attr(unix.NFTA_MATCH_INFO, align8(info)))
}

func xtTarget(name string, rev uint32, info []byte) []byte {
	return expr("target", attr(unix.NFTA_TARGET_NAME, str(name)), attr(unix.NFTA_TARGET_REV, be32(rev)), attr(unix.NFTA_TARGET_INFO, align8(info)))
}

func align8(b []byte) []byte {
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	return b
}

func ne16(b []byte, v ...uint16) []byte {
	for _, n := range v {
		b = binary.NativeEndian.AppendUint16(b, n)
	}
	return b
}

func ne32(b []byte, v ...uint32) []byte {
	for _, n := range v {
		b = binary.NativeEndian.AppendUint32(b, n)
	}
	return b
}

package conntrack

import (
	"encoding/binary"
	"iter"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What is read is read in place: a million entries are no reason to allocate.

// attributes are those in b, by their kinds, as long as they are whole.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofNlAttr {
			size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
			if size < unix.SizeofNlAttr || size > len(b) {
				return
			}
			if !yield(kind&nl.NLA_TYPE_MASK, b[unix.SizeofNlAttr:size]) {
				return
			}
			b = b[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
		}
	}
}

// read makes it the entry of a message, if it is one.
func (e *Entry) read(msg []byte) bool {
	if len(msg) < nl.SizeofNfgenmsg {
		return false
	}
	*e = Entry{raw: msg[nl.SizeofNfgenmsg:]}
	for kind, value := range attributes(e.raw) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			e.Original, e.Protocol = readTuple(value)
		case nl.CTA_TUPLE_REPLY:
			e.Reply, _ = readTuple(value)
		case nl.CTA_STATUS:
			if len(value) == 4 {
				e.Status = binary.BigEndian.Uint32(value)
			}
		case nl.CTA_PROTOINFO:
			for kind, value := range attributes(value) {
				if kind == ctaProtoinfoTCP {
					e.TCPState = readState(value)
				}
			}
		}
	}
	return true
}

func readState(b []byte) uint8 {
	for kind, value := range attributes(b) {
		if kind == ctaProtoinfoTCPStat && len(value) == 1 {
			return value[0]
		}
	}
	return 0
}

func readTuple(b []byte) (t Tuple, protocol uint8) {
	var src, dst netip.Addr
	var from, to uint16
	for kind, value := range attributes(b) {
		switch kind {
		case nl.CTA_TUPLE_IP:
			for kind, value := range attributes(value) {
				switch kind {
				case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
					src, _ = netip.AddrFromSlice(value)
				case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
					dst, _ = netip.AddrFromSlice(value)
				}
			}
		case nl.CTA_TUPLE_PROTO:
			for kind, value := range attributes(value) {
				switch {
				case kind == nl.CTA_PROTO_NUM && len(value) == 1:
					protocol = value[0]
				case kind == nl.CTA_PROTO_SRC_PORT && len(value) == 2:
					from = binary.BigEndian.Uint16(value)
				case kind == nl.CTA_PROTO_DST_PORT && len(value) == 2:
					to = binary.BigEndian.Uint16(value)
				}
			}
		}
	}
	return Tuple{netip.AddrPortFrom(src, from), netip.AddrPortFrom(dst, to)}, protocol
}

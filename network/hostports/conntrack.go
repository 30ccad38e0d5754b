package hostports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A node may track a million connections, and a pod asks about a few of them: the kernel is told which, and what it tells is
// not collected.

// Attributes that the libraries do not have (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctaFilter          = 25
	ctaFilterOrigFlags = 1
	// Which fields of a tuple count; the numbers are those of the kernel's nf_internals.h.
	filterProtocol = 1 << 3
	filterDstPort  = 1 << 5
)

// connection is one of UDP, as the kernel tracks it.
type connection struct {
	port     uint16     // where its first packet went
	to, with netip.Addr // where that went, and who answers
	raw      []byte     // by which the kernel knows it
}

// eachConnection calls f for all connections of UDP of a family, or, unless port is 0, for those to that port. A kernel before
// 5.8 tells of others, too.
func eachConnection(v6 bool, port uint16, f func(connection)) error {
	filter, err := udpTo(port)
	if err != nil {
		return err
	}
	var failed error
	err = conntrack(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, v6, filter).ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		c, udp, err := readConnection(msg)
		if err != nil {
			failed = err
			return false
		}
		if udp && (port == 0 || c.port == port) {
			f(c)
		}
		return true
	})
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("connections: %w", err)
	}
	return nil
}

// forgetConnection has the kernel forget it. It may have done so already.
func forgetConnection(v6 bool, c connection) error {
	_, err := conntrack(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, v6, c.raw).Execute(unix.NETLINK_NETFILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func conntrack(operation, flags int, v6 bool, attrs []byte) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|operation, flags)
	family := uint8(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	req.AddRawData(attrs)
	return req
}

// udpTo is a filter of connections.
func udpTo(port uint16) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	flags := uint32(filterProtocol)
	ae.Nested(nl.CTA_TUPLE_ORIG, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(nl.CTA_TUPLE_PROTO, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(nl.CTA_PROTO_NUM, uint8(UDP))
			if port != 0 {
				ae.Bytes(nl.CTA_PROTO_DST_PORT, be16(port))
				flags |= filterDstPort
			}
			return nil
		})
		return nil
	})
	ae.Nested(ctaFilter, func(ae *netlink.AttributeEncoder) error {
		ae.Uint32(ctaFilterOrigFlags, flags)
		return nil
	})
	return ae.Encode()
}

// readConnection reads what the kernel tells of one; udp is whether it is of UDP.
func readConnection(msg []byte) (c connection, udp bool, err error) {
	if len(msg) < nl.SizeofNfgenmsg {
		return c, false, errors.New("short answer")
	}
	c.raw = msg[nl.SizeofNfgenmsg:]
	ad, err := netlink.NewAttributeDecoder(c.raw)
	if err != nil {
		return c, false, err
	}
	for ad.Next() {
		switch ad.Type() {
		case nl.CTA_TUPLE_ORIG:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				t, err := readTuple(ad)
				c.to, c.port, udp = t.dst, t.port, t.protocol == UDP
				return err
			})
		case nl.CTA_TUPLE_REPLY:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				t, err := readTuple(ad)
				c.with = t.src
				return err
			})
		}
	}
	return c, udp, ad.Err()
}

// tuple is one direction of a connection.
type tuple struct {
	src, dst netip.Addr
	protocol Protocol
	port     uint16 // where it goes
}

func readTuple(ad *netlink.AttributeDecoder) (t tuple, err error) {
	for ad.Next() {
		switch ad.Type() {
		case nl.CTA_TUPLE_IP:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch ad.Type() {
					case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
						t.src, _ = netip.AddrFromSlice(ad.Bytes())
					case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
						t.dst, _ = netip.AddrFromSlice(ad.Bytes())
					}
				}
				return nil
			})
		case nl.CTA_TUPLE_PROTO:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch ad.Type() {
					case nl.CTA_PROTO_NUM:
						t.protocol = Protocol(ad.Uint8())
					case nl.CTA_PROTO_DST_PORT:
						if b := ad.Bytes(); len(b) == 2 {
							t.port = binary.BigEndian.Uint16(b)
						}
					}
				}
				return nil
			})
		}
	}
	return t, ad.Err()
}

// connectionsOf collects those of a family, to some ports, that pick wants.
func connectionsOf(v6 bool, ports []uint16, pick func(connection) bool) (all []connection, err error) {
	const few = 8 // as often the table is walked, rather than told as a whole
	if len(ports) > few {
		ports = []uint16{0}
	}
	for _, port := range ports {
		if err := eachConnection(v6, port, func(c connection) {
			if pick(c) {
				c.raw = slices.Clone(c.raw)
				all = append(all, c)
			}
		}); err != nil {
			return nil, err
		}
	}
	return all, nil
}

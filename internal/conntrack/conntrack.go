package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What the libraries do not have of linux/netfilter/nfnetlink_conntrack.h.
const (
	msgGetStats = 5 // IPCTNL_MSG_CT_GET_STATS

	ctaFilter           = 25
	ctaFilterOrigFlags  = 1
	ctaStatsTotal       = 1
	ctaProtoinfoTCP     = 1
	ctaProtoinfoTCPStat = 1
	// Which fields of a tuple count; the numbers are those of the kernel's nf_internals.h.
	filterProtocol = 1 << 3
	filterDstPort  = 1 << 5
)

// DestinationChanged is the bit of Entry.Status that says that packets go elsewhere than they were sent to (IPS_DST_NAT).
const DestinationChanged = 1 << 5

// Tuple is one direction of a connection.
type Tuple struct {
	Src, Dst netip.AddrPort
}

// Entry is a connection as the kernel tracks it. It is valid until the function that it was given to returns.
type Entry struct {
	// Protocol is TCP, UDP ... by its number (IANA). Others than those with ports have ports of 0.
	Protocol uint8
	// Original is what its first packet had, Reply what an answer to it has when it comes in: from where the packet went in
	// truth, to the source that it got.
	Original, Reply Tuple
	// Status are IPS_* bits (linux/netfilter/nf_conntrack_common.h).
	Status uint32
	// TCPState is TCP_CONNTRACK_*; 0 if it is not of TCP.
	TCPState uint8

	raw []byte
}

// Key is what the kernel knows an entry by. One of the same addresses that has come in its place since may be taken for it.
type Key struct {
	family uint8
	attrs  []byte
}

// Key is the entry's, which stays valid.
func (e *Entry) Key() Key {
	family := uint8(unix.AF_INET)
	if e.Original.Dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	return Key{family, slices.Clone(e.raw)}
}

// Filter picks entries. The zero value picks all.
type Filter struct {
	// Family is AF_INET or AF_INET6; 0 picks both.
	Family uint8
	// Protocol is a number of IANA's; it needs a Family.
	Protocol uint8
	// Port is where the first packet was sent to; it needs a Protocol.
	Port uint16
}

func (f Filter) matches(e *Entry) bool {
	return (f.Protocol == 0 || e.Protocol == f.Protocol) && (f.Port == 0 || e.Original.Dst.Port() == f.Port)
}

// Conn is a pair of netlink sockets: one for what is read, one for what is removed meanwhile.
type Conn struct {
	read, remove map[int]*nl.SocketHandle
}

// Open opens a connection in the network namespace of the calling thread.
func Open() (*Conn, error) {
	c := &Conn{}
	for _, sockets := range []*map[int]*nl.SocketHandle{&c.read, &c.remove} {
		s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
		if err != nil {
			c.Close()
			return nil, fmt.Errorf("conntrack: %w", err)
		}
		*sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}
	}
	return c, nil
}

// Close closes it.
func (c *Conn) Close() {
	for _, sockets := range []map[int]*nl.SocketHandle{c.read, c.remove} {
		for _, s := range sockets {
			s.Close()
		}
	}
}

// ErrInterrupted is a table that was rebuilt while it was read (another size): entries may be missing.
var ErrInterrupted = vnetlink.ErrDumpInterrupted

// Each calls f for the entries that the filter picks. Those that come or go meanwhile may be among them or not, and
// one may be told of twice. f may take its time, and call Delete. If it returns false that is the end, and the Conn can only be
// closed: what the kernel has not told yet would have to be read first.
func (c *Conn) Each(filter Filter, f func(*Entry) bool) error {
	attrs, err := filter.attributes()
	if err != nil {
		return err
	}
	var e Entry
	ended := false
	err = c.request(c.read, nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, filter.Family, attrs).ExecuteIter(unix.NETLINK_NETFILTER, 0, func(msg []byte) bool {
		// Kernels before 5.8 tell of all.
		if !e.read(msg) || !filter.matches(&e) || f(&e) {
			return true
		}
		ended = true
		c.read[unix.NETLINK_NETFILTER].Close()
		return false
	})
	if err != nil && !ended {
		return fmt.Errorf("conntrack: read the table: %w", err)
	}
	return nil
}

// Delete removes an entry, and says whether it was still there.
func (c *Conn) Delete(key Key) (bool, error) {
	_, err := c.request(c.remove, nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, key.family, key.attrs).Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("conntrack: remove an entry: %w", err)
	}
	return true, nil
}

// ForgetUDP removes the connections of UDP of a family that pick wants, of those to some ports: a node may track a million
// connections, and whoever has these ports asks about a few of them, so the kernel is told which. Of many ports pick is given
// those to others, too.
func (c *Conn) ForgetUDP(v6 bool, ports []uint16, pick func(*Entry) bool) error {
	const few = 8 // as often the table is walked, rather than told as a whole
	if len(ports) > few {
		ports = []uint16{0}
	}
	filter := Filter{Family: unix.AF_INET, Protocol: unix.IPPROTO_UDP}
	if v6 {
		filter.Family = unix.AF_INET6
	}
	var gone []Key
	for _, filter.Port = range ports {
		if err := c.Each(filter, func(e *Entry) bool {
			if pick(e) {
				gone = append(gone, e.Key())
			}
			return true
		}); err != nil {
			return err
		}
	}
	var errs []error
	for _, key := range gone {
		_, err := c.Delete(key)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Count is how many entries of all families there are.
func (c *Conn) Count() (int, error) {
	answers, err := c.request(c.remove, msgGetStats, unix.NLM_F_ACK, 0, nil).Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, fmt.Errorf("conntrack: count entries: %w", err)
	}
	for _, msg := range answers {
		for kind, value := range attributes(msg[min(nl.SizeofNfgenmsg, len(msg)):]) {
			if kind == ctaStatsTotal && len(value) >= 4 {
				return int(binary.BigEndian.Uint32(value)), nil
			}
		}
	}
	return 0, errors.New("conntrack: count entries: the kernel does not say")
}

func (c *Conn) request(sockets map[int]*nl.SocketHandle, operation, flags int, family uint8, attrs []byte) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|operation, flags)
	req.Sockets = sockets
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	req.AddRawData(attrs)
	return req
}

func (f Filter) attributes() ([]byte, error) {
	if f.Protocol == 0 {
		return nil, nil
	}
	ae := netlink.NewAttributeEncoder()
	flags := uint32(filterProtocol)
	ae.Nested(nl.CTA_TUPLE_ORIG, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(nl.CTA_TUPLE_PROTO, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(nl.CTA_PROTO_NUM, f.Protocol)
			if f.Port != 0 {
				ae.Bytes(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, f.Port))
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

package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/proxy/model"
)

// table is a namespace's table of connections, and the Cleaner of it. The test's thread is in the namespace.
type table struct {
	t testing.TB
	*Cleaner
	removed [model.Families]int
}

func newTable(t testing.TB) *table {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	b := &table{t: t}
	b.Cleaner = New(Options{Log: slog.New(slog.DiscardHandler), Swept: func(f model.Family, _ time.Duration, n int) { b.removed[f] += n }})
	t.Cleanup(b.close)
	return b
}

// sweep does at once what Run would do.
func (b *table) sweep() {
	b.t.Helper()
	if b.take(); b.pending.empty() {
		return
	}
	if err := b.Cleaner.sweep(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// flow is a connection: "udp CLIENT>SENT TO>LED TO".
type flow string

// ends are the three addresses and ports; a client without a port has 4000.
func (f flow) ends(t testing.TB) (protocol uint8, client, sent, to netip.AddrPort) {
	t.Helper()
	name, rest, _ := strings.Cut(string(f), " ")
	parts := strings.Split(rest, ">")
	if len(parts) != 3 {
		t.Fatalf("flow %q", f)
	}
	return map[string]uint8{"udp": unix.IPPROTO_UDP, "tcp": unix.IPPROTO_TCP}[name],
		netip.MustParseAddrPort(parts[0]), netip.MustParseAddrPort(parts[1]), netip.MustParseAddrPort(parts[2])
}

func flowOf(e *conntrack.Entry) flow {
	return flow(fmt.Sprintf("%s %v>%v>%v", model.Protocol(e.Protocol), e.Original.Src, e.Original.Dst, e.Reply.Src))
}

// flows are all of both families, sorted.
func (b *table) flows() []flow {
	b.t.Helper()
	c, err := conntrack.Open()
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	var all []flow
	if err := c.Each(conntrack.Filter{}, func(e *conntrack.Entry) bool { all = append(all, flowOf(e)); return true }); err != nil {
		b.t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

// has fails the test if there are other connections than these.
func (b *table) has(want ...flow) {
	b.t.Helper()
	slices.Sort(want)
	if got := b.flows(); !slices.Equal(got, want) {
		b.t.Errorf("there are\n  %q, want\n  %q", got, want)
	}
}

// track has the kernel track connections.
func (b *table) track(flows ...flow) {
	b.t.Helper()
	tr := newTracker(b.t)
	for _, f := range flows {
		tr.add(f.ends(b.t))
	}
	tr.close()
}

// tracker has the kernel track connections, many at a time.
type tracker struct {
	t     testing.TB
	fd    int
	batch []byte
	n     uint32
}

func newTracker(t testing.TB) *tracker {
	t.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	return &tracker{t: t, fd: fd}
}

func (tr *tracker) close() {
	tr.t.Helper()
	tr.flush()
	if err := unix.Close(tr.fd); err != nil {
		tr.t.Fatal(err)
	}
}

func (tr *tracker) add(protocol uint8, client, sent, to netip.AddrPort) {
	tr.t.Helper()
	ae := netlink.NewAttributeEncoder()
	putTuple(ae, nl.CTA_TUPLE_ORIG, protocol, client, sent)
	putTuple(ae, nl.CTA_TUPLE_REPLY, protocol, to, client)
	ae.Bytes(nl.CTA_TIMEOUT, binary.BigEndian.AppendUint32(nil, 600))
	if protocol == unix.IPPROTO_TCP {
		ae.Nested(nl.CTA_PROTOINFO, func(ae *netlink.AttributeEncoder) error {
			ae.Nested(nl.CTA_PROTOINFO_TCP, func(ae *netlink.AttributeEncoder) error {
				ae.Uint8(nl.CTA_PROTOINFO_TCP_STATE, nl.TCP_CONNTRACK_ESTABLISHED)
				return nil
			})
			return nil
		})
	}
	attrs, err := ae.Encode()
	if err != nil {
		tr.t.Fatal(err)
	}
	const header = unix.SizeofNlMsghdr + nl.SizeofNfgenmsg
	tr.n++
	m := binary.NativeEndian.AppendUint32(tr.batch, uint32(header+len(attrs)))
	m = binary.NativeEndian.AppendUint16(m, unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_NEW)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	m = binary.NativeEndian.AppendUint32(m, tr.n)
	m = binary.NativeEndian.AppendUint32(m, 0)
	family := byte(unix.AF_INET)
	if sent.Addr().Is6() {
		family = unix.AF_INET6
	}
	tr.batch = append(append(m, family, nl.NFNETLINK_V0, 0, 0), attrs...)
	if len(tr.batch) > 64<<10 {
		tr.flush()
	}
}

// flush sends what there is. Only what is refused is answered.
func (tr *tracker) flush() {
	tr.t.Helper()
	if err := unix.Sendto(tr.fd, tr.batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		tr.t.Fatal(err)
	}
	tr.batch = tr.batch[:0]
	b := make([]byte, 4096)
	switch n, _, err := unix.Recvfrom(tr.fd, b, unix.MSG_DONTWAIT); {
	case err == nil && n >= unix.SizeofNlMsghdr+4:
		tr.t.Fatalf("an entry is refused: %v", unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))))
	case !errors.Is(err, unix.EAGAIN):
		tr.t.Fatal(err)
	}
}

func putTuple(ae *netlink.AttributeEncoder, kind uint16, protocol uint8, src, dst netip.AddrPort) {
	from, to := uint16(nl.CTA_IP_V4_SRC), uint16(nl.CTA_IP_V4_DST)
	if src.Addr().Is6() {
		from, to = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	ae.Nested(kind, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(nl.CTA_TUPLE_IP, func(ae *netlink.AttributeEncoder) error {
			ae.Bytes(from, src.Addr().AsSlice())
			ae.Bytes(to, dst.Addr().AsSlice())
			return nil
		})
		ae.Nested(nl.CTA_TUPLE_PROTO, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(nl.CTA_PROTO_NUM, protocol)
			ae.Bytes(nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, src.Port()))
			ae.Bytes(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, dst.Port()))
			return nil
		})
		return nil
	})
}

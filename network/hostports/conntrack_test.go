package hostports

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/conntrack"
)

// track has the kernel track a connection that goes to an address and port, and that another one answers.
func track(t *testing.T, p Protocol, from uint16, to, with string, port uint16) {
	t.Helper()
	client, family := net.IPv4(198, 51, 100, 1).To4(), netlink.InetFamily(unix.AF_INET)
	dst, src := net.ParseIP(to).To4(), net.ParseIP(with).To4()
	if dst == nil {
		client, family, dst, src = net.ParseIP("2001:db8:1::1"), unix.AF_INET6, net.ParseIP(to), net.ParseIP(with)
	}
	f := &netlink.ConntrackFlow{
		FamilyType: uint8(family), TimeOut: 600,
		Forward: netlink.IPTuple{SrcIP: client, DstIP: dst, SrcPort: from, DstPort: port, Protocol: uint8(p)},
		Reverse: netlink.IPTuple{SrcIP: src, DstIP: client, SrcPort: port, DstPort: from, Protocol: uint8(p)},
	}
	if p == TCP {
		f.ProtoInfo = &netlink.ProtoInfoTCP{State: 3}
	}
	must(t, netlink.ConntrackCreate(netlink.ConntrackTable, family, f))
}

func tracked(t *testing.T, v6 bool, ports ...uint16) []string {
	t.Helper()
	conn, err := conntrack.Open()
	must(t, err)
	defer conn.Close()
	var all []string
	must(t, conn.ForgetUDP(v6, ports, func(e *conntrack.Entry) bool {
		all = append(all, fmt.Sprintf("%d of %v with %v", e.Original.Dst.Port(), e.Original.Dst.Addr(), e.Reply.Src.Addr()))
		return false
	}))
	slices.Sort(all)
	return all
}

func TestConnections(t *testing.T) {
	inNode(t)
	track(t, UDP, 1, "192.0.2.1", "10.1.0.5", 53)
	track(t, UDP, 2, "192.0.2.1", "10.1.0.5", 54)
	track(t, UDP, 3, "8.8.8.8", "8.8.8.8", 53)
	track(t, TCP, 4, "192.0.2.1", "10.1.0.5", 53)
	track(t, UDP, 5, "2001:db8::1", "fd00::5", 53)
	many := []uint16{0, 1, 2, 3, 4, 5, 6, 7, 8}
	for _, tc := range []struct {
		v6    bool
		ports []uint16
		want  []string
	}{
		{false, []uint16{53}, []string{"53 of 192.0.2.1 with 10.1.0.5", "53 of 8.8.8.8 with 8.8.8.8"}},
		{false, []uint16{54, 55}, []string{"54 of 192.0.2.1 with 10.1.0.5"}},
		{false, []uint16{55}, nil},
		{true, []uint16{53}, []string{"53 of 2001:db8::1 with fd00::5"}},
		{false, many, []string{"53 of 192.0.2.1 with 10.1.0.5", "53 of 8.8.8.8 with 8.8.8.8", "54 of 192.0.2.1 with 10.1.0.5"}},
	} {
		if got := tracked(t, tc.v6, tc.ports...); !slices.Equal(got, tc.want) {
			t.Errorf("ports %v, IPv6 %v: %q, want %q", tc.ports, tc.v6, got, tc.want)
		}
	}

	_, gone := diff(nil, elementsOf([]Target{web("a", "10.1.0.5", port(UDP, 53, ""))}))
	must(t, forget(gone, nil))
	must(t, forget(gone, nil)) // there is none any more
	if got, want := tracked(t, false, many...), []string{"53 of 8.8.8.8 with 8.8.8.8", "54 of 192.0.2.1 with 10.1.0.5"}; !slices.Equal(got, want) {
		t.Errorf("left: %q, want %q", got, want)
	}
	if got := tracked(t, true, 53); len(got) != 1 {
		t.Errorf("left of IPv6: %q", got)
	}
	all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil || len(all) != 3 {
		t.Errorf("%d connections of IPv4 are left, %v", len(all), err)
	}
}

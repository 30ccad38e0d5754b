package conntrack

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace has the test run in a network namespace of its own, with a table of its own.
func inNamespace(t *testing.T) *Conn {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// track has the kernel track a connection that is sent to an address and port, and that another one answers.
func track(t *testing.T, protocol uint8, client, to, with string) {
	t.Helper()
	from, dst, src := netip.MustParseAddrPort(client), netip.MustParseAddrPort(to), netip.MustParseAddrPort(with)
	family := netlink.InetFamily(unix.AF_INET)
	if dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	ip := func(a netip.AddrPort) net.IP { return a.Addr().AsSlice() }
	f := &netlink.ConntrackFlow{
		FamilyType: uint8(family), TimeOut: 600,
		Forward: netlink.IPTuple{SrcIP: ip(from), DstIP: ip(dst), SrcPort: from.Port(), DstPort: dst.Port(), Protocol: protocol},
		Reverse: netlink.IPTuple{SrcIP: ip(src), DstIP: ip(from), SrcPort: src.Port(), DstPort: from.Port(), Protocol: protocol},
	}
	if protocol == unix.IPPROTO_TCP {
		f.ProtoInfo = &netlink.ProtoInfoTCP{State: 3}
	}
	if err := netlink.ConntrackCreate(netlink.ConntrackTable, family, f); err != nil {
		t.Fatal(err)
	}
}

func (e *Entry) String() string {
	return fmt.Sprintf("%d %v>%v %v>%v state %d", e.Protocol, e.Original.Src, e.Original.Dst, e.Reply.Src, e.Reply.Dst, e.TCPState)
}

func list(t *testing.T, c *Conn, f Filter) []string {
	t.Helper()
	var all []string
	if err := c.Each(f, func(e *Entry) bool { all = append(all, e.String()); return true }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func TestEntriesAreReadAndPicked(t *testing.T) {
	c := inNamespace(t)
	track(t, unix.IPPROTO_UDP, "198.51.100.1:1001", "192.0.2.1:53", "10.1.0.5:5353")
	track(t, unix.IPPROTO_UDP, "198.51.100.1:1002", "192.0.2.1:54", "192.0.2.1:54")
	track(t, unix.IPPROTO_TCP, "198.51.100.1:1003", "192.0.2.1:53", "10.1.0.5:53")
	track(t, unix.IPPROTO_UDP, "[2001:db8:1::1]:1004", "[2001:db8::1]:53", "[fd00::5]:53")
	const (
		dns   = "17 198.51.100.1:1001>192.0.2.1:53 10.1.0.5:5353>198.51.100.1:1001 state 0"
		other = "17 198.51.100.1:1002>192.0.2.1:54 192.0.2.1:54>198.51.100.1:1002 state 0"
		web   = "6 198.51.100.1:1003>192.0.2.1:53 10.1.0.5:53>198.51.100.1:1003 state 3"
		six   = "17 [2001:db8:1::1]:1004>[2001:db8::1]:53 [fd00::5]:53>[2001:db8:1::1]:1004 state 0"
	)
	for _, tc := range []struct {
		f    Filter
		want []string
	}{
		{Filter{}, []string{dns, other, six, web}},
		{Filter{Family: unix.AF_INET}, []string{dns, other, web}},
		{Filter{Family: unix.AF_INET, Protocol: unix.IPPROTO_UDP}, []string{dns, other}},
		{Filter{Family: unix.AF_INET, Protocol: unix.IPPROTO_UDP, Port: 53}, []string{dns}},
		{Filter{Family: unix.AF_INET, Protocol: unix.IPPROTO_TCP, Port: 54}, nil},
		{Filter{Family: unix.AF_INET6}, []string{six}},
	} {
		if got := list(t, c, tc.f); !slices.Equal(got, tc.want) {
			t.Errorf("%+v:\n%q, want\n%q", tc.f, got, tc.want)
		}
		// The kernel picks, not who is told.
		attrs, err := tc.f.attributes()
		if err != nil {
			t.Fatal(err)
		}
		told := 0
		if err := c.request(c.read, 1, unix.NLM_F_DUMP, tc.f.Family, attrs).ExecuteIter(unix.NETLINK_NETFILTER, 0, func([]byte) bool { told++; return true }); err != nil {
			t.Fatal(err)
		}
		if told != len(tc.want) {
			t.Errorf("%+v: the kernel tells of %d", tc.f, told)
		}
	}
	if n, err := c.Count(); n != 4 || err != nil {
		t.Errorf("%d entries, %v", n, err)
	}
}

func TestDeleteIsForOneEntry(t *testing.T) {
	c := inNamespace(t)
	var keys []Key
	track(t, unix.IPPROTO_UDP, "198.51.100.1:1001", "192.0.2.1:53", "10.1.0.5:53")
	c.Each(Filter{}, func(e *Entry) bool { keys = append(keys, e.Key()); return true })
	track(t, unix.IPPROTO_UDP, "198.51.100.1:1002", "192.0.2.1:53", "10.1.0.5:53")
	for _, want := range []bool{true, false} {
		if there, err := c.Delete(keys[0]); there != want || err != nil {
			t.Errorf("%v %v, want %v", there, err, want)
		}
	}
	if left := list(t, c, Filter{}); len(left) != 1 {
		t.Errorf("left: %q", left)
	}
}

func TestReadingEndsWhenAsked(t *testing.T) {
	c := inNamespace(t)
	for i := range 400 { // in several answers
		track(t, unix.IPPROTO_UDP, fmt.Sprintf("198.51.100.1:%d", 1000+i), "192.0.2.1:53", "10.1.0.5:53")
	}
	n := 0
	if err := c.Each(Filter{}, func(*Entry) bool { n++; return n < 10 }); err != nil || n != 10 {
		t.Errorf("%d entries, %v", n, err)
	}
}

// Whatever a message is, it is read without harm.
func FuzzRead(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 52, 0, 1, 128, 20, 0, 1, 128, 8, 0, 1, 0, 198, 51, 100, 1, 8, 0, 2, 0, 192, 0, 2, 1})
	f.Add([]byte{2, 0, 0, 0, 4, 0, 1, 128, 3, 0, 2, 0, 255, 255})
	f.Fuzz(func(t *testing.T, msg []byte) {
		var e Entry
		if e.read(msg) != (len(msg) >= 4) {
			t.Error("a message of 4 bytes or more is an entry")
		}
	})
}

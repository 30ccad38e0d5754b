package network

import (
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// links is a network namespace with links in it.
type links struct {
	t  *testing.T
	ns string
}

func newLinks(t *testing.T) links { return links{t, pinned(t, NamespaceSet{}).Net} }

func (l links) do(f func() error) {
	l.t.Helper()
	if err := InNamespaces([]string{l.ns}, f); err != nil {
		l.t.Fatal(err)
	}
}

// add makes a link that is up, with addresses.
func (l links) add(link netlink.Link, addrs ...string) {
	l.t.Helper()
	l.do(func() error {
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		for _, a := range addrs {
			if err := addAddr(link, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
}

func addAddr(link netlink.Link, text string) error {
	addr, err := netlink.ParseAddr(text)
	if err != nil {
		return err
	}
	addr.Flags = unix.IFA_F_NODAD
	return netlink.AddrAdd(link, addr)
}

// cable is a link that leads nowhere; not every kernel has dummy ones.
func cable(name string, mtu int) netlink.Link {
	return &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}, PeerName: "x" + name}
}

func bridge(name string) netlink.Link {
	return &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}
}

func (l links) route(r netlink.Route) {
	l.t.Helper()
	l.do(func() error { return netlink.RouteAdd(&r) })
}

func TestWayOutMTU(t *testing.T) {
	l := newLinks(t)
	want := func(when, joined string, want int) {
		t.Helper()
		l.do(func() error {
			if got := wayOutMTU(cidrs(t, joined)); got != want {
				t.Errorf("%s: %s: %d, want %d", when, joined, got, want)
			}
			return nil
		})
	}
	const v4, v6, both = "10.1.0.0/24", "fd01::/64", "10.1.0.0/24,fd01::/64"
	want("no link", both, 0)
	one, two := cable("one", 1460), cable("two", 1400)
	l.add(one, "192.168.1.2/24", "fd02::2/64")
	l.add(two, "192.168.2.2/24", "fd03::2/64")
	want("no way out", both, 0)
	l.route(netlink.Route{Gw: net.ParseIP("192.168.1.1")})
	want("IPv4 alone", both, 1460)
	want("IPv4 alone", v6, 0)
	l.route(netlink.Route{Gw: net.ParseIP("fd03::1")})
	want("each another way", both, 1400)
	want("each another way", v4, 1460)
	l.do(func() error { return netlink.RouteReplace(&netlink.Route{Gw: net.ParseIP("192.168.1.1"), MTU: 1300}) })
	want("the route says less", both, 1300)
	l.do(func() error {
		return netlink.RouteReplace(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, MultiPath: []*netlink.NexthopInfo{
			{LinkIndex: one.Attrs().Index, Gw: net.ParseIP("192.168.1.1")}, {LinkIndex: two.Attrs().Index, Gw: net.ParseIP("192.168.2.1")},
		}})
	})
	want("two ways", v4, 1400)
	l.route(netlink.Route{Gw: net.ParseIP("192.168.1.1"), Priority: 10}) // not the first choice
	want("a spare way", v4, 1400)
}

// A node that forwards IPv6 drops the routes that routers advertise.
func TestAdvertisedRouteIsKept(t *testing.T) {
	for name, tc := range map[string]struct {
		protocol      netlink.RouteProtocol
		before, after string
	}{
		"advertised":                           {unix.RTPROT_RA, "1", "2"},
		"advertised, and taken by a program":   {unix.RTPROT_RA, "0", "0"},
		"advertised, and thought of already":   {unix.RTPROT_RA, "2", "2"},
		"configured":                           {unix.RTPROT_STATIC, "1", "1"},
		"a protocol of a routing daemon's own": {unix.RTPROT_BGP, "1", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLinks(t)
			out, other := cable("out", 1500), cable("other", 1500)
			l.add(out, "fd02::2/64")
			l.add(other, "fd03::2/64")
			setting := func(link string) string { return "/proc/sys/net/ipv6/conf/" + link + "/accept_ra" }
			l.do(func() error {
				for _, link := range []string{"out", "other"} {
					if err := os.WriteFile(setting(link), []byte(tc.before), 0o600); err != nil {
						return err
					}
				}
				if err := keepAdvertised(slog.New(slog.DiscardHandler)); err != nil { // no route yet
					return err
				}
				if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("fd02::1"), Protocol: tc.protocol}); err != nil {
					return err
				}
				if err := keepAdvertised(slog.New(slog.DiscardHandler)); err != nil {
					return err
				}
				if got := read(t, setting("out")); got != tc.after {
					t.Errorf("the link out has %s, want %s", got, tc.after)
				}
				if got := read(t, setting("other")); got != tc.before {
					t.Errorf("another link has %s", got)
				}
				return nil
			})
		})
	}
}

func TestRangeThatAnotherLinkHas(t *testing.T) {
	const range1, bridge1 = "10.1.0.0/24,fd01::/64", "berth-00000001"
	for name, tc := range map[string]struct {
		make func(l links)
		want string // a part of the error; "" is none
		gone string // a link that is removed
	}{
		"an empty node":                    {func(links) {}, "", ""},
		"other ranges":                     {func(l links) { l.add(cable("eth0", 1500), "192.168.1.2/24", "fd02::1/64") }, "", ""},
		"a range around":                   {func(l links) { l.add(cable("eth0", 1500), "10.9.0.5/8") }, "", ""},
		"our bridge":                       {func(l links) { l.add(bridge(bridge1), "10.1.0.1/24", "fd01::1/64") }, "", ""},
		"another runtime's":                {func(l links) { l.add(bridge("cni0"), "10.1.0.1/24") }, "pod CIDR 10.1.0.0/24: link cni0 has 10.1.0.1 of it", ""},
		"IPv6":                             {func(l links) { l.add(bridge("cni0"), "fd01::1/64") }, "pod CIDR fd01::/64: link cni0 has fd01::1 of it", ""},
		"the node's own address":           {func(l links) { l.add(cable("eth0", 1500), "10.1.0.77/32") }, "link eth0 has 10.1.0.77", ""},
		"ours, with another range, unused": {func(l links) { l.add(bridge("berth-00000002"), "10.1.0.1/25") }, "", "berth-00000002"},
		"ours, with another range, used": {func(l links) {
			b := bridge("berth-00000002")
			l.add(b, "10.1.0.1/25")
			l.add(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "port", MasterIndex: b.Attrs().Index}, PeerName: "pod"})
		}, "link berth-00000002 has 10.1.0.1", ""},
		"the end of a tunnel":     {func(l links) { l.add(cable("tunnel0", 1450), "10.1.0.1/32", "fd01::1/128") }, "", ""},
		"no bridge, by that name": {func(l links) { l.add(cable("berth-0000002", 1500), "10.1.0.1/25") }, "link berth-0000002 has", ""},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLinks(t)
			tc.make(l)
			l.do(func() error {
				err := takenElsewhere(cidrs(t, range1), bridge1, slog.New(slog.DiscardHandler), "tunnel0")
				if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
					t.Errorf("%v, want %q", err, tc.want)
				}
				if tc.gone != "" {
					if _, err := netlink.LinkByName(tc.gone); err == nil {
						t.Errorf("%s is still there", tc.gone)
					}
				}
				return nil
			})
		})
	}
}

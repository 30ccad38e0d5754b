package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// CVE-2020-10749: a pod that plays the router. The node must not take its IPv6 route, nor an address, from what it advertises,
// also where new links of the node would, and whether the pod is on a bridge or on a link of its own.
func TestCVE_2020_10749_AdvertisementsOfPodsAreNotTaken(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	for name, conf := range map[string]string{
		"bridge": `{"cniVersion":"1.0.0","name":"ra","plugins":[{"type":"bridge","bridge":"ra0","isGateway":true,"ipam":{"type":"host-local","dataDir":"DIR","ranges":[[{"subnet":"fd89:9::/64"}]]}}]}`,
		"ptp":    `{"cniVersion":"1.0.0","name":"ra","plugins":[{"type":"ptp","ipam":{"type":"host-local","dataDir":"DIR","ranges":[[{"subnet":"fd89:9::/64"}]]}}]}`,
	} {
		t.Run(name, func(t *testing.T) {
			host := newLinks(t)
			host.do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_ra", []byte("2"), 0o600) })
			n := newNode(t)
			n.bin = bin
			n.write(n.conf+"/10-ra.conflist", strings.ReplaceAll(conf, "DIR", t.TempDir()))
			m := n.open()
			p := n.pod()
			p.Conflist = []byte(read(t, n.conf+"/10-ra.conflist"))
			host.do(func() error {
				_, err := m.Setup(t.Context(), p)
				return err
			})
			toPod := "ra0"
			if name == "ptp" {
				toPod = host.only(t, "veth")
			}
			if taken := host.takes(t, p.NetNS); taken != "" {
				t.Errorf("the node takes %s from a pod", taken)
			}
			// It would, were it let: else the test shows nothing.
			host.do(func() error {
				return os.WriteFile("/proc/sys/net/ipv6/conf/"+toPod+"/accept_ra", []byte("2"), 0o600)
			})
			if host.takes(t, p.NetNS) == "" {
				t.Error("the advertisement is none")
			}
			host.do(func() error { return m.Teardown(t.Context(), p) })
		})
	}
}

// only is the name of the only link of a kind.
func (l links) only(t *testing.T, kind string) (name string) {
	t.Helper()
	l.do(func() error {
		all, err := netlink.LinkList()
		for _, link := range all {
			if link.Type() == kind {
				name = link.Attrs().Name
			}
		}
		return err
	})
	return name
}

// advertised is the prefix of the pod that plays the router.
const advertised = "2001:db8:bad:"

// takes has the pod advertise itself for some time, and tells what the node has taken from it.
func (l links) takes(t *testing.T, pod string) (what string) {
	t.Helper()
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end) && what == ""; time.Sleep(100 * time.Millisecond) {
		if err := InNamespaces([]string{pod}, advertise); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) { // its address is not ready yet
			t.Fatal(err)
		}
		l.do(func() error {
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Protocol: unix.RTPROT_RA}, netlink.RT_FILTER_PROTOCOL)
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(nil, netlink.FAMILY_V6)
			for _, a := range addrs {
				if strings.HasPrefix(a.IP.String(), advertised) {
					what = a.IP.String()
				}
			}
			if len(routes) > 0 {
				what = fmt.Sprint(routes)
			}
			return err
		})
	}
	return what
}

// advertise sends a router advertisement (RFC 4861) from the interface of a pod, whose namespace this thread is in.
func advertise() error {
	link, err := net.InterfaceByName(IfName)
	if err != nil {
		return err
	}
	s, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(s) //nolint:errcheck // a test
	from, err := linkLocal(link)
	if err != nil {
		return err
	}
	if err := errors.Join(
		unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
		unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, link.Index),
		unix.Bind(s, from),
	); err != nil {
		return err
	}
	router := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0} // for 1,800 s
	prefix := append([]byte{3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0}, net.ParseIP(advertised+":")...)
	all := &unix.SockaddrInet6{Addr: [16]byte{0: 0xff, 1: 2, 15: 1}, ZoneId: uint32(link.Index)}
	return unix.Sendto(s, append(router, prefix...), 0, all)
}

// linkLocal is the address of an interface that advertisements have to come from.
func linkLocal(link *net.Interface) (*unix.SockaddrInet6, error) {
	addrs, err := link.Addrs()
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.IsLinkLocalUnicast() {
			return &unix.SockaddrInet6{Addr: [16]byte(ip.To16()), ZoneId: uint32(link.Index)}, nil
		}
	}
	return nil, unix.EADDRNOTAVAIL
}

package nodetest

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Lab is a node with pods, and a client outside. All pods are of this node; which of them a Service takes for local is its
// test's.
type Lab struct {
	T      testing.TB
	Node   *Space
	Client *Space
	Pods   []*Space
}

// Addresses of the node and of the client outside, and the port that pods serve.
const (
	NodeIP4, NodeIP6     = "192.0.2.1", "fd02::1"
	ClientIP4, ClientIP6 = "192.0.2.2", "fd02::2"
	PodPort              = 8080
)

// PodIP4 is the address of a pod, counted from 1.
func PodIP4(n int) string { return fmt.Sprintf("10.1.%d.2", n) }

// PodIP6 is the same for IPv6.
func PodIP6(n int) string { return fmt.Sprintf("fd01:0:0:%d::2", n) }

// Pod4 is an endpoint for PortOf: pod 1 to 3, with a star if it is local.
func Pod4(n int) string { return fmt.Sprintf("%s:%d", PodIP4(n), PodPort) }

// Pod6 is the same for IPv6.
func Pod6(n int) string { return fmt.Sprintf("[%s]:%d", PodIP6(n), PodPort) }

// New makes the namespaces of a lab, which end with the test.
func New(t testing.TB, pods int) *Lab {
	t.Helper()
	l := &Lab{T: t, Node: NewSpace(t, "node"), Client: NewSpace(t, "client")}
	l.Node.Sysctl("net/ipv4/ip_forward", "1")
	l.Node.Sysctl("net/ipv6/conf/all/forwarding", "1")
	l.Node.Sysctl("net/ipv4/icmp_ratelimit", "0") // as many errors as there are rejections
	l.Node.Sysctl("net/ipv6/icmp/ratelimit", "0")
	l.Node.Link("lo")
	l.Wire(l.Client, "out0", NodeIP4+"/24", ClientIP4+"/24", NodeIP6+"/64", ClientIP6+"/64")
	for n := 1; n <= pods; n++ {
		pod := NewSpace(t, fmt.Sprintf("pod%d", n))
		l.Wire(pod, pod.Name, fmt.Sprintf("10.1.%d.1/24", n), PodIP4(n)+"/24", fmt.Sprintf("fd01:0:0:%d::1/64", n), PodIP6(n)+"/64")
		l.Pods = append(l.Pods, pod)
		pod.Serve(PodPort)
	}
	// All else goes up, where it is told to be unreachable: what is dropped is silence.
	up := NewSpace(t, "up")
	l.Wire(up, "up0", "198.51.100.1/24", "198.51.100.2/24", "fd04::1/64", "fd04::2/64")
	up.Sysctl("net/ipv4/ip_forward", "1")
	up.Sysctl("net/ipv6/conf/all/forwarding", "1")
	up.ReplaceDefault(unix.RTN_UNREACHABLE, "", "")
	l.Node.ReplaceDefault(unix.RTN_UNICAST, "198.51.100.2", "fd04::2")
	return l
}

// Wire connects a namespace to the node, which is its gateway.
func (l *Lab) Wire(to *Space, name, here4, there4, here6, there6 string) {
	l.T.Helper()
	err := l.Node.Do(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(to.NS.Fd()))}
		return netlink.LinkAdd(veth)
	})
	if err != nil {
		l.T.Fatal(err)
	}
	l.Node.Link(name, here4, here6)
	to.Link("lo")
	to.Link("eth0", there4, there6)
	err = to.Do(func() error {
		for _, gateway := range []string{here4, here6} {
			gw := net.ParseIP(strings.Split(gateway, "/")[0])
			if err := netlink.RouteAdd(&netlink.Route{Gw: gw}); err != nil {
				return fmt.Errorf("route by %s: %w", gw, err)
			}
		}
		return nil
	})
	if err != nil {
		l.T.Fatal(err)
	}
}

// ReplaceDefault has the default routes be others.
func (s *Space) ReplaceDefault(kind int, gateways ...string) {
	s.T.Helper()
	err := s.Do(func() error {
		for i, any := range []string{"0.0.0.0/0", "::/0"} {
			_, dst, _ := net.ParseCIDR(any)
			old, err := netlink.RouteListFiltered([]int{netlink.FAMILY_V4, netlink.FAMILY_V6}[i], &netlink.Route{Dst: dst}, netlink.RT_FILTER_DST)
			if err != nil {
				return err
			}
			for j := range old {
				if err := netlink.RouteDel(&old[j]); err != nil {
					return err
				}
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Type: kind, Gw: net.ParseIP(gateways[i])}); err != nil {
				return fmt.Errorf("%s: %w", any, err)
			}
		}
		return nil
	})
	if err != nil {
		s.T.Fatalf("%s: %v", s.Name, err)
	}
}

// Link sets a link up with addresses.
func (s *Space) Link(name string, addrs ...string) {
	s.T.Helper()
	// Also addresses that the kernel makes are good at once.
	s.Sysctl("net/ipv6/conf/"+name+"/accept_dad", "0")
	err := s.Do(func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("%s: %w", a, err)
			}
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		s.T.Fatalf("%s: link %s: %v", s.Name, name, err)
	}
}

// Sysctl sets a sysctl of the namespace, by its path below /proc/sys.
func (s *Space) Sysctl(name, value string) {
	s.T.Helper()
	if err := s.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o600) }); err != nil {
		s.T.Fatal(err)
	}
}

package nft

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// lab is a node with pods, a client outside, and the node's Programmer. All pods are of this node; which of them a Service
// takes for local is its test's.
type lab struct {
	t      testing.TB
	node   *space
	client *space
	pods   []*space
	p      *Programmer
}

const (
	nodeIP4, nodeIP6     = "192.0.2.1", "fd02::1"
	clientIP4, clientIP6 = "192.0.2.2", "fd02::2"
	podPort              = 8080
)

func podIP4(n int) string { return fmt.Sprintf("10.1.%d.2", n) }
func podIP6(n int) string { return fmt.Sprintf("fd01:0:0:%d::2", n) }

// pod is an endpoint for portOf: pod 1 to 3, with a star if it is local.
func pod4(n int) string { return fmt.Sprintf("%s:%d", podIP4(n), podPort) }
func pod6(n int) string { return fmt.Sprintf("[%s]:%d", podIP6(n), podPort) }

func newLab(t testing.TB, pods int) *lab {
	t.Helper()
	l := &lab{t: t, node: newSpace(t, "node"), client: newSpace(t, "client")}
	l.node.sysctl("net/ipv4/ip_forward", "1")
	l.node.sysctl("net/ipv6/conf/all/forwarding", "1")
	l.node.sysctl("net/ipv4/icmp_ratelimit", "0") // as many errors as there are rejections
	l.node.sysctl("net/ipv6/icmp/ratelimit", "0")
	l.node.link("lo")
	l.wire(l.client, "out0", nodeIP4+"/24", clientIP4+"/24", nodeIP6+"/64", clientIP6+"/64")
	for n := 1; n <= pods; n++ {
		pod := newSpace(t, fmt.Sprintf("pod%d", n))
		l.wire(pod, pod.name, fmt.Sprintf("10.1.%d.1/24", n), podIP4(n)+"/24", fmt.Sprintf("fd01:0:0:%d::1/64", n), podIP6(n)+"/64")
		l.pods = append(l.pods, pod)
		pod.serve(podPort)
	}
	// All else goes up, where it is told to be unreachable: what is dropped is silence.
	up := newSpace(t, "up")
	l.wire(up, "up0", "198.51.100.1/24", "198.51.100.2/24", "fd04::1/64", "fd04::2/64")
	up.sysctl("net/ipv4/ip_forward", "1")
	up.sysctl("net/ipv6/conf/all/forwarding", "1")
	up.replaceDefault(unix.RTN_UNREACHABLE, "", "")
	l.node.replaceDefault(unix.RTN_UNICAST, "198.51.100.2", "fd04::2")
	l.p = l.node.program(Options{})
	return l
}

// wire connects a namespace to the node, which is its gateway.
func (l *lab) wire(to *space, name, here4, there4, here6, there6 string) {
	l.t.Helper()
	err := l.node.do(func() error {
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(to.ns.Fd()))}
		return netlink.LinkAdd(veth)
	})
	if err != nil {
		l.t.Fatal(err)
	}
	l.node.link(name, here4, here6)
	to.link("lo")
	to.link("eth0", there4, there6)
	err = to.do(func() error {
		for _, gateway := range []string{here4, here6} {
			gw := net.ParseIP(strings.Split(gateway, "/")[0])
			if err := netlink.RouteAdd(&netlink.Route{Gw: gw}); err != nil {
				return fmt.Errorf("route by %s: %w", gw, err)
			}
		}
		return nil
	})
	if err != nil {
		l.t.Fatal(err)
	}
}

// replaceDefault has the default routes be others.
func (s *space) replaceDefault(kind int, gateways ...string) {
	s.t.Helper()
	err := s.do(func() error {
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
		s.t.Fatalf("%s: %v", s.name, err)
	}
}

// link sets a link up with addresses.
func (s *space) link(name string, addrs ...string) {
	s.t.Helper()
	// Also addresses that the kernel makes are good at once.
	s.sysctl("net/ipv6/conf/"+name+"/accept_dad", "0")
	err := s.do(func() error {
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
		s.t.Fatalf("%s: link %s: %v", s.name, name, err)
	}
}

func (s *space) sysctl(name, value string) {
	s.t.Helper()
	if err := s.do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o600) }); err != nil {
		s.t.Fatal(err)
	}
}

// serve answers each line on TCP, and each datagram on UDP, with the name of the namespace and the address that it sees.
func (s *space) serve(port int) {
	s.t.Helper()
	s.serveTCP(port)
	s.serveUDP(port)
}

func (s *space) serveTCP(port int) { s.listenTCP(port, s.answer) }

// serveTCPOnce answers each connection with the number of the port.
func (s *space) serveTCPOnce(port int) {
	s.listenTCP(port, func(c net.Conn) {
		fmt.Fprintln(c, port)
		c.Close()
	})
}

func (s *space) listenTCP(port int, serve func(net.Conn)) {
	s.t.Helper()
	var l net.Listener
	if err := s.do(func() (err error) { l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); return err }); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
}

// portAtEnd is what serveTCPOnce says.
func (l *lab) portAtEnd(c net.Conn) int {
	l.t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		l.t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		l.t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		l.t.Fatal(err)
	}
	return n
}

func (s *space) answer(c net.Conn) {
	defer c.Close()
	from, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	for in := bufio.NewScanner(c); in.Scan(); {
		if _, err := fmt.Fprintf(c, "%s %s\n", s.name, from.Addr().Unmap()); err != nil {
			return
		}
	}
}

func (s *space) serveUDP(port int) {
	s.t.Helper()
	for _, network := range []string{"udp4", "udp6"} {
		var l net.PacketConn
		if err := s.do(func() (err error) { l, err = net.ListenPacket(network, fmt.Sprintf(":%d", port)); return err }); err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { l.Close() })
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := l.ReadFrom(b)
				if err != nil {
					return
				}
				a, _ := netip.ParseAddrPort(from.String())
				_, _ = l.WriteTo([]byte(s.name+" "+a.Addr().Unmap().String()), from)
			}
		}()
	}
}

// What ask says if nobody answers.
const (
	refused = "refused"
	silence = "silence"
	denied  = "denied" // a datagram of the node itself, rejected or dropped
)

// patience is how long an answer is waited for that should come; silence costs less.
const (
	patience = 10 * time.Second
	quiet    = 700 * time.Millisecond
)

// ask connects and says who answers, and whom that takes for the client.
func (s *space) ask(network, to string) string { return s.askFor(patience, network, to) }

func (s *space) askFor(d time.Duration, network, to string) string {
	start := time.Now()
	c, err := s.dialFor(d, network, to)
	if err != nil {
		return wrong(err)
	}
	defer c.Close()
	if took := time.Since(start); took > 900*time.Millisecond {
		s.t.Logf("%s to %s %s: connected after %s", s.name, network, to, took) // a SYN was lost, or the machine is busy
	}
	return againFor(d, c)
}

func (s *space) dial(network, to string) (c net.Conn, err error) {
	return s.dialFor(patience, network, to)
}

func (s *space) dialFor(d time.Duration, network, to string) (c net.Conn, err error) {
	err = s.do(func() (err error) { c, err = net.DialTimeout(network, to, d); return err })
	return c, err
}

// again asks on a connection that is there.
func again(c net.Conn) string { return againFor(patience, c) }

func againFor(d time.Duration, c net.Conn) string {
	if err := c.SetDeadline(time.Now().Add(d)); err != nil {
		return err.Error()
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return wrong(err)
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	if err != nil {
		return wrong(err)
	}
	return strings.TrimSpace(string(b[:n]))
}

func wrong(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return refused
	case errors.Is(err, unix.EPERM):
		return denied
	case errors.As(err, &timeout) && timeout.Timeout():
		return silence
	}
	return err.Error()
}

// want asks, and fails the test if the answer is another one.
func (l *lab) want(from *space, network, to, answer string) {
	l.t.Helper()
	d := patience
	if answer == silence {
		d = quiet
	}
	got := from.askFor(d, network, to)
	if got == denied && from == l.node && (answer == silence || answer == refused) && strings.HasPrefix(network, "udp") {
		return
	}
	if got != answer {
		l.t.Errorf("%s to %s %s: %q, want %q", from.name, network, to, got, answer)
	}
}

// spread asks so many times and counts who answers.
func (l *lab) spread(from *space, network, to string, times int) map[string]int {
	got := map[string]int{}
	for range times {
		got[strings.Fields(from.ask(network, to) + " ")[0]]++
	}
	return got
}

func (l *lab) sync(s *state) Report {
	l.t.Helper()
	r, err := l.p.Sync(s)
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

// apply has a Service be another one.
func (l *lab) apply(s *state, old, next *modelService) Report {
	l.t.Helper()
	r, err := l.p.Apply(s.delta(old, next))
	if err != nil {
		l.t.Fatal(err)
	}
	return r
}

func sorted(lines []string) string {
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

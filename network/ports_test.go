package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	portRange4, portRange6 = "10.89.9.0/24", "fd89:9::/64"
	nodeAddr4, nodeAddr6   = "192.168.99.1", "fd99::1"
	farAddr4, farAddr6     = "192.168.99.2", "fd99::2"
)

// portNode is a node of its own with the default network, and a machine outside, which has a route to the pods.
type portNode struct {
	*node
	m             *Manager
	host, outside links
	conflist      []byte
	pods          int
}

// byTable has host ports led by the table, byPlugin by portmap, as on a node whose kernel does not take the table.
const (
	byTable  = true
	byPlugin = false
)

func newPortNode(t *testing.T, table bool) *portNode {
	t.Helper()
	needRoot(t)
	n := &portNode{node: newNode(t)}
	n.host, n.outside = wired(t, 1500)
	for _, via := range [][2]string{{portRange4, nodeAddr4}, {portRange6, nodeAddr6}} {
		_, dst, _ := net.ParseCIDR(via[0])
		n.outside.route(netlink.Route{Dst: dst, Gw: net.ParseIP(via[1])})
	}
	n.restart(t, table)
	return n
}

// restart has another daemon take the pods over.
func (n *portNode) restart(t *testing.T, table bool, pods ...Connected) {
	t.Helper()
	n.m = n.open()
	if !table {
		n.m.probe.Do(func() { n.m.noTable = errors.New("not asked") })
	}
	n.host.do(func() (err error) { // what the kernel is asked, it is asked there
		if err := n.m.adoptPorts(pods); err != nil {
			return err
		}
		n.m.SetPodCIDRs(portRange4 + "," + portRange6)
		n.conflist, err = n.m.Conflist()
		return err
	})
}

// setUp is a pod that has been set up, with ports of the node.
func (n *portNode) setUp(t *testing.T, ports ...PortMapping) Connected {
	t.Helper()
	n.pods++
	p := n.pod()
	p.ID, p.Name, p.Conflist, p.PortMappings = fmt.Sprintf("%064x", n.pods), fmt.Sprintf("web-%d", n.pods), n.conflist, ports
	out := Connected{Pod: p}
	n.host.do(func() error {
		if err := n.m.ClaimPorts(p); err != nil {
			return err
		}
		res, err := n.m.Setup(t.Context(), p)
		if err == nil {
			out.IPs = res.IPs
		}
		return err
	})
	return out
}

func (n *portNode) tearDown(t *testing.T, p Connected) {
	t.Helper()
	n.host.do(func() error { return n.m.Teardown(t.Context(), p.Pod) })
}

// nft runs nft on the node.
func (n *portNode) nft(t *testing.T, args ...string) (out string) {
	t.Helper()
	n.host.do(func() error {
		b, err := exec.Command("nft", args...).CombinedOutput()
		out = string(b)
		if err != nil {
			return fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, b)
		}
		return nil
	})
	return out
}

// serveUDP answers every packet, with a name, a space and the address that it sees.
func serveUDP(t *testing.T, ns, name, addr string) {
	t.Helper()
	var c net.PacketConn
	if err := InNamespaces([]string{ns}, func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			_, _ = c.WriteTo([]byte(name+" "+host), from)
		}
	}()
}

// sender sends packets of UDP from one port to another, and has the answers.
type sender struct{ net.Conn }

func newSender(t *testing.T, ns, host string, port int) sender {
	t.Helper()
	var s sender
	if err := InNamespaces([]string{ns}, func() (err error) {
		s.Conn, err = net.Dial("udp", net.JoinHostPort(host, fmt.Sprint(port)))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// ask is what is answered within a moment; "" is nothing.
func (s sender) ask(patience time.Duration) string {
	_, _ = s.Write([]byte("?")) // an error is that of the packet before
	_ = s.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 64)
	n, _ := s.Read(buf)
	return string(buf[:n])
}

// reach is ask where there must be an answer: a neighbour of IPv6 is found as soon as it knows that its address is its own.
func reach(ns, host string, port int) (answer string, err error) {
	for start := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if answer, err = ask(ns, host, port); err == nil || time.Since(start) > soon {
			return answer, err
		}
	}
}

const (
	soon = 3 * time.Second
	not  = 300 * time.Millisecond
)

// Host ports from everywhere, for both protocols and families, whoever makes them.
func TestHostPorts(t *testing.T) {
	for name, table := range map[string]bool{"table": byTable, "portmap": byPlugin} {
		t.Run(name, func(t *testing.T) {
			n := newPortNode(t, table)
			const inside, everywhere, there = 8080, 18080, 18081
			server := n.setUp(t,
				PortMapping{Protocol: "tcp", ContainerPort: inside, HostPort: everywhere},
				PortMapping{Protocol: "udp", ContainerPort: inside, HostPort: everywhere},
				PortMapping{Protocol: "tcp", ContainerPort: inside, HostPort: there, HostIP: nodeAddr4},
				PortMapping{Protocol: "udp", ContainerPort: inside, HostPort: there, HostIP: nodeAddr6})
			client := n.setUp(t)
			serve(t, server.NetNS, inside)
			serveUDP(t, server.NetNS, "pod", fmt.Sprintf(":%d", inside))
			if made := strings.Contains(n.nft(t, "list", "tables"), "berth-hostports"); made != table {
				t.Errorf("the table is there: %v", made)
			}
			const nobody = "-"
			for _, tc := range []struct {
				what, protocol, from, to string
				port                     int
				want                     string // the address that the pod sees, "": any
			}{
				{"from outside", "tcp", n.outside.ns, nodeAddr4, everywhere, farAddr4},
				{"from outside", "tcp", n.outside.ns, nodeAddr6, everywhere, farAddr6},
				{"from outside", "udp", n.outside.ns, nodeAddr4, everywhere, farAddr4},
				{"from outside", "udp", n.outside.ns, nodeAddr6, everywhere, farAddr6},
				{"from outside, at the bridge's address", "tcp", n.outside.ns, "10.89.9.1", everywhere, farAddr4},
				{"on the node", "tcp", n.host.ns, nodeAddr4, everywhere, nodeAddr4},
				{"on the node", "tcp", n.host.ns, nodeAddr6, everywhere, nodeAddr6},
				{"on the node", "udp", n.host.ns, nodeAddr4, everywhere, nodeAddr4},
				{"on the node", "udp", n.host.ns, nodeAddr6, everywhere, nodeAddr6},
				{"on the node, by loopback", "tcp", n.host.ns, "127.0.0.1", everywhere, "10.89.9.1"},
				{"on the node, by loopback", "udp", n.host.ns, "127.0.0.1", everywhere, "10.89.9.1"},
				{"from the pod itself", "tcp", server.NetNS, nodeAddr4, everywhere, "10.89.9.1"},
				{"from the pod itself", "tcp", server.NetNS, nodeAddr6, everywhere, ""},
				{"from the pod itself", "udp", server.NetNS, nodeAddr4, everywhere, "10.89.9.1"},
				{"from the pod itself", "udp", server.NetNS, nodeAddr6, everywhere, ""},
				{"from the pod itself, at the bridge's address", "tcp", server.NetNS, "10.89.9.1", everywhere, ""},
				{"from another pod", "tcp", client.NetNS, nodeAddr4, everywhere, ""},
				{"from another pod", "tcp", client.NetNS, nodeAddr6, everywhere, ""},
				{"from another pod", "udp", client.NetNS, nodeAddr4, everywhere, ""},
				{"from another pod", "udp", client.NetNS, nodeAddr6, everywhere, ""},
				{"at one address", "tcp", n.outside.ns, nodeAddr4, there, farAddr4},
				{"at one address, on the node", "tcp", n.host.ns, nodeAddr4, there, nodeAddr4},
				{"at one address", "udp", n.outside.ns, nodeAddr6, there, farAddr6},
				{"at another address", "tcp", n.outside.ns, "10.89.9.1", there, nobody},
				{"at another address, on the node", "tcp", n.host.ns, "127.0.0.1", there, nobody},
				{"at an address of another family", "tcp", n.outside.ns, nodeAddr6, there, nobody},
				{"at an address of another family", "udp", n.outside.ns, nodeAddr4, there, nobody},
				{"of another protocol", "udp", n.outside.ns, nodeAddr4, there, nobody},
			} {
				var got string
				var err error
				switch {
				case tc.protocol == "tcp" && tc.want == nobody:
					got, err = ask(tc.from, tc.to, tc.port)
				case tc.protocol == "tcp":
					got, err = reach(tc.from, tc.to, tc.port)
				default:
					patience := soon
					if tc.want == nobody {
						patience = not
					}
					got = strings.TrimPrefix(newSender(t, tc.from, tc.to, tc.port).ask(patience), "pod ")
				}
				if ok := got == tc.want || tc.want == "" && got != "" || tc.want == nobody && got == ""; !ok {
					t.Errorf("%s, %s to %s port %d: the pod sees %q, %v, want %q", tc.what, tc.protocol, tc.to, tc.port, got, err, tc.want)
				}
			}
			n.tearDown(t, server)
			for _, to := range []string{nodeAddr4, nodeAddr6} {
				if got, err := ask(n.outside.ns, to, everywhere); err == nil {
					t.Errorf("%s port %d is answered by %q after the pod has gone", to, everywhere, got)
				}
			}
			n.tearDown(t, client)
			if left := n.nft(t, "list", "tables"); strings.Contains(left, "berth") {
				t.Errorf("left: %s", left)
			}
			if !table {
				return
			}
			n.host.do(func() error {
				if got := read(t, "/proc/sys/net/ipv4/conf/"+defaultName(cidrs(t, portRange4))+"/route_localnet"); got != "0" {
					t.Errorf("route_localnet is %s without a host port", got)
				}
				return nil
			})
		})
	}
}

// ::1 is no host port (a pod cannot answer it), but a process that listens there is found, and a refusal comes at once.
func TestLoopbackOfIPv6IsLeftAlone(t *testing.T) {
	n := newPortNode(t, byTable)
	const port = 18080
	n.setUp(t, PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: port})
	start := time.Now()
	if got, err := ask(n.host.ns, "::1", port); !errors.Is(err, unix.ECONNREFUSED) || time.Since(start) > time.Second {
		t.Errorf("%q, %v after %v", got, err, time.Since(start))
	}
	serve(t, n.host.ns, port)
	if got, err := ask(n.host.ns, "::1", port); err != nil || got != "::1" {
		t.Errorf("%q, %v", got, err)
	}
}

// A port of the node is one at the node's addresses only: what is on its way to others is not touched.
func TestCVE_2025_67499_ForwardedTrafficIsLeftAlone(t *testing.T) {
	for name, table := range map[string]bool{"table": byTable, "portmap": byPlugin} {
		t.Run(name, func(t *testing.T) {
			n := newPortNode(t, table)
			const port = 18080
			victim := n.setUp(t)
			thief := n.setUp(t,
				PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: port}, PortMapping{Protocol: "udp", ContainerPort: 8080, HostPort: port})
			serveUDP(t, thief.NetNS, "thief", ":8080")
			for _, ns := range []string{victim.NetNS, n.outside.ns} {
				serveUDP(t, ns, "right", fmt.Sprintf(":%d", port))
				serve(t, ns, port)
			}
			for _, tc := range []struct{ what, from, to string }{
				{"from outside to another pod", n.outside.ns, victim.IPs[0].String()},
				{"from outside to another pod", n.outside.ns, victim.IPs[1].String()},
				{"on the node to another pod", n.host.ns, victim.IPs[0].String()},
				{"from the pod to another pod", thief.NetNS, victim.IPs[0].String()},
				{"from a pod to the outside", victim.NetNS, farAddr4},
				{"from a pod to the outside", victim.NetNS, farAddr6},
				{"on the node to the outside", n.host.ns, farAddr4},
			} {
				if got, err := reach(tc.from, tc.to, port); err != nil {
					t.Errorf("%s (%s), TCP: %q, %v", tc.what, tc.to, got, err)
				}
				if got := newSender(t, tc.from, tc.to, port).ask(soon); !strings.HasPrefix(got, "right ") {
					t.Errorf("%s (%s), UDP: %q", tc.what, tc.to, got)
				}
			}
		})
	}
}

// A NodePort of the same number has the packets, whether its rules were there before those of host ports or not.
func TestCVE_2019_9946_NodePortWins(t *testing.T) {
	n := newPortNode(t, byTable)
	const port = 18080
	mapping := PortMapping{Protocol: "udp", ContainerPort: 8080, HostPort: port}
	backend := n.setUp(t)
	serveUDP(t, backend.NetNS, "service", ":9090")
	nodePort := func() {
		n.nft(t, "add table ip services; add chain ip services pre { type nat hook prerouting priority -100; }; "+
			"add chain ip services out { type nat hook output priority -100; };"+
			fmt.Sprintf("add rule ip services pre udp dport %[1]d dnat to %[2]s:9090; add rule ip services out udp dport %[1]d dnat to %[2]s:9090", port, backend.IPs[0]))
	}
	want := func(when, who string) {
		t.Helper()
		for from, ns := range map[string]string{"from outside": n.outside.ns, "on the node": n.host.ns} {
			if got := newSender(t, ns, nodeAddr4, port).ask(soon); !strings.HasPrefix(got, who+" ") {
				t.Errorf("%s, %s: %q, want that of the %s", when, from, got, who)
			}
		}
	}
	pod := n.setUp(t, mapping)
	serveUDP(t, pod.NetNS, "pod", ":8080")
	want("no Service", "pod")
	nodePort()
	want("the Service comes later", "service")
	n.tearDown(t, pod)
	n.pods++
	pod = n.setUp(t, mapping)
	serveUDP(t, pod.NetNS, "pod", ":8080")
	want("the Service was there", "service")
	n.nft(t, "delete", "table", "ip", "services")
	want("the Service is gone", "pod")
}

// 127.0.0.1 has host ports, which lets packets from and to loopback addresses in by the pods' bridge. They are not for pods.
func TestCVE_2020_8558_LoopbackIsNotForPods(t *testing.T) {
	n := newPortNode(t, byTable)
	n.setUp(t, PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: 18080})
	attacker := n.setUp(t)
	const secret = 4194
	serveUDP(t, n.host.ns, "secret", fmt.Sprintf("127.0.0.1:%d", secret))
	if err := InNamespaces([]string{attacker.NetNS}, func() error { // what CAP_NET_ADMIN in a pod can do
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		own, err := netlink.ParseAddr("127.0.0.1/8")
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(lo, own); err != nil {
			return err
		}
		eth, err := netlink.LinkByName(IfName)
		if err != nil {
			return err
		}
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+IfName+"/route_localnet", []byte("1"), 0o600); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{
			LinkIndex: eth.Attrs().Index, Gw: net.ParseIP("10.89.9.1"), Dst: &net.IPNet{IP: net.IPv4(127, 0, 0, 1).To4(), Mask: net.CIDRMask(32, 32)},
		})
	}); err != nil {
		t.Fatal(err)
	}
	reached := func() bool { return newSender(t, attacker.NetNS, "127.0.0.1", secret).ask(not) != "" }
	if reached() {
		t.Errorf("a pod reaches a process that listens on the node's 127.0.0.1: %s", n.nft(t, "list", "table", "inet", n.m.table.Name()))
	}
	// Without the guard the packet gets through, so that it is what keeps it out.
	n.nft(t, "flush", "chain", "inet", n.m.table.Name(), "guard")
	if !reached() {
		t.Error("the test shows nothing: the packet does not arrive without the guard either")
	}
}

package network

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// wired is two nodes of their own, host and outside, with a cable between them whose packets are smaller than usual, and the
// way out of host leads to outside.
func wired(t *testing.T, mtu int) (host, outside links) {
	t.Helper()
	host, outside = newLinks(t), newLinks(t)
	far, err := os.Open(outside.ns)
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close() //nolint:errcheck // opened for reading
	host.add(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "out0", MTU: mtu}, PeerName: "eth0", PeerNamespace: netlink.NsFd(far.Fd()),
	}, "192.168.99.1/24", "fd99::1/64")
	outside.do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range []string{"192.168.99.2/24", "fd99::2/64"} {
			if err := addAddr(link, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
	for _, gw := range []string{"192.168.99.2", "fd99::2"} {
		host.route(netlink.Route{Gw: net.ParseIP(gw)})
	}
	return host, outside
}

// serve has a server in a network namespace that says to everybody who connects which address it sees.
func serve(t *testing.T, ns string, port int) {
	t.Helper()
	var l net.Listener
	if err := InNamespaces([]string{ns}, func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			_, _ = c.Write([]byte(host))
			_ = c.Close()
		}
	}()
}

// ask connects from a network namespace, and returns what the server says.
func ask(ns, host string, port int) (answer string, err error) {
	return askWithin(5*time.Second, ns, host, port)
}

func askWithin(patience time.Duration, ns, host string, port int) (answer string, err error) {
	err = InNamespaces([]string{ns}, func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(port)), patience)
		if err != nil {
			return err
		}
		defer c.Close() //nolint:errcheck // a test
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		buf := make([]byte, 64)
		n, err := c.Read(buf)
		answer = string(buf[:n])
		return err
	})
	return answer, err
}

// The default network as the reference plugins make it, for both families.
func TestDefaultNetworkOfReferencePlugins(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const (
		mtu            = 1400
		port, hostPort = 8080, 18080
		range4, range6 = "10.89.9.0/24", "fd89:9::/64"
	)
	host, outside := wired(t, mtu)
	n := newNode(t)
	n.bin = bin
	m := n.open()
	var made []byte
	host.do(func() (err error) { // what the kernel is asked, it is asked there
		m.SetPodCIDRs(range4 + "," + range6)
		made, err = m.Conflist()
		return err
	})
	var conf struct{ Plugins []struct{ MTU int } }
	if err := json.Unmarshal(made, &conf); err != nil || conf.Plugins[0].MTU != mtu {
		t.Errorf("%s: %v", made, err)
	}
	server, client := n.pod(), n.pod()
	client.ID = otherID
	server.PortMappings = []PortMapping{{Protocol: "tcp", ContainerPort: port, HostPort: hostPort}}
	for _, p := range []*Pod{&server, &client} {
		p.Conflist = made
		host.do(func() error {
			res, err := m.Setup(t.Context(), *p)
			if err == nil && (len(res.IPs) != 2 || !cidrs(t, range4)[0].Contains(res.IPs[0]) || !cidrs(t, range6)[0].Contains(res.IPs[1])) {
				t.Fatalf("addresses %v", res.IPs)
			}
			if err == nil && p == &server {
				p.Name = res.IPs[0].String() + " " + res.IPs[1].String()
			}
			return err
		})
		if err := InNamespaces([]string{p.NetNS}, func() error {
			link, err := netlink.LinkByName(IfName)
			if err == nil && link.Attrs().MTU != mtu {
				t.Errorf("MTU %d", link.Attrs().MTU)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	server4, server6, _ := strings.Cut(server.Name, " ")
	server.Name = client.Name
	serve(t, server.NetNS, port)
	serve(t, outside.ns, port)
	for _, tc := range []struct {
		what, from, to string
		port           int
		want           string // "": whoever
	}{
		{"from pod to pod", client.NetNS, server4, port, ""},
		{"from pod to pod, IPv6", client.NetNS, server6, port, ""},
		{"from the host to the pod", host.ns, server4, port, "10.89.9.1"},
		{"from the host to the pod, IPv6", host.ns, server6, port, ""},
		{"to the outside, by the host's address", client.NetNS, "192.168.99.2", port, "192.168.99.1"},
		{"to the outside, by the host's address, IPv6", client.NetNS, "fd99::2", port, "fd99::1"},
		{"host port from outside", outside.ns, "192.168.99.1", hostPort, "192.168.99.2"},
		{"host port from outside, IPv6", outside.ns, "fd99::1", hostPort, "fd99::2"},
		{"host port on the host", host.ns, "127.0.0.1", hostPort, ""},
		{"host port from another pod", client.NetNS, "192.168.99.1", hostPort, ""},
		{"the pod's own host port", server.NetNS, "192.168.99.1", hostPort, ""},
		{"the pod's own host port, IPv6", server.NetNS, "fd99::1", hostPort, ""},
	} {
		if got, err := ask(tc.from, tc.to, tc.port); err != nil || tc.want != "" && got != tc.want {
			t.Errorf("%s: %q, %v, want %q", tc.what, got, err, tc.want)
		}
	}
	for _, p := range []Pod{server, client} {
		host.do(func() error { return m.Teardown(t.Context(), p) })
	}
	if left, err := filepath.Glob(n.cache + "/networks/*/[0-9f]*"); err != nil || len(left) > 0 {
		t.Errorf("addresses left: %v, %v", left, err)
	}
	host.do(func() error {
		for _, show := range []string{"iptables-save", "ip6tables-save"} {
			out, err := exec.Command(show).Output()
			if err != nil {
				return err
			}
			if bytes.Contains(out, []byte(defaultName(cidrs(t, range4)))) {
				t.Errorf("rules left: %s", out)
			}
		}
		return nil
	})
}

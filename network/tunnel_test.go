package network

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Pods leave room for the headers of a tunnel, of IPv4 where the node has a way out by that.
func TestPodMTUBesideATunnel(t *testing.T) {
	for name, tc := range map[string]struct {
		ways      []string
		tunnelled bool
		want      int
	}{
		"no tunnel":                    {[]string{"192.168.1.1", "fd02::1"}, false, 1500},
		"a tunnel of IPv4":             {[]string{"192.168.1.1", "fd02::1"}, true, 1450},
		"a tunnel of IPv6":             {[]string{"fd02::1"}, true, 1430},
		"nothing is known of the ways": {nil, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLinks(t)
			l.add(cable("out", 1500), "192.168.1.2/24", "fd02::2/64")
			for _, gw := range tc.ways {
				l.route(netlink.Route{Gw: net.ParseIP(gw)})
			}
			m := &Manager{opts: Options{Tunnelled: tc.tunnelled}}
			l.do(func() error {
				if got := m.podMTU(cidrs(t, "10.1.0.0/24,fd01::/64")); got != tc.want {
					t.Errorf("%d, want %d", got, tc.want)
				}
				return nil
			})
		})
	}
}

// Whoever makes routes for the default network hears when that comes, changes, and gives way to another.
func TestDefaultIsTold(t *testing.T) {
	n := bare(t)
	m := n.open()
	told := func(what, cidr, other string) {
		t.Helper()
		for {
			select {
			case <-m.Changes():
			case <-time.After(5 * time.Second):
				t.Fatalf("%s: no news", what)
			}
			got, from := m.Default()
			if joinCIDRs(got) == cidr && from == other {
				return
			}
		}
	}
	if got, other := m.Default(); got != nil || other != "" {
		t.Errorf("at first: %v, %q", got, other)
	}
	m.SetPodCIDRs(someCIDR)
	told("a pod CIDR", someCIDR, "")
	m.SetPodCIDRs(otherCIDR)
	told("another one", otherCIDR, "")
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	told("a configuration", "", n.conf+"/10-a.conflist")
	n.write(n.conf+"/10-a.conflist", "{")
	told("a broken one: nobody knows", "", "")
	if err := os.Remove(n.conf + "/10-a.conflist"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(n.cache + "/configured"); err != nil {
		t.Fatal(err)
	}
	told("the default one again", otherCIDR, "")
}

package iptables

import (
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// CVE-2020-8558: node ports at 127.0.0.1 need route_localnet, which opens the node's loopback to its neighbours. The rule against
// that is there before it is set; without such node ports it is not set.
func TestCVE_2020_8558(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		l := nodetest.New(t, 1)
		s := nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, ip4.Pods(1), ip4.NodePort(30080))))
		p := openAt(l.Node, backend)
		l.Client.Sysctl("net/ipv4/conf/all/route_localnet", "1")
		l.Client.Run("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
		l.Client.Run("ip", "route", "add", "127.0.0.0/8", "via", ip4.Node, "src", ip4.Client)
		l.Node.ServeTCP(7777)
		for _, loopback := range []bool{false, true} {
			s.All.Family[model.IPv4].NodePorts.Loopback = loopback
			if _, err := p.Sync(s); err != nil {
				t.Fatal(err)
			}
			want := map[bool]string{false: "0\n", true: "1\n"}[loopback]
			if got := l.Node.Run("cat", "/proc/sys/net/ipv4/conf/all/route_localnet"); got != want {
				t.Errorf("route_localnet: %q", got)
			}
			l.Want(l.Client, ip4.TCP, "127.0.0.1:7777", nodetest.Silence)
			got := l.Node.Ask(ip4.TCP, "127.0.0.1:30080")
			if loopback != strings.HasPrefix(got, "pod1 ") || !loopback && got != nodetest.Refused {
				t.Errorf("from the node itself, loopback %v: %q", loopback, got)
			}
		}
	})
}

// By whichever address a client comes, it is sent to the endpoint where it was sent first, until that goes; and it stays with the
// next one when the first comes back.
func TestSessionAffinity(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		for _, f := range nodetest.Families {
			l := nodetest.New(t, 2)
			p := openAt(l.Node, backend)
			of := func(pods ...int) *model.Service {
				return nodetest.ServiceOf("web", nodetest.Sticky(3*time.Hour, nodetest.PortOf(model.TCP, f.Pods(pods...), f.LoadBalancer(80), f.NodePort(30080))))
			}
			both := of(1, 2)
			s := nodetest.NewState(both)
			if _, err := p.Sync(s); err != nil {
				t.Fatal(err)
			}
			apply := func(old, next *model.Service) {
				if _, err := p.Apply(s.Delta(old, next)); err != nil {
					t.Fatal(err)
				}
			}
			who := func() string { return strings.Fields(l.Client.Ask(f.TCP, nodetest.At(f.LoadIP, 80)) + " ")[0] }
			first := who()
			stays := func(at string) {
				t.Helper()
				for range 10 {
					if got := l.Client.Ask(f.TCP, nodetest.At(f.Node, 30080)); !strings.HasPrefix(got, at+" ") || who() != at {
						t.Errorf("%s: %q, not %s", f.Name, got, at)
					}
				}
			}
			stays(first)
			left := map[string]int{"pod1": 2, "pod2": 1}[first]
			one := of(left)
			apply(both, one)
			stays([]string{"", "pod1", "pod2"}[left])
			apply(one, both)
			stays([]string{"", "pod1", "pod2"}[left])
			// And a restart forgets nobody.
			if _, err := openAt(l.Node, backend).Sync(s); err != nil {
				t.Fatal(err)
			}
			stays([]string{"", "pod1", "pod2"}[left])
		}
	})
}

// Packets that conntrack takes for invalid are dropped where they are forwarded, unless it is liberal.
func TestInvalidPackets(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, "nft")
	const rule = "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n"
	for _, liberal := range []string{"0", "1", "0"} {
		s.Sysctl("net/netfilter/nf_conntrack_tcp_be_liberal", liberal)
		if _, err := p.Sync(nodetest.NewState()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(listing(s, "nft"), rule); got != map[string]int{"0": 2, "1": 0}[liberal] {
			t.Errorf("liberal %s: %d rules", liberal, got)
		}
	}
}

package routes

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// lan is this node's way to others: eth0 with an address of each family.
var lan = Link{Index: 2, Name: "eth0", MTU: 1500, Addrs: prefixes("192.168.1.1/24", "fd00:1::1/64")}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// object is a Node made so many minutes after the first: "1.1.1.1,fd00::1 10.1.0.0/24,fd01::/64", "-" for none.
func object(name string, minute int, spec string) Node {
	n := Node{Name: name, Created: epoch.Add(time.Duration(minute) * time.Minute)}
	addrs, cidrs, _ := strings.Cut(spec, " ")
	if addrs != "-" {
		n.Addresses = strings.Split(addrs, ",")
	}
	if cidrs != "-" && cidrs != "" {
		n.PodCIDRs = strings.Split(cidrs, ",")
	}
	return n
}

// self is this node.
var self = object("me", 0, "192.168.1.1,fd00:1::1 10.1.0.0/24,fd01::/64")

func ownCIDRs() []netip.Prefix { return prefixes("10.1.0.0/24", "fd01::/64") }

// show is a plan, a line for each route, peer and thing left out.
func show(p *Plan) string {
	var lines []string
	for _, t := range p.Tunnels {
		lines = append(lines, fmt.Sprintf("%s local %s mtu %d addrs %v", t.Name, t.Local, t.MTU, t.Addrs))
		for _, peer := range t.Peers {
			lines = append(lines, fmt.Sprintf("%s peer %s hops %d", t.Name, peer.Node, len(peer.Hops)))
		}
	}
	for _, r := range p.Routes {
		way := "dev " + r.Link
		if r.Link == "" {
			way = fmt.Sprintf("via %s index %d", r.Via, r.LinkIndex)
		}
		lines = append(lines, fmt.Sprintf("%s %s", r.Dst, way))
	}
	for _, out := range p.LeftOut {
		lines = append(lines, out.String())
	}
	return strings.Join(lines, "\n")
}

func TestPlan(t *testing.T) {
	const tunnel4 = "berth.vxlan local 192.168.1.1 mtu 1450 addrs [10.1.0.1 fd01::1]"
	const tunnel6 = "berth.vxlan6 local fd00:1::1 mtu 1430 addrs [10.1.0.1 fd01::1]"
	near := object("near", 1, "192.168.1.2,fd00:1::2 10.2.0.0/24,fd02::/64")
	far := object("far", 2, "192.168.9.3,fd00:9::3 10.3.0.0/24,fd03::/64")
	for name, tc := range map[string]struct {
		mode  Mode
		nodes []Node
		want  []string
	}{
		"host-gw, one subnet": {HostGateway, []Node{near}, []string{
			"10.2.0.0/24 via 192.168.1.2 index 2", "fd02::/64 via fd00:1::2 index 2",
		}},
		"host-gw does not reach beyond a router": {HostGateway, []Node{far}, []string{
			"node far: pod CIDR 10.3.0.0/24: 192.168.9.3 is in no subnet of this node: mode auto or vxlan leads there",
			"node far: pod CIDR fd03::/64: fd00:9::3 is in no subnet of this node: mode auto or vxlan leads there",
		}},
		"auto takes what fits": {Auto, []Node{near, far}, []string{
			tunnel4, "berth.vxlan peer 192.168.9.3 hops 2", tunnel6,
			"10.2.0.0/24 via 192.168.1.2 index 2", "10.3.0.0/24 dev berth.vxlan", "fd02::/64 via fd00:1::2 index 2", "fd03::/64 dev berth.vxlan",
		}},
		"vxlan, also in one subnet": {VXLAN, []Node{near}, []string{
			tunnel4, "berth.vxlan peer 192.168.1.2 hops 2", tunnel6, "10.2.0.0/24 dev berth.vxlan", "fd02::/64 dev berth.vxlan",
		}},
		"auto: IPv6 pods of nodes that reach each other by IPv4 alone": {Auto, []Node{object("near", 1, "192.168.1.2 10.2.0.0/24,fd02::/64")}, []string{
			tunnel4, "berth.vxlan peer 192.168.1.2 hops 1", tunnel6, "10.2.0.0/24 via 192.168.1.2 index 2", "fd02::/64 dev berth.vxlan",
		}},
		"a tunnel of IPv6 to a node that has nothing else": {Auto, []Node{object("far", 1, "fd00:9::3 10.3.0.0/24,fd03::/64")}, []string{
			tunnel4, tunnel6, "berth.vxlan6 peer fd00:9::3 hops 2", "10.3.0.0/24 dev berth.vxlan6", "fd03::/64 dev berth.vxlan6",
		}},
		"a node without an address": {Auto, []Node{object("far", 1, "- 10.3.0.0/24")}, []string{
			tunnel4, tunnel6, "node far: pod CIDR 10.3.0.0/24: no family in which both nodes have an InternalIP",
		}},
		"host-gw, a node without an address of the family": {HostGateway, []Node{object("near", 1, "192.168.1.2 fd02::/64")}, []string{
			"node near: pod CIDR fd02::/64: the node has no InternalIP of this family",
		}},
		"a node without a pod CIDR": {HostGateway, []Node{object("near", 1, "192.168.1.2 -")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			plan, err := Compute(Input{Mode: tc.mode, Self: "me", PodCIDRs: ownCIDRs(), Nodes: append([]Node{self}, tc.nodes...), Links: []Link{lan}})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := show(plan), strings.Join(tc.want, "\n"); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// A node of one family has no routes for the other, and that is no fault of anybody's.
func TestFamilyWithoutPodsHere(t *testing.T) {
	me := object("me", 0, "192.168.1.1 10.1.0.0/24")
	other := object("near", 1, "192.168.1.2,fd00:1::2 10.2.0.0/24,fd02::/64")
	plan, err := Compute(Input{Mode: HostGateway, Self: "me", PodCIDRs: prefixes("10.1.0.0/24"), Nodes: []Node{me, other}, Links: []Link{lan}})
	if err != nil || show(plan) != "10.2.0.0/24 via 192.168.1.2 index 2" {
		t.Errorf("%v\n%s", err, show(plan))
	}
}

func TestTheSmallestSubnetIsTaken(t *testing.T) {
	wide := Link{Index: 7, Name: "wide", MTU: 9000, Addrs: prefixes("192.168.0.1/16")}
	plan, err := Compute(Input{Mode: HostGateway, Self: "me", PodCIDRs: ownCIDRs(), Links: []Link{wide, lan}, Nodes: []Node{
		self, object("a", 1, "192.168.1.2 10.2.0.0/24"), object("b", 1, "192.168.2.2 10.3.0.0/24"),
	}})
	if want := "10.2.0.0/24 via 192.168.1.2 index 2\n10.3.0.0/24 via 192.168.2.2 index 7"; err != nil || show(plan) != want {
		t.Errorf("%v\n%s", err, show(plan))
	}
}

func TestWaiting(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Input)
		want   string
	}{
		"no object of this node":  {func(in *Input) { in.Nodes = in.Nodes[1:] }, "for Node object me, this node's (--node-name)"},
		"no nodes at all":         {func(in *Input) { in.Nodes = nil }, "for Node object me"},
		"no pod CIDR yet":         {func(in *Input) { in.Nodes[0].PodCIDRs = nil }, "for spec.podCIDRs of Node object me"},
		"no default network":      {func(in *Input) { in.PodCIDRs = nil }, "for a pod CIDR of this node"},
		"address is of no link":   {func(in *Input) { in.Links = nil }, "for an InternalIP of Node object me that a link of this node has"},
		"no InternalIP at all":    {func(in *Input) { in.Nodes[0].Addresses = nil }, "for an InternalIP of Node object me"},
		"a pod CIDR that is none": {func(in *Input) { in.Nodes[0].PodCIDRs = []string{"0.0.0.0/0"} }, "for spec.podCIDRs of Node object me"},
	} {
		t.Run(name, func(t *testing.T) {
			in := Input{Mode: Auto, Self: "me", PodCIDRs: ownCIDRs(), Nodes: []Node{self, object("near", 1, "192.168.1.2 10.2.0.0/24")}, Links: []Link{lan}}
			tc.change(&in)
			if plan, err := Compute(in); !errors.Is(err, errWaiting) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, %v", plan, err)
			}
		})
	}
}

func TestOtherPodCIDRsThanTheObjects(t *testing.T) {
	plan, err := Compute(Input{Mode: HostGateway, Self: "me", PodCIDRs: prefixes("10.77.0.0/24"), Nodes: []Node{self}, Links: []Link{lan}})
	if want := "node me: pod CIDRs 10.1.0.0/24,fd01::/64: pods of this node have addresses of 10.77.0.0/24: other nodes do not find them"; err != nil || show(plan) != want {
		t.Errorf("%v\n%s", err, show(plan))
	}
}

// TestBadNodes has one good node and a bad one: the good one's routes are there whatever the bad one says.
func TestBadNodes(t *testing.T) {
	const good = "10.2.0.0/24 via 192.168.1.2 index 2\nfd02::/64 via fd00:1::2 index 2"
	for name, tc := range map[string]struct{ spec, want string }{
		"default route":                      {"192.168.1.9 0.0.0.0/0", "pod CIDR 0.0.0.0/0: it is larger than a /8"},
		"default route of IPv6":              {"192.168.1.9 ::/0", "pod CIDR ::/0: it is larger than a /32"},
		"half of the internet":               {"192.168.1.9 128.0.0.0/1", "pod CIDR 128.0.0.0/1: it is larger than a /8"},
		"global unicast":                     {"192.168.1.9 2000::/3", "pod CIDR 2000::/3: it is larger than a /32"},
		"another's range":                    {"192.168.1.9 10.2.0.0/24", "pod CIDR 10.2.0.0/24: it overlaps pod CIDR 10.2.0.0/24 of node good"},
		"a part of another's":                {"192.168.1.9 10.2.0.128/25", "pod CIDR 10.2.0.128/25: it overlaps pod CIDR 10.2.0.0/24 of node good"},
		"around another's":                   {"192.168.1.9 10.2.0.0/16", "pod CIDR 10.2.0.0/16: it overlaps pod CIDR 10.2.0.0/24 of node good"},
		"this node's range":                  {"192.168.1.9 10.1.0.0/16", "pod CIDR 10.1.0.0/16: it overlaps pod CIDR 10.1.0.0/24 of node me"},
		"an address of a node":               {"192.168.1.9 192.168.1.0/30", "pod CIDR 192.168.1.0/30: it overlaps address 192.168.1.1 of node me"},
		"a part of the nodes' subnet":        {"192.168.1.9 192.168.1.252/30", "pod CIDR 192.168.1.252/30: it overlaps subnet 192.168.1.0/24 of link eth0"},
		"around the nodes' subnet":           {"192.168.9.9 192.168.0.0/16", "pod CIDR 192.168.0.0/16: it overlaps address 192.168.1.1 of node me"},
		"its own address":                    {"192.168.9.9 192.168.9.0/24", "pod CIDR 192.168.9.0/24: it overlaps address 192.168.9.9 of node bad"},
		"loopback":                           {"192.168.1.9 127.0.0.0/24", "pod CIDR 127.0.0.0/24: it has addresses that are no pod's"},
		"groups":                             {"192.168.1.9 239.0.0.0/24", "pod CIDR 239.0.0.0/24: it has addresses that are no pod's"},
		"link-local":                         {"192.168.1.9 169.254.0.0/16", "pod CIDR 169.254.0.0/16: it has addresses that are no pod's"},
		"link-local of IPv6":                 {"192.168.1.9 fe80::/64", "pod CIDR fe80::/64: it has addresses that are no pod's"},
		"IPv4 in IPv6":                       {"192.168.1.9 ::ffff:10.9.0.0/120", "pod CIDR ::ffff:10.9.0.0/120: it has addresses that are no pod's"},
		"one address":                        {"192.168.1.9 10.9.0.1/32", "pod CIDR 10.9.0.1/32: it is too small for a gateway and a pod"},
		"no range":                           {"192.168.1.9 10.9.0.0", "pod CIDR 10.9.0.0: it is no address range"},
		"nonsense":                           {"192.168.1.9 \x1b[31mred", `pod CIDR \x1b[31mred: it is no address range`},
		"very long":                          {"192.168.1.9 " + strings.Repeat("9", 5000), "pod CIDR " + strings.Repeat("9", 64) + "…: it is no address range"},
		"the way out":                        {"192.168.1.9 172.31.0.0/24", "pod CIDR 172.31.0.0/24: it overlaps 172.31.0.254, a next hop of this node"},
		"a zone":                             {"192.168.1.9 fe80::%eth0/64", "pod CIDR fe80::%eth0/64: it is no address range"},
		"another's address":                  {"192.168.1.2 -", "address 192.168.1.2: it is, or is in, address 192.168.1.2 of node good"},
		"this node's address":                {"192.168.1.1 -", "address 192.168.1.1: it is, or is in, address 192.168.1.1 of node me"},
		"an address of another's pods":       {"10.2.0.7 -", "address 10.2.0.7: it is, or is in, pod CIDR 10.2.0.0/24 of node good"},
		"loopback as address":                {"127.0.0.1 -", "address 127.0.0.1: it is none of a node in a network"},
		"a name as address":                  {"bad.example -", "address bad.example: it is no IP address"},
		"link-local with a zone as address":  {"fe80::1%eth0 -", "address fe80::1%eth0: it is no IP address"},
		"everything":                         {"0.0.0.0 -", "address 0.0.0.0: it is none of a node in a network"},
		"another one of the family (no IPs)": {"- 10.7.0.0/24,10.8.0.0/24", "pod CIDR 10.8.0.0/24: the node has another one of this family"},
	} {
		t.Run(name, func(t *testing.T) {
			keep := map[netip.Addr]string{netip.MustParseAddr("172.31.0.254"): "a next hop of this node"}
			plan, err := Compute(Input{Mode: HostGateway, Self: "me", PodCIDRs: ownCIDRs(), Links: []Link{lan}, Keep: keep, Nodes: []Node{
				object("bad", 5, tc.spec), object("good", 1, "192.168.1.2,fd00:1::2 10.2.0.0/24,fd02::/64"), self,
			}})
			if err != nil {
				t.Fatal(err)
			}
			routes, rest := "", ""
			for line := range strings.Lines(show(plan)) {
				if strings.HasPrefix(line, "node bad: ") {
					rest += strings.TrimPrefix(line, "node bad: ")
				} else {
					routes += line
				}
			}
			if strings.TrimSpace(routes) != good {
				t.Errorf("routes:\n%s", routes)
			}
			if !strings.Contains(rest, tc.want) {
				t.Errorf("left out:\n%s\nwant\n%s", rest, tc.want)
			}
		})
	}
}

// Of two that claim the same the older one has it, whatever they are called, and the same on every node.
func TestTheOlderNodeHasIt(t *testing.T) {
	older, newer := object("z-older", 1, "192.168.1.2 10.2.0.0/24"), object("a-newer", 2, "192.168.1.3 10.2.0.0/16")
	for _, nodes := range [][]Node{{self, older, newer}, {newer, older, self}} {
		plan, err := Compute(Input{Mode: HostGateway, Self: "me", PodCIDRs: ownCIDRs(), Links: []Link{lan}, Nodes: nodes})
		if err != nil || len(plan.Routes) != 1 || plan.Routes[0].Via.String() != "192.168.1.2" {
			t.Errorf("%v\n%s", err, show(plan))
		}
	}
}

func TestNoMACTwice(t *testing.T) {
	seen := map[string]netip.Addr{}
	a := netip.MustParseAddr("10.0.0.0")
	for range 100000 {
		mac := macOf(a)
		if mac[0]&3 != 2 {
			t.Fatalf("%s of %s is not a local address of one station", mac, a)
		}
		if other, ok := seen[mac.String()]; ok {
			t.Fatalf("%s and %s have %s", a, other, mac)
		}
		seen[mac.String()] = a
		a = a.Next()
	}
	// It is the same in every release: nodes of different ones talk to each other.
	if mac := macOf(netip.MustParseAddr("192.168.1.2")); mac.String() != "ce:fc:90:29:4e:43" {
		t.Errorf("%s", mac)
	}
	if hop := linkLocal(macOf(netip.MustParseAddr("192.168.1.2"))); hop.String() != "fe80::ccfc:90ff:fe29:4e43" {
		t.Errorf("%s", hop)
	}
}

func TestPlansOfTheSameAreEqual(t *testing.T) {
	nodes := []Node{self}
	for i := range 50 {
		nodes = append(nodes, object(fmt.Sprint("n", i), i, fmt.Sprintf("192.168.%d.9,fd00:%x::9 10.%d.0.0/24,fd%02x::/64", i, i, i+10, i+10)))
	}
	in := Input{Mode: Auto, Self: "me", PodCIDRs: ownCIDRs(), Links: []Link{lan}, Nodes: nodes}
	one, err := Compute(in)
	if err != nil {
		t.Fatal(err)
	}
	in.Nodes = slices.Clone(nodes)
	slices.Reverse(in.Nodes)
	two, err := Compute(in)
	if err != nil || !reflect.DeepEqual(one, two) {
		t.Errorf("%v\n%s\nand\n%s", err, show(one), show(two))
	}
}

package routes

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
)

// host is a network namespace with eth0 in it.
type host struct {
	t  *testing.T
	ns string
}

func newHost(t *testing.T) host {
	t.Helper()
	h := host{t, filepath.Join(t.TempDir(), "net")}
	if err := network.Pin(network.NamespaceSet{Net: h.ns}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := network.Unpin(h.ns); err != nil {
			t.Error(err)
		}
	})
	h.do(func() error { return addLink("eth0", 1500, lan.Addrs...) })
	return h
}

func (h host) do(f func() error) {
	h.t.Helper()
	if err := network.InNamespaces([]string{h.ns}, f); err != nil {
		h.t.Fatal(err)
	}
}

func addLink(name string, mtu int, addrs ...netip.Prefix) error {
	link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: mtu}, PeerName: "x" + name}
	if err := netlink.LinkAdd(link); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: toNet(a), Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	peer, err := netlink.LinkByName("x" + name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(peer); err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// command runs a program in the host's network and returns what it says, in lines without the spaces around.
func (h host) command(name string, args ...string) []string {
	h.t.Helper()
	var lines []string
	h.do(func() error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s %v: %w: %s", name, args, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if line = strings.Join(strings.Fields(line), " "); line != "" {
				lines = append(lines, line)
			}
		}
		return nil
	})
	return lines
}

// plan is what the host should have for these nodes beside it.
func (h host) plan(mode Mode, nodes ...Node) *Plan {
	h.t.Helper()
	var links []Link
	h.do(func() (err error) {
		links, err = readLinks()
		return err
	})
	plan, err := Compute(Input{Mode: mode, Self: "me", PodCIDRs: ownCIDRs(), Nodes: append([]Node{self}, nodes...), Links: links})
	if err != nil {
		h.t.Fatal(err)
	}
	return plan
}

func (h host) apply(mode Mode, nodes ...Node) {
	h.t.Helper()
	plan := h.plan(mode, nodes...)
	h.put(plan)
}

func (h host) put(plan *Plan) {
	h.t.Helper()
	h.do(func() error {
		_, err := plan.apply()
		return err
	})
}

// state is all that is ours in the kernel.
func (h host) state() []string {
	var all []string
	all = append(all, h.command("ip", "-4", "route", "show", "proto", "98")...)
	all = append(all, h.command("ip", "-6", "route", "show", "proto", "98")...)
	links := h.command("ip", "-o", "link", "show")
	for _, name := range Links() {
		if !slices.ContainsFunc(links, func(l string) bool { return strings.Contains(l, ": "+name+": ") }) {
			continue
		}
		for _, args := range [][]string{{"neigh", "show", "dev", name, "nud", "permanent"}, {"-6", "neigh", "show", "dev", name, "nud", "permanent"}} {
			for _, line := range h.command("ip", args...) {
				if !slices.Contains(all, name+" "+line) { // "neigh show" is of both families in some versions
					all = append(all, name+" "+line)
				}
			}
		}
		all = append(all, h.command("bridge", "fdb", "show", "dev", name)...)
		for _, line := range h.command("ip", "-o", "addr", "show", "dev", name) {
			all = append(all, strings.Join(strings.Fields(line)[1:4], " "))
		}
	}
	slices.Sort(all)
	return all
}

func (h host) wantState(when string, want ...string) {
	h.t.Helper()
	slices.Sort(want)
	if got := h.state(); !slices.Equal(got, want) {
		h.t.Errorf("%s: got\n\t%s\nwant\n\t%s", when, strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

var (
	nearNode = object("near", 1, "192.168.1.2,fd00:1::2 10.2.0.0/24,fd02::/64")
	farNode  = object("far", 2, "192.168.9.3 10.3.0.0/24,fd03::/64")
)

// What near and far make of the kernel's tables.
var (
	nearState = []string{
		"10.2.0.0/24 via 192.168.1.2 dev eth0", "fd02::/64 via fd00:1::2 dev eth0 metric 1024 pref medium",
	}
	ends = []string{
		"berth.vxlan inet 10.1.0.1/32", "berth.vxlan inet6 fd01::1/128", "berth.vxlan6 inet 10.1.0.1/32", "berth.vxlan6 inet6 fd01::1/128",
	}
	farState = []string{
		"10.3.0.0/24 via 10.3.0.1 dev berth.vxlan src 10.1.0.1 onlink", "fd03::/64 via " + farHop + " dev berth.vxlan src fd01::1 metric 1024 pref medium",
		"berth.vxlan 10.3.0.1 lladdr " + farMAC + " PERMANENT", "berth.vxlan " + farHop + " lladdr " + farMAC + " PERMANENT",
		farMAC + " dst 192.168.9.3 self permanent",
	}
	farMAC = macOf(netip.MustParseAddr("192.168.9.3")).String()
	farHop = linkLocal(macOf(netip.MustParseAddr("192.168.9.3"))).String()
)

func TestKernelHasThePlan(t *testing.T) {
	h := newHost(t)
	h.wantState("before")
	h.apply(Auto, nearNode, farNode)
	h.wantState("both nodes", slices.Concat(nearState, ends, farState)...)
	link := strings.Join(h.command("ip", "-d", "-o", "link", "show", "berth.vxlan"), "\n")
	for _, want := range []string{
		"mtu 1450", "vxlan id 48711 local 192.168.1.1", "dstport 4789", "nolearning", "addrgenmode none", macOf(lan.Addrs[0].Addr()).String(), "UP",
	} {
		if !strings.Contains(link, want) {
			t.Errorf("no %q in\n%s", want, link)
		}
	}

	h.apply(Auto, farNode)
	h.wantState("near is gone", slices.Concat(ends, farState)...)
	h.apply(Auto, nearNode)
	h.wantState("far is gone", slices.Concat(nearState, ends)...)
	h.apply(HostGateway, nearNode)
	h.wantState("without a tunnel", nearState...)
	h.do(withdraw)
	h.wantState("withdrawn")
	if tables := h.command("nft", "list", "tables"); len(tables) > 0 {
		t.Errorf("tables are left: %v", tables)
	}
}

// What is as it should be is not touched: the kernel tells of no change.
func TestNothingIsChangedTwice(t *testing.T) {
	h := newHost(t)
	plan := h.plan(Auto, nearNode, farNode)
	h.put(plan)
	handles := h.command("nft", "-a", "list", "table", "inet", tableName)
	var monitor *exec.Cmd
	out, err := os.Create(filepath.Join(t.TempDir(), "news"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	news := func() string {
		text, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	h.do(func() error {
		monitor = exec.Command("ip", "monitor", "link", "address", "route", "neigh")
		monitor.Stdout = out
		return monitor.Start()
	})
	for range 3 {
		h.put(plan)
	}
	h.command("ip", "route", "add", "10.99.0.0/24", "via", "192.168.1.99") // which the monitor tells
	for range 100 {
		if strings.Contains(news(), "10.99.0.0/24") {
			break
		}
		sleep()
	}
	_ = monitor.Process.Kill()
	_ = monitor.Wait()
	var more []string
	for line := range strings.Lines(news()) {
		// Links of pairs tell of themselves when they come up.
		if !strings.Contains(line, "10.99.0.0/24") && strings.Contains(line, "berth") || strings.Contains(line, "proto 98") {
			more = append(more, line)
		}
	}
	if !strings.Contains(news(), "10.99.0.0/24") || len(more) > 0 {
		t.Errorf("the kernel told of\n%s\nof all\n%s", strings.Join(more, ""), news())
	}
	if after := h.command("nft", "-a", "list", "table", "inet", tableName); !slices.Equal(handles, after) {
		t.Errorf("the table was made anew:\n%s\nand\n%s", strings.Join(handles, "\n"), strings.Join(after, "\n"))
	}
}

func TestWhatIsChangedIsMended(t *testing.T) {
	h := newHost(t)
	h.apply(Auto, nearNode, farNode)
	want := h.state()
	table := h.command("nft", "list", "table", "inet", tableName)
	for _, damage := range []string{
		"ip route del 10.2.0.0/24",
		"ip -6 route del fd03::/64",
		"ip route replace 10.2.0.0/24 via 192.168.1.77 proto 98",
		"ip route add 10.4.0.0/24 via 192.168.1.77 proto 98",
		"ip link del berth.vxlan",
		"ip link set berth.vxlan down",
		"ip link set berth.vxlan mtu 1400",
		"ip link set berth.vxlan address 02:00:00:00:00:01",
		"ip link add berth.vxlan6x type vxlan id 9 dstport 9 local 192.168.1.1", // not ours
		"bridge fdb del " + farMAC + " dev berth.vxlan",
		"bridge fdb replace " + farMAC + " dev berth.vxlan dst 192.168.9.99",
		"bridge fdb append 02:00:00:00:00:02 dev berth.vxlan dst 192.168.9.99",
		"ip neigh del 10.3.0.1 dev berth.vxlan",
		"ip neigh replace 10.3.0.1 lladdr 02:00:00:00:00:01 dev berth.vxlan",
		"ip addr del 10.1.0.1/32 dev berth.vxlan",
		"ip addr add 10.1.0.9/32 dev berth.vxlan",
		"nft delete table inet berth-routes",
		"nft flush chain inet berth-routes pods",
		"nft flush set inet berth-routes pods4",
		"nft add element inet berth-routes pods4 { 10.77.0.0/24 }",
		"nft add element inet berth-routes nodes4 { 10.77.0.1 }",
		"nft add chain inet berth-routes more",
		"nft add rule inet berth-routes tunnel-in accept",
		"nft insert rule inet berth-routes tunnel-in accept",
	} {
		t.Run(damage, func(t *testing.T) {
			h := host{t, h.ns}
			args := strings.Fields(damage)
			h.command(args[0], args[1:]...)
			h.apply(Auto, nearNode, farNode)
			h.wantState("mended", want...)
			if now := h.command("nft", "list", "table", "inet", tableName); !slices.Equal(now, table) {
				t.Errorf("table:\n%s\nwant\n%s", strings.Join(now, "\n"), strings.Join(table, "\n"))
			}
			if link := h.command("ip", "-o", "link", "show", "berth.vxlan")[0]; !strings.Contains(link, "mtu 1450") || !strings.Contains(link, macOf(lan.Addrs[0].Addr()).String()) {
				t.Errorf("%s", link)
			}
		})
	}
	if links := strings.Join(h.command("ip", "-o", "link", "show"), "\n"); !strings.Contains(links, "berth.vxlan6x") {
		t.Errorf("another's link is gone:\n%s", links)
	}
}

// Who loads a firewall anew begins with `flush ruleset`: that is told at once, and said once the rules are there again.
func TestFlushedRulesAreSeenAtOnce(t *testing.T) {
	h := newHost(t)
	log := &strings.Builder{}
	a := &Agent{log: slog.New(slog.NewTextHandler(log, nil))}
	plan := h.plan(Auto, nearNode)
	apply := func() { h.do(func() error { return a.apply(plan) }) }
	apply()
	changed := make(chan struct{}, 1)
	ctx, stop := context.WithCancel(t.Context())
	watched := make(chan error)
	go func() {
		watched <- network.InNamespaces([]string{h.ns}, func() error { return a.watchKernelOnce(ctx, changed) })
	}()
	for told := false; !told; { // until somebody listens
		h.command("nft", "flush", "ruleset")
		select {
		case <-changed:
			told = true
		case err := <-watched:
			t.Fatalf("it ended: %v", err)
		case <-time.After(tableEvery / 10):
		}
	}
	apply()
	apply()
	h.command("nft", "list", "table", "inet", tableName)
	if n := strings.Count(log.String(), "changed by somebody else"); n != 1 {
		t.Errorf("said %d times:\n%s", n, log)
	}
	stop()
	if err := <-watched; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Nothing that is another's is touched, not even where it is in the way.
func TestWhatIsOthersStays(t *testing.T) {
	h := newHost(t)
	h.command("ip", "route", "add", "10.2.0.0/24", "via", "192.168.1.55", "proto", "static")
	h.command("ip", "-6", "route", "add", "fd02::/64", "via", "fd00:1::55", "proto", "static")
	h.command("ip", "route", "add", "10.50.0.0/24", "via", "192.168.1.55", "proto", "bird")
	h.command("ip", "neigh", "add", "192.168.1.55", "lladdr", "02:00:00:00:00:55", "dev", "eth0")
	h.command("nft", "add", "table", "inet", "others")
	others := func() []string {
		return slices.Concat(h.command("ip", "route", "show", "proto", "static"), h.command("ip", "-6", "route", "show", "proto", "static"),
			h.command("ip", "route", "show", "proto", "bird"), h.command("ip", "neigh", "show", "nud", "permanent", "dev", "eth0"), h.command("nft", "list", "table", "inet", "others"))
	}
	before := others()
	plan := h.plan(Auto, nearNode, farNode)
	var err error
	h.do(func() error {
		_, err = plan.apply()
		return nil
	})
	for _, dst := range []string{"10.2.0.0/24", "fd02::/64"} {
		if err == nil || !strings.Contains(err.Error(), "route to "+dst) || !strings.Contains(err.Error(), "another program has made a route there") {
			t.Errorf("of %s: %v", dst, err)
		}
	}
	h.wantState("the rest is done", slices.Concat(ends, farState)...)
	h.do(withdraw)
	h.wantState("withdrawn")
	if after := others(); !slices.Equal(before, after) {
		t.Errorf("before\n%s\nafter\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
	}
}

func TestALinkOfThatNameIsNotOurs(t *testing.T) {
	h := newHost(t)
	h.do(func() error { return addLink(Tunnel4, 1500) })
	plan := h.plan(Auto, farNode)
	var err error
	h.do(func() error {
		_, err = plan.apply()
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "link berth.vxlan: there is one of type veth, which is not ours") {
		t.Errorf("%v", err)
	}
	h.do(withdraw)
	h.command("ip", "link", "show", Tunnel4)
}

// Another address of this node makes another end of the tunnel.
func TestNodeGetsAnotherAddress(t *testing.T) {
	h := newHost(t)
	h.apply(VXLAN, farNode)
	h.command("ip", "addr", "add", "192.168.1.200/24", "dev", "eth0")
	moved := self
	moved.Addresses = []string{"192.168.1.200"}
	var links []Link
	h.do(func() (err error) {
		links, err = readLinks()
		return err
	})
	plan, err := Compute(Input{Mode: VXLAN, Self: "me", PodCIDRs: ownCIDRs(), Nodes: []Node{moved, farNode}, Links: links})
	if err != nil {
		t.Fatal(err)
	}
	h.put(plan)
	h.wantState("moved", slices.Concat(ends[:2], farState)...)
	if link := h.command("ip", "-d", "-o", "link", "show", "berth.vxlan")[0]; !strings.Contains(link, "local 192.168.1.200") {
		t.Error(link)
	}
}

func TestRules(t *testing.T) {
	h := newHost(t)
	// Ranges that follow each other, and the first and last ones that there can be.
	nodes := []Node{
		nearNode, farNode, object("a", 3, "192.168.1.4 10.4.0.0/24"), object("b", 3, "192.168.1.5 10.5.0.0/16"), object("c", 3, "192.168.1.6 10.4.1.0/24,feff:ffff::/64"),
		object("d", 3, "192.168.1.7 223.255.255.0/24"),
	}
	h.apply(Auto, nodes...)
	got := strings.Join(h.command("nft", "list", "table", "inet", tableName), "\n")
	for _, want := range []string{
		"elements = { 10.2.0.0/24, 10.3.0.0/24,\n10.4.0.0/23, 10.5.0.0/16,\n223.255.255.0/24 }",
		"elements = { fd02::/64,\nfd03::/64,\nfeff:ffff::/64 }",
		"type nat hook postrouting priority srcnat - 1; policy accept;",
		`ip saddr 10.1.0.0/24 ip daddr @pods4 snat ip to ip saddr comment "from pods 10.1.0.0/24 to pods of other nodes: source as it is"`,
		"ip6 saddr fd01::/64 ip6 daddr @pods6 snat ip6 to ip6 saddr",
		`udp dport 4789 @th,96,24 0xbe47 iifname "berth-*" counter packets 0 bytes 0 drop comment "no tunnel begins at a pod"`,
		"udp dport 4789 @th,96,24 0xbe47 ip saddr != @nodes4 counter packets 0 bytes 0 drop",
		"udp dport 4789 @th,96,24 0xbe47 ip6 daddr @nodes6 counter packets 0 bytes 0 drop",
		"type filter hook forward priority filter - 10; policy accept;", "type filter hook input priority filter - 10; policy accept;",
		"fd00:1::1", "192.168.1.4, 192.168.1.5",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no\n%s\nin\n%s", want, got)
		}
	}
}

func TestReadLinks(t *testing.T) {
	h := newHost(t)
	h.do(func() error {
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "berth-01234567"}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return err
		}
		if err := netlink.AddrAdd(bridge, &netlink.Addr{IPNet: toNet(netip.MustParsePrefix("10.1.0.1/24"))}); err != nil {
			return err
		}
		return netlink.LinkSetUp(bridge)
	})
	h.do(func() error { return addLink("eth1", 9000, prefixes("172.16.0.1/12")...) })
	h.command("ip", "addr", "add", "10.88.0.1/32", "dev", "lo")
	h.command("ip", "link", "add", "name", "down0", "type", "veth", "peer", "name", "xdown")
	h.command("ip", "addr", "add", "10.89.0.1/24", "dev", "down0")
	h.do(func() error {
		links, err := readLinks()
		var names []string
		for _, l := range links {
			names = append(names, l.Name)
			i, err := net.InterfaceByName(l.Name)
			if err != nil || i.Index != l.Index || i.MTU != l.MTU {
				t.Errorf("%+v is %+v, %v", l, i, err)
			}
		}
		slices.Sort(names)
		if !slices.Equal(names, []string{"eth0", "eth1"}) {
			t.Errorf("links %v", names)
		}
		return err
	})
}

func TestWarnings(t *testing.T) {
	h := newHost(t)
	plan := h.plan(HostGateway, nearNode)
	look := func() (all []string) {
		h.do(func() error {
			for _, w := range warnings(plan) {
				all = append(all, w.what+"; "+w.remedy)
			}
			return nil
		})
		return all
	}
	// A new namespace has what the machine has.
	h.command("sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
	if all := look(); len(all) > 0 {
		t.Errorf("%q", all)
	}
	h.command("nft", "add", "table", "ip", "filter")
	h.command("nft", "add", "chain", "ip", "filter", "FORWARD", "{ type filter hook forward priority 0; policy drop; }")
	h.command("nft", "add", "table", "inet", "fw")
	h.command("nft", "add", "chain", "inet", "fw", "pass", "{ type filter hook forward priority 0; policy drop; }")
	h.command("nft", "add", "chain", "inet", "fw", "in", "{ type filter hook input priority 0; policy drop; }")
	h.command("ip", "link", "add", "berth-01234567", "type", "bridge")
	all := look()
	if len(all) != 4 {
		t.Fatalf("%q", all)
	}
	for i, want := range []string{
		"net.ipv4.ip_forward is 0: nothing that pods send leaves the node; sysctl -w net.ipv4.ip_forward=1",
		"net.ipv6.conf.all.forwarding is 0",
		`nftables chain "inet fw pass" drops what the node forwards for pods 10.1.0.0/24, unless a rule of it accepts that; nft insert rule inet fw pass ip saddr 10.1.0.0/24 accept`,
		`nftables chain "inet fw pass" drops what the node forwards for pods fd01::/64, unless a rule of it accepts that; nft insert rule inet fw pass ip6 saddr fd01::/64 accept`,
	} {
		if !strings.HasPrefix(all[i], want) {
			t.Errorf("%q, want %q", all[i], want)
		}
	}
}

func TestNextHops(t *testing.T) {
	h := newHost(t)
	h.apply(HostGateway, nearNode)
	h.command("ip", "route", "add", "default", "via", "192.168.1.254")
	h.command("ip", "route", "add", "172.30.0.0/16", "nexthop", "via", "192.168.1.253", "nexthop", "via", "192.168.1.252")
	h.command("ip", "-6", "route", "add", "default", "via", "fd00:1::fe")
	h.command("ip", "-6", "route", "add", "fd77::/64", "via", "fe80::1", "dev", "eth0")
	h.do(func() error {
		hops, err := nextHops()
		for _, a := range []string{"192.168.1.254", "192.168.1.253", "192.168.1.252", "fd00:1::fe"} {
			if hops[netip.MustParseAddr(a)] == "" {
				t.Errorf("%s is missing", a)
			}
		}
		if len(hops) != 4 { // not those of routes to pods
			t.Errorf("%v", hops)
		}
		return err
	})
}

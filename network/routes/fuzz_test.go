package routes

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// FuzzNodes has nodes of all kinds beside a good one that is older: its routes are there, and no route leads away what is not
// a node's to give.
func FuzzNodes(f *testing.F) {
	f.Add("192.168.1.9 10.9.0.0/24\n192.168.1.8 10.8.0.0/24,fd08::/64", byte(3))
	f.Add("192.168.1.2 10.2.0.0/24\n192.168.1.1 10.1.0.0/16\n- 0.0.0.0/0", byte(1))
	f.Add("10.2.0.9 10.9.0.0/24\n10.9.0.1 192.168.1.0/24\nfd02::5 fd00:1::/64", byte(2))
	f.Add("::ffff:10.0.0.1 ::ffff:10.0.0.0/104\nfe80::1%eth0 fe80::/10", byte(3))
	f.Add("1.1.1.1 254.255.255.0/24,feff:ffff::/32\n255.255.255.255 8.0.0.0/8", byte(0))
	good := object("good", 1, "192.168.1.2,fd00:1::2 10.2.0.0/24,fd02::/64")
	modes := []Mode{HostGateway, VXLAN, Auto, Off}
	f.Fuzz(func(t *testing.T, text string, mode byte) {
		nodes := []Node{self, good}
		for i, line := range strings.Split(text, "\n") {
			nodes = append(nodes, object("bad-"+strings.Repeat("x", i%40), i+2, line))
		}
		in := Input{Mode: modes[int(mode)%len(modes)], Self: "me", PodCIDRs: ownCIDRs(), Nodes: nodes, Links: []Link{lan}}
		plan, err := Compute(in)
		if err != nil {
			t.Fatal(err)
		}
		wantDisjoint(t, plan)
		for _, dst := range prefixes(good.PodCIDRs...) {
			i := slices.IndexFunc(plan.Routes, func(r Route) bool { return r.Dst == dst })
			if i < 0 && in.Mode != Off {
				t.Fatalf("there is no route to %s of the good node:\n%s", dst, show(plan))
			}
			if i >= 0 && plan.Routes[i].Link == "" && !strings.Contains(strings.Join(good.Addresses, ","), plan.Routes[i].Via.String()) {
				t.Fatalf("another node got %s:\n%s", dst, show(plan))
			}
		}
		for _, out := range plan.LeftOut {
			if strings.ContainsFunc(out.What, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Fatalf("what is told has control characters: %q", out.What)
			}
		}
		// The sets of nf_tables are of intervals in order, none of which touches another.
		for _, v6 := range []bool{false, true} {
			if keys := ranges(plan.Others, v6).keys; !slices.IsSorted(keys) || len(keys) != len(slices.Compact(slices.Clone(keys))) || len(keys)%2 != 0 {
				t.Fatalf("intervals %q", keys)
			}
		}
	})
}

// wantDisjoint wants no route to lead where this node, a subnet of its links, an older node or another route leads.
func wantDisjoint(t *testing.T, p *Plan) {
	t.Helper()
	keep := slices.Concat(ownCIDRs(), never)
	for _, a := range lan.Addrs {
		keep = append(keep, a.Masked())
	}
	for _, a := range p.Nodes {
		keep = append(keep, netip.PrefixFrom(a, a.BitLen()))
	}
	for i, r := range p.Routes {
		if r.Dst.Bits() == 0 || r.Dst != r.Dst.Masked() {
			t.Fatalf("route to %s", r.Dst)
		}
		if j := slices.IndexFunc(keep, r.Dst.Overlaps); j >= 0 {
			t.Fatalf("route to %s leads to %s:\n%s", r.Dst, keep[j], show(p))
		}
		for _, o := range p.Routes[:i] {
			if o.Dst.Overlaps(r.Dst) {
				t.Fatalf("routes to %s and to %s", o.Dst, r.Dst)
			}
		}
	}
}

package cni

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// BenchmarkFloor is the bare work of the kernel for the network of a pod, over sockets that are kept: a namespace, a pair of
// interfaces of which one is a port of a bridge, an address, a route, the rules of masquerading and of a host port, and all of
// it undone. No configuration is read, no file is written, nothing is looked up. What network.BenchmarkPod takes beyond is
// berth's. Each step has a figure of its own, the median in microseconds. Between the pods the kernel has time to free what was
// deleted, as there: rules with extensions of iptables wait for those that were deleted just before (nft_compat.c).
//
//	go test -run '^$' -bench Floor ./network/cni
func BenchmarkFloor(b *testing.B) {
	for _, others := range []int{0, 200} {
		b.Run(fmt.Sprintf("pods=%d", others), func(b *testing.B) {
			inNamespace(b, func() error { return benchmarkFloor(b, others) })
		})
	}
}

func benchmarkFloor(b *testing.B, others int) error {
	f, err := newFloor()
	if err != nil {
		return err
	}
	defer f.node.Close()
	for n := range others {
		p := f.pod(n)
		defer p.close() //nolint:revive // some hundred pods, all until the end
		if err := runAll(p.up(), func(string, time.Duration) {}); err != nil {
			return err
		}
	}
	var names []string
	times := map[string][]time.Duration{}
	note := func(name string, took time.Duration) {
		if times[name] == nil {
			names = append(names, name)
		}
		times[name] = append(times[name], took)
	}
	for b.Loop() {
		p := f.pod(others)
		if err := runAll(append(p.up(), p.down()...), note); err != nil {
			return err
		}
		time.Sleep(50 * time.Millisecond)
	}
	var up, down time.Duration
	for i, name := range names {
		slices.Sort(times[name])
		median := times[name][len(times[name])/2]
		b.ReportMetric(float64(median.Nanoseconds())/1000, fmt.Sprintf("%02d-%s-µs", i+1, name))
		switch {
		case name[0] != '-':
			up += median
		case name != freed:
			down += median
		}
	}
	b.ReportMetric(float64(up.Microseconds())/1000, "ms/up")
	b.ReportMetric(float64(down.Microseconds())/1000, "ms/down")
	return nil
}

// floorStep is one piece of the work. The names of those that undo begin with a dash.
type floorStep struct {
	name string
	do   func() error
}

// freed is what nobody has to wait for.
const freed = "-freed,not-waited-for"

func runAll(steps []floorStep, note func(name string, took time.Duration)) error {
	for _, s := range steps {
		start := time.Now()
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		note(s.name, time.Since(start))
	}
	return nil
}

// floor is the node: its namespace is that of the thread.
type floor struct {
	node   *netlink.Handle
	self   *os.File
	bridge *netlink.Bridge
	plain  *Plugins
}

func newFloor() (*floor, error) {
	f := &floor{bridge: &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}, plain: New(slog.New(slog.DiscardHandler))}
	var err error
	if f.node, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	if f.self, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	if err := f.node.LinkAdd(f.bridge); err != nil {
		return nil, err
	}
	if err := f.node.LinkSetUp(f.bridge); err != nil {
		return nil, err
	}
	t, err := openXT(tableNAT, false)
	if err != nil {
		return nil, err
	}
	defer t.close()
	for chain := range xtBases[tableNAT] {
		if err := t.ensureChain(chain); err != nil {
			return nil, err
		}
	}
	if err := t.ensureChain(chainDNAT); err != nil {
		return nil, err
	}
	return f, t.apply()
}

// floorPod is one pod.
type floorPod struct {
	*floor
	n       int
	netns   *os.File
	handle  *netlink.Handle // in its namespace
	inside  *netlink.Veth
	address netip.Prefix
	rules   map[string][]uint64 // numbers, by chains
}

func (f *floor) pod(n int) *floorPod {
	return &floorPod{floor: f, n: n, address: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 88, byte(n>>8) + 1, byte(n)}), 16), rules: map[string][]uint64{}}
}

func (p *floorPod) up() []floorStep {
	port := fmt.Sprintf("veth%d", p.n)
	masq, dnat := fmt.Sprintf("CNI-%d", p.n), fmt.Sprintf("CNI-DN-%d", p.n)
	return []floorStep{
		{"namespace", p.makeNamespace},
		{"pair", func() error {
			p.inside = &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: port, PeerNamespace: netlink.NsFd(int(p.self.Fd()))}
			return p.handle.LinkAdd(p.inside)
		}},
		{"port", func() error {
			l, err := p.node.LinkByName(port)
			if err != nil {
				return err
			}
			if err := p.node.LinkSetMaster(l, p.bridge); err != nil {
				return err
			}
			return p.node.LinkSetUp(l)
		}},
		{"address,up", func() error {
			if err := p.handle.AddrAdd(p.inside, &netlink.Addr{IPNet: podAddress(256 + p.n)}); err != nil {
				return err
			}
			return p.handle.LinkSetUp(p.inside)
		}},
		{"route", func() error {
			return p.handle.RouteAdd(&netlink.Route{LinkIndex: p.inside.Index, Gw: podAddress(255).IP})
		}},
		{"masquerade", func() error {
			return p.makeRules(masq, "POSTROUTING", xtRule{src: single(p.address.Addr()), comment: masq, target: xtTo{chain: masq}},
				xtRule{dst: p.address, comment: masq, target: xtTo{chain: "ACCEPT"}},
				xtRule{dst: netip.MustParsePrefix("224.0.0.0/4"), notDst: true, comment: masq, target: xtTo{masquerade: true}})
		}},
		{"hostport", func() error {
			host := uint16(8000 + p.n)
			return p.makeRules(dnat, chainDNAT, xtRule{comment: dnat, proto: "tcp", dports: []uint16{host}, target: xtTo{chain: dnat}},
				xtRule{proto: "tcp", dport: host, target: xtTo{dnat: netip.AddrPortFrom(p.address.Addr(), 80)}})
		}},
	}
}

func (p *floorPod) down() []floorStep {
	masq, dnat := fmt.Sprintf("CNI-%d", p.n), fmt.Sprintf("CNI-DN-%d", p.n)
	return []floorStep{
		{"-hostport", func() error { return p.dropRules(dnat, chainDNAT) }},
		{"-masquerade", func() error { return p.dropRules(masq, "POSTROUTING") }},
		{"-pair", func() error {
			return thread.Throwaway(func() error {
				if err := unix.Setns(int(p.netns.Fd()), unix.CLONE_NEWNET); err != nil {
					return err
				}
				return p.plain.deleteLink(p.inside)
			})
		}},
		{"-namespace", func() error { p.close(); return nil }},
		{freed, func() error { p.plain.Close(); return nil }},
	}
}

func (p *floorPod) close() {
	p.handle.Close()
	_ = p.netns.Close() // opened for reading
}

func (p *floorPod) makeNamespace() error {
	return thread.Throwaway(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if p.netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		p.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
}

// makeRules makes a chain with rules, and what leads there from another.
func (p *floorPod) makeRules(chain, from string, entry xtRule, rules ...xtRule) error {
	t, err := openXT(tableNAT, false)
	if err != nil {
		return err
	}
	defer t.close()
	t.addChain(chain, nil)
	for _, r := range rules {
		t.addRule(chain, false, r.exprs(false), r.compat())
	}
	t.addRule(from, false, entry.exprs(false), entry.compat())
	t.tell("", "")
	p.rules[from], err = t.applyTold()
	return err
}

func (p *floorPod) dropRules(chain, from string) error {
	t, err := openXT(tableNAT, false)
	if err != nil {
		return err
	}
	defer t.close()
	for _, h := range p.rules[from] {
		t.deleteRule(from, h)
	}
	t.deleteChain(chain)
	return t.apply()
}

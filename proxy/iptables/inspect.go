package iptables

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Inspector compares what the kernel has with what it should have, and changes nothing. It may be used from any goroutine.
type Inspector struct {
	p  *Programmer
	mu sync.Mutex // one reads at a time: of many Services that takes seconds
}

// Inspector looks at the tables of a Programmer.
func (p *Programmer) Inspector() *Inspector { return &Inspector{p: p} }

// Inspect reads the tables by iptables-save and compares them. What is being programmed is waited for.
func (i *Inspector) Inspect(scope program.Scope) (*program.Inspection, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.p.working.Settled(func() (*program.Inspection, error) {
		services, globals := i.p.wantedNow()
		found := &program.Inspection{}
		err := i.p.enter(func() error {
			for f := range model.Family(model.Families) {
				if err := i.family(f, scope, services, &globals, found); err != nil {
					return err
				}
			}
			return nil
		})
		return found, err
	})
}

// Client is not told: the kernel says when a client was there by a clock of its own that nobody else can read (xt_recent).
func (i *Inspector) Client(netip.Addr, types.NamespacedName, *model.Port, model.Policy) (to netip.AddrPort, left time.Duration, ok bool, err error) {
	return to, 0, false, fmt.Errorf("mode iptables: where clients are remembered is in /proc/net/xt_recent/%s*, without the time that is left: %w", endpointChain, errors.ErrUnsupported)
}

// view is what is wanted of a family, what it has, and what of both is of a Scope.
type view struct {
	family model.Family
	all    bool
	want   map[chain]*wanted
	have   saved
	counts map[chain][]program.Count
	// own are the Scope's chains, shared its rules in others, by key, and places where it answers.
	own    map[string]bool
	shared map[chain]map[string]bool
	places []program.Place
	found  *program.Inspection
	lines  []haveLine
}

// haveLine is one of Inspection.Have.
type haveLine struct {
	rank int
	text string
}

func (i *Inspector) family(f model.Family, scope program.Scope, services []*model.Service, g *model.Globals, found *program.Inspection) error {
	if !g.Family[f].Enabled {
		return nil
	}
	v := &view{family: f, all: scope.All(), own: map[string]bool{}, shared: map[chain]map[string]bool{}, found: found}
	if !v.narrow(scope, services, parts{family: f, globals: &g.Family[f]}) {
		return nil
	}
	v.want = i.p.wantedOf(f, &g.Family[f], services)
	var err error
	if v.have, v.counts, err = i.p.programs(f).saveCounted(); err != nil {
		return err
	}
	for _, c := range sortedChains(v.want) {
		v.compare(c)
	}
	v.fixed(f == model.IPv4 && g.Family[f].NodePorts.Loopback)
	slices.SortStableFunc(v.lines, func(a, b haveLine) int { return cmp.Compare(a.rank, b.rank) })
	for _, l := range v.lines {
		found.Have = append(found.Have, l.text)
	}
	return nil
}

// narrow notes what is of a Scope, and says whether anything of it is of the family.
func (v *view) narrow(scope program.Scope, services []*model.Service, x parts) bool {
	place := func(p model.Protocol, at netip.AddrPort) {
		if at.Addr().Is6() == (v.family == model.IPv6) {
			v.places = append(v.places, program.Place{Protocol: p, Addr: at})
		}
	}
	for _, at := range scope.At {
		place(at.Protocol, at.Addr)
	}
	for _, s := range services {
		if s = scope.Part(s); s == nil || v.all {
			continue
		}
		p := x.service(s)
		for _, o := range p.own {
			v.own[o.name] = true
		}
		for _, r := range p.shared {
			if v.shared[r.chain] == nil {
				v.shared[r.chain] = map[string]bool{}
			}
			v.shared[r.chain][key(r.rule)] = true
		}
		for j := range s.Ports {
			for k := range s.Ports[j].Frontends {
				place(s.Ports[j].Protocol, s.Ports[j].Frontends[k].Addr)
			}
		}
	}
	return v.all || len(v.places) > 0
}

func (v *view) ip() string {
	if v.family == model.IPv6 {
		return "ip6"
	}
	return "ip"
}

func (v *view) add(c chain, what, want, have string) {
	v.found.Differences = append(v.found.Differences, program.Difference{
		Where: fmt.Sprintf("table %s %s chain %s", v.ip(), c.table, c.name), What: what, Want: want, Have: have,
	})
}

// fixed compares what is not in a chain of the proxy's: what leads there, and what says that the tables were flushed.
func (v *view) fixed(localNodePorts bool) {
	for t := range table(tables) {
		if c := (chain{t, canary}); v.have[c] == nil {
			v.add(c, program.Missing, "the chain", "")
		}
	}
	for _, j := range jumps(localNodePorts) {
		if c := (chain{j.table, j.from}); !v.have.has(c, j.rule) {
			v.add(c, program.Missing, j.rule, "")
		}
	}
	if localNodePorts {
		if c := (chain{filter, kubeletFirewall}); !v.have.has(c, martian) {
			v.add(c, program.Missing, martian, "")
		}
		if !isSet(routeLocalnet) {
			v.found.Differences = append(v.found.Differences, program.Difference{
				Where: "sysctl " + strings.ReplaceAll(routeLocalnet, "/", "."), What: program.Otherwise, Want: "1", Have: "0",
			})
		}
	}
	if !v.all {
		return
	}
	stale := func(c chain) bool { return c.table == nat && isService(c.name) && v.want[c] == nil }
	kept := v.have.kept(func(c chain) bool { return stale(c) || v.want[c] != nil })
	for _, c := range sortedChains(v.have) {
		if stale(c) && (!kept[c] || len(v.have[c]) > 0) {
			v.add(c, program.Foreign, "", fmt.Sprintf("a chain of %d rules", len(v.have[c])))
		}
	}
}

// compare compares a chain; of one that Services share what is of the Scope, or goes for all.
func (v *view) compare(c chain) {
	whole := v.all
	if c.table == nat && isService(c.name) {
		if !v.all && !v.own[c.name] {
			return
		}
		whole = true
	}
	rules, there := v.have[c]
	if !there {
		v.add(c, program.Missing, "the chain", "")
		return
	}
	m := v.match(c, whole)
	v.tell(c, m.lacking, m.extra)
	if m.order != "" {
		v.add(c, "another order", m.order, "")
	}
	v.found.Elements += len(m.mine)
	if v.all {
		return
	}
	shares := sharesOf(rules)
	for _, i := range m.mine {
		line := fmt.Sprintf("%s %s %s: %s", v.ip(), c.table, c.name, led(rules[i], shares[i], v.have.endpoint(rules[i])))
		if counts := v.counts[c]; i < len(counts) {
			line += fmt.Sprintf(" counter packets %d bytes %d", counts[i].Packets, counts[i].Bytes)
		}
		v.lines = append(v.lines, haveLine{rank(c), line})
	}
}

// rank has chains in the order in which packets pass them, but those of endpoints last, of which there may be many.
func rank(c chain) int {
	order := []string{firewallChain, externalChain, clusterChain, localChain}
	switch {
	case c.table != nat:
		return len(order) + 1
	case strings.HasPrefix(c.name, endpointChain):
		return len(order) + 2
	}
	return 1 + slices.IndexFunc(order, func(prefix string) bool { return strings.HasPrefix(c.name, prefix) })
}

// matched is what becomes of a chain's rules when they are compared. All but what is lacking are indexes.
type matched struct {
	lacking []wantedRule
	extra   []int
	mine    []int  // of the Scope, what is extra included
	order   string // which rule should be before which other
}

// wantedRule is a rule that is wanted, and by which share it leads to an endpoint.
type wantedRule struct {
	rule  string
	share float64
}

// match finds the rules that are wanted. Whole is that all of the chain is of the Scope.
func (v *view) match(c chain, whole bool) (m matched) {
	rules, w := v.have[c], v.want[c]
	at := make(map[string][]int, len(rules))
	for i, r := range rules {
		k := key(r)
		at[k] = append(at[k], i)
	}
	taken := make([]bool, len(rules))
	shares := sharesOf(w.fixed)
	// Rules of Services are in no order, but each before or after those that go for all.
	before, last := -1, "" // the last one of those that were found
	var heads []wantedAt
	for section, list := range [][]string{w.head, w.fixed, w.tail} {
		for n, r := range list {
			k := key(r)
			fixed := section == 1
			told := whole || fixed || v.shared[c][k]
			spots := at[k]
			if len(spots) == 0 {
				if told {
					lack := wantedRule{r, 0}
					if fixed {
						lack.share = shares[n]
					}
					m.lacking = append(m.lacking, lack)
				}
				continue
			}
			i := spots[0]
			at[k], taken[i] = spots[1:], true
			if whole || v.shared[c][k] {
				m.mine = append(m.mine, i)
			}
			switch {
			case section == 0 && told:
				heads = append(heads, wantedAt{r, i})
			case fixed:
				for _, h := range heads {
					m.outOfOrder(h.i > i, h.rule, r)
				}
				m.outOfOrder(before > i, last, r)
				before, last = i, r
			case told:
				m.outOfOrder(before > i, last, r)
			}
		}
	}
	for i, r := range rules {
		if !taken[i] && (whole || v.concerns(r)) {
			m.extra = append(m.extra, i)
			m.mine = append(m.mine, i)
		}
	}
	slices.Sort(m.mine)
	return m
}

// wantedAt is where a rule that is wanted is.
type wantedAt struct {
	rule string
	i    int
}

// outOfOrder notes the first pair that is in another order.
func (m *matched) outOfOrder(is bool, first, second string) {
	if is && m.order == "" {
		m.order = first + " before " + second
	}
}

// tell tells rules that are not there, and those that should not be. Of two that do the same to the same packets, but for a value, one
// stands for the other.
func (v *view) tell(c chain, lacking []wantedRule, extra []int) {
	rules := v.have[c]
	shares := sharesOf(rules)
	own := c.table == nat && isService(c.name)
	var left []wantedRule
	for _, w := range lacking {
		want := factsOf(w.rule)
		n := slices.IndexFunc(extra, func(i int) bool {
			have := factsOf(rules[i])
			return want.target == have.target && (own || want.to == have.to && want.protocol == have.protocol && want.port == have.port)
		})
		if n < 0 {
			left = append(left, w)
			continue
		}
		have := rules[extra[n]]
		what := program.Otherwise
		if is := factsOf(have); want.probability != is.probability {
			what = "another share"
		}
		v.add(c, what, led(w.rule, w.share, v.endpointWanted(w.rule)), led(have, shares[extra[n]], v.have.endpoint(have)))
		extra = slices.Delete(slices.Clone(extra), n, n+1)
	}
	for _, w := range left {
		v.add(c, program.Missing, led(w.rule, w.share, v.endpointWanted(w.rule)), "")
	}
	for _, i := range extra {
		v.add(c, program.Foreign, "", led(rules[i], shares[i], v.have.endpoint(rules[i])))
	}
}

// concerns is whether a rule of a chain that Services share is about packets to one of the Scope's places.
func (v *view) concerns(rule string) bool {
	f := factsOf(rule)
	return slices.ContainsFunc(v.places, func(p program.Place) bool {
		if f.protocol != "" && f.protocol != protocolName(p.Protocol) || f.port != "" && f.port != number(p.Addr.Port()) {
			return false
		}
		to, err := netip.ParsePrefix(strings.TrimPrefix(f.to, "! "))
		switch {
		case err != nil: // any address
			return true
		case p.Addr.Addr().IsUnspecified(): // a node port, which is at all of the node's
			return f.port != ""
		}
		return to.Contains(p.Addr.Addr()) != strings.HasPrefix(f.to, "! ")
	})
}

// facts are what of a rule says which packets it is for, and what becomes of them.
type facts struct {
	to, protocol, port, target, destination string
	probability                             float64
	remembered                              bool // it is for clients that session affinity knows
}

func factsOf(rule string) (f facts) {
	f.probability = 1
	w := split(rule)
	value := func(i int) string {
		if i+1 == len(w) {
			return ""
		}
		return w[i+1].text
	}
	for i := range w {
		if w[i].quoted {
			continue
		}
		switch w[i].text {
		case "-d":
			if f.to = value(i); i > 0 && w[i-1].text == "!" && !w[i-1].quoted {
				f.to = "! " + f.to
			}
		case "-p":
			f.protocol = value(i)
		case "--dport":
			f.port = value(i)
		case "-j", "-g":
			f.target = value(i)
		case "--to-destination":
			f.destination = value(i)
		case "--probability":
			f.probability, _ = strconv.ParseFloat(value(i), 64)
		case "--rcheck":
			f.remembered = true
		}
	}
	return f
}

// sharesOf is which part of the packets that come to a chain's draw each of its rules takes; 0 for those that do not draw.
func sharesOf(rules []string) []float64 {
	out, left := make([]float64, len(rules)), 1.0
	for i, r := range rules {
		if !strings.Contains(r, endpointChain) {
			continue
		}
		if f := factsOf(r); strings.HasPrefix(f.target, endpointChain) && !f.remembered {
			out[i] = left * f.probability
			left -= out[i]
		}
	}
	return out
}

// led is a rule, with the endpoint that it leads to and its share.
func led(rule string, share float64, endpoint string) string {
	switch {
	case endpoint == "":
		return rule
	case factsOf(rule).remembered:
		return fmt.Sprintf("%s (to %s)", rule, endpoint)
	}
	return fmt.Sprintf("%s (%.1f%% to %s)", rule, 100*share, endpoint)
}

// endpoint is where a rule leads that leads to the chain of an endpoint; empty for others.
func (s saved) endpoint(rule string) string {
	return endpointOf(rule, func(c chain) []string { return s[c] })
}

func (v *view) endpointWanted(rule string) string {
	return endpointOf(rule, func(c chain) []string {
		if w := v.want[c]; w != nil {
			return w.fixed
		}
		return nil
	})
}

func endpointOf(rule string, rulesOf func(chain) []string) string {
	if !strings.Contains(rule, endpointChain) {
		return ""
	}
	name := factsOf(rule).target
	if !strings.HasPrefix(name, endpointChain) {
		return ""
	}
	for _, r := range rulesOf(chain{nat, name}) {
		if to := factsOf(r).destination; to != "" {
			return to
		}
	}
	return "nowhere"
}

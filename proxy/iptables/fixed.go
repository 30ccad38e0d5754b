package iptables

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/berth-run/berth/proxy/model"
)

// wanted is what a chain should have: rules of Services in no order, those that are there for all in theirs between.
type wanted struct {
	head, fixed, tail []string
}

func (w *wanted) add(at section, rule string) {
	if at == head {
		w.head = append(w.head, rule)
	} else {
		w.tail = append(w.tail, rule)
	}
}

// all are the rules, in an order that is right.
func (w *wanted) all() []string { return slices.Concat(w.head, w.fixed, w.tail) }

// is says whether a chain has what it should.
func (w *wanted) is(rules []string) bool {
	if len(rules) != len(w.head)+len(w.fixed)+len(w.tail) {
		return false
	}
	fixed := rules[len(w.head) : len(w.head)+len(w.fixed)]
	return sameSet(w.head, rules[:len(w.head)]) && slices.EqualFunc(w.fixed, fixed, same) && sameSet(w.tail, rules[len(rules)-len(w.tail):])
}

// same is whether two rules are one.
func same(a, b string) bool { return a == b || key(a) == key(b) }

// sameSet is whether there are the same rules, in whatever order.
func sameSet(a, b []string) bool {
	counts := make(map[string]int, len(a))
	for _, r := range a {
		counts[key(r)]++
	}
	for _, r := range b {
		k := key(r)
		if counts[k]--; counts[k] < 0 {
			return false
		}
	}
	return true
}

// params are what the rules depend on beside the model.
type params struct {
	mark uint32 // the bit of a packet's mark that has it be masqueraded
	// dropInvalid is whether packets that conntrack takes for none of their connection are dropped, which would be answered by a
	// reset otherwise (kubernetes#74839).
	dropInvalid bool
}

// fixed are the chains that are there for all Services, with what they have without any.
func (x parts) fixed(q params) map[chain]*wanted {
	mark := fmt.Sprintf("%#x/%#x", q.mark, q.mark)
	rules := map[chain]*wanted{
		{nat, services}:            {fixed: x.toNodePorts()},
		{nat, nodePorts}:           {},
		{nat, markMasq}:            {fixed: []string{"-j MARK --set-xmark " + mark}},
		{filter, externalServices}: {},
		{filter, nodePorts}:        {},
		{filter, proxyFirewall}:    {},
		{filter, clusterIPs}:       {fixed: []string{"-j " + externalServices}},
		{filter, rejects}:          {fixed: []string{"-p tcp " + x.reject("tcp"), x.reject("")}},
		{nat, postrouting}: {fixed: []string{
			words("-m mark ! --mark", mark, "-j RETURN"),
			// Not twice, if it goes through the node's stack again.
			words("-j MARK --set-xmark", fmt.Sprintf("%#x/0x0", q.mark)),
			words(comment("kubernetes service traffic requiring SNAT"), "-j MASQUERADE --random-fully"),
		}},
		{filter, services}: {fixed: []string{
			words(comment("kubernetes externally-visible service portals"), "-m addrtype --src-type LOCAL -j", externalServices),
		}},
		{filter, forward}: {fixed: []string{
			words(comment("kubernetes forwarding rules"), "-m mark --mark", mark, "-j ACCEPT"),
			words(comment("kubernetes forwarding conntrack rule"), "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
		}},
	}
	if q.dropInvalid {
		f := rules[chain{filter, forward}]
		f.fixed = slices.Insert(f.fixed, 0, dropInvalid)
	}
	for _, c := range x.globals.ServiceCIDRs {
		s := rules[chain{filter, services}]
		s.fixed = append(s.fixed, words(destination(c), comment("kubernetes cluster IPs"), "-j", clusterIPs),
			dropUnallocated(c))
	}
	return rules
}

const dropInvalid = "-m conntrack --ctstate INVALID -j DROP"

// dropUnallocated drops what is to a cluster IP that no Service has.
func dropUnallocated(cidr netip.Prefix) string {
	return words(destination(cidr), comment("no service has the cluster IP"), "-j DROP")
}

// toNodePorts leads packets to addresses of node ports there, after all that are to an address of a Service.
func (x parts) toNodePorts() (out []string) {
	for _, m := range x.nodePortAddresses() {
		out = append(out, words(m, comment("kubernetes service nodeports; NOTE: this must be the last rule in this chain"), "-j", nodePorts))
	}
	return out
}

// nodePortAddresses match packets to addresses that node ports are served at.
func (x parts) nodePortAddresses() (out []string) {
	const local = "-m addrtype --dst-type LOCAL"
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	if x.family == model.IPv6 {
		loopback = netip.MustParsePrefix("::1/128")
	}
	a := x.globals.NodePorts
	for _, p := range a.Prefixes {
		switch {
		case a.Loopback || !p.Overlaps(loopback):
			out = append(out, words(destination(p), local))
		case p.Bits() == 0:
			out = append(out, words(not(destination(loopback)), local))
		default:
			for _, rest := range without(p, loopback) {
				out = append(out, words(destination(rest), local))
			}
		}
	}
	return out
}

// without is what is left of a netip.Prefix.
func without(p, hole netip.Prefix) []netip.Prefix {
	if !p.Overlaps(hole) {
		return []netip.Prefix{p}
	}
	if p.Bits() >= hole.Bits() {
		return nil
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	high, _ := netip.AddrFromSlice(b)
	return append(without(low, hole), without(netip.PrefixFrom(high, p.Bits()+1), hole)...)
}

// jump is a rule of a chain of the kernel's that leads to one of the proxy's.
type jump struct {
	table    table
	from, to string
	rule     string
}

// jumps are inserted in this order, each before all else. Only new connections are looked at where that is enough.
func jumps(localNodePorts bool) []jump {
	isNew := "-m conntrack --ctstate NEW"
	var out []jump
	add := func(t table, from, to, match, note string) {
		if note != "" {
			note = comment(note)
		}
		out = append(out, jump{t, from, to, words(match, note, "-j", to)})
	}
	add(filter, "INPUT", externalServices, isNew, "kubernetes externally-visible service portals")
	add(filter, "FORWARD", externalServices, isNew, "kubernetes externally-visible service portals")
	add(filter, "INPUT", nodePorts, "", "kubernetes health check service ports")
	add(filter, "FORWARD", services, isNew, "kubernetes service portals")
	add(filter, "OUTPUT", services, isNew, "kubernetes service portals")
	add(filter, "FORWARD", forward, "", "kubernetes forwarding rules")
	for _, from := range []string{"INPUT", "OUTPUT", "FORWARD"} {
		add(filter, from, proxyFirewall, isNew, "kubernetes load balancer firewall")
	}
	add(nat, "OUTPUT", services, "", "kubernetes service portals")
	add(nat, "PREROUTING", services, "", "kubernetes service portals")
	add(nat, "POSTROUTING", postrouting, "", "kubernetes postrouting rules")
	if localNodePorts {
		add(filter, "INPUT", kubeletFirewall, "", "")
		add(filter, "OUTPUT", kubeletFirewall, "", "")
	}
	return out
}

// martian keeps packets from outside from the node's loopback addresses, which route_localnet would let in
// (CVE-2020-8558). The kubelet has the same rule.
var martian = words("! -s 127.0.0.0/8 -d 127.0.0.0/8", comment("block incoming localnet connections"),
	"-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP")

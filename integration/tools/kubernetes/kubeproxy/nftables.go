package nftables

import (
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"sigs.k8s.io/knftables"
)

// kernel is a fake of nf_tables, with what packets have been followed through.
type kernel struct {
	nft   *knftables.Fake
	views map[string]*knftables.Fake
}

func newKernel(ipFamily v1.IPFamily) (kernel, *Proxier) {
	nft, p := theirs_NewFakeProxier(ipFamily)
	p.serviceCIDRs = ""
	return kernel{nft: nft}, p
}

func (k *kernel) dump() string { return k.nft.Dump() }

// forget is for when the rules change.
func (k *kernel) forget() { k.views = map[string]*knftables.Fake{} }

// trace follows a packet through the hooks that the kernel has for it.
func (f *family) trace(t *testing.T, p *PacketQuestion, nodeIPs []string) PacketFate {
	view := f.view(p)
	fate := PacketFate{Action: "pass"}
	port := strconv.Itoa(int(p.Port))
	first := newNFTablesTracer(t, view, nodeIPs)
	hook := map[bool]string{true: "output", false: "prerouting"}[p.Interface == ""]
	done := func(tr *nftablesTracer) PacketFate {
		fate.Rules = append(fate.Rules, tr.matches...)
		fate.Action = strings.ToLower(strings.Join(tr.outputs, ","))
		return fate
	}
	if first.runChain("filter-"+hook+"-pre-dnat", p.Src, p.Protocol, p.Dst, port) {
		return done(first)
	}
	first.runChain("nat-"+hook, p.Src, p.Protocol, p.Dst, port)
	fate.Rules = append(fate.Rules, first.matches...)
	targets := first.outputs
	if len(targets) == 0 {
		targets = []string{net.JoinHostPort(p.Dst, port)}
	}
	for _, target := range targets {
		dst, port, err := net.SplitHostPort(target)
		if err != nil {
			t.Errorf("%s: %v", target, err)
			return fate
		}
		next := newNFTablesTracer(t, view, nodeIPs)
		next.dnat, next.markMasq = len(first.outputs) > 0, first.markMasq
		var chains []string
		local := slices.Contains(nodeIPs, dst)
		switch {
		case p.Interface == "" && local:
			// It comes back by the loopback interface.
			chains = []string{"filter-output", "filter-prerouting-pre-dnat", "filter-input"}
		case p.Interface == "":
			chains = []string{"filter-output"}
		case local:
			chains = []string{"filter-input"}
		default:
			chains = []string{"filter-forward"}
		}
		for _, c := range chains {
			if next.runChain(c, p.Src, p.Protocol, dst, port) {
				return done(next)
			}
		}
		if !next.dnat {
			continue
		}
		// The tracer takes any packet to its own source for a hairpin, and does not look into the set.
		src := p.Src
		if view.Table.Sets[hairpinConnectionsSet].FindElement(src, dst, p.Protocol, port) == nil {
			src = "198.51.100.99"
		}
		next.runChain("nat-postrouting", src, p.Protocol, dst, port)
		fate.Rules = append(fate.Rules, next.matches...)
		fate.Action = "forward"
		fate.Endpoints = append(fate.Endpoints, EndpointFate{Endpoint: target, Masquerade: next.masquerade})
	}
	slices.SortFunc(fate.Endpoints, func(a, b EndpointFate) int { return strings.Compare(a.Endpoint, b.Endpoint) })
	for _, rule := range fate.Rules {
		if m := affinityNote.FindStringSubmatch(rule); m != nil {
			fate.Affinity, _ = strconv.Atoi(m[1])
		}
	}
	return fate
}

var (
	interfaceMatch = regexp.MustCompile(`iifname (!= )?"?([^" ]+)"? ?`)
	affinityLookup = regexp.MustCompile(`^ip6? saddr @(affinity-\S+) `)
	affinityUpdate = regexp.MustCompile(`^update @(affinity-\S+) \{ ip6? saddr \}$`)
	affinityTarget = regexp.MustCompile(`dnat to (\S+)$`)
	addressList    = regexp.MustCompile(`^(ip6? daddr) \{ ([^}]*) \} (.*)$`)
	affinityNote   = regexp.MustCompile(`^jump affinity-seconds-(\d+)$`)
)

// view is the rules as they are for a packet: those of interfaces and of session affinity, which the tracer does not know, are taken
// out, or stand without what they ask for. It takes an address for one of a list if it is all of them, so that lists are taken apart.
func (f *family) view(p *PacketQuestion) *knftables.Fake {
	key := p.Interface + " " + p.Pinned
	if v := f.views[key]; v != nil {
		return v
	}
	f.nft.RLock()
	defer f.nft.RUnlock()
	pinned := map[string]bool{}
	for _, c := range f.nft.Table.Chains {
		set := ""
		for _, r := range c.Rules {
			if m := affinityUpdate.FindStringSubmatch(r.Rule); m != nil {
				set = m[1]
			} else if m := affinityTarget.FindStringSubmatch(r.Rule); m != nil && set != "" && m[1] == p.Pinned {
				pinned[set] = true
			}
		}
	}
	v := &knftables.Fake{Table: &knftables.FakeTable{Chains: map[string]*knftables.FakeChain{}, Sets: f.nft.Table.Sets, Maps: f.nft.Table.Maps}}
	for name, c := range f.nft.Table.Chains {
		to := &knftables.FakeChain{Chain: c.Chain}
		add := func(rule string) { to.Rules = append(to.Rules, &knftables.Rule{Chain: name, Rule: rule}) }
		for _, r := range c.Rules {
			rule := r.Rule
			if m := interfaceMatch.FindStringSubmatch(rule); m != nil {
				prefix, any := strings.CutSuffix(m[2], "*")
				is := p.Interface == m[2] || any && strings.HasPrefix(p.Interface, prefix)
				if is == (m[1] != "") {
					continue
				}
				rule = strings.Replace(rule, m[0], "", 1)
			}
			if m := affinityLookup.FindStringSubmatch(rule); m != nil {
				if pinned[m[1]] {
					add(strings.TrimPrefix(rule, m[0]))
				}
				continue
			}
			if m := affinityUpdate.FindStringSubmatch(rule); m != nil {
				seconds := "jump affinity-seconds-" + strconv.Itoa(int(f.nft.Table.Sets[m[1]].Timeout.Seconds()))
				add(seconds)
				v.Table.Chains[strings.TrimPrefix(seconds, "jump ")] = &knftables.FakeChain{}
				continue
			}
			if m := addressList.FindStringSubmatch(rule); m != nil {
				for _, address := range strings.Split(m[2], ",") {
					add(m[1] + " " + strings.TrimSpace(address) + " " + m[3])
				}
				continue
			}
			add(rule)
		}
		v.Table.Chains[name] = to
	}
	f.views[key] = v
	return v
}

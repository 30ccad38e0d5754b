package iptables

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"github.com/berth-run/berth/proxy/model"
)

// Remove removes a proxy's chains, berth's or kube-proxy's in modes iptables and ipvs, and the rules of other chains that lead
// there, in the network namespace of the process, and says what it has removed. A failure does not keep it from the rest.
func Remove() ([]string, error) { return removeBy(removal) }

// RemoveOwn is Remove of what berth alone has, and of chains that nothing leads to any more: those that a kube-proxy has taken over,
// which runs, stay.
func RemoveOwn() ([]string, error) { return removeBy(removalOfOwn) }

func removeBy(what func(saved, table) *batch) ([]string, error) {
	var removed []string
	var errs []error
	for _, p := range present() {
		what, err := p.remove(what)
		removed = append(removed, what...)
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// present are the programs that are there: a proxy may have used either of a host that has two backends.
func present() (out []programs) {
	for _, backends := range [][]string{{"nft", "legacy"}, {""}} {
		for _, backend := range backends {
			for f := range model.Family(model.Families) {
				p := programs{family: f, backend: backend}
				if _, err := exec.LookPath(p.name("save")); err == nil {
					out = append(out, p)
				}
			}
		}
		if out != nil {
			break
		}
	}
	return out
}

// removeAll removes a proxy's chains.
func (p programs) removeAll() ([]string, error) { return p.remove(removal) }

// remove removes chains, in one transaction for each table.
func (p programs) remove(what func(saved, table) *batch) (removed []string, err error) {
	have, err := p.save()
	if err != nil {
		return nil, nil // the kernel does not have the tables, so there is nothing in them
	}
	var errs []error
	if b := what(have, filter); strings.Contains(b.String(), "-X "+kubeletFirewall+"\n") && isSet(routeLocalnet) {
		// Before the rule goes that keeps the node's neighbours from its loopback.
		if err := setSysctl(routeLocalnet, "0"); err != nil {
			errs = append(errs, err)
			delete(have, chain{filter, kubeletFirewall})
		} else {
			removed = append(removed, "1 from sysctl "+strings.ReplaceAll(routeLocalnet, "/", "."))
		}
	}
	for t := range table(tables) {
		b := what(have, t)
		if b.empty() {
			continue
		}
		if err := p.restore(b); err != nil {
			errs = append(errs, fmt.Errorf("table %s: %w", t, err))
			continue
		}
		removed = append(removed, fmt.Sprintf("%d chains of %s in table %s", b.chains, p.name(""), t))
	}
	return removed, errors.Join(errs...)
}

// routeLocalnet is set for node ports at 127.0.0.1.
const routeLocalnet = "net/ipv4/conf/all/route_localnet"

// ownFirewall is whether the kubelet's chain is a proxy's: there was no kubelet, whose canary would be there, and it has the proxy's
// rule alone. kube-proxy leaves it and the sysctl in any case.
func (s saved) ownFirewall() bool {
	rules := s[chain{filter, kubeletFirewall}]
	for t := range table(tables) {
		if _, there := s[chain{t, kubeletCanary}]; there {
			return false
		}
	}
	return len(rules) == 1 && same(rules[0], martian)
}

// OwnLeft is what RemoveOwn leaves of berth's, since it is in force.
func OwnLeft() (left []string) {
	for _, p := range present() {
		have, err := p.save()
		if err != nil {
			continue // the kernel does not have the tables
		}
		for _, name := range []string{clusterIPs, rejects} {
			if _, there := have[chain{filter, name}]; there {
				left = append(left, fmt.Sprintf("chain %s of %s in table filter", name, p.name("")))
			}
		}
	}
	return left
}

// removal removes a proxy's chains from a table.
func removal(have saved, t table) *batch {
	b := &batch{}
	firewall := t == filter && have.ownFirewall()
	isProxys := func(name string) bool { return isProxys(name) || firewall && name == kubeletFirewall }
	for _, c := range sortedChains(have) {
		switch {
		case c.table != t:
		case isProxys(c.name):
			b.drop(c)
		default:
			for _, rule := range have[c] {
				if to := target(rule); isProxys(to) {
					b.remove(c, rule)
				}
			}
		}
	}
	return b
}

// removalOfOwn removes berth's chains from a table that kube-proxy has rules in; all of a proxy from one where nothing is led to them.
func removalOfOwn(have saved, t table) *batch {
	led := have.kept(func(c chain) bool { return isProxys(c.name) })
	used := false
	for c := range led {
		used = used || isProxys(c.name)
	}
	if !used {
		return removal(have, t)
	}
	b := &batch{}
	own := []chain{{filter, clusterIPs}, {filter, rejects}}
	isOwn := func(c chain) bool { return slices.Contains(own, c) }
	others := have.kept(isOwn)
	if slices.ContainsFunc(own, func(c chain) bool { return others[c] }) {
		return b // berth's rules are in force
	}
	for _, c := range own {
		if c.table == t && have[c] != nil {
			b.drop(c)
		}
	}
	return b
}

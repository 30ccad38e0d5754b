package iptables

import (
	"errors"
	"fmt"
	"os/exec"

	"github.com/berth-run/berth/proxy/model"
)

// Remove removes a proxy's chains, berth's or kube-proxy's in modes iptables and ipvs, and the rules of other chains that lead
// there, in the network namespace of the process, and says what it has removed. A failure does not keep it from the rest.
func Remove() ([]string, error) {
	var removed []string
	var errs []error
	for _, p := range present() {
		what, err := p.removeAll()
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
				p := programs{f, backend}
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

// removeAll removes a proxy's chains, in one transaction for each table.
func (p programs) removeAll() (removed []string, err error) {
	have, err := p.save()
	if err != nil {
		return nil, nil // the kernel does not have the tables, so there is nothing in them
	}
	var errs []error
	for t := range table(tables) {
		b := removal(have, t)
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

// removal removes a proxy's chains from a table.
func removal(have saved, t table) *batch {
	b := &batch{}
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

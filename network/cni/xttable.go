package cni

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	tableNAT    = "nat"
	tableFilter = "filter"
)

// xtBases are the chains of the tables that the kernel comes to, as far as they are used here.
var xtBases = map[string]map[string]nftBase{
	tableNAT: {
		"PREROUTING":  {"nat", unix.NF_INET_PRE_ROUTING, -100},
		"OUTPUT":      {"nat", unix.NF_INET_LOCAL_OUT, -100},
		"POSTROUTING": {"nat", unix.NF_INET_POST_ROUTING, 100},
	},
	tableFilter: {"FORWARD": {"filter", unix.NF_INET_FORWARD, 0}},
}

// xtTable is a table of iptables of a family.
type xtTable struct {
	nftTable
	v6   bool
	seen map[string]bool       // chains that are known to be there
	made map[string]bool       // of these, those that are being made
	has  map[string][]nftExprs // rules that are being added
}

// openXT opens a table of the IPv4 or IPv6 family.
func openXT(table string, v6 bool) (*xtTable, error) {
	t, err := openNFTTable(nfproto(v6), table)
	if err != nil {
		return nil, err
	}
	return &xtTable{nftTable: *t, v6: v6, seen: map[string]bool{}, made: map[string]bool{}, has: map[string][]nftExprs{}}, nil
}

// xtChanges lets one at a time look what is missing in tables and add it, so that nothing is added twice.
var xtChanges sync.Mutex

// changeXT makes the changes of f to a table at once.
func changeXT(table string, v6 bool, f func(*xtTable) error) error {
	xtChanges.Lock()
	defer xtChanges.Unlock()
	t, err := openXT(table, v6)
	if err != nil {
		return err
	}
	defer t.close()
	if err := f(t); err != nil {
		return err
	}
	return t.apply()
}

// ensureChain makes a chain, and with it the table, unless it is there.
func (t *xtTable) ensureChain(name string) error {
	if t.seen[name] {
		return nil
	}
	there, err := t.hasChain(name)
	if err != nil {
		return err
	}
	t.seen[name] = true
	if there {
		return nil
	}
	if len(t.changes) == 0 {
		t.add()
	}
	var base *nftBase
	if b, ok := xtBases[t.name][name]; ok {
		base = &b
	}
	t.addChain(name, base)
	t.made[name] = true
	return nil
}

func (t *xtTable) ensureChains(names ...string) error {
	for _, name := range names {
		if err := t.ensureChain(name); err != nil {
			return err
		}
	}
	return nil
}

// ensureRule adds a rule to a chain, which is made where it is missing, unless it has it.
func (t *xtTable) ensureRule(chain string, first bool, r xtRule) error {
	if err := t.ensureChain(chain); err != nil {
		return err
	}
	exprs := r.exprs(t.v6)
	there, err := t.contains(chain, exprs)
	if err != nil || there {
		return err
	}
	t.addRule(chain, first, exprs, r.compat())
	t.has[chain] = append(t.has[chain], exprs)
	if to := r.target.chain; t.made[to] {
		t.tell(chain, jumpTo(to))
	}
	return nil
}

// contains says whether a chain has a rule, or will have it.
func (t *xtTable) contains(chain string, exprs nftExprs) (bool, error) {
	if slices.ContainsFunc(t.has[chain], exprs.equal) {
		return true, nil
	}
	if t.made[chain] || slices.ContainsFunc(slices.Collect(maps.Keys(t.made)), exprs.jumpsTo) {
		return false, nil // nothing is in a chain that is not there yet, and nothing leads there
	}
	rules, err := t.find(chain, sameRule(exprs), func(r nftRule) bool { return r.exprs.equal(exprs) })
	return len(rules) > 0, err
}

// ensureOfMany adds rules at the end of a chain that has some of each pod, those that it does not have, and makes all changes.
// The rules of other pods are not listed: what is not remembered is not there, unless somebody else has made something in the
// table since. Its numbers show that; then the chain is listed, and those go of the new rules that it had before.
func (t *xtTable) ensureOfMany(chain string, rules []xtRule) error {
	added := false
	for _, r := range rules {
		exprs := r.exprs(t.v6)
		there, err := t.recall(chain, sameRule(exprs), func(r nftRule) bool { return r.exprs.equal(exprs) })
		if err != nil {
			return err
		}
		if len(there) > 0 || slices.ContainsFunc(t.has[chain], exprs.equal) {
			continue
		}
		t.addRule(chain, false, exprs, r.compat())
		t.tell(chain, sameRule(exprs))
		t.has[chain] = append(t.has[chain], exprs)
		added = true
	}
	made, err := t.applyTold()
	if err != nil || !added || t.nextOnes(made) {
		return err
	}
	return t.deleteAgain(chain, made)
}

// deleteAgain deletes those of the rules that were just made that a chain had before, and remembers all that it has.
func (t *xtTable) deleteAgain(chain string, made []uint64) error {
	all, err := t.rules(chain)
	if err != nil {
		return err
	}
	for _, r := range all {
		t.forget(chain, sameRule(r.exprs))
	}
	had := map[string]bool{}
	for _, r := range all {
		what := sameRule(r.exprs)
		if had[what] && slices.Contains(made, r.handle) {
			t.deleteRule(chain, r.handle)
			continue
		}
		had[what] = true
		t.remember(chain, what, r.handle)
	}
	return t.apply()
}

// removeRules deletes, for each of some rules, the first in a chain that is it, if there is one, and makes all changes.
func (t *xtTable) removeRules(chain string, rules []xtRule) (err error) {
	for _, find := range []finder{t.find, t.list} {
		done := map[string]bool{}
		for _, r := range rules {
			exprs := r.exprs(t.v6)
			what := sameRule(exprs)
			found, err := find(chain, what, func(r nftRule) bool { return r.exprs.equal(exprs) })
			if err != nil {
				return err
			}
			if len(found) > 0 && !done[what] {
				t.deleteRule(chain, found[0].handle)
				t.forget(chain, what)
			}
			done[what] = true
		}
		if err = t.apply(); !errors.Is(err, unix.ENOENT) {
			return err
		}
		// Some have gone meanwhile.
	}
	return err
}

// removeChains deletes chains, those that are there, with the rules of another chain that lead to each.
func (t *xtTable) removeChains(from map[string]string) error {
	for _, find := range []finder{t.find, t.list} {
		for name, other := range from {
			if err := t.removeChain(name, other, find); err != nil {
				return err
			}
		}
		if err := t.apply(); !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOENT) {
			return err
		}
		// More rules lead there than are remembered, or some have gone meanwhile.
	}
	return fmt.Errorf("chains %q are changed by others: %w", slices.Sorted(maps.Keys(from)), unix.EBUSY)
}

func (t *xtTable) removeChain(name, from string, find finder) error {
	if there, err := t.hasChain(name); err != nil || !there {
		return err
	}
	rules, err := find(from, jumpTo(name), func(r nftRule) bool { return r.exprs.jumpsTo(name) })
	if err != nil {
		return err
	}
	for _, r := range rules {
		t.deleteRule(from, r.handle)
	}
	t.forget(from, jumpTo(name))
	t.deleteChain(name)
	return nil
}

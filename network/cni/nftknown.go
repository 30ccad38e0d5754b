package cni

import (
	"crypto/sha256"
	"errors"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// known is where in the kernel's chains rules were that are looked for again: shared ones by each pod, a pod's own when it goes.
// A chain has a rule or more for each pod of the node, and takes the kernel 8 µs for each to list. Others change chains, too:
// so whoever recalls a rule asks the kernel for the one of that number and compares, and lists the chain if it is another.
var known struct {
	sync.Mutex
	handles map[knownRules][]uint64
}

// knownRules names rules by what they are known for: what they are, or whose.
type knownRules struct {
	netns              uint64
	family             byte
	table, chain, what string
}

// mostKnown bounds what is known of pods whose DEL never comes.
var mostKnown = 1 << 16

func (t *nftTable) knownRules(chain, what string) knownRules {
	return knownRules{t.cookie, t.family, t.name, chain, what}
}

// remember notes the numbers of rules.
func (t *nftTable) remember(chain, what string, handles ...uint64) {
	known.Lock()
	defer known.Unlock()
	k := t.knownRules(chain, what)
	_, more := known.handles[k] // all numbers of one are known, or none
	if known.handles == nil || !more && len(known.handles) >= mostKnown {
		known.handles = map[knownRules][]uint64{}
	}
	known.handles[k] = append(known.handles[k], handles...)
}

func (t *nftTable) forget(chain, what string) []uint64 {
	known.Lock()
	defer known.Unlock()
	k := t.knownRules(chain, what)
	handles := known.handles[k]
	delete(known.handles, k)
	return handles
}

// recall finds rules that are remembered. If one is there no more, or is not what it was, all are forgotten, and there are none.
func (t *nftTable) recall(chain, what string, is func(nftRule) bool) ([]nftRule, error) {
	known.Lock()
	handles := slices.Clone(known.handles[t.knownRules(chain, what)])
	known.Unlock()
	var rules []nftRule
	for _, h := range handles {
		r, err := t.rule(chain, h)
		switch {
		case err != nil && !errors.Is(err, unix.ENOENT):
			return nil, err
		case err != nil || !is(r):
			t.forget(chain, what)
			return nil, nil
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// find is recall, and where that finds nothing it lists the chain, and remembers what it finds.
func (t *nftTable) find(chain, what string, is func(nftRule) bool) ([]nftRule, error) {
	rules, err := t.recall(chain, what, is)
	if err != nil || len(rules) > 0 {
		return rules, err
	}
	return t.list(chain, what, is)
}

// finder is find or a half of it.
type finder func(chain, what string, is func(nftRule) bool) ([]nftRule, error)

// list is find without recalling.
func (t *nftTable) list(chain, what string, is func(nftRule) bool) ([]nftRule, error) {
	all, err := t.rules(chain)
	if err != nil {
		return nil, err
	}
	t.forget(chain, what)
	var rules []nftRule
	for _, r := range all {
		if is(r) {
			rules = append(rules, r)
			t.remember(chain, what, r.handle)
		}
	}
	return rules, nil
}

// sameRule is what a rule is known for that is looked for as it is.
func sameRule(e nftExprs) string {
	h := sha256.New()
	for _, part := range e {
		h.Write(part)
	}
	return "is " + string(h.Sum(nil))
}

// jumpTo is what rules are known for that lead to a chain.
func jumpTo(chain string) string { return "to " + chain }

// rulesOf is what rules are known for that are somebody's.
func rulesOf(owner string) string { return "of " + owner }

// nextOnes says whether nothing was made in a table between what it was last asked about and these rules: the kernel numbers what
// is made in a table one after the other.
func (t *nftTable) nextOnes(made []uint64) bool {
	if len(made) == 0 {
		return true // a kernel that tells no numbers: what there was before stays until its DEL
	}
	k := t.knownRules("", "last")
	known.Lock()
	defer known.Unlock()
	if known.handles == nil {
		known.handles = map[knownRules][]uint64{}
	}
	last := known.handles[k]
	known.handles[k] = made[len(made)-1:]
	return len(last) == 1 && made[0] == last[0]+1
}

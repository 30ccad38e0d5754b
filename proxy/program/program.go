// Package program has what those who program a kernel by package model have in common: nft and iptables.
package program

import (
	"iter"

	"github.com/berth-run/berth/proxy/model"
)

// State is all that is wanted: that of package model.
type State interface {
	Services() iter.Seq[*model.Service]
	Hairpins() []model.Hairpin
	Globals() *model.Globals
}

// Report is what a call has done.
type Report struct {
	// Transactions are how many the kernel has taken.
	Transactions int
	// Elements are how many elements of sets (nft), or rules (iptables), were put in, taken away or changed.
	Elements int
	// Objects are how many tables, chains, sets, and with nft rules, were.
	Objects int
}

// Programmer has a kernel do what a model says. It remembers what it was told, also where that has failed: Verify tries again.
type Programmer interface {
	// Sync makes the kernel have a whole State, Apply what has changed since.
	Sync(State) (Report, error)
	Apply(*model.Delta) (Report, error)
	// Verify compares all with the kernel, and mends it.
	Verify() (Report, error)
	// Changed has the name of a program that has changed the kernel's tables, if the kernel says it.
	Changed() <-chan string
}

// Abilities are what Services can ask for that not every Programmer, or not every kernel, can do.
type Abilities struct {
	// Hash is to choose endpoints by a hash (model.Hash).
	Hash bool
	// Ranges is ranges of ports (model.Port.Ranges).
	Ranges bool
}

// AbilitiesOf asks a Programmer; one that does not say has none.
func AbilitiesOf(p Programmer) Abilities {
	if able, ok := p.(interface{ Abilities() Abilities }); ok {
		return able.Abilities()
	}
	return Abilities{}
}

// Limit has a model ask for nothing else: it tells of Services that do.
func (a Abilities) Limit(c *model.Config) { c.NoHash, c.NoRanges = !a.Hash, !a.Ranges }

// Package program has what those who program a kernel by package model have in common: nft and iptables.
package program

import (
	"iter"
	"net/netip"

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
	// Resets is that connections are reset (model.Port.Resets).
	Resets bool
}

// Flow is packets of TCP of one direction of a connection, as they come to the node.
type Flow struct{ Src, Dst netip.AddrPort }

// Resetter has the kernel answer packets by resets.
type Resetter interface {
	// Answer has packets of flows be answered that are of no connection that the kernel tracks, for half a minute, or until one
	// begins another connection by the same addresses and ports, or ends the old one. What is sent there as a SYN with a window
	// of 0, the other way around, is not tracked.
	Answer([]Flow) error
	// Answering are the flows whose packets are still answered.
	Answering() (map[Flow]struct{}, error)
}

// AbilitiesOf asks a Programmer; one that does not say has none.
func AbilitiesOf(p Programmer) Abilities {
	if able, ok := p.(interface{ Abilities() Abilities }); ok {
		return able.Abilities()
	}
	return Abilities{}
}

// Limit has a model ask for nothing else: it tells of Services that do.
func (a Abilities) Limit(c *model.Config) {
	c.NoHash, c.NoRanges, c.NoResets = !a.Hash, !a.Ranges, !a.Resets
}

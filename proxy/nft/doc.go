// Package nft has the kernel's nf_tables do what package model says of Services. Nothing is made for a Service but elements of
// sets and maps, so that a change costs the same beside ten Services and beside thirty thousand, and no program is started.
//
//	p, err := nft.Open(nft.Options{Log: log})
//	p.Sync(m.State())              // reads the kernel, compares, changes what differs
//	p.Apply(m.Commit())            // a change of the model, in one transaction
//	case <-p.Changed(): p.Verify() // somebody else has changed the tables
//
// It promises: a start with rules that are as they should be changes nothing, and with rules of another version replaces
// these in one transaction, so that no connection breaks and no packet is dropped; a change of a Service is one transaction;
// loads are in several small ones, in an order in which no Service is half there; what another program changes in the tables is
// seen, and undone by Verify; a table of the name that is not berth's is an error, and left alone. `nft list ruleset` shows
// all of it, and Services by their names.
//
// It does not promise to remember more than 262,144 clients of Services with session affinity in a family, nor to keep the
// priority (SO_PRIORITY) of the first packet of a connection to one, or to a range of ports. It does not clean conntrack, and sets no sysctls.
//
// Files: layout.go has tables, sets, chains and rules, expr.go what rules are made of; elements.go computes elements from
// values of the model; objects.go and commit.go read both from the kernel, compare and write; program.go puts it together,
// watch.go sees others' changes, resets.go ends connections whose endpoint is gone, affinity.go and groups.go are about session affinity.
package nft

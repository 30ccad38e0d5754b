// Package iptables has the kernel do what package model says of Services by iptables-restore, where it has no nf_tables or is
// configured so. Chains and comments are those of kube-proxy 1.37 in its iptables mode, so that people and tools find what they
// know, and a node that changes from one to the other has no rule that is left behind.
//
//	p, err := iptables.Open(iptables.Options{MasqueradeBit: 14, Log: log})
//	p.Sync(m.State())              // reads the kernel, compares, changes what differs
//	p.Apply(m.Commit())            // the chains of Services that have changed, and their rules in chains that all share
//	case <-p.Changed(): p.Verify() // the tables were flushed
//
// It promises: a start with rules that are as they should be changes nothing, be they its own or kube-proxy's; what changes is
// committed in one transaction for each table; rules of others are left alone; a flush of the tables by another program is seen
// within Options.Period, as kube-proxy sees it (a chain in each table that has no other purpose), and undone by Verify. The
// programs are those that the host calls iptables and ip6tables, so that the rules are where others on the host look for theirs.
//
// It differs from kube-proxy in what package model says: packets to a port that a cluster IP does not have are rejected, and
// those to a cluster IP that no Service has dropped (chains KUBE-CLUSTER-IPS and KUBE-REJECT); connections are rejected by a reset; addresses without endpoints precede node ports of
// the same number, and reject packets of the node itself, too. Endpoints may have weights.
//
// It does not promise a cost of a packet or of a change that does not depend on the number of Services: that is what package nft
// is for. With session affinity the kernel remembers 100 clients of an endpoint, unless its module xt_recent is told otherwise
// (ip_list_tot). It does not clean conntrack, and sets one sysctl, route_localnet, where node ports are served at 127.0.0.1.
//
// Files: chains.go names chains; service.go computes the rules of a Service and fixed.go those that are there for all of them;
// rule.go is what rules are made of, saved.go reads what iptables-save writes, batch.go is what iptables-restore reads;
// program.go puts it together, counters.go reads what rules have counted, inspect.go compares the kernel with what it should have, restores.go counts what was written, canary.go sees a flush, run.go runs programs, remove.go removes all of it.
package iptables

package hostports

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// masqueradeMark is the bit of a packet's mark that says, between prerouting and postrouting, that it is to be masqueraded: the
// one that the portmap plugin has for the same. Kubernetes has bits 14 and 15.
const masqueradeMark = 1 << 13

// afterServices is the priority of the chains that lead to pods: those that lead to Services, kube-proxy's and our own, are
// at -100, and who comes first has the packet.
const afterServices = -90

// The chains of the table.
const (
	chainGuard       = "guard"
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainPods        = "to-pods"
	chainPostrouting = "postrouting"
)

var allChains = []string{chainGuard, chainPrerouting, chainOutput, chainPods, chainPostrouting}

// base says where the kernel comes to a chain.
type base struct {
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
}

var bases = map[string]base{
	chainGuard:       {nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw},
	chainPrerouting:  {nftables.ChainTypeNAT, nftables.ChainHookPrerouting, afterServices},
	chainOutput:      {nftables.ChainTypeNAT, nftables.ChainHookOutput, afterServices},
	chainPostrouting: {nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource},
}

// rule is a rule of the table, with what it is for where it does not say so itself.
type rule struct {
	chain, why string
	exprs      exprs
}

// rules are those of the table, in order. Their number depends on nothing.
func rules() []rule {
	loopback4, loopback6 := netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")
	fromPods := join(meta(expr.MetaKeyIIFNAME, 0), isIn(links))
	fromLoopback := address(loopback4, source)
	mark, unmark := setMark(^uint32(masqueradeMark), masqueradeMark), setMark(^uint32(masqueradeMark), 0)
	all := []rule{
		{chainGuard, "the node's loopback addresses are not for pods", join(fromPods, address(loopback4, destination), verdict(expr.VerdictDrop, ""))},
		{chainGuard, "nor are they theirs", join(fromPods, fromLoopback, verdict(expr.VerdictDrop, ""))},
		{chainPrerouting, "", join(toLocal(), verdict(expr.VerdictJump, chainPods))},
		{chainOutput, "", join(toLocal(), verdict(expr.VerdictJump, chainPods))},
		{chainPods, "no packet comes back to ::1", join(address(loopback6, destination), verdict(expr.VerdictReturn, ""))},
		{chainPods, "a pod's answer to its neighbour or itself must come back here", join(fromPods, mark)},
		{chainPods, "as must that to 127.0.0.1", join(fromLoopback, mark)},
	}
	for _, v6 := range []bool{false, true} {
		all = append(all, rule{chainPods, "", portAtAddress(v6)}, rule{chainPods, "", portAtAll(v6)})
	}
	return append(all,
		rule{chainPods, "not a host port", join(fromPods, unmark)},
		rule{chainPods, "not a host port", join(fromLoopback, unmark)},
		rule{chainPostrouting, "", join(hasMark(masqueradeMark), setMark(^uint32(0), masqueradeMark), masquerade())},
	)
}

// The sets of the table: maps of ports that are at all addresses, and at one, of a family; and the links of the pods.
const (
	ports4 = "ports-ipv4"
	ports6 = "ports-ipv6"
	addrs4 = "hostip-ports-ipv4"
	addrs6 = "hostip-ports-ipv6"
	links  = "links"
)

var allSets = []string{ports4, ports6, addrs4, addrs6, links}

// setOf is a set of a table. Its number need only be unique in a transaction.
func setOf(t *nftables.Table, name string) *nftables.Set {
	addr := nftables.TypeIPAddr
	if name == ports6 || name == addrs6 {
		addr = nftables.TypeIP6Addr
	}
	concat := nftables.MustConcatSetType
	s := &nftables.Set{Table: t, Name: name, IsMap: true, Concatenation: true, DataType: concat(addr, nftables.TypeInetService)}
	switch name {
	case ports4, ports6:
		s.KeyType = concat(nftables.TypeInetProto, nftables.TypeInetService)
		s.Comment = "ports of the node at all of its addresses, and where they lead"
	case addrs4, addrs6:
		s.KeyType = concat(addr, nftables.TypeInetProto, nftables.TypeInetService)
		s.Comment = "ports of the node at one of its addresses, and where they lead"
	case links:
		s = &nftables.Set{Table: t, Name: name, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian, Comment: "where those pods are"}
	}
	for i, n := range allSets {
		if n == name {
			s.ID = uint32(i) + 1
		}
	}
	return s
}

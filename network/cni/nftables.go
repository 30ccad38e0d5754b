package cni

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/containernetworking/plugins/pkg/utils"
	"golang.org/x/sys/unix"
)

// What the reference project makes with nftables as the backend, in tables of its own: no iptables is asked, and no nft run.

// Attributes that golang.org/x/sys/unix does not have.
const (
	nftaTableUserdata = 6
	nftaChainUserdata = 12
)

// note is user data that nft shows as a comment.
func note(comment string) []byte {
	return append([]byte{noteComment, byte(len(comment) + 1)}, str(comment)...)
}

const (
	noteComment = 0 // NFTNL_UDATA_RULE_COMMENT, and that of tables and chains
	noteHead    = 2 // type and length
)

// comment is what nft shows as a rule's comment.
func (r nftRule) comment() string {
	for d := r.userdata; len(d) >= noteHead && len(d) >= noteHead+int(d[1]); d = d[noteHead+int(d[1]):] {
		if d[0] == noteComment {
			return strings.TrimRight(string(d[noteHead:noteHead+int(d[1])]), "\x00")
		}
	}
	return ""
}

func (t *nftTable) addWithNote(comment string) {
	t.change(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, attr(unix.NFTA_TABLE_NAME, str(t.name)), attr(nftaTableUserdata, note(comment)))
}

// emptyChain makes a base chain, without rules.
func (t *nftTable) emptyChain(name string, base *nftBase) {
	t.addChain(name, base)
	t.change(unix.NFT_MSG_DELRULE, 0, attr(unix.NFTA_RULE_TABLE, str(t.name)), attr(unix.NFTA_RULE_CHAIN, str(name)))
}

// addNotedRule adds a rule with a comment, which is remembered as somebody's.
func (t *nftTable) addNotedRule(chain, comment, owner string, exprs nftExprs) {
	t.addRule(chain, false, exprs, attr(unix.NFTA_RULE_USERDATA, note(comment)))
	t.tell(chain, rulesOf(owner))
}

// deleteNoted deletes the rules of a chain that are somebody's by their comments.
func (t *nftTable) deleteNoted(chain, owner string, find finder, is func(comment string) bool) error {
	rules, err := find(chain, rulesOf(owner), func(r nftRule) bool { return is(r.comment()) })
	if err != nil {
		return err
	}
	for _, r := range rules {
		t.deleteRule(chain, r.handle)
	}
	t.forget(chain, rulesOf(owner))
	return nil
}

func ret() []byte { return verdict(unix.NFT_RETURN, "") }

func gotoChain(chain string) []byte { return verdict(unix.NFT_GOTO, chain) }

func masq() []byte { return expr("masq") }

// ofFamily is true of packets of IPv4 or IPv6, in a table of both.
func ofFamily(v6 bool) nftExprs {
	return nftExprs{meta(unix.NFT_META_NFPROTO), cmp(false, []byte{nfproto(v6)})}
}

// toLocal is true of packets to an address of the node.
func toLocal() nftExprs {
	return nftExprs{
		expr("fib", attr(unix.NFTA_FIB_DREG, be32(reg1)), attr(unix.NFTA_FIB_RESULT, be32(unix.NFT_FIB_RESULT_ADDRTYPE)), attr(unix.NFTA_FIB_FLAGS, be32(unix.NFTA_FIB_F_DADDR))),
		cmp(false, ne32(nil, unix.RTN_LOCAL)),
	}
}

func load(reg uint32, value []byte) []byte {
	return expr("immediate", attr(unix.NFTA_IMMEDIATE_DREG, be32(reg)), attr(unix.NFTA_IMMEDIATE_DATA, attr(unix.NFTA_DATA_VALUE, value)))
}

// dnat leads to an address and port.
func dnat(to netip.AddrPort) nftExprs {
	const reg2, specified = unix.NFT_REG_2, 3 // NF_NAT_RANGE_MAP_IPS, NF_NAT_RANGE_PROTO_SPECIFIED
	family := uint32(nfproto(to.Addr().Is6()))
	return nftExprs{
		load(reg1, to.Addr().AsSlice()), load(reg2, binary.BigEndian.AppendUint16(nil, to.Port())),
		expr("nat", attr(unix.NFTA_NAT_TYPE, be32(unix.NFT_NAT_DNAT)), attr(unix.NFTA_NAT_FAMILY, be32(family)),
			attr(unix.NFTA_NAT_REG_ADDR_MIN, be32(reg1)), attr(unix.NFTA_NAT_REG_ADDR_MAX, be32(reg1)),
			attr(unix.NFTA_NAT_REG_PROTO_MIN, be32(reg2)), attr(unix.NFTA_NAT_REG_PROTO_MAX, be32(reg2)), attr(unix.NFTA_NAT_FLAGS, be32(specified))),
	}
}

// join makes one rule of parts.
func join(parts ...nftExprs) nftExprs {
	var all nftExprs
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// The table of masquerading, and its chain of a rule for each address.
const (
	masqTable  = "cni_plugins_masquerade"
	masqChecks = "masq_checks"
)

// masqOwner begins the comments of the rules of one interface of a container.
func masqOwner(network, ifName, id string) string {
	const size = 16
	return utils.MustFormatHashWithPrefix(size, "", network) + "-" + utils.MustFormatHashWithPrefix(size, "", ifName+":"+id)
}

func isMasqOf(owner string) func(comment string) bool {
	return func(comment string) bool { return strings.HasPrefix(comment, owner) }
}

func masqComment(network, ifName, id string) string {
	const longest = 128 // that nft takes
	quotes := strings.NewReplacer(`"`, ``)
	comment := fmt.Sprintf("%s, net: %s, if: %s, id: %s", masqOwner(network, ifName, id), quotes.Replace(network), quotes.Replace(ifName), quotes.Replace(id))
	return comment[:min(len(comment), longest)]
}

func openMasqTable() (*nftTable, error) { return openNFTTable(unix.NFPROTO_INET, masqTable) }

// masqTurn is for one ADD after the other: the second knows what the first has made. Nor does any DEL ask meanwhile what is known
// of its pod: that may be half of it, while an ADD notes what it has listed.
var masqTurn sync.RWMutex

// masqueradeNFT makes the rules of an interface anew. Those that it may have are found without listing those of all pods: they
// are remembered, or nobody else has made any in this table.
func masqueradeNFT(nets []*net.IPNet, network, ifName, id string) error {
	masqTurn.Lock()
	defer masqTurn.Unlock()
	t, err := openMasqTable()
	if err != nil {
		return err
	}
	defer t.close()
	owner := masqOwner(network, ifName, id)
	old := *t
	if err := old.deleteNoted(masqChecks, owner, old.recall, isMasqOf(owner)); err != nil {
		return err
	}
	t.addWithNote("Masquerading for plugins from github.com/containernetworking/plugins")
	t.addChain(masqChecks, nil, attr(nftaChainUserdata, note("Masquerade traffic from certain IPs to any (non-multicast) IP outside their subnet")))
	t.emptyChain("postrouting", &nftBase{"nat", unix.NF_INET_POST_ROUTING, 100})
	for _, multicast := range []netip.Prefix{netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8")} {
		v6 := multicast.Addr().Is6()
		t.addRule("postrouting", false, join(ofFamily(v6), address(multicast, false, addressAt(v6, true)), nftExprs{ret()}))
		t.tell("", "")
	}
	t.addRule("postrouting", false, nftExprs{gotoChain(masqChecks)})
	t.tell("", "")
	t.changes = append(t.changes, old.changes...)
	for _, n := range nets {
		p, ok := toPrefix(n)
		if !ok {
			continue
		}
		v6 := p.Addr().Is6()
		t.addNotedRule(masqChecks, masqComment(network, ifName, id), owner, join(ofFamily(v6),
			address(single(p.Addr()), false, addressAt(v6, false)), address(p, true, addressAt(v6, true)), nftExprs{masq()}))
	}
	made, err := t.applyTold()
	if err != nil || t.nextOnes(made) {
		return err
	}
	return t.deleteOlder(owner, made)
}

// deleteOlder deletes the rules of an owner but for those that were just made, and remembers whose the rules of all pods are.
func (t *nftTable) deleteOlder(owner string, made []uint64) error {
	all, err := t.rules(masqChecks)
	if err != nil {
		return err
	}
	for _, r := range all {
		of, _, _ := strings.Cut(r.comment(), ",")
		t.forget(masqChecks, rulesOf(of))
	}
	for _, r := range all {
		of, _, _ := strings.Cut(r.comment(), ",")
		if of == owner && !slices.Contains(made, r.handle) {
			t.deleteRule(masqChecks, r.handle)
			continue
		}
		t.remember(masqChecks, rulesOf(of), r.handle)
	}
	return t.apply()
}

func unmasqueradeNFT(network, ifName, id string) error {
	masqTurn.RLock()
	defer masqTurn.RUnlock()
	t, err := openMasqTable()
	if err != nil {
		return err
	}
	defer t.close()
	owner := masqOwner(network, ifName, id)
	if err := t.deleteNoted(masqChecks, owner, t.find, isMasqOf(owner)); err != nil {
		return err
	}
	return t.apply()
}

// The table of host ports, one of each family, and its chains.
const (
	portTable    = "cni_hostport"
	portsAll     = "hostports_all"
	ports        = "hostports"
	portsHostIP  = "hostip_hostports" // of versions before 1.6
	portsMasking = "masquerading"
)

// nftPorts makes host ports with nftables.
type nftPorts struct{}

func openPortTable(v6 bool) (*nftTable, error) { return openNFTTable(nfproto(v6), portTable) }

func (nftPorts) usable(bool) error { return nil }

func (nftPorts) forward(conf *portmapConf, id string, pod netip.Prefix) error {
	v6 := pod.Addr().Is6()
	t, err := openPortTable(v6)
	if err != nil {
		return err
	}
	defer t.close()
	t.addWithNote("CNI portmap plugin")
	for _, chain := range []string{ports, portsHostIP} {
		t.addChain(chain, nil)
	}
	t.emptyChain(portsAll, nil)
	t.addRule(portsAll, false, nftExprs{jump(portsHostIP)})
	t.addRule(portsAll, false, nftExprs{jump(ports)})
	for _, chain := range []struct {
		name string
		hook uint32
	}{{"prerouting", unix.NF_INET_PRE_ROUTING}, {"output", unix.NF_INET_LOCAL_OUT}} {
		t.emptyChain(chain.name, &nftBase{"nat", chain.hook, -100})
		t.addRule(chain.name, false, join(toLocal(), nftExprs{jump(portsAll)}))
	}
	if conf.snat() {
		t.addChain(portsMasking, &nftBase{"nat", unix.NF_INET_POST_ROUTING, 100})
	}
	for _, m := range conf.RuntimeConfig.PortMaps {
		if to, ok := m.forFamily(v6); ok {
			t.addNotedRule(ports, id, id, m.exprs(to, pod.Addr()))
		}
	}
	if conf.snat() {
		for _, exprs := range maskedToPod(pod.Addr()) {
			t.addNotedRule(portsMasking, id, id, exprs)
		}
	}
	if err := t.apply(); err != nil {
		return fmt.Errorf("unable to set up nftables rules for port mappings: %v", err)
	}
	return nil
}

// exprs lead from a port of the node, at one of its addresses or at all, to the pod.
func (m portMapping) exprs(at, pod netip.Addr) nftExprs {
	var to nftExprs
	if at.IsValid() {
		to = address(single(at), false, addressAt(at.Is6(), true))
	}
	return join(to, ofProtocol(m.Protocol), toPort(uint16(m.HostPort)), dnat(netip.AddrPortFrom(pod, uint16(m.ContainerPort))))
}

// maskedToPod are the rules that masquerade what a pod sends to itself, and the node from its loopback address.
func maskedToPod(pod netip.Addr) []nftExprs {
	v6 := pod.Is6()
	from := []netip.Addr{pod}
	if !v6 {
		from = append(from, netip.MustParseAddr("127.0.0.1"))
	}
	var all []nftExprs
	for _, a := range from {
		all = append(all, join(address(single(a), false, addressAt(v6, false)), address(single(pod), false, addressAt(v6, true)), nftExprs{masq()}))
	}
	return all
}

// unforward deletes the rules of a pod in both families: nobody knows any more which it had.
func (nftPorts) unforward(_ *portmapConf, id string) error {
	var errs []error
	for _, v6 := range []bool{false, true} {
		errs = append(errs, deletePorts(v6, id))
	}
	return errors.Join(errs...)
}

func deletePorts(v6 bool, id string) error {
	t, err := openPortTable(v6)
	if err != nil {
		return err
	}
	defer t.close()
	for _, chain := range []string{ports, portsHostIP, portsMasking} {
		if err := t.deleteNoted(chain, id, t.find, func(comment string) bool { return comment == id }); err != nil {
			return fmt.Errorf("could not list rules in table %s: %w", portTable, err)
		}
	}
	if err := t.apply(); err != nil {
		return fmt.Errorf("error deleting nftables rules: %w", err)
	}
	return nil
}

func (nftPorts) check(conf *portmapConf, id string, pod netip.Prefix) error {
	v6 := pod.Addr().Is6()
	t, err := openPortTable(v6)
	if err != nil {
		return err
	}
	defer t.close()
	want := map[string]int{}
	for _, m := range conf.RuntimeConfig.PortMaps {
		if _, ok := m.forFamily(v6); ok {
			want[ports]++
		}
	}
	if conf.snat() {
		want[portsMasking] = len(maskedToPod(pod.Addr()))
	}
	for _, chain := range []string{ports, portsMasking} {
		rules, err := t.rules(chain)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if r.comment() == id {
				want[chain]--
			}
		}
		if want[chain] > 0 {
			return fmt.Errorf("missing hostport rules in %q chain", chain)
		}
	}
	return nil
}

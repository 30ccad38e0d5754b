package routes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/network"
)

// tableName is that of the only table that is made here, of both families.
const tableName = "berth-routes"

// rules are what the table should have. They do two things:
//
// What pods of this node send to pods of other nodes is given its own source address, in a chain before all that masquerade: the
// kernel asks no further chain once one has said what becomes of a connection's source. So neither the plugins that
// masquerade, nor pods that are there already, need to know of other nodes.
//
// The tunnel takes what other nodes send, and nothing else: not what comes from elsewhere, and not what pods send to nodes,
// which would have a node's address once it is masqueraded. Both look for the identifier, so that other tunnels are not
// touched.
type rules struct {
	sets   map[string]ruleSet
	chains map[string]ruleChain
}

// ruleSet is a set of addresses, or of ranges from the first address to before the last.
type ruleSet struct {
	v6       bool
	interval bool
	keys     []string // raw addresses, in order; of an interval two each
}

type ruleChain struct {
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority nftables.ChainPriority
	rules    []rule
}

// rule is known by its comment, which says all that differs between rules of different plans.
type rule struct {
	comment string
	exprs   []expr.Any
}

func setName(what string, v6 bool) string {
	if v6 {
		return what + "6"
	}
	return what + "4"
}

func (p *Plan) rules() rules {
	r := rules{sets: map[string]ruleSet{}, chains: map[string]ruleChain{}}
	pods := ruleChain{kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPostrouting, priority: *nftables.ChainPriorityNATSource - 1}
	for _, own := range p.Own {
		v6 := own.Addr().Is6()
		set := setName("pods", v6)
		r.sets[set] = ranges(p.Others, v6)
		pods.rules = append(pods.rules, rule{
			fmt.Sprintf("from pods %s to pods of other nodes: source as it is", own),
			join(ofFamily(v6), source(own), inSet(destination(v6), set), keepSource(v6)),
		})
	}
	r.chains["pods"] = pods
	if len(p.Tunnels) == 0 {
		return r
	}
	into := ruleChain{kind: nftables.ChainTypeFilter, hook: nftables.ChainHookInput, priority: *nftables.ChainPriorityFilter - 10}
	through := ruleChain{kind: nftables.ChainTypeFilter, hook: nftables.ChainHookForward, priority: *nftables.ChainPriorityFilter - 10}
	into.rules = append(into.rules, rule{"no tunnel begins at a pod", join(ofTunnel(), fromPods(), drop())})
	for _, v6 := range []bool{false, true} {
		set := setName("nodes", v6)
		r.sets[set] = addresses(p.Nodes, v6)
		into.rules = append(into.rules, rule{
			"the tunnel is for nodes, " + set, join(ofFamily(v6), ofTunnel(), notInSet(sourceAddress(v6), set), drop()),
		})
		through.rules = append(through.rules, rule{
			"no pod sends through the tunnel, " + set, join(ofFamily(v6), ofTunnel(), inSet(destination(v6), set), drop()),
		})
	}
	r.chains["tunnel-in"], r.chains["tunnel-through"] = into, through
	return r
}

// ranges are those of a family, joined where one begins at the other's end.
func ranges(all []netip.Prefix, v6 bool) ruleSet {
	s := ruleSet{v6: v6, interval: true}
	for _, p := range all { // in order, none in another
		if p.Addr().Is6() != v6 {
			continue
		}
		first, end := string(p.Addr().AsSlice()), string(after(p).AsSlice())
		if n := len(s.keys); n > 0 && s.keys[n-1] == first {
			s.keys[n-1] = end
			continue
		}
		s.keys = append(s.keys, first, end)
	}
	return s
}

// after is the first address that is not in the range. There is one: the last addresses of both families are nobody's.
func after(p netip.Prefix) netip.Addr {
	last := p.Masked().Addr().AsSlice()
	for i := range last {
		switch ones := p.Bits() - 8*i; {
		case ones <= 0:
			last[i] = 0xff
		case ones < 8:
			last[i] |= 0xff >> ones
		}
	}
	a, _ := netip.AddrFromSlice(last)
	return a.Next()
}

func addresses(all []netip.Addr, v6 bool) ruleSet {
	s := ruleSet{v6: v6}
	for _, a := range all {
		if a.Is6() == v6 {
			s.keys = append(s.keys, string(a.AsSlice()))
		}
	}
	return s
}

func (s ruleSet) equal(o ruleSet) bool {
	return s.v6 == o.v6 && s.interval == o.interval && slices.Equal(s.keys, o.keys)
}

// equal says whether tables of both would be one and the same.
func (r rules) equal(o rules) bool {
	sameChain := func(a, b ruleChain) bool {
		return slices.EqualFunc(a.rules, b.rules, func(a, b rule) bool { return a.comment == b.comment })
	}
	return maps.EqualFunc(r.sets, o.sets, ruleSet.equal) && maps.EqualFunc(r.chains, o.chains, sameChain)
}

// patience is for an answer of the kernel, which may have to load modules.
const patience = 20 * time.Second

// largest bounds a transaction: some 200 bytes for each node and family, of more nodes than a cluster has.
const largest = 32 << 20

func openNFT() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetDeadline(time.Now().Add(patience)), c.SetWriteBuffer(largest))
	}))
}

// apply makes the table anew, in one transaction, unless it is as it should be, and says whether it has.
func (r rules) apply() (made bool, err error) {
	conn, err := openNFT()
	if err != nil {
		return false, err
	}
	same, err := r.inForce(conn)
	if err != nil || same {
		return false, err
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	sets := map[string]*nftables.Set{}
	for _, name := range slices.Sorted(maps.Keys(r.sets)) {
		if sets[name], err = r.sets[name].add(conn, table, name); err != nil {
			return false, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.chains)) {
		c := r.chains[name]
		chain := conn.AddChain(&nftables.Chain{Table: table, Name: name, Type: c.kind, Hooknum: c.hook, Priority: &c.priority})
		for _, rule := range c.rules {
			for _, e := range rule.exprs {
				if lookup, ok := e.(*expr.Lookup); ok {
					lookup.SetID = sets[lookup.SetName].ID
				}
			}
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: rule.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, rule.comment)})
		}
	}
	return true, conn.Flush()
}

func (s ruleSet) add(conn *nftables.Conn, table *nftables.Table, name string) (*nftables.Set, error) {
	set := &nftables.Set{Table: table, Name: name, KeyType: nftables.TypeIPAddr, Interval: s.interval, KeyByteOrder: binaryutil.BigEndian}
	if s.v6 {
		set.KeyType = nftables.TypeIP6Addr
	}
	if err := conn.AddSet(set, nil); err != nil {
		return nil, err
	}
	const most = 1000 // to a message
	var batch []nftables.SetElement
	for i, k := range s.keys {
		batch = append(batch, nftables.SetElement{Key: []byte(k), IntervalEnd: s.interval && i%2 == 1})
		if len(batch) == most || i == len(s.keys)-1 {
			if err := conn.SetAddElements(set, batch); err != nil {
				return nil, err
			}
			batch = nil
		}
	}
	return set, nil
}

// inForce says whether the table is as it should be.
func (r rules) inForce(conn *nftables.Conn) (bool, error) {
	table, err := findTable(conn)
	if table == nil || err != nil {
		return false, err
	}
	sets, err := conn.GetSets(table)
	if err != nil || len(sets) != len(r.sets) {
		return false, err
	}
	for _, set := range sets {
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return false, err
		}
		have := ruleSet{v6: set.KeyType.Bytes == nftables.TypeIP6Addr.Bytes, interval: set.Interval, keys: keys(elements)}
		if want, ok := r.sets[set.Name]; !ok || !want.equal(have) {
			return false, nil
		}
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, err
	}
	found := 0
	for _, c := range chains {
		if c.Table.Name != tableName {
			continue
		}
		found++
		same, err := r.chains[c.Name].inForce(conn, table, c)
		if !same || err != nil {
			return false, err
		}
	}
	return found == len(r.chains), nil
}

func (c ruleChain) inForce(conn *nftables.Conn, table *nftables.Table, chain *nftables.Chain) (bool, error) {
	if c.hook == nil || chain.Hooknum == nil || chain.Priority == nil || *chain.Hooknum != *c.hook || *chain.Priority != c.priority || chain.Type != c.kind {
		return false, nil
	}
	have, err := conn.GetRules(table, chain)
	if err != nil || len(have) != len(c.rules) {
		return false, err
	}
	for i, r := range have {
		if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); !ok || comment != c.rules[i].comment {
			return false, nil
		}
	}
	return true, nil
}

// keys are those of a set in order. An interval that ends where another begins has its end first, which is there twice then;
// ranges has none such.
func keys(elements []nftables.SetElement) (all []string) {
	for _, e := range elements {
		all = append(all, string(e.Key))
	}
	slices.Sort(all)
	return all
}

func findTable(conn *nftables.Conn) (*nftables.Table, error) {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName })
	if i < 0 {
		return nil, nil //nolint:nilnil // there is none
	}
	return tables[i], nil
}

func removeTable() error {
	conn, err := openNFT()
	if err != nil {
		return err
	}
	table, err := findTable(conn)
	if table == nil || err != nil {
		return err
	}
	conn.DelTable(table)
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// dropsForwarded are the chains, as FAMILY TABLE CHAIN, that drop what they have no rule for of what the node forwards.
func dropsForwarded() ([]string, error) {
	conn, err := openNFT()
	if err != nil {
		return nil, err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, err
	}
	names := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet"}
	var all []string
	for _, c := range chains {
		family, ok := names[c.Table.Family]
		if ok && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			all = append(all, family+" "+c.Table.Name+" "+c.Name)
		}
	}
	slices.Sort(all)
	return all, nil
}

// Expressions of rules. What is compared is in the first register.

func join(parts ...[]expr.Any) (all []expr.Any) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func ofFamily(v6 bool) []expr.Any {
	family := byte(unix.NFPROTO_IPV4)
	if v6 {
		family = unix.NFPROTO_IPV6
	}
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal([]byte{family})}
}

// address loads the source or the destination.
func address(v6, dst bool) *expr.Payload {
	p := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	if v6 {
		p.Offset, p.Len = 8, 16
	}
	if dst {
		p.Offset += p.Len
	}
	return p
}

func sourceAddress(v6 bool) *expr.Payload { return address(v6, false) }

func destination(v6 bool) *expr.Payload { return address(v6, true) }

func source(p netip.Prefix) []expr.Any {
	size := p.Addr().BitLen() / 8
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		sourceAddress(p.Addr().Is6()),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size), Mask: mask, Xor: bytes.Repeat([]byte{0}, size)},
		equal(p.Masked().Addr().AsSlice()),
	}
}

func inSet(of *expr.Payload, set string) []expr.Any {
	return []expr.Any{of, &expr.Lookup{SourceRegister: 1, SetName: set}}
}

func notInSet(of *expr.Payload, set string) []expr.Any {
	return []expr.Any{of, &expr.Lookup{SourceRegister: 1, SetName: set, Invert: true}}
}

// keepSource makes the source what it is.
func keepSource(v6 bool) []expr.Any {
	family := uint32(unix.NFPROTO_IPV4)
	if v6 {
		family = unix.NFPROTO_IPV6
	}
	return []expr.Any{sourceAddress(v6), &expr.NAT{Type: expr.NATTypeSourceNAT, Family: family, RegAddrMin: 1}}
}

// ofTunnel is true of packets of the tunnel: UDP to its port, and the identifier in bytes 4 to 6 of what is inside (RFC 7348).
func ofTunnel() []expr.Any {
	const udpHeader, vniAt, vniLen = 8, 4, 3
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal([]byte{unix.IPPROTO_UDP}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}, equal(binary.BigEndian.AppendUint16(nil, Port)),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: udpHeader + vniAt, Len: vniLen}, equal([]byte{VNI >> 16, VNI >> 8 & 0xff, VNI & 0xff}),
	}
}

// fromPods is true of what comes by the bridge of a default network: the names begin alike.
func fromPods() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, equal([]byte(network.DefaultPrefix))}
}

func drop() []expr.Any { return []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

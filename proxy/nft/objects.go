package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// Attributes that golang.org/x/sys/unix does not have (linux/netfilter/nf_tables.h).
const (
	nftaTableUserdata = 6
	nftaTableOwner    = 7
	nftaChainUserdata = 12
	nftaSetExpr       = 17

	udataComment = 0 // of tables, chains, rules and elements

	nfAccept = 1
)

// commentOf is what user data of a table, chain, rule or element says.
func commentOf(userdata []byte) string {
	for d := userdata; len(d) >= 2 && len(d) >= 2+int(d[1]); d = d[2+int(d[1]):] {
		if d[0] == udataComment {
			return nftables.Text(d[2 : 2+int(d[1])])
		}
	}
	return ""
}

func userdataOf(comment string) []byte {
	if comment == "" {
		return nil
	}
	return udata(nil, udataComment, append([]byte(comment), 0))
}

// found is what the kernel has of a table, but for the elements of its sets.
type found struct {
	there   bool
	comment string
	owner   uint32 // the port of the socket that alone may change it
	layout
}

// readTable reads a table. What is not there is not an error.
func readTable(c *nftables.Conn, f layer, table string) (*found, error) {
	t := &found{layout: layout{layer: f}}
	err := c.Get(unix.NFT_MSG_GETTABLE, 0, f.family, func(b *nftables.Buffer) { b.String(unix.NFTA_TABLE_NAME, table) },
		func(_ byte, attrs []byte) {
			t.there = true
			nftables.Attrs(attrs, func(kind uint16, content []byte) {
				switch kind {
				case nftaTableUserdata:
					t.comment = commentOf(content)
				case nftaTableOwner:
					t.owner = nftables.Uint32(content)
				}
			})
		})
	if errors.Is(err, unix.ENOENT) {
		return t, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read table %s %s: %w", f, table, err)
	}
	for _, read := range []func(*nftables.Conn, string) error{t.readSets, t.readChains, t.readRules} {
		if err := read(c, table); err != nil {
			return nil, fmt.Errorf("read table %s %s: %w", f, table, err)
		}
	}
	return t, nil
}

// dump asks for all objects of a kind in a table, again as long as tables change meanwhile; after so many times it takes
// what it has, and a commit that does not fit is refused and leads here again.
func dump(c *nftables.Conn, kind uint16, family byte, put func(*nftables.Buffer), reset func(), each func(attrs []byte)) error {
	const times = 5
	var err error
	for range times {
		reset()
		err = c.Get(kind, unix.NLM_F_DUMP, family, put, func(got byte, attrs []byte) {
			if got == family {
				each(attrs)
			}
		})
		if !errors.Is(err, nftables.ErrInterrupted) {
			return err
		}
	}
	return nil
}

func (t *found) readSets(c *nftables.Conn, table string) error {
	return dump(c, unix.NFT_MSG_GETSET, t.family, func(b *nftables.Buffer) { b.String(unix.NFTA_SET_TABLE, table) },
		func() { t.sets = nil },
		func(attrs []byte) {
			var s set
			of := ""
			nftables.Attrs(attrs, func(kind uint16, content []byte) {
				switch kind {
				case unix.NFTA_SET_TABLE:
					of = nftables.Text(content)
				case unix.NFTA_SET_NAME:
					s.name = nftables.Text(content)
				case unix.NFTA_SET_FLAGS:
					s.flags = nftables.Uint32(content)
				case unix.NFTA_SET_KEY_TYPE:
					s.keyType = nftables.Uint32(content)
				case unix.NFTA_SET_KEY_LEN:
					s.keyLen = nftables.Uint32(content)
				case unix.NFTA_SET_DATA_TYPE:
					s.valueType = nftables.Uint32(content)
				case unix.NFTA_SET_DATA_LEN:
					s.valueLen = nftables.Uint32(content)
				case nftaSetExpr:
					s.expr = exprName(content)
				case unix.NFTA_SET_USERDATA:
					s.userdata = bytes.Clone(content)
				case unix.NFTA_SET_DESC:
					s.readDesc(content)
				}
			})
			if of == table && s.flags&unix.NFT_SET_ANONYMOUS == 0 {
				t.sets = append(t.sets, s)
			}
		})
}

func (s *set) readDesc(desc []byte) {
	nftables.Attrs(desc, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_SET_DESC_SIZE:
			s.size = nftables.Uint32(content)
		case nftaSetDescConcat:
			nftables.Attrs(content, func(_ uint16, one []byte) {
				nftables.Attrs(one, func(_ uint16, size []byte) { s.fields = append(s.fields, nftables.Uint32(size)) })
			})
		}
	})
}

// exprName is the name of an expression.
func exprName(expr []byte) (name string) {
	nftables.Attrs(expr, func(kind uint16, content []byte) {
		if kind == unix.NFTA_EXPR_NAME {
			name = nftables.Text(content)
		}
	})
	return name
}

const (
	nftaSetDescConcat = 2 // NFTA_SET_DESC_CONCAT
	nftaSetFieldLen   = 1 // NFTA_SET_FIELD_LEN
)

// is says whether a set that the kernel has is this one. How nft shows it does not count.
func (s *set) is(got *set) bool {
	return s.keyLen == got.keyLen && s.valueLen == got.valueLen && s.flags == got.flags && s.size == got.size &&
		s.expr == got.expr &&
		slices.Equal(s.fields, got.fields)
}

func (t *found) readChains(c *nftables.Conn, table string) error {
	return dump(c, unix.NFT_MSG_GETCHAIN, t.family, nil, func() { t.chains = nil }, func(attrs []byte) {
		var ch chain
		of := ""
		nftables.Attrs(attrs, func(kind uint16, content []byte) {
			switch kind {
			case unix.NFTA_CHAIN_TABLE:
				of = nftables.Text(content)
			case unix.NFTA_CHAIN_NAME:
				ch.name = nftables.Text(content)
			case unix.NFTA_CHAIN_HOOK:
				ch.readHook(content)
			case nftaChainUserdata:
				ch.comment = commentOf(content)
			}
		})
		nftables.Attrs(attrs, func(kind uint16, content []byte) {
			if kind == unix.NFTA_CHAIN_TYPE && ch.base != nil {
				ch.base.kind = nftables.Text(content)
			}
		})
		if of == table {
			t.chains = append(t.chains, ch)
		}
	})
}

func (ch *chain) readHook(hook []byte) {
	ch.base = &base{}
	nftables.Attrs(hook, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_HOOK_HOOKNUM:
			ch.base.hook = nftables.Uint32(content)
		case unix.NFTA_HOOK_PRIORITY:
			ch.base.priority = int32(nftables.Uint32(content))
		}
	})
}

func (t *found) readRules(c *nftables.Conn, table string) error {
	byName := make(map[string]*chain, len(t.chains))
	for i := range t.chains {
		byName[t.chains[i].name] = &t.chains[i]
	}
	return dump(c, unix.NFT_MSG_GETRULE, t.family, func(b *nftables.Buffer) { b.String(unix.NFTA_RULE_TABLE, table) },
		func() {
			for _, ch := range byName {
				ch.rules = nil
			}
		},
		func(attrs []byte) {
			var r rule
			var of, in string
			nftables.Attrs(attrs, func(kind uint16, content []byte) {
				switch kind {
				case unix.NFTA_RULE_TABLE:
					of = nftables.Text(content)
				case unix.NFTA_RULE_CHAIN:
					in = nftables.Text(content)
				case unix.NFTA_RULE_EXPRESSIONS:
					r.exprs = readExprs(content)
				case unix.NFTA_RULE_USERDATA:
					r.comment = commentOf(content)
				}
			})
			if ch := byName[in]; ch != nil && of == table {
				ch.rules = append(ch.rules, r)
			}
		})
}

// objects builds the messages that make one layout of another. It is a transaction's begin: elements may follow.
type objects struct {
	*nftables.Batch
	table string
	id    uint32 // of anonymous sets
}

// change makes want of have, and says how many objects it makes or takes away. Chains of the kernel come last, so that a
// layout that is made in several transactions has no effect before the last one.
func (o *objects) change(have, want *layout) (count int) {
	oldSets, oldChains := map[string]*set{}, map[string]*chain{}
	for i := range have.sets {
		if s := &have.sets[i]; !s.absent {
			oldSets[s.name] = s
		}
	}
	for i := range have.chains {
		oldChains[have.chains[i].name] = &have.chains[i]
	}
	var torn bool // a set is another one than it should be: no rule may use it while it is replaced
	for i := range want.sets {
		s := &want.sets[i]
		old := oldSets[s.name]
		torn = torn || old != nil && !s.absent && !s.is(old)
	}
	var stale []*chain // whose rules have to go
	for i := range have.chains {
		c := &have.chains[i]
		if w := want.find(c.name); torn || w == nil || !w.is(c) {
			stale = append(stale, c)
		}
	}
	for _, c := range stale {
		if len(c.rules) > 0 {
			o.flush(want.layer, c.name)
			count++
		}
	}
	for _, c := range stale {
		if w := want.find(c.name); w == nil || !w.sameHook(c) {
			o.deleteChain(want.layer, c.name)
			delete(oldChains, c.name)
			count++
		}
	}
	count += o.changeSets(oldSets, want)
	for _, hooked := range []bool{false, true} {
		for i := range want.chains {
			if c := &want.chains[i]; oldChains[c.name] == nil && (c.base != nil) == hooked {
				o.addChain(want.layer, c)
				count++
			}
		}
		for i := range want.chains {
			c := &want.chains[i]
			if old := oldChains[c.name]; (c.base != nil) != hooked || old != nil && !torn && c.is(old) {
				continue
			}
			for j := range c.rules {
				o.addRule(want.layer, c.name, &c.rules[j])
				count++
			}
		}
	}
	return count
}

func (o *objects) changeSets(old map[string]*set, want *layout) (count int) {
	for i := range want.sets {
		s := &want.sets[i]
		if have := old[s.name]; have != nil && !s.absent && !s.is(have) {
			o.deleteSet(want.layer, s.name)
			count++
		}
	}
	for name := range old {
		if !slices.ContainsFunc(want.sets, func(s set) bool { return s.name == name && !s.absent }) {
			o.deleteSet(want.layer, name)
			count++
		}
	}
	for i := range want.sets {
		s := &want.sets[i]
		if have := old[s.name]; !s.absent && (have == nil || !s.is(have)) {
			o.addSet(want.layer, s)
			count++
		}
	}
	return count
}

func (l *layout) find(name string) *chain {
	for i := range l.chains {
		if l.chains[i].name == name {
			return &l.chains[i]
		}
	}
	return nil
}

// sameHook says whether the kernel comes to both at the same place, or to neither.
func (ch *chain) sameHook(got *chain) bool {
	if ch.base == nil || got.base == nil {
		return ch.base == nil && got.base == nil
	}
	return *ch.base == *got.base
}

// is says whether a chain that the kernel has is this one. Its comment does not count: it cannot be changed.
func (ch *chain) is(got *chain) bool {
	if !ch.sameHook(got) || len(ch.rules) != len(got.rules) {
		return false
	}
	for i := range ch.rules {
		if !ch.rules[i].is(&got.rules[i]) {
			return false
		}
	}
	return true
}

func (o *objects) begin(kind, flags uint16, f layer, what string) {
	o.Begin(kind, flags, f.family, fmt.Sprintf("table %s %s: %s", f, o.table, what))
}

func (o *objects) addTable(f layer) {
	o.begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, f, "table")
	o.String(unix.NFTA_TABLE_NAME, o.table)
	o.Bytes(nftaTableUserdata, userdataOf(tableComment))
	o.End()
}

func (o *objects) deleteTable(f layer) {
	o.begin(unix.NFT_MSG_DELTABLE, 0, f, "table")
	o.String(unix.NFTA_TABLE_NAME, o.table)
	o.End()
}

func (o *objects) addChain(f layer, c *chain) {
	o.begin(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, f, "chain "+c.name)
	o.String(unix.NFTA_CHAIN_TABLE, o.table)
	o.String(unix.NFTA_CHAIN_NAME, c.name)
	if c.base != nil {
		n := o.Open(unix.NFTA_CHAIN_HOOK)
		o.Uint32(unix.NFTA_HOOK_HOOKNUM, c.base.hook)
		o.Uint32(unix.NFTA_HOOK_PRIORITY, uint32(c.base.priority))
		o.Close(n)
		o.Uint32(unix.NFTA_CHAIN_POLICY, nfAccept)
		o.String(unix.NFTA_CHAIN_TYPE, c.base.kind)
	}
	if c.comment != "" {
		o.Bytes(nftaChainUserdata, userdataOf(c.comment))
	}
	o.End()
}

func (o *objects) deleteChain(f layer, name string) {
	o.begin(unix.NFT_MSG_DELCHAIN, 0, f, "chain "+name)
	o.String(unix.NFTA_CHAIN_TABLE, o.table)
	o.String(unix.NFTA_CHAIN_NAME, name)
	o.End()
}

// flush takes all rules out of a chain.
func (o *objects) flush(f layer, name string) {
	o.begin(unix.NFT_MSG_DELRULE, 0, f, "rules of chain "+name)
	o.String(unix.NFTA_RULE_TABLE, o.table)
	o.String(unix.NFTA_RULE_CHAIN, name)
	o.End()
}

func (o *objects) addSet(f layer, s *set) {
	o.begin(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, f, "set "+s.name)
	o.id++
	o.String(unix.NFTA_SET_TABLE, o.table)
	o.String(unix.NFTA_SET_NAME, s.name)
	o.Uint32(unix.NFTA_SET_FLAGS, s.flags)
	o.Uint32(unix.NFTA_SET_KEY_TYPE, s.keyType)
	o.Uint32(unix.NFTA_SET_KEY_LEN, s.keyLen)
	if s.flags&unix.NFT_SET_MAP != 0 {
		o.Uint32(unix.NFTA_SET_DATA_TYPE, s.valueType)
		o.Uint32(unix.NFTA_SET_DATA_LEN, s.valueLen)
	}
	if s.size != 0 || s.fields != nil {
		n := o.Open(unix.NFTA_SET_DESC)
		if s.size != 0 {
			o.Uint32(unix.NFTA_SET_DESC_SIZE, s.size)
		}
		if s.fields != nil {
			all := o.Open(nftaSetDescConcat)
			for _, size := range s.fields {
				one := o.Open(unix.NFTA_LIST_ELEM)
				o.Uint32(nftaSetFieldLen, size)
				o.Close(one)
			}
			o.Close(all)
		}
		o.Close(n)
	}
	if s.expr != "" {
		n := o.Open(nftaSetExpr)
		o.String(unix.NFTA_EXPR_NAME, s.expr)
		o.Close(o.Open(unix.NFTA_EXPR_DATA))
		o.Close(n)
	}
	o.Uint32(unix.NFTA_SET_ID, o.id)
	o.Bytes(unix.NFTA_SET_USERDATA, s.userdata)
	o.End()
}

func (o *objects) deleteSet(f layer, name string) {
	o.begin(unix.NFT_MSG_DELSET, 0, f, "set "+name)
	o.String(unix.NFTA_SET_TABLE, o.table)
	o.String(unix.NFTA_SET_NAME, name)
	o.End()
}

func (o *objects) addRule(f layer, chain string, r *rule) {
	for i := range r.exprs {
		if r.exprs[i].protocols {
			o.addProtocols(f)
		}
	}
	o.begin(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, f, "rule of chain "+chain+" ("+r.names()+")")
	o.String(unix.NFTA_RULE_TABLE, o.table)
	o.String(unix.NFTA_RULE_CHAIN, chain)
	list := o.Open(unix.NFTA_RULE_EXPRESSIONS)
	for i := range r.exprs {
		e := &r.exprs[i]
		n := o.Open(unix.NFTA_LIST_ELEM)
		o.String(unix.NFTA_EXPR_NAME, e.name)
		data := o.Open(unix.NFTA_EXPR_DATA)
		o.Raw(e.attrs)
		if e.protocols {
			o.Uint32(unix.NFTA_LOOKUP_SET_ID, o.id)
		}
		o.Close(data)
		o.Close(n)
	}
	o.Close(list)
	if r.comment != "" {
		o.Bytes(unix.NFTA_RULE_USERDATA, userdataOf(r.comment))
	}
	o.End()
}

// names are the expressions of a rule, for errors: old kernels lack some.
func (r *rule) names() string {
	var all []string
	for i := range r.exprs {
		if n := r.exprs[i].name; !slices.Contains(all, n) {
			all = append(all, n)
		}
	}
	return strings.Join(all, ", ")
}

// addProtocols makes the anonymous set of the rule that follows.
func (o *objects) addProtocols(f layer) {
	o.id++
	o.begin(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, f, "set of protocols")
	o.String(unix.NFTA_SET_TABLE, o.table)
	o.String(unix.NFTA_SET_NAME, anonymous)
	o.Uint32(unix.NFTA_SET_FLAGS, unix.NFT_SET_ANONYMOUS|unix.NFT_SET_CONSTANT)
	o.Uint32(unix.NFTA_SET_KEY_TYPE, typeProto)
	o.Uint32(unix.NFTA_SET_KEY_LEN, 1)
	o.Uint32(unix.NFTA_SET_ID, o.id)
	n := o.Open(unix.NFTA_SET_DESC)
	o.Uint32(unix.NFTA_SET_DESC_SIZE, 3)
	o.Close(n)
	o.Bytes(unix.NFTA_SET_USERDATA, binaryOrder)
	o.End()
	o.Glue()
	o.begin(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, f, "set of protocols")
	o.String(unix.NFTA_SET_ELEM_LIST_TABLE, o.table)
	o.String(unix.NFTA_SET_ELEM_LIST_SET, anonymous)
	o.Uint32(unix.NFTA_SET_ELEM_LIST_SET_ID, o.id)
	list := o.Open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	for _, p := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
		e := o.Open(unix.NFTA_LIST_ELEM)
		k := o.Open(unix.NFTA_SET_ELEM_KEY)
		o.Bytes(unix.NFTA_DATA_VALUE, []byte{p})
		o.Close(k)
		o.Close(e)
	}
	o.Close(list)
	o.End()
	o.Glue()
}

var binaryOrder = binary.NativeEndian.AppendUint32([]byte{udataKeyOrder, 4}, 0)

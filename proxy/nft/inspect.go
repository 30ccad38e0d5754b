package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Inspector compares what the kernel has with what it should have, and changes nothing. It may be used from any goroutine.
type Inspector struct {
	p    *Programmer
	mu   sync.Mutex
	conn *nftables.Conn
}

// Inspector looks at the tables of a Programmer.
func (p *Programmer) Inspector() *Inspector { return p.inspector }

func (i *Inspector) close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.conn.Close()
}

// view is what is wanted of a Scope, as of one moment.
type view struct {
	scope   program.Scope
	globals model.Globals
	params  [model.Families]params
	wanted  [model.Families][setCount]map[elemKey]elemValue
	// prefixes are how keys begin that are of the Scope, whoever's they are: addresses with protocol and port, node ports with
	// protocol, and groups of clients. They are not looked at for all there is.
	vips, groups, clusterIPs map[string]struct{}
	nodePorts                [model.Families]map[string]struct{}
	// families are those of the Scope.
	families [model.Families]bool
}

func (i *Inspector) view(scope program.Scope) *view {
	p := i.p
	p.look.Lock()
	services := make([]*model.Service, 0, len(scope.Services))
	if scope.All() {
		services = slices.AppendSeq(services, maps.Values(p.services))
	}
	for _, name := range scope.Services {
		if s := scope.Part(p.services[name]); s != nil {
			services = append(services, s)
		}
	}
	known := newGroups()
	known.number, known.taken = maps.Clone(p.groups.number), maps.Clone(p.groups.taken)
	hairpins := maps.Clone(p.hairpins)
	v := &view{scope: scope, globals: p.globals, params: p.params}
	p.look.Unlock()

	for _, m := range []*map[string]struct{}{&v.vips, &v.groups, &v.clusterIPs, &v.nodePorts[model.IPv4], &v.nodePorts[model.IPv6]} {
		*m = map[string]struct{}{}
	}
	e := elements{groups: known}
	if scope.All() {
		for h := range hairpins {
			e.hairpin(h)
		}
	}
	for _, s := range services {
		e.service(s)
		for j := range s.Ports {
			port := &s.Ports[j]
			if !scope.All() {
				v.hairpinsOf(&e, port, hairpins)
			}
			for k := range port.Frontends {
				v.at(&port.Frontends[k], port.Protocol)
			}
			for k := range port.Ranges {
				v.at(&port.Ranges[k], port.Protocol)
			}
		}
	}
	for name, n := range known.number {
		if !scope.All() && scope.Has(program.Port{Service: name.service, Name: name.port, Protocol: name.protocol}) {
			v.groups[string(native32(n))] = struct{}{}
		}
	}
	for _, at := range scope.At {
		f := model.Frontend{Addr: at.Addr}
		if at.Addr.Addr().IsUnspecified() {
			f.Kind = model.NodePort
		}
		v.at(&f, at.Protocol)
	}
	e.globals(&v.globals)
	for f := range v.wanted {
		for s := range v.wanted[f] {
			v.wanted[f][s] = make(map[elemKey]elemValue, len(e.all[f][s]))
		}
	}
	e.each(func(el *elem) { v.wanted[el.key.family][el.key.set][el.key] = el.value })
	return v
}

func (v *view) at(f *model.Frontend, p model.Protocol) {
	family := model.IPv4
	if f.Addr.Addr().Is6() {
		family = model.IPv6
	}
	v.families[family] = true
	to := string(toKey(f, p))
	if f.Kind == model.NodePort {
		v.nodePorts[family][to] = struct{}{}
	} else {
		v.vips[to] = struct{}{}
		v.clusterIPs[to[:layers[family].size]] = struct{}{}
	}
}

// hairpinsOf adds those of a port's endpoints.
func (v *view) hairpinsOf(e *elements, p *model.Port, all map[model.Hairpin]struct{}) {
	for _, list := range [...][]model.Endpoint{p.Cluster, p.Local} {
		for _, end := range list {
			for _, at := range []netip.AddrPort{end.AddrPort(), netip.AddrPortFrom(end.Addr, 0)} { // at all ports, too
				h := model.Hairpin{Protocol: p.Protocol, Endpoint: at}
				if _, ok := all[h]; ok && end.Local {
					e.hairpin(h)
				}
			}
		}
	}
}

// concerns says whether an element that the kernel has is of the Scope.
func (v *view) concerns(s *set, k *elemKey) bool {
	if v.scope.All() {
		return true
	}
	if _, ok := v.wanted[k.family][k.set][*k]; ok && v.families[k.family] {
		return true
	}
	var begin map[string]struct{}
	size := 0
	switch parts := partsOf(s.keyType); {
	case k.set.ofIntervals() && len(parts) == 1: // ranges of addresses are few, and go for all
		return v.families[k.family]
	case len(parts) == 1 && parts[0] == layers[k.family].typeAddr:
		begin, size = v.clusterIPs, layers[k.family].size
	case len(parts) >= 3 && parts[1] == typeProto:
		begin, size = v.vips, layers[k.family].size+8
	case len(parts) >= 2 && parts[0] == typeProto:
		begin, size = v.nodePorts[k.family], 8
	case parts[0] == typeClassID:
		begin, size = v.groups, 4
	}
	if size == 0 || size > int(k.size) {
		return false
	}
	_, ok := begin[string(k.content()[:size])]
	return ok
}

// findings are an Inspection in the making.
type findings struct{ program.Inspection }

// Inspect compares rules and elements. What is being programmed is waited for.
func (i *Inspector) Inspect(scope program.Scope) (*program.Inspection, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.p.working.Settled(func() (*program.Inspection, error) {
		found, v := &findings{}, i.view(scope)
		for f := range layers {
			if err := i.family(v, layers[f], found); err != nil {
				return nil, err
			}
		}
		return &found.Inspection, nil
	})
}

func (i *Inspector) family(v *view, f layer, to *findings) error {
	where := fmt.Sprintf("table %s %s", f, i.p.table)
	got, err := readTable(i.conn, f, i.p.table)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil // a kernel without the family
	}
	if err != nil {
		return err
	}
	enabled := v.globals.Family[f.model].Enabled
	switch {
	case !enabled && (!got.there || got.comment != tableComment):
		return nil
	case !enabled:
		to.add(where, program.Foreign, "", "a table of a family that is off")
		return nil
	case !got.there:
		to.add(where, program.Missing, "the table", "")
		return nil
	case got.comment != tableComment || got.owner != 0:
		to.add(where, program.Foreign, tableComment, got.comment)
		return nil
	}
	want := newLayout(f, &v.params[f.model])
	to.compareObjects(where, want, &got.layout)
	for s := range setID(affinity) {
		if want.sets[s].absent {
			continue
		}
		if err := i.elements(v, where, want, s, to); err != nil {
			return err
		}
	}
	return nil
}

func (n *findings) add(where, what, want, have string) {
	n.Differences = append(n.Differences, program.Difference{Where: where, What: what, Want: want, Have: have})
}

// compareObjects compares sets, chains and rules.
func (n *findings) compareObjects(where string, want, have *layout) {
	names := map[string]bool{}
	for i := range want.sets {
		s := &want.sets[i]
		if s.absent {
			continue
		}
		names[s.name] = true
		switch at := slices.IndexFunc(have.sets, func(o set) bool { return o.name == s.name }); {
		case at < 0:
			n.add(where+" set "+s.name, program.Missing, "the set", "")
		case !s.is(&have.sets[at]):
			n.add(where+" set "+s.name, program.Otherwise, "", "a set of another kind")
		}
	}
	for _, s := range have.sets {
		if !names[s.name] {
			n.add(where+" set "+s.name, program.Foreign, "", "the set")
		}
	}
	for i := range want.chains {
		c := &want.chains[i]
		switch got := have.find(c.name); {
		case got == nil:
			n.add(where+" chain "+c.name, program.Missing, "the chain", "")
		case !c.sameHook(got):
			n.add(where+" chain "+c.name, program.Otherwise, "", "at another hook or priority")
		default:
			n.compareRules(where+" chain "+c.name, c, got)
		}
	}
	for i := range have.chains {
		if c := &have.chains[i]; want.find(c.name) == nil {
			n.add(where+" chain "+c.name, program.Foreign, "", fmt.Sprintf("a chain of %d rules", len(c.rules)))
		}
	}
}

// compareRules tells the first rule that is another one, and how many there are.
func (n *findings) compareRules(where string, want, have *chain) {
	describe := func(c *chain, i int) string {
		if i >= len(c.rules) {
			return fmt.Sprintf("%d rules", len(c.rules))
		}
		s := fmt.Sprintf("%d rules, the %d. of %s", len(c.rules), i+1, c.rules[i].names())
		if c.rules[i].comment != "" {
			s += fmt.Sprintf(" comment %q", c.rules[i].comment)
		}
		return s
	}
	for i := range max(len(want.rules), len(have.rules)) {
		if i >= len(want.rules) || i >= len(have.rules) || !want.rules[i].is(&have.rules[i]) {
			n.add(where, "other rules", describe(want, i), describe(have, i))
			return
		}
	}
}

// elements compares those of a set.
func (i *Inspector) elements(v *view, where string, l *layout, s setID, to *findings) error {
	set := &l.sets[s]
	where += " set " + set.name
	wanted := v.wanted[l.model][s]
	if !v.scope.All() && !v.families[l.model] {
		return nil
	}
	have := map[elemKey]elemValue{}
	counted := map[elemKey]program.Count{}
	err := dump(i.conn, unix.NFT_MSG_GETSETELEM, l.family, ofSet(i.p.table, set.name), func() { clear(have) }, func(attrs []byte) {
		eachElement(attrs, func(one []byte) {
			if e := readElement(l.layer, s, one); v.concerns(set, &e.key) && (!s.ofIntervals() || !e.key.isNothing()) {
				have[e.key] = e.value
				if set.expr != "" {
					counted[e.key] = countOf(one)
				}
			}
		})
	})
	if err != nil && !errors.Is(err, unix.ENOENT) { // a set that is missing has been told of
		return fmt.Errorf("read table %s %s: elements of %s: %w", l.layer, i.p.table, set.name, err)
	}
	to.Elements += len(have)
	for _, k := range sortedKeys(wanted) {
		is, ok := have[k]
		switch want := wanted[k]; {
		case !ok:
			to.add(where, program.Missing, set.show(l.layer, k, want), "")
		case is != want:
			to.add(where, program.Otherwise, set.show(l.layer, k, want), set.show(l.layer, k, is))
		}
	}
	for _, k := range sortedKeys(have) {
		if _, ok := wanted[k]; !ok {
			to.add(where, program.Foreign, "", set.show(l.layer, k, have[k]))
		}
		if ranges := s.ofIntervals() && s != sources; !v.scope.All() && !ranges { // ranges go for all Services
			line := fmt.Sprintf("%s %s: %s", l.layer, set.name, set.show(l.layer, k, have[k]))
			if n, ok := counted[k]; ok {
				line += fmt.Sprintf(" counter packets %d bytes %d", n.Packets, n.Bytes)
			}
			to.Have = append(to.Have, line)
		}
	}
	return nil
}

func sortedKeys(all map[elemKey]elemValue) []elemKey {
	return slices.SortedFunc(maps.Keys(all), func(a, b elemKey) int { return bytes.Compare(a.content(), b.content()) })
}

// partsOf are the types of a key's parts.
func partsOf(packed uint32) (parts []uint32) {
	for ; packed != 0; packed >>= 6 {
		parts = append([]uint32{packed & 63}, parts...)
	}
	return parts
}

// show writes an element as nft does.
func (s *set) show(f layer, k elemKey, v elemValue) string {
	b := k.content()
	text := showParts(f, partsOf(s.keyType), &b)
	switch {
	case len(b) == f.size && s.flags&setConcat != 0: // the last address of the last part
		if last, _ := netip.AddrFromSlice(b); !strings.HasSuffix(text, " "+last.String()) {
			text += "-" + last.String()
		}
	case len(b) == 1 && b[0] != 0:
		text += " (behind an interval)"
	}
	if v.size > 0 {
		b := v.content()
		text += " : " + showParts(f, partsOf(s.valueType), &b)
	}
	if v.comment != "" {
		text += fmt.Sprintf(" comment %q", v.comment)
	}
	return text
}

func showParts(f layer, parts []uint32, b *[]byte) string {
	var out []string
	take := func(n int) []byte {
		n = min(n, len(*b))
		v := (*b)[:n]
		*b = (*b)[n:]
		return v
	}
	for _, kind := range parts {
		switch kind {
		case f.typeAddr:
			a, _ := netip.AddrFromSlice(take(f.size))
			out = append(out, a.String())
		case typeProto:
			if v := take(4); len(v) > 0 {
				out = append(out, model.Protocol(v[0]).String())
			}
		case typeService:
			if v := take(4); len(v) >= 2 {
				port := strconv.Itoa(int(binary.BigEndian.Uint16(v)))
				if len(v) == 4 && v[2]|v[3] != 0 { // a range
					port += "-" + strconv.Itoa(int(binary.BigEndian.Uint16(v[2:])))
				}
				out = append(out, port)
			}
		default:
			if v := take(4); len(v) == 4 {
				out = append(out, strconv.FormatUint(uint64(nativeOf(v)), 10))
			}
		}
	}
	return strings.Join(out, " . ")
}

// Client is which endpoint a client of a Service's port with session affinity is sent to again, and for how long still; ok is
// false if none is remembered.
func (i *Inspector) Client(from netip.Addr, service types.NamespacedName, p *model.Port, policy model.Policy) (to netip.AddrPort, left time.Duration, ok bool, err error) {
	i.p.look.Lock()
	group, known := i.p.groups.number[groupOf{service, p.Name, p.Family, p.Protocol, policy}]
	i.p.look.Unlock()
	f := layers[p.Family]
	if !known || from.Is4() != (f.size == 4) {
		return to, 0, false, nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	k := elemKey{family: p.Family, set: affinity}
	k.size = uint8(copy(k.bytes[:], append(from.AsSlice(), native32(group)...)))
	err = getElement(i.conn, i.p.table, "affinity", &k, func(one []byte) {
		e := readElement(f, affinity, one)
		to, ok = endpointOf(&e.value, f), true
		nftables.Attrs(one, func(kind uint16, content []byte) {
			if kind == unix.NFTA_SET_ELEM_EXPIRATION {
				left = time.Duration(nftables.Uint64(content)) * time.Millisecond
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	return to, left, ok, err
}

// getElement asks for one element.
func getElement(c *nftables.Conn, table, name string, k *elemKey, each func(one []byte)) error {
	return c.Get(unix.NFT_MSG_GETSETELEM, 0, layers[k.family].family, func(b *nftables.Buffer) {
		ofSet(table, name)(b)
		list := b.Open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		elem := b.Open(unix.NFTA_LIST_ELEM)
		value := func(kind uint16, v []byte) {
			at := b.Open(kind)
			b.Bytes(unix.NFTA_DATA_VALUE, v)
			b.Close(at)
		}
		if k.set.hasEnd() {
			first, last := ends(k.content(), k.set, layers[k.family])
			value(unix.NFTA_SET_ELEM_KEY, first)
			value(nftaSetElemKeyEnd, last)
		} else {
			value(unix.NFTA_SET_ELEM_KEY, k.content())
		}
		b.Close(elem)
		b.Close(list)
	}, func(_ byte, attrs []byte) { eachElement(attrs, each) })
}

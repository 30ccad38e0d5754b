package nft

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
)

// op is a change of an element: it is taken away, put in, or both, which gives it another value.
type op struct {
	key      elemKey
	del, put bool
	value    elemValue
}

// plan is a list of changes for each set.
type plan [model.Families][setCount][]op

func (p *plan) add(o op) { p[o.key.family][o.key.set] = append(p[o.key.family][o.key.set], o) }

func (p *plan) len() (n int) {
	for f := range p {
		for s := range p[f] {
			n += len(p[f][s])
		}
	}
	return n
}

// replace plans what makes next of old in a set of intervals. If they differ, all are new: the kernel takes where an interval
// begins and where it ends for one, and wants them one after the other.
func (p *plan) replace(old map[elemKey]elemValue, next []elem) {
	count := 0
	for k := range old {
		if !k.isNothing() {
			count++
		}
	}
	same := count == len(next)
	for i := range next {
		_, ok := old[next[i].key]
		same = same && ok
	}
	if same {
		return
	}
	for _, k := range slices.SortedFunc(maps.Keys(old), func(a, b elemKey) int { return bytes.Compare(a.content(), b.content()) }) {
		p.add(op{key: k, del: true})
	}
	for i := range next {
		p.add(op{key: next[i].key, put: true, value: next[i].value})
	}
}

// isNothing says whether an element is the end of an interval before the first address, which nft puts into such sets.
func (k *elemKey) isNothing() bool {
	c := k.content()
	return len(c) > 0 && c[len(c)-1] == 1 && len(bytes.Trim(c[:len(c)-1], "\x00")) == 0
}

// compare plans for an element, which it takes out of old if it is there.
func (p *plan) compare(old map[elemKey]elemValue, e *elem) {
	was, ok := old[e.key]
	if ok {
		delete(old, e.key)
	}
	if !ok || was != e.value {
		p.add(op{e.key, ok, true, e.value})
	}
}

// diff plans what makes next of old, which is empty then.
func (p *plan) diff(old map[elemKey]elemValue, next []elem) {
	for i := range next {
		p.compare(old, &next[i])
	}
	p.remove(old)
}

// diffAll is diff for all sets.
func (p *plan) diffAll(old map[elemKey]elemValue, next *elements) {
	next.each(func(e *elem) { p.compare(old, e) })
	p.remove(old)
}

func (p *plan) remove(old map[elemKey]elemValue) {
	for k := range old {
		p.add(op{key: k, del: true})
	}
}

const (
	// messageElements and messageBytes are where a message ends: the length of an attribute has 16 bits.
	messageElements = 512
	messageBytes    = 32 << 10
	// loadBytes is the size from which on a transaction of a load ends. Larger ones are no faster, and other programs wait for
	// each (kubernetes#139328). What is added at once is smaller than stepBytes.
	loadBytes = 160 << 10
	stepBytes = 100 << 10
)

// writer puts elements into a batch.
type writer struct {
	batch *nftables.Batch
	table string
	sets  [setCount]string
}

func newWriter(b *nftables.Batch, table string) *writer {
	w := &writer{batch: b, table: table}
	for i, s := range newLayout(layers[model.IPv4], &params{}).sets {
		w.sets[i] = s.name
	}
	return w
}

// write puts deletions or additions of a list into the batch.
func (w *writer) write(list []op, del bool) {
	kind, flags := uint16(unix.NFT_MSG_NEWSETELEM), uint16(unix.NLM_F_CREATE)
	if del {
		kind, flags = unix.NFT_MSG_DELSETELEM, 0
	}
	var open, elems nftables.Nest
	count, start := 0, 0
	for i := range list {
		o := &list[i]
		if del && !o.del || !del && !o.put {
			continue
		}
		if count == 0 {
			f := layers[o.key.family]
			name := w.sets[o.key.set]
			w.batch.Begin(kind, flags, f.family, fmt.Sprintf("table %s %s: elements of %s", f, w.table, name))
			w.batch.String(unix.NFTA_SET_ELEM_LIST_TABLE, w.table)
			w.batch.String(unix.NFTA_SET_ELEM_LIST_SET, name)
			start = w.batch.Len()
			elems = w.batch.Open(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		}
		open = w.batch.Open(unix.NFTA_LIST_ELEM)
		w.element(o, del)
		w.batch.Close(open)
		if count++; count == messageElements || w.batch.Len()-start > messageBytes {
			w.batch.Close(elems)
			w.batch.End()
			count = 0
		}
	}
	if count > 0 {
		w.batch.Close(elems)
		w.batch.End()
	}
}

func (w *writer) element(o *op, del bool) {
	k := o.key.content()
	switch s := o.key.set; {
	case s.hasEnd():
		first, last := ends(k, s, layers[o.key.family])
		w.value(unix.NFTA_SET_ELEM_KEY, first)
		w.value(nftaSetElemKeyEnd, last)
	case s == serviceCIDRs || s == nodeportAddresses:
		w.value(unix.NFTA_SET_ELEM_KEY, k[:len(k)-1])
		if k[len(k)-1] != 0 {
			w.batch.Uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
		}
	default:
		w.value(unix.NFTA_SET_ELEM_KEY, k)
	}
	if del {
		return
	}
	if o.value.size > 0 {
		w.value(unix.NFTA_SET_ELEM_DATA, o.value.content())
	}
	if o.value.comment != "" {
		w.batch.Bytes(unix.NFTA_SET_ELEM_USERDATA, userdataOf(o.value.comment))
	}
}

const nftaSetElemKeyEnd = 10 // NFTA_SET_ELEM_KEY_END

// ends are the first and the last key of an element, as the kernel wants them.
func ends(k []byte, s setID, f layer) (first, last []byte) {
	first, last = bytes.Clone(k), bytes.Clone(k)
	if s.hasSources() {
		at := len(k) - f.size
		first = first[:at]
		last = append(last[:at-f.size], k[at:]...)
	}
	if at := lastPortAt(f); s.hasPorts() {
		copy(last[at-2:], k[at:at+2])
		clear(first[at : at+2])
		clear(last[at : at+2])
	}
	return first, last
}

// joined is the opposite of ends.
func joined(b []byte, first, last []byte, s setID, f layer) int {
	if len(last) == 0 { // an address or port alone
		last = first
	}
	n := copy(b, first)
	if s.hasSources() {
		n += copy(b[n:], last[max(0, len(last)-f.size):])
	}
	if at := lastPortAt(f); s.hasPorts() && len(last) > at {
		copy(b[at:], last[at-2:at])
	}
	return n
}

func (w *writer) value(kind uint16, content []byte) {
	n := w.batch.Open(kind)
	w.batch.Bytes(unix.NFTA_DATA_VALUE, content)
	w.batch.Close(n)
}

// whole puts all of a plan into the batch, as part of one transaction.
func (w *writer) whole(p *plan) {
	for f := range p {
		for s := range p[f] {
			w.write(p[f][s], true)
			w.write(p[f][s], false)
		}
	}
}

// ofIntervals says whether elements of a set exclude others that are not the same.
func (s setID) ofIntervals() bool {
	return s.hasEnd() || s == serviceCIDRs || s == nodeportAddresses
}

// parts commits a plan in several transactions, in an order in which no Service is half there: first what frontends lead to,
// then frontends, and what is taken away last, in the opposite order. A change of an element is in one transaction.
func (w *writer) parts(p *plan, limit int, commit func() error) error {
	flush := func() error {
		if w.batch.Size() < min(loadBytes, limit-stepBytes) {
			return nil
		}
		return commit()
	}
	const few = 256
	for s := range setID(setCount) {
		for f := range p {
			list := p[f][s]
			if s.ofIntervals() {
				w.write(list, true)
				w.write(list, false)
				if err := flush(); err != nil {
					return err
				}
				continue
			}
			for some := range slices.Chunk(list, few) {
				changes := make([]op, 0, len(some))
				for _, o := range some {
					if o.put {
						changes = append(changes, o)
					}
				}
				w.write(changes, true)
				w.write(changes, false)
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	for s := int(setCount) - 1; s >= 0; s-- {
		if setID(s).ofIntervals() {
			continue
		}
		for f := range p {
			var gone []op
			for _, o := range p[f][s] {
				if !o.put {
					gone = append(gone, o)
				}
			}
			for some := range slices.Chunk(gone, few) {
				w.write(some, true)
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return commit()
}

// readElements reads the elements of a set.
func readElements(c *nftables.Conn, f layer, table string, s setID, name string, size int) (map[elemKey]elemValue, error) {
	var all map[elemKey]elemValue
	err := dump(c, unix.NFT_MSG_GETSETELEM, f.family, ofSet(table, name), func() { all = make(map[elemKey]elemValue, size) }, func(attrs []byte) {
		eachElement(attrs, func(one []byte) {
			e := readElement(f, s, one)
			all[e.key] = e.value
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read table %s %s: elements of %s: %w", f, table, name, err)
	}
	return all, nil
}

// ofSet asks for elements of a set.
func ofSet(table, name string) func(*nftables.Buffer) {
	return func(b *nftables.Buffer) {
		b.String(unix.NFTA_SET_ELEM_LIST_TABLE, table)
		b.String(unix.NFTA_SET_ELEM_LIST_SET, name)
	}
}

// eachElement calls f for each element of an answer.
func eachElement(attrs []byte, f func(one []byte)) {
	nftables.Attrs(attrs, func(kind uint16, list []byte) {
		if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			nftables.Attrs(list, func(_ uint16, one []byte) { f(one) })
		}
	})
}

func readElement(f layer, s setID, one []byte) elem {
	e := elem{key: elemKey{family: f.model, set: s}}
	var start, end []byte
	var flags byte
	nftables.Attrs(one, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_SET_ELEM_KEY:
			start = valueOf(content)
		case nftaSetElemKeyEnd:
			end = valueOf(content)
		case unix.NFTA_SET_ELEM_DATA:
			e.value.size = uint8(copy(e.value.bytes[:], valueOf(content)))
		case unix.NFTA_SET_ELEM_FLAGS:
			flags = byte(nftables.Uint32(content)) & unix.NFT_SET_ELEM_INTERVAL_END
		case unix.NFTA_SET_ELEM_USERDATA:
			e.value.comment = commentOf(content)
		}
	})
	n := joined(e.key.bytes[:], start, end, s, f)
	if s == serviceCIDRs || s == nodeportAddresses {
		n += copy(e.key.bytes[n:], []byte{flags})
	}
	e.key.size = uint8(n)
	return e
}

func valueOf(data []byte) (v []byte) {
	nftables.Attrs(data, func(kind uint16, content []byte) {
		if kind == unix.NFTA_DATA_VALUE {
			v = content
		}
	})
	return v
}

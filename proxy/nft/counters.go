package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Counters are what the kernel has counted in elements of sets, which no change touches. They may be read from any goroutine.
// An element that goes while its Service stays (there are endpoints again) leaves its count behind, so that the sum of a port
// does not go back as long as the proxy runs; what was left behind is lost with the process, what is in the kernel is not.
type Counters struct {
	conn  *nftables.Conn
	table string
	sets  [setCount]string
	// wanted are the Services of now, and what goes for all.
	wanted func() ([]*model.Service, model.Globals)

	reading sync.Mutex
	at      time.Time
	sum     map[program.Counted]program.Count

	// kept is locked while elements go: who reads meanwhile would count them twice, and reads again.
	kept  sync.Mutex
	epoch uint64
	base  map[program.Counted]program.Count // of elements that have gone
	last  map[elemKey]counting              // as of the last time they were read
}

// counting is an element's count, and what it counts for.
type counting struct {
	of program.Counted
	program.Count
}

const (
	// readAtMost is how often the kernel is read: all that ask within that time get the same answer.
	readAtMost = 2 * time.Second
	// readTries is how often it is tried while elements go.
	readTries = 8
	// keepAtMost is how many elements of a change are looked at before they go; for more the last time counts.
	keepAtMost = 64
)

// countedSets are the sets with counters.
var countedSets = []setID{
	frontends, nodeports, portRanges, reject, nodeportReject, rangeReject, drop, nodeportDrop, rangeDrop, restricted, rangeRestricted, serviceCIDRs,
}

func newCounters(p *Programmer) (*Counters, error) {
	conn, err := nftables.Open()
	if err != nil {
		return nil, explain(err)
	}
	return &Counters{
		conn: conn, table: p.table, sets: p.writer.sets, base: map[program.Counted]program.Count{},
		wanted: func() ([]*model.Service, model.Globals) {
			p.look.Lock()
			defer p.look.Unlock()
			all := make([]*model.Service, 0, len(p.services))
			for _, s := range p.services {
				all = append(all, s)
			}
			return all, p.globals
		},
	}, nil
}

// Counters are nil without Options.Counters.
func (p *Programmer) Counters() *Counters { return p.counters }

func (c *Counters) close() error {
	c.reading.Lock()
	defer c.reading.Unlock()
	return c.conn.Close()
}

// countedOf calls for each element that counts something of a Service.
func countedOf(s *model.Service, each func(elemKey, program.Counted)) {
	for i := range s.Ports {
		p := &s.Ports[i]
		for _, list := range [][]model.Frontend{p.Frontends, p.Ranges} {
			for j := range list {
				countedAtFrontend(s, p, &list[j], each)
			}
		}
	}
}

func countedAtFrontend(s *model.Service, p *model.Port, f *model.Frontend, each func(elemKey, program.Counted)) {
	in, to := setsFor(f), toKey(f, p.Protocol)
	tell := func(set setID, cause program.Cause) {
		k := elemKey{family: p.Family, set: set}
		k.size = uint8(copy(k.bytes[:], to))
		each(k, program.Counted{Service: s.Name, Port: p.Name, Family: p.Family, Protocol: p.Protocol, Cause: cause})
	}
	tell(in.frontends, program.Connections)
	switch f.Action {
	case model.Reject:
		tell(in.reject, program.NoEndpoints)
	case model.Drop:
		tell(in.drop, program.NoLocal)
	}
	if f.Restricted && f.Kind != model.NodePort {
		tell(in.restricted, program.SourceRanges)
	}
}

// Read is what was counted up to some seconds ago. It is not to be changed. Of a Service's port Connections are always there,
// the rest if there was something. While elements go without end, and after an error of the kernel, it is what it was.
func (c *Counters) Read() (map[program.Counted]program.Count, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	if c.sum != nil && time.Since(c.at) < readAtMost {
		return c.sum, nil
	}
	for range readTries {
		switch whole, err := c.read(); {
		case err != nil:
			return c.sum, fmt.Errorf("read counters: %w", err)
		case whole:
			c.at = time.Now()
			return c.sum, nil
		}
	}
	return c.sum, nil
}

// read reads all. It is not whole if elements have gone meanwhile.
func (c *Counters) read() (whole bool, err error) {
	c.kept.Lock()
	epoch := c.epoch
	c.kept.Unlock()
	services, globals := c.wanted()
	owners := make(map[elemKey]program.Counted, len(services))
	for _, s := range services {
		countedOf(s, func(k elemKey, of program.Counted) { owners[k] = of })
	}
	cidrs := elements{}
	cidrs.globals(&globals)
	now := make(map[elemKey]program.Count, len(owners))
	for f := range model.Family(model.Families) {
		if !globals.Family[f].Enabled {
			continue
		}
		for _, e := range cidrs.all[f][serviceCIDRs] {
			owners[e.key] = program.Counted{Family: f, Cause: program.Unallocated}
		}
		for _, s := range countedSets {
			if err := c.dump(layers[f], s, now); err != nil {
				return false, err
			}
		}
	}
	c.kept.Lock()
	defer c.kept.Unlock()
	if c.epoch != epoch {
		return false, nil
	}
	c.add(owners, now)
	return true, nil
}

// dump reads the counts of a set. A set that is not there has none. A dump that is broken by a change may lack elements, which
// add takes for what they were.
func (c *Counters) dump(f layer, s setID, into map[elemKey]program.Count) error {
	err := c.conn.Get(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, f.family, ofSet(c.table, c.sets[s]), func(family byte, attrs []byte) {
		if family == f.family {
			eachElement(attrs, func(one []byte) { into[readElement(f, s, one).key] = countOf(one) })
		}
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, nftables.ErrInterrupted) {
		return nil
	}
	return err
}

// countOf is what an element's counter says.
func countOf(one []byte) (c program.Count) {
	nftables.Attrs(one, func(kind uint16, expr []byte) {
		if kind != unix.NFTA_SET_ELEM_EXPR || exprName(expr) != counterExpr {
			return
		}
		nftables.Attrs(expr, func(kind uint16, data []byte) {
			if kind != unix.NFTA_EXPR_DATA {
				return
			}
			nftables.Attrs(data, func(kind uint16, v []byte) {
				switch {
				case len(v) < 8:
				case kind == unix.NFTA_COUNTER_PACKETS:
					c.Packets = binary.BigEndian.Uint64(v)
				case kind == unix.NFTA_COUNTER_BYTES:
					c.Bytes = binary.BigEndian.Uint64(v)
				}
			})
		})
	})
	return c
}

// add makes the sums of what was read.
func (c *Counters) add(owners map[elemKey]program.Counted, now map[elemKey]program.Count) {
	sum, last := make(map[program.Counted]program.Count, len(owners)), make(map[elemKey]counting, len(owners))
	for k, of := range owners {
		alive := of
		alive.Cause = program.Connections
		if of.Cause != program.Unallocated {
			if _, ok := sum[alive]; !ok {
				sum[alive] = program.Count{} // also without an element: ports that are there keep what was left behind
			}
		}
		was, had := c.last[k]
		if had && was.of != of { // another Service has the address
			c.base[was.of], had = c.base[was.of].Plus(was.Count), false
		}
		is, ok := now[k]
		switch {
		case !ok && !had:
			continue
		case !ok: // somebody has taken it away, and it will be put in again
			is = was.Count
		case had && is.Packets < was.Packets: // it was put in again
			c.base[of] = c.base[of].Plus(was.Count)
		}
		last[k] = counting{of, is}
	}
	for k, was := range c.last {
		if _, ok := owners[k]; !ok {
			c.base[was.of] = c.base[was.of].Plus(was.Count)
		}
	}
	tell := func(of program.Counted, n program.Count) {
		if n.Packets > 0 {
			sum[of] = sum[of].Plus(n)
		}
	}
	for _, l := range last {
		tell(l.of, l.Count)
	}
	for of, n := range c.base {
		alive := of
		alive.Cause = program.Connections
		if _, ok := sum[alive]; !ok && of.Cause != program.Unallocated {
			delete(c.base, of)
			continue
		}
		tell(of, n)
	}
	c.sum, c.last = sum, last
}

// going is an element that a change takes away; it is lost if its Service goes.
type going struct {
	counting
	key  elemKey
	lost bool
}

// begin says which elements a change takes away. If there are some nobody reads until end: what the kernel has would not be what
// is wanted.
func (c *Counters) begin(d *model.Delta) (gone []going) {
	if c == nil {
		return nil
	}
	stay := map[elemKey]program.Counted{}
	for i := range d.Services {
		if s := d.Services[i].New; s != nil && d.Services[i].Old != nil {
			countedOf(s, func(k elemKey, of program.Counted) { stay[k] = of })
		}
	}
	for i := range d.Services {
		if s := d.Services[i].Old; s != nil {
			countedOf(s, func(k elemKey, of program.Counted) {
				if now, ok := stay[k]; !ok || now != of {
					gone = append(gone, going{counting{of: of}, k, d.Services[i].New == nil})
				}
			})
		}
	}
	if len(gone) > 0 {
		c.kept.Lock()
		c.epoch++
	}
	return gone
}

func (c *Counters) end(gone []going) {
	if len(gone) > 0 {
		c.kept.Unlock()
	}
}

// look reads what elements have counted that are about to go. The connection is that of who commits.
func (c *Counters) look(conn *nftables.Conn, gone []going) {
	if len(gone) > keepAtMost {
		return
	}
	for i := range gone {
		gone[i].Count = c.one(conn, gone[i].key)
	}
}

// keep adds what elements had counted that have gone.
func (c *Counters) keep(gone []going) {
	for _, g := range gone {
		was, ok := c.last[g.key]
		delete(c.last, g.key)
		switch {
		case g.lost: // and all that the Service has left behind
			for g.of.Cause = range program.Causes {
				delete(c.base, g.of)
			}
		case ok && was.of == g.of && g.Packets < was.Packets:
			c.base[g.of] = c.base[g.of].Plus(was.Count)
		case g.Packets > 0:
			c.base[g.of] = c.base[g.of].Plus(g.Count)
		}
	}
}

// one reads the count of an element; none if it is not there.
func (c *Counters) one(conn *nftables.Conn, k elemKey) (n program.Count) {
	_ = getElement(conn, c.table, c.sets[k.set], &k, func(one []byte) { n = countOf(one) })
	return n
}

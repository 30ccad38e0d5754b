package model

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unique"
)

// PortRangesAnnotation is on Services: further ports of theirs, as NAME=FIRST-LAST, several separated by commas. NAME is that of
// one of the Service's ports, whose protocol and endpoints the range has (without NAME= the one without a name); /PROTOCOL may
// follow, where two ports have the name. All addresses of the Service answer there, node ports do not; a packet keeps its port.
const PortRangesAnnotation = "berth.run/port-ranges"

// A Service has so many ranges for all its addresses together: each is compared with all ports that others have there.
const maxRanges = 16

// portRange is a range of a Service's port.
type portRange struct {
	name        unique.Handle[string]
	protocol    Protocol
	first, last uint16
}

func (r portRange) overlaps(o portRange) bool {
	return r.protocol == o.protocol && r.first <= o.last && o.first <= r.last
}

// readRanges reads the ranges of a Service of some ports; with a mistake there are none.
func readRanges(text string, ports []portSpec) ([]portRange, error) {
	var all []portRange
	for part := range strings.SplitSeq(text, ",") {
		r, err := readRange(strings.TrimSpace(part), ports)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(all, r.overlaps) {
			return nil, fmt.Errorf("%q overlaps with another one", part)
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b portRange) int { return int(a.first) - int(b.first) })
	return all, nil
}

func readRange(text string, ports []portSpec) (r portRange, err error) {
	name, numbers, named := strings.Cut(text, "=")
	if !named {
		name, numbers = "", text
	}
	numbers, protocol, given := strings.Cut(numbers, "/")
	first, last, ok := strings.Cut(numbers, "-")
	if r.first, err = readPort(first); err == nil {
		r.last, err = readPort(last)
	}
	if !ok || err != nil || r.first > r.last {
		return r, fmt.Errorf("%q is no range FIRST-LAST of ports from 1 to 65535", numbers)
	}
	name = strings.TrimSpace(name)
	found := 0
	for _, p := range ports {
		if p.name.Value() == name && (!given || strings.EqualFold(p.protocol.String(), strings.TrimSpace(protocol))) {
			r.name, r.protocol = p.name, p.protocol
			found++
		}
	}
	switch found {
	case 0:
		return r, fmt.Errorf("%q is for none of the Service's ports", text)
	case 1:
		return r, nil
	}
	return r, fmt.Errorf("%q is for several of the Service's ports: say /TCP, /UDP or /SCTP", text)
}

func readPort(text string) (uint16, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	if err == nil && n == 0 {
		err = errors.New("is 0")
	}
	return uint16(n), err
}

// rangesOf are those of a port: each does what the address does that it is at. At the node's own addresses a range would take the
// ports of the node's programs: it is refused there.
func (spec *serviceSpec) rangesOf(p *Port, c *circumstances) (ranges, refused []Frontend) {
	if c.noRanges {
		return nil, nil
	}
	for _, r := range spec.ranges {
		if r.protocol != p.Protocol || r.name.Value() != p.Name {
			continue
		}
		for _, f := range p.Frontends {
			if f.Kind == NodePort {
				continue
			}
			f.Addr, f.Last = netip.AddrPortFrom(f.Addr.Addr(), r.first), r.last
			if c.isNodes(f.Addr.Addr()) {
				refused = append(refused, f)
			} else {
				ranges = append(ranges, f)
			}
		}
	}
	return ranges, refused
}

// isNodes is whether the node has the address, as far as is known.
func (c *circumstances) isNodes(a netip.Addr) bool {
	return slices.Contains(c.nodeIP[:], a) || strings.Contains(c.nodeIPs, " "+a.String()+" ")
}

// rangesText is what the annotation says, in the order of the ports.
func rangesText(all []portRange) string {
	out := make([]string, len(all))
	for i, r := range all {
		out[i] = strings.TrimPrefix(fmt.Sprintf("%s=%d-%d/%s", r.name.Value(), r.first, r.last, strings.ToUpper(r.protocol.String())), "=")
	}
	return strings.Join(out, ",")
}

// unserved is why ranges that were asked for are not there, but for those that others hold.
func (m *Model) unserved(e *entry) []Problem {
	if e.spec == nil || e.raw == nil || len(e.spec.ranges) == 0 {
		return nil
	}
	p := problems{kind: "Service", object: e.name}
	if m.circumstances.noRanges {
		p.add(annotation(PortRangesAnnotation), rangesText(e.spec.ranges), "the rules of this node have no ranges; they are not served")
	}
	for i := range e.raw.Ports {
		port := &e.raw.Ports[i]
		_, refused := e.spec.rangesOf(port, &m.circumstances)
		for _, f := range refused {
			p.add(annotation(PortRangesAnnotation), f.Ports(), "is at an address of the node, which has ports of its own; it is not served there")
		}
	}
	return p.list
}

// Ports are the address and port, or ports, that a Frontend answers at.
func (f *Frontend) Ports() string {
	s := f.Addr.String()
	if f.Last != 0 {
		s += "-" + strconv.Itoa(int(f.Last))
	}
	return s
}

// covers is whether a range has the port.
func (f *Frontend) covers(port uint16) bool { return f.Addr.Port() <= port && port <= f.Last }

// span is all ports of an address and protocol, where there may be ranges.
type span struct {
	addr     netip.Addr
	protocol Protocol
}

// isRange is whether a claim is one for a range: those have the indexes of Ranges, from firstRange downwards.
func (c claim) isRange() bool { return c.frontend <= firstRange }

const firstRange = -2

// of is the claim's Frontend; nil for a cluster IP as a whole.
func (c claim) of() *Frontend {
	p := &c.entry.raw.Ports
	switch {
	case c.isRange():
		return &(*p)[c.port].Ranges[firstRange-c.frontend]
	case c.frontend < 0:
		return nil
	}
	return &(*p)[c.port].Frontends[c.frontend]
}

// eachRange calls for each range that an entry claims.
func (e *entry) eachRange(do func(span, claim)) {
	if e.raw == nil {
		return
	}
	for i := range e.raw.Ports {
		p := &e.raw.Ports[i]
		for j := range p.Ranges {
			do(span{p.Ranges[j].Addr.Addr(), p.Protocol}, claim{e, int32(i), int32(firstRange - j)})
		}
	}
}

// inRange calls for each claim of another entry to a port of a range.
func (cs *claims) inRange(at span, r claim, do func(claim)) {
	f := r.of()
	for port := int(f.Addr.Port()); port <= int(f.Last); port++ {
		where := place{at.addr, uint16(port), at.protocol}
		holder, ok := cs.held[where]
		if !ok {
			continue
		}
		if list, ok := cs.contested[where]; ok {
			for _, c := range list {
				if c.entry != r.entry {
					do(c)
				}
			}
		} else if holder.entry != r.entry {
			do(holder)
		}
	}
}

// over calls for each range of another entry that a claim to one port is in.
func (cs *claims) over(at place, c claim, do func(claim)) {
	for _, r := range cs.ranges[span{at.addr, at.protocol}] {
		if r.entry != c.entry && r.of().covers(at.port) {
			do(r)
		}
	}
}

// beside calls for each range of another entry that overlaps with one.
func (cs *claims) beside(at span, r claim, do func(claim)) {
	f := r.of()
	for _, o := range cs.ranges[at] {
		if g := o.of(); o.entry != r.entry && g.Addr.Port() <= f.Last && f.Addr.Port() <= g.Last {
			do(o)
		}
	}
}

// A port that somebody has precedes a range that another has, unless its kind of address is a weaker one; of two ranges the
// stronger claim precedes. What is preceded is not served at all: half a range would be of no use to those who ask for it.

// shadowed is whether a claim to one port is preceded by a range.
func (cs *claims) shadowed(at place, c claim) (is bool) {
	cs.over(at, c, func(r claim) { is = is || c.kind() > r.kind() })
	return is
}

// refused is whether a range is preceded.
func (cs *claims) refused(at span, r claim) (is bool) {
	cs.beside(at, r, func(o claim) { is = is || o.compare(r) < 0 })
	if !is {
		cs.inRange(at, r, func(c claim) { is = is || c.kind() <= r.kind() })
	}
	return is
}

// meet counts a conflict of two entries, or takes it away, and has the other look again.
func (c claim) meet(other claim, n int32, changed func(*entry)) {
	c.entry.contests += n
	other.entry.contests += n
	changed(other.entry)
}

// takeRanges makes an entry's claims to ranges, releaseRanges takes them away; both are for after its claims to ports.
func (cs *claims) takeRanges(e *entry, changed func(*entry)) {
	e.eachRange(func(at span, r claim) {
		meet := func(o claim) { r.meet(o, 1, changed) }
		cs.beside(at, r, meet)
		cs.inRange(at, r, meet)
		if cs.ranges == nil {
			cs.ranges = map[span][]claim{}
		}
		list := cs.ranges[at]
		i, _ := slices.BinarySearchFunc(list, r, claim.compare)
		cs.ranges[at] = slices.Insert(list, i, r)
	})
}

func (cs *claims) releaseRanges(e *entry, changed func(*entry)) {
	e.eachRange(func(at span, r claim) {
		list := slices.DeleteFunc(cs.ranges[at], func(o claim) bool { return o == r })
		if len(list) == 0 {
			delete(cs.ranges, at)
		} else {
			cs.ranges[at] = list
		}
		meet := func(o claim) { r.meet(o, -1, changed) }
		cs.beside(at, r, meet)
		cs.inRange(at, r, meet)
	})
}

// lookupRange finds who answers at a port that is in a range alone.
func (cs *claims) lookupRange(p Protocol, at netip.AddrPort) (claim, bool) {
	where := span{at.Addr(), p}
	for _, r := range cs.ranges[where] {
		if r.of().covers(at.Port()) && (r.entry.contests == 0 || !cs.refused(where, r)) {
			return r, true
		}
	}
	return claim{}, false
}

package model

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// place is what only one port of one Service can have: an address and port. That of a cluster IP as a whole has neither
// protocol nor port.
type place struct {
	addr     netip.Addr
	port     uint16
	protocol Protocol
}

// claim is a frontend of an entry's raw Service by its indexes; of a cluster IP, frontend is -1 and port its index.
type claim struct {
	entry          *entry
	port, frontend int32
}

// claims are all places and who has them.
type claims struct {
	// held is who has a place.
	held map[place]claim
	// contested is all that claim it, the holder first, for places that more than one do.
	contested map[place][]claim
	// ranges are all claims to ranges, the strongest first.
	ranges map[span][]claim
}

// kind is the claim's kind of address.
func (c claim) kind() Kind {
	if f := c.of(); f != nil {
		return f.Kind
	}
	return ClusterIP
}

// idle is whether there is no endpoint for it anywhere.
func (c claim) idle() bool {
	f := c.of()
	return f != nil && f.Action == Reject
}

// compare orders claims to one place, the stronger first: by kind; one with endpoints before one without, as it is in
// kube-proxy; the older Service; and then by name, so that there is always an order.
func (c claim) compare(o claim) int {
	switch {
	case c.kind() != o.kind():
		return int(c.kind()) - int(o.kind())
	case c.idle() != o.idle():
		if o.idle() {
			return -1
		}
		return 1
	case c.entry == o.entry:
		return cmp.Or(int(c.port-o.port), int(o.frontend-c.frontend))
	case c.entry.created != o.entry.created:
		if c.entry.created < o.entry.created {
			return -1
		}
		return 1
	}
	if d := strings.Compare(c.entry.name.Namespace, o.entry.name.Namespace); d != 0 {
		return d
	}
	return strings.Compare(c.entry.name.Name, o.entry.name.Name)
}

// each calls for each place that an entry claims.
func (e *entry) each(do func(place, claim)) {
	if e.raw == nil {
		return
	}
	for i, ip := range e.raw.ClusterIPs {
		do(place{addr: ip}, claim{e, int32(i), -1})
	}
	for i := range e.raw.Ports {
		p := &e.raw.Ports[i]
		for j := range p.Frontends {
			do(p.Frontends[j].place(p.Protocol), claim{e, int32(i), int32(j)})
		}
	}
}

func (f *Frontend) place(p Protocol) place { return place{f.Addr.Addr(), f.Addr.Port(), p} }

// release takes an entry's claims away; changed is called for others that have a place now.
func (cs *claims) release(e *entry, changed func(*entry)) {
	e.each(func(at place, c claim) {
		cs.over(at, c, func(r claim) { c.meet(r, -1, changed) })
		list, ok := cs.contested[at]
		if !ok {
			if cs.held[at] == c {
				delete(cs.held, at)
			}
			return
		}
		e.contests--
		if i := slices.Index(list, c); i >= 0 {
			list = slices.Delete(list, i, i+1)
		}
		if cs.held[at] != list[0] {
			cs.held[at] = list[0]
			changed(list[0].entry)
		}
		if len(list) == 1 {
			list[0].entry.contests--
			delete(cs.contested, at)
		} else {
			cs.contested[at] = list
		}
	})
	cs.releaseRanges(e, changed)
}

// take makes an entry's claims; changed is called for others that have lost a place.
func (cs *claims) take(e *entry, changed func(*entry)) {
	e.each(func(at place, c claim) {
		cs.over(at, c, func(r claim) { c.meet(r, 1, changed) })
		holder, ok := cs.held[at]
		if !ok {
			cs.held[at] = c
			return
		}
		list := cs.contested[at]
		if list == nil {
			list = []claim{holder}
			holder.entry.contests++
		}
		i, _ := slices.BinarySearchFunc(list, c, claim.compare)
		list = slices.Insert(list, i, c)
		if cs.contested == nil {
			cs.contested = map[place][]claim{}
		}
		cs.contested[at] = list
		e.contests++
		if i == 0 {
			cs.held[at] = c
			changed(holder.entry)
		}
	})
	cs.takeRanges(e, changed)
}

// won is what an entry has: its raw Service without what others hold, which is told.
func (cs *claims) won(e *entry) (*Service, []Problem) {
	if e.raw == nil || e.contests == 0 {
		return e.raw, nil
	}
	bad := problems{kind: "Service", object: e.name}
	s := &Service{Name: e.raw.Name, HealthCheck: e.raw.HealthCheck, Ports: slices.Clone(e.raw.Ports)}
	for i := range s.Ports {
		s.Ports[i].Frontends, s.Ports[i].Ranges = nil, nil
	}
	e.each(func(at place, c claim) {
		switch has := cs.held[at] == c && !cs.shadowed(at, c); {
		case has && c.frontend < 0:
			s.ClusterIPs = append(s.ClusterIPs, at.addr)
		case has:
			p := &s.Ports[c.port]
			p.Frontends = append(p.Frontends, e.raw.Ports[c.port].Frontends[c.frontend])
		case c.frontend >= 0:
			bad.add(c.kind().field(), netip.AddrPortFrom(at.addr, at.port).String()+"/"+at.protocol.String(),
				"is held by another port or Service; it is not served for this one")
		}
	})
	e.eachRange(func(at span, r claim) {
		if f, p := r.of(), &s.Ports[r.port]; cs.refused(at, r) {
			bad.add(annotation(PortRangesAnnotation), f.Ports()+"/"+p.Protocol.String(), "has ports that are held by another Service; it is not served there")
		} else {
			p.Ranges = append(p.Ranges, *f)
		}
	})
	return s, bad.list
}

// field is where in a Service such addresses are.
func (k Kind) field() string {
	return [...]string{"spec.clusterIPs", "status.loadBalancer.ingress", "spec.externalIPs", "spec.ports[].nodePort"}[k]
}

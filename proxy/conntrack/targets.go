package conntrack

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/proxy/model"
)

// place is what packets are sent to; of a node port, the family's unspecified address.
type place struct {
	at       netip.AddrPort
	protocol model.Protocol
	// last is the last port of a range that begins with that of at; 0 without one.
	last uint16
}

// target is which connections to a place are stale. Its lists are the model's, sorted, and not to be changed.
type target struct {
	// ranged is whether it is one of a range of ports, where only addresses count: what is sent there keeps its port.
	ranged bool
	// valid is where connections may lead.
	valid [][]model.Endpoint
	// gone is where they led before: what leads there, and not where it may, is stale.
	gone [][]model.Endpoint
	// any is whether all is stale that leads elsewhere than where it may.
	any bool
	// fresh is whether the place leads somewhere only since lately: connections that were left to themselves are stale.
	fresh bool
}

// maxLists is how many lists of endpoints are remembered of a place: of what has lost more often, all is stale that leads
// elsewhere.
const maxLists = 24

// stale is whether a connection is that was sent to a place and leads to another, or to the place itself.
func (t *target) stale(sent, to netip.AddrPort) bool {
	switch {
	case t.within(t.valid, to):
		return false
	case sent == to:
		return t.fresh
	}
	return t.any || t.within(t.gone, to)
}

// pointless is whether nothing can be stale.
func (t *target) pointless() bool {
	if t.any || t.fresh {
		return false
	}
	for _, list := range t.gone {
		for i := range list {
			if !t.within(t.valid, list[i].AddrPort()) {
				return false
			}
		}
	}
	return true
}

// within is whether an endpoint is in one of the lists.
func (t *target) within(lists [][]model.Endpoint, at netip.AddrPort) bool {
	for _, list := range lists {
		if _, ok := slices.BinarySearchFunc(list, at, func(e model.Endpoint, at netip.AddrPort) int {
			if t.ranged {
				return e.Addr.Compare(at.Addr())
			}
			return e.AddrPort().Compare(at)
		}); ok {
			return true
		}
	}
	return false
}

// work is what is to be looked for in the kernel's table.
type work struct {
	places map[place]*target
	// clusterIPs are where all addresses are those of Services, by family: what was sent to one that leads nowhere now, and went
	// elsewhere, is stale. They are there where all Services are looked at.
	clusterIPs [model.Families][]netip.Prefix
	// ranges are the places of ranges, by address, as index has found them.
	ranges map[netip.Addr][]place
	// nodePorts are the addresses that node ports are at.
	nodePorts [model.Families]model.NodePortAddresses
}

func (w *work) empty() bool {
	return len(w.places) == 0 && len(w.clusterIPs[model.IPv4])+len(w.clusterIPs[model.IPv6]) == 0
}

// frontend is a place as it was or is.
type frontend struct {
	of   types.NamespacedName
	port *model.Port
	at   *model.Frontend
}

// forwards is whether there are packets that it leads to endpoints.
func (f frontend) forwards() bool {
	return f.at != nil && (f.at.Action == model.Forward || f.at.ShortCircuit)
}

// endpoints are all that a port's connections may lead to: those that serve, ending or not, and those that packets are sent to
// although they do not serve (publishNotReadyAddresses).
func (f frontend) endpoints() (lists [][]model.Endpoint) {
	switch {
	case f.port == nil:
		return nil
	case f.port.Resets && len(f.port.Members) > 0:
		return [][]model.Endpoint{f.port.Members}
	case f.port.Protocol == model.TCP:
		return nil
	}
	for _, list := range [...][]model.Endpoint{f.port.Serving, f.port.Cluster, f.port.Local} {
		same := func(l []model.Endpoint) bool { return &l[0] == &list[0] && len(l) == len(list) }
		if len(list) > 0 && !slices.ContainsFunc(lists, same) {
			lists = append(lists, list)
		}
	}
	return lists
}

// protocols are those whose connections are looked at.
var protocols = [...]model.Protocol{model.UDP, model.TCP}

// kinds has something for each family and each of protocols.
type kinds[T any] [model.Families][len(protocols)]T

// kindOf is the index in protocols; -1 for another one.
func kindOf(protocol uint8) int { return slices.Index(protocols[:], model.Protocol(protocol)) }

// watched is whether a port's connections are looked at.
func watched(p *model.Port) bool { return p.Protocol == model.UDP || p.Resets }

// collect puts a Service's places into a map: those that are watched.
func collect(s *model.Service, watched func(*model.Port) bool, into map[place]frontend) {
	if s == nil {
		return
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		if !watched(p) {
			continue
		}
		for j := range p.Frontends {
			into[place{at: p.Frontends[j].Addr, protocol: p.Protocol}] = frontend{s.Name, p, &p.Frontends[j]}
		}
		for j := range p.Ranges {
			into[place{p.Ranges[j].Addr, p.Protocol, p.Ranges[j].Last}] = frontend{s.Name, p, &p.Ranges[j]}
		}
	}
}

// note adds what changes. In work that was there before, places may lead to where they do from now on, besides.
func (w *work) note(c *change, earlier ...*work) {
	if c.globals != nil {
		for f := range w.nodePorts {
			w.nodePorts[f] = c.globals.Family[f].NodePorts
		}
	}
	before, after := map[place]frontend{}, map[place]frontend{}
	for i := range c.services {
		collect(c.services[i].Old, func(p *model.Port) bool { return watched(p) || p.Protocol == model.TCP }, before)
		collect(c.services[i].New, watched, after)
	}
	for at, is := range after {
		was := before[at]
		if at.protocol == model.TCP && was.of != is.of {
			was = frontend{} // it has lost nothing
		}
		// What asks for resets only now may have lost endpoints long ago.
		w.noteOne(at, was, is, c.all || is.port.Resets && was.port != nil && !was.port.Resets)
		for _, e := range earlier {
			e.widen(at, is.endpoints(), w)
		}
	}
	for at, was := range before {
		if _, ok := after[at]; ok {
			continue
		}
		if at.protocol == model.TCP {
			// A Service or an address of it that is no more does not say that an endpoint is gone.
			delete(w.places, at)
			continue
		}
		w.noteOne(at, was, frontend{}, false)
	}
	if c.all && c.globals != nil {
		for f := range w.clusterIPs {
			w.clusterIPs[f] = c.globals.Family[f].ServiceCIDRs
		}
	}
}

// widen has a place lead to endpoints, besides. What changes too often to be remembered is left to a later time.
func (w *work) widen(at place, to [][]model.Endpoint, later *work) {
	t := w.places[at]
	if t == nil {
		return
	}
	if t.valid = append(t.valid, to...); len(t.valid) > maxLists {
		delete(w.places, at)
		later.adopt(at, t)
	}
}

func (w *work) noteOne(at place, was, is frontend, all bool) {
	t := w.places[at]
	if t == nil {
		t = &target{ranged: at.last > 0}
	}
	t.valid = is.endpoints()
	// What was sent to an address without a Service is somebody's, who may have an established connection of TCP there.
	t.fresh = is.forwards() && (t.fresh || !was.forwards()) && at.protocol != model.TCP
	t.any = t.any || all
	t.lose(was.endpoints())
	if t.pointless() && !all {
		delete(w.places, at)
	} else {
		w.put(at, t)
	}
}

func (w *work) put(at place, t *target) {
	if w.places == nil {
		w.places = map[place]*target{}
	}
	w.places[at] = t
}

// lose adds where connections led.
func (t *target) lose(lists [][]model.Endpoint) {
	if t.gone = append(t.gone, lists...); len(t.gone) > maxLists {
		t.any, t.gone = true, nil
	}
}

// again adds what was to be done before it and was not.
func (w *work) again(earlier *work) {
	for at, old := range earlier.places {
		w.adopt(at, old)
	}
	for f := range w.clusterIPs {
		if w.clusterIPs[f] == nil {
			w.clusterIPs[f] = earlier.clusterIPs[f]
		}
	}
}

func (w *work) adopt(at place, old *target) {
	t := w.places[at]
	if t == nil {
		w.put(at, old)
		return
	}
	t.any, t.fresh = t.any || old.any, t.fresh || old.fresh
	t.lose(old.gone)
}

// index makes ranges be found.
func (w *work) index() {
	w.ranges = map[netip.Addr][]place{}
	for at := range w.places {
		if at.last > 0 {
			w.ranges[at.at.Addr()] = append(w.ranges[at.at.Addr()], at)
		}
	}
}

// kinds is what there is work of; nodePorts is whether there is of node ports.
func (w *work) kinds() (of kinds[bool], nodePorts bool) {
	for f := range of {
		of[f][0] = len(w.clusterIPs[f]) > 0
	}
	for at := range w.places {
		of[model.FamilyOf(at.at.Addr())][kindOf(uint8(at.protocol))] = true
		nodePorts = nodePorts || at.at.Addr().IsUnspecified()
	}
	return of, nodePorts
}

// port is the one that all work of a protocol is for; 0 if there are several.
func (w *work) port(protocol model.Protocol) uint16 {
	if protocol == model.UDP && len(w.clusterIPs[model.IPv4])+len(w.clusterIPs[model.IPv6]) > 0 {
		return 0
	}
	var port uint16
	for at := range w.places {
		if at.protocol != protocol {
			continue
		}
		if at.last > 0 || port != 0 && port != at.at.Port() {
			return 0
		}
		port = at.at.Port()
	}
	return port
}

// node is what addresses the node has.
type node func(netip.Addr) bool

// find is the target that an entry is one of, and where it is kept. Without one, an orphan is stale nevertheless.
func (w *work) find(e *conntrack.Entry, here node) (at place, t *target, orphan bool) {
	if kindOf(e.Protocol) < 0 {
		return place{}, nil, false
	}
	sent := e.Original.Dst
	f := model.FamilyOf(sent.Addr())
	at = place{at: sent, protocol: model.Protocol(e.Protocol)}
	if t := w.places[at]; t != nil {
		return at, t, false
	}
	at.at = netip.AddrPortFrom(unspecified[f], sent.Port())
	if t := w.places[at]; t != nil && w.nodePorts[f].Match(sent.Addr()) && here(sent.Addr()) {
		return at, t, false
	}
	if e.Reply.Src.Port() == sent.Port() {
		for _, r := range w.ranges[sent.Addr()] {
			if sent.Port() >= r.at.Port() && sent.Port() <= r.last && r.protocol == at.protocol {
				return r, w.places[r], false
			}
		}
	}
	if e.Reply.Src == sent || e.Protocol != uint8(model.UDP) {
		return place{}, nil, false
	}
	for _, p := range w.clusterIPs[f] {
		if p.Contains(sent.Addr()) {
			return place{}, nil, true
		}
	}
	return place{}, nil, false
}

var unspecified = [model.Families]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}

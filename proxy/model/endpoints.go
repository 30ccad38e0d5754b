package model

import (
	"net/netip"
	"slices"
	"unique"
)

// candidate is an endpoint of a port of a Service, from whichever slice.
type candidate struct {
	Endpoint
	conditions conditions
	zones      unique.Handle[string]
	weight     uint16
	// turn is when it came, in the order of slices by name.
	turn int32
}

func (c *candidate) inZone(zone string) bool {
	e := sliceEndpoint{conditions: c.conditions, zones: c.zones}
	return e.inZone(zone)
}

// compare is the order of endpoints.
func (e Endpoint) compare(o Endpoint) int {
	if c := e.Addr.Compare(o.Addr); c != 0 {
		return c
	}
	return int(e.Port) - int(o.Port)
}

// gather lists the endpoints that slices have for a port, each once, sorted, into a buffer that is used again.
//
// An address and port that is there more than once may be one pod that moves between slices, or a new pod with the address of
// one that ends: whatever comes later precedes, unless it terminates. Slices are sorted by name, so that it is always the
// same one; kube-proxy takes them in no order.
func gather(buf []candidate, from *sources, key portKey) []candidate {
	buf = buf[:0]
	from.each(key, func(s *source) {
		for i := range s.slice.endpoints {
			e := &s.slice.endpoints[i]
			buf = append(buf, candidate{
				Endpoint:   Endpoint{Addr: e.addr, Port: s.port, Local: e.conditions.all(isLocal)},
				conditions: e.conditions, zones: e.zones, weight: from.weightOf(s.slice, e), turn: int32(len(buf)),
			})
		}
	})
	slices.SortFunc(buf, func(a, b candidate) int {
		if c := a.compare(b.Endpoint); c != 0 {
			return c
		}
		return int(a.turn - b.turn)
	})
	out := buf[:0]
	for _, c := range buf {
		switch last := len(out) - 1; {
		case last < 0 || out[last].compare(c.Endpoint) != 0:
			out = append(out, c)
		case !c.conditions.all(isTerminating):
			out[last] = c
		}
	}
	return out
}

// usable is which endpoints a port's packets may be sent to.
type usable struct {
	// cluster and local are for each Policy; each is only filled where it is used.
	cluster, local []Endpoint
	// any is whether there is a usable endpoint anywhere in the cluster, this node or another.
	any bool
}

// usableEndpoints picks among the candidates: ready ones, those hinted for this node or zone if hints can be followed, and
// those that serve while they terminate if there is no ready one (KEP-1669, KEP-2433, KEP-4444).
func usableEndpoints(all []candidate, useCluster, useLocal bool, zone string, old *Port) usable {
	var u usable
	var ready, localReady, localEnds bool
	for i := range all {
		c := all[i].conditions
		ready = ready || c.all(isReady)
		u.any = u.any || c.all(isReady) || c.ends()
		localReady = localReady || c.all(isReady|isLocal)
		localEnds = localEnds || c.ends() && c.all(isLocal)
	}
	if useCluster {
		near := nearest(all, zone)
		u.cluster = pickWeighed(all, reuse(old, Cluster), func(c *candidate) bool {
			if !ready {
				return c.conditions.ends()
			}
			return c.conditions.all(isReady) && near(c)
		})
	}
	if useLocal && (localReady || localEnds) {
		u.local = pickWeighed(all, reuse(old, Local), func(c *candidate) bool {
			if !localReady {
				return c.conditions.ends() && c.conditions.all(isLocal)
			}
			return c.conditions.all(isReady | isLocal)
		})
		if slices.Equal(u.local, u.cluster) {
			u.local = u.cluster
		}
	}
	return u
}

// hints is whether the hints of endpoints can be followed, and by which.
type hints uint8

const (
	noHints hints = iota
	byNodeHints
	byZoneHints
)

// hintsOf says whose hints are followed: only if each ready endpoint has one and one at least is for this node or zone; those for
// nodes precede those for zones.
func hintsOf(all []candidate, zone string) hints {
	nodes, zones, here, zoneHere := true, true, false, false
	for i := range all {
		c := &all[i]
		if !c.conditions.all(isReady) {
			continue
		}
		nodes = nodes && c.conditions.all(hasNodes)
		here = here || c.conditions.all(forNode)
		zones = zones && c.conditions.all(hasZones)
		zoneHere = zoneHere || c.inZone(zone)
	}
	switch {
	case nodes && here:
		return byNodeHints
	case zones && zoneHere:
		return byZoneHints
	}
	return noHints
}

// nearest says which ready endpoints are near enough.
func nearest(all []candidate, zone string) func(*candidate) bool {
	switch hintsOf(all, zone) {
	case byNodeHints:
		return func(c *candidate) bool { return c.conditions.all(forNode) }
	case byZoneHints:
		return func(c *candidate) bool { return c.inZone(zone) }
	}
	return func(*candidate) bool { return true }
}

// serving is all endpoints that serve: where conntrack may lead to.
func serving(all []candidate, old *Port) []Endpoint {
	var was []Endpoint
	if old != nil {
		was = old.Serving
	}
	return pick(all, was, func(c *candidate) bool { return c.conditions.all(isServing) })
}

// members is all endpoints, whatever their conditions.
func members(all []candidate, old *Port) []Endpoint {
	var was []Endpoint
	if old != nil {
		was = old.Members
	}
	return pick(all, was, func(*candidate) bool { return true })
}

// reuse is the endpoints that a port had.
func reuse(old *Port, p Policy) []Endpoint {
	switch {
	case old == nil:
		return nil
	case p == Local:
		return old.Local
	}
	return old.Cluster
}

// pick is the endpoints that match; where they are the same as before, it is the same memory.
func pick(all []candidate, old []Endpoint, match func(*candidate) bool) []Endpoint {
	n, same := 0, true
	for i := range all {
		if match(&all[i]) {
			same = same && n < len(old) && old[n] == all[i].Endpoint
			n++
		}
	}
	if n == 0 {
		return nil
	}
	if same && n == len(old) {
		return old
	}
	out := make([]Endpoint, 0, n)
	for i := range all {
		if match(&all[i]) {
			out = append(out, all[i].Endpoint)
		}
	}
	return out
}

// pickWeighed is pick for new connections: endpoints have their weights.
func pickWeighed(all []candidate, old []Endpoint, match func(*candidate) bool) []Endpoint {
	if !slices.ContainsFunc(all, func(c candidate) bool { return c.weight != 1 }) {
		return pick(all, old, match)
	}
	var list []Endpoint
	var weights []uint16
	for i := range all {
		if match(&all[i]) {
			list, weights = append(list, all[i].Endpoint), append(weights, all[i].weight)
		}
	}
	if len(list) == 0 {
		return nil
	}
	if list = weigh(list, weights); slices.Equal(list, old) {
		return old
	}
	return slices.Clip(list)
}

// localReady counts the addresses of this node that are ready for any port (kube-proxy counts a pod with two ports once).
func localReady(buf *[]candidate, from *sources, f Family) int {
	var ready []netip.Addr
	seen := map[portKey]bool{}
	for _, s := range from.list {
		if s.key.family != f || seen[s.key] {
			continue
		}
		seen[s.key] = true
		*buf = gather(*buf, from, s.key)
		for _, c := range *buf {
			if c.conditions.all(isLocal | isReady) {
				ready = append(ready, c.Addr)
			}
		}
	}
	return len(tidyAddrs(ready))
}

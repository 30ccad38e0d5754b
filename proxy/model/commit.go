package model

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

// Commit brings the State up to date, and says what has changed since the last one. Its cost is that of the Services that
// were touched, unless the Node's zone or address or the Config has changed in a way that goes for all.
func (m *Model) Commit() Delta {
	var d Delta
	m.committed = true
	if m.stale {
		m.refresh(&d)
	}
	affected := make(map[*entry]struct{}, len(m.dirty))
	for e := range m.dirty {
		affected[e] = struct{}{}
		m.rebuild(e, func(o *entry) { affected[o] = struct{}{} })
	}
	before := map[Hairpin]bool{}
	for e := range affected {
		m.settle(e, &d, before)
	}
	m.dirty = map[*entry]struct{}{}
	slices.SortFunc(d.Services, func(a, b Change) int { return compareNames(a.Name, b.Name) })
	for h, was := range before {
		switch _, is := m.state.hairpins[h]; {
		case is && !was:
			d.HairpinAdded = append(d.HairpinAdded, h)
		case was && !is:
			d.HairpinRemoved = append(d.HairpinRemoved, h)
		}
	}
	slices.SortFunc(d.HairpinAdded, Hairpin.compare)
	slices.SortFunc(d.HairpinRemoved, Hairpin.compare)
	d.Problems = m.journal.tell()
	m.scratch.trim()
	return d
}

// refresh computes what goes for all Services, and touches them all if they depend on what has changed.
func (m *Model) refresh(d *Delta) {
	m.stale = false
	var cidrs []netip.Prefix
	for _, list := range m.cidrs {
		cidrs = append(cidrs, list...)
	}
	g := globals(&m.config, &m.rules, &m.node, cidrs)
	if !g.equal(&m.state.globals) {
		m.state.globals = g
		d.Globals = &g
	}
	c := circumstances{
		zone: m.node.zone, masqueradeAll: m.config.MasqueradeAll, noExternalIPs: m.config.NoExternalIPs, noHash: m.config.NoHash,
		noRanges: m.config.NoRanges, resets: m.config.Resets, noResets: m.config.NoResets, nodeIPs: m.node.all,
	}
	for f := range Family(Families) {
		c.enabled[f] = g.Family[f].Enabled
		c.detects[f] = g.Family[f].Detector.Implemented()
		c.nodeIP[f] = m.rules.nodeIP(&m.node, f)
	}
	if c != m.circumstances {
		m.circumstances = c
		for e := range maps.Values(m.state.entries) {
			m.touch(e)
		}
	}
}

// rebuild computes an entry's raw Service and has it claim its places; changed is called for others that win or lose some.
func (m *Model) rebuild(e *entry, changed func(*entry)) {
	raw, err := build(e.name, e.spec, e.slices, &m.circumstances, e.raw, &m.scratch)
	e.crowded = err != nil
	created := e.created
	if e.spec != nil {
		created = e.spec.created
	}
	switch {
	case created == e.created && raw.equal(e.raw):
	case created == e.created && raw.claimsAs(e.raw):
		e.raw = raw
	default:
		m.state.claims.release(e, changed)
		e.raw, e.created = raw, created
		m.state.claims.take(e, changed)
	}
}

// claimsAs is whether it claims the same places as strongly.
func (s *Service) claimsAs(o *Service) bool {
	if s == nil || o == nil {
		return s == o
	}
	same := func(x, y Frontend) bool {
		return x.Addr == y.Addr && x.Last == y.Last && x.Kind == y.Kind && (x.Action == Reject) == (y.Action == Reject)
	}
	return slices.Equal(s.ClusterIPs, o.ClusterIPs) && slices.EqualFunc(s.Ports, o.Ports, func(a, b Port) bool {
		return a.Protocol == b.Protocol && slices.EqualFunc(a.Frontends, b.Frontends, same) && slices.EqualFunc(a.Ranges, b.Ranges, same)
	})
}

// settle finds what an entry has won, and notes it if that has changed. Whether a hairpin was there before is put down.
func (m *Model) settle(e *entry, d *Delta, before map[Hairpin]bool) {
	won, bad := m.state.claims.won(e)
	if e.crowded {
		n := 0
		for _, s := range e.slices {
			n += len(s.endpoints)
		}
		p := problems{kind: "Service", object: e.name}
		p.add("spec.ports", strconv.Itoa(len(e.spec.ports))+" ports, "+strconv.Itoa(n)+" endpoints in slices", errTooManyEndpoints.Error())
		bad = append(bad, p.list...)
	}
	bad = append(append(append(bad, m.unhashed(e)...), m.unserved(e)...), m.unreset(e)...)
	m.journal.set(subject{kind: "Service", object: e.name, shared: true}, bad)
	if won.equal(e.won) {
		if e.contests == 0 {
			// It claims by the same indexes: one copy is enough.
			e.raw = e.won
		}
	} else {
		d.Services = append(d.Services, Change{Name: e.name, Old: e.won, New: won})
		m.state.counts.count(e.won, -1)
		m.state.counts.count(won, 1)
		m.hairpins(e.won, -1, before)
		m.hairpins(won, 1, before)
		e.won = won
	}
	if e.spec == nil && len(e.slices) == 0 {
		delete(m.state.entries, e.name)
	}
}

// unhashed is why endpoints are drawn although a hash was asked for.
func (m *Model) unhashed(e *entry) []Problem {
	if e.spec == nil || e.raw == nil || e.spec.hash.By == Unhashed {
		return nil
	}
	field, value, instead := HashAnnotation, e.spec.hash.text(), drawn
	if e.spec.rangesHash {
		if m.circumstances.noRanges { // which is told, and leaves nothing to be hashed
			return nil
		}
		field, value = PortRangesAnnotation, rangesText(e.spec.ranges)
		instead = "session affinity does not go for the ranges, whose " + drawn
	}
	p := problems{kind: "Service", object: e.name}
	for i := range e.raw.Ports {
		port := &e.raw.Ports[i]
		if port.Hash.By != Unhashed {
			continue
		}
		why := "the rules of this node cannot hash"
		if !m.circumstances.noHash {
			why = "port " + strconv.Quote(port.Name) + ": " + strconv.Itoa(max(len(port.Cluster), len(port.Local))) + " endpoints are more than " + strconv.Itoa(int(e.spec.hash.Buckets)) + " buckets"
		}
		p.add(annotation(field), value, why+"; "+instead)
		break
	}
	return p.list
}

// hairpins adds a Service's local endpoints, or takes them away. Two Services may have the same ones.
func (m *Model) hairpins(s *Service, n int32, before map[Hairpin]bool) {
	if s == nil {
		return
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		for _, list := range [...][]Endpoint{p.Cluster, p.Local} {
			for _, e := range list {
				if !e.Local {
					continue
				}
				m.hairpin(Hairpin{p.Protocol, e.AddrPort()}, n, before)
				if len(p.Ranges) > 0 {
					m.hairpin(Hairpin{p.Protocol, netip.AddrPortFrom(e.Addr, 0)}, n, before)
				}
			}
		}
	}
}

func (m *Model) hairpin(h Hairpin, n int32, before map[Hairpin]bool) {
	if _, ok := before[h]; !ok {
		before[h] = m.state.hairpins[h] > 0
	}
	if m.state.hairpins[h] += n; m.state.hairpins[h] == 0 {
		delete(m.state.hairpins, h)
	}
}

// trim gives memory back that a large Service needed.
func (s *scratch) trim() {
	const keep = 4096
	if cap(s.candidates) > keep {
		s.candidates = nil
	} else {
		// What is left in it would keep strings alive.
		clear(s.candidates[:cap(s.candidates)])
	}
	if cap(s.sources) > keep {
		s.sources = nil
	} else {
		clear(s.sources[:cap(s.sources)])
	}
}

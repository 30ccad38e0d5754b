package model

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// kernel is what somebody has who does nothing but follow Deltas.
type kernel struct {
	places     map[place]Frontend
	ranges     map[span][]Frontend
	endpoints  map[place][]Endpoint
	clusterIPs map[netip.Addr]bool
	hairpins   map[Hairpin]bool
	globals    Globals
}

func newKernel() *kernel {
	return &kernel{map[place]Frontend{}, map[span][]Frontend{}, map[place][]Endpoint{}, map[netip.Addr]bool{}, map[Hairpin]bool{}, Globals{}}
}

func (k *kernel) follow(t testing.TB, d *Delta) {
	t.Helper()
	if d.Globals != nil {
		k.globals = *d.Globals
	}
	for i, c := range d.Services {
		if c.Old.equal(c.New) {
			t.Fatalf("a change that is none: %s", c.Name)
		}
		if i > 0 && compareNames(d.Services[i-1].Name, c.Name) >= 0 {
			t.Fatalf("not sorted: %s after %s", c.Name, d.Services[i-1].Name)
		}
		if c.Old == nil {
			continue
		}
		for _, ip := range c.Old.ClusterIPs {
			if !k.clusterIPs[ip] {
				t.Fatalf("%s: cluster IP %s goes, and was not there", c.Name, ip)
			}
			delete(k.clusterIPs, ip)
		}
		for _, p := range c.Old.Ports {
			for _, f := range p.Frontends {
				at := f.place(p.Protocol)
				if had, ok := k.places[at]; !ok || !had.equal(f) {
					t.Fatalf("%s: %s goes, there was %v", c.Name, f, had)
				}
				delete(k.places, at)
				delete(k.endpoints, at)
			}
			for _, f := range p.Ranges {
				at := span{f.Addr.Addr(), p.Protocol}
				i := slices.IndexFunc(k.ranges[at], f.equal)
				if i < 0 {
					t.Fatalf("%s: range %s goes, there were %v", c.Name, f, k.ranges[at])
				}
				if k.ranges[at] = slices.Delete(k.ranges[at], i, i+1); len(k.ranges[at]) == 0 {
					delete(k.ranges, at)
				}
			}
		}
	}
	for _, c := range d.Services {
		if c.New == nil {
			continue
		}
		for _, ip := range c.New.ClusterIPs {
			if k.clusterIPs[ip] {
				t.Fatalf("%s: cluster IP %s is another's", c.Name, ip)
			}
			k.clusterIPs[ip] = true
		}
		for i := range c.New.Ports {
			p := &c.New.Ports[i]
			for _, f := range p.Frontends {
				at := f.place(p.Protocol)
				if had, ok := k.places[at]; ok {
					t.Fatalf("%s: %s comes, there is %v", c.Name, f, had)
				}
				k.places[at], k.endpoints[at] = f, p.Endpoints(&f)
			}
			for _, f := range p.Ranges {
				at := span{f.Addr.Addr(), p.Protocol}
				for _, o := range k.ranges[at] {
					if o.Addr.Port() <= f.Last && f.Addr.Port() <= o.Last {
						t.Fatalf("%s: range %s comes, there is %s", c.Name, f, o)
					}
				}
				k.ranges[at] = append(k.ranges[at], f)
				slices.SortFunc(k.ranges[at], func(a, b Frontend) int { return a.Addr.Compare(b.Addr) })
			}
		}
	}
	for _, h := range d.HairpinRemoved {
		if !k.hairpins[h] {
			t.Fatalf("hairpin %v goes, and was not there", h)
		}
		delete(k.hairpins, h)
	}
	for _, h := range d.HairpinAdded {
		if k.hairpins[h] {
			t.Fatalf("hairpin %v comes, and is there", h)
		}
		k.hairpins[h] = true
	}
}

// is checks that following Deltas has led to the State.
func (k *kernel) is(t testing.TB, s *State) {
	t.Helper()
	want := newKernel()
	all := Delta{Globals: &s.globals, HairpinAdded: s.Hairpins()}
	for svc := range s.Services() {
		all.Services = append(all.Services, Change{Name: svc.Name, New: svc})
	}
	want.follow(t, &all)
	sameRanges := func(a, b []Frontend) bool { return slices.EqualFunc(a, b, Frontend.equal) }
	if !maps.EqualFunc(k.places, want.places, Frontend.equal) || !maps.EqualFunc(k.ranges, want.ranges, sameRanges) || !maps.EqualFunc(k.endpoints, want.endpoints, slices.Equal) ||
		!maps.Equal(k.clusterIPs, want.clusterIPs) || !maps.Equal(k.hairpins, want.hairpins) || !k.globals.equal(&want.globals) {
		t.Fatalf("whoever follows Deltas has not what the State says:\n%s", s)
	}
}

// sound checks what goes for any State.
func sound(t testing.TB, s *State) {
	t.Helper()
	for svc := range s.Services() {
		for i := range svc.Ports {
			p := &svc.Ports[i]
			for _, list := range [][]Endpoint{p.Cluster, p.Local, p.Serving} {
				if !slices.IsSortedFunc(list, Endpoint.compare) {
					t.Fatalf("not sorted: %s", svc)
				}
				for j, e := range list {
					if FamilyOf(e.Addr) != p.Family || e.Port == 0 || special(e.Addr) != "" || j > 0 && list[j-1].compare(e) == 0 {
						t.Fatalf("bad endpoint %s: %s", e, svc)
					}
				}
			}
			for _, list := range [][]Endpoint{p.Cluster, p.Local} {
				weighed(t, svc, list)
			}
			for _, f := range p.Frontends {
				if f.Action == Pass || FamilyOf(f.Addr.Addr()) != p.Family || f.Addr.Port() == 0 || f.Addr.Addr().IsLoopback() ||
					(f.Kind == NodePort) != f.Addr.Addr().IsUnspecified() ||
					(f.Action == Forward) != (len(p.Endpoints(&f)) > 0) || f.ShortCircuit && len(p.Cluster) == 0 ||
					(f.Action == Reject) && (f.ShortCircuit || len(p.Cluster)+len(p.Local) > 0) ||
					len(f.Sources) > 0 && !f.Restricted {
					t.Fatalf("bad frontend %s: %s", f, svc)
				}
				svc2, _, f2 := s.Lookup(p.Protocol, f.Addr)
				if svc2 != svc || f2 == nil || !f2.equal(f) {
					t.Fatalf("Lookup of %s %s: %v", p.Protocol, f.Addr, f2)
				}
			}
		}
		for i := range svc.Ports {
			ranged(t, s, svc, &svc.Ports[i])
		}
		for _, ip := range svc.ClusterIPs {
			if !s.IsClusterIP(ip) {
				t.Fatalf("%s is no cluster IP", ip)
			}
		}
	}
}

// ranged checks the ranges of a port: all in them is theirs, or a port's of the same Service.
func ranged(t testing.TB, s *State, svc *Service, p *Port) {
	t.Helper()
	for _, f := range p.Ranges {
		if f.Kind == NodePort || f.Addr.Port() == 0 || f.Last < f.Addr.Port() || (f.Action == Forward) != (len(p.Endpoints(&f)) > 0) {
			t.Fatalf("bad range %s: %s", f, svc)
		}
		for port := int(f.Addr.Port()); port <= int(f.Last); port++ {
			other, _, g := s.Lookup(p.Protocol, netip.AddrPortFrom(f.Addr.Addr(), uint16(port)))
			if g == nil || other != svc || !g.equal(f) && g.Last != 0 {
				t.Fatalf("Lookup of %d in range %s of %s: %v of %v", port, f, svc, g, other)
			}
		}
	}
}

// weighed checks the weights of a list: none, or such that are not all the same and have no divisor.
func weighed(t testing.TB, svc *Service, list []Endpoint) {
	t.Helper()
	divisor, differ := 0, false
	for _, e := range list {
		for a := int(e.Weight); a != 0; {
			divisor, a = a, divisor%a
		}
		differ = differ || e.Weight != list[0].Weight
	}
	if divisor != 0 && (divisor != 1 || !differ) || differ && slices.ContainsFunc(list, func(e Endpoint) bool { return e.Weight == 0 }) {
		t.Fatalf("bad weights %v: %s", list, svc)
	}
	if shares := Shares(list); (shares != nil) != differ || shares != nil && slices.Min(shares) < 1 {
		t.Fatalf("bad shares %v of %v", shares, list)
	}
}

// Whatever happens to objects in whatever order, what a Model has is what it would have if it had been told of the last state
// of each alone.
func TestIncrementalEqualsFull(t *testing.T) {
	sequences := 3000
	if testing.Short() {
		sequences = 300
	}
	changes, contested, told, several, uneven, spans := 0, 0, 0, 0, 0, 0
	for seed := range sequences {
		r := chance{rand.New(rand.NewPCG(uint64(seed), 7)), seed%2 == 1}
		o := newObjects(r.config())
		m, err := New(o.config)
		if err != nil {
			t.Fatal(err)
		}
		k := newKernel()
		for range 20 + r.IntN(100) {
			o.step(t, r, m)
			if r.in(2) {
				continue
			}
			d := m.Commit()
			changes += len(d.Services)
			told += len(d.Problems)
			k.follow(t, &d)
		}
		d := m.Commit()
		k.follow(t, &d)
		k.is(t, m.State())
		sound(t, m.State())
		contested += len(m.state.claims.contested)
		tallied(t, m)
		for s := range m.State().Services() {
			for _, p := range s.Ports {
				if len(p.Cluster) > 1 {
					several++
				}
				spans += len(p.Ranges)
				if Shares(p.Cluster) != nil {
					uneven++
				}
			}
		}
		full, _ := o.model(t)
		if diff := m.State().diff(full.State()); diff != "" {
			t.Fatalf("seed %d: incremental:\n%s", seed, diff)
		}
		if a, b := problemSet(m), problemSet(full); !maps.Equal(a, b) {
			t.Fatalf("seed %d: problems %v, in full %v", seed, a, b)
		}
		if again := m.Commit(); !again.Empty() || len(again.Problems) > 0 {
			t.Fatalf("seed %d: changes without a cause: %+v", seed, again)
		}
		if len(m.dirty) > 0 || len(m.slices) > len(o.slices) || len(m.state.entries) > len(o.services)+len(o.slices) {
			t.Fatalf("seed %d: %d dirty, %d slices of %d, %d entries of %d and %d", seed, len(m.dirty), len(m.slices), len(o.slices),
				len(m.state.entries), len(o.services), len(o.slices))
		}
	}
	t.Logf("%d sequences: %d changes of Services, %d places contested at their ends, %d ports with several endpoints, %d with weights, %d ranges, %d problems told",
		sequences, changes, contested, several, uneven, spans, told)
	if changes < 5*sequences || contested < sequences/2 || several < sequences/2 || uneven < sequences/16 || spans < sequences/16 || told < sequences {
		t.Error("the sequences have too little in them")
	}
}

func problemSet(m *Model) map[Problem]bool {
	set := map[Problem]bool{}
	for _, p := range m.Problems() {
		set[p] = true
	}
	return set
}

// tallied checks what claims keep count of.
func tallied(t testing.TB, m *Model) {
	t.Helper()
	contests := map[*entry]int32{}
	ranges := 0
	for at, list := range m.state.claims.ranges {
		if len(list) == 0 || !slices.IsSortedFunc(list, claim.compare) {
			t.Fatalf("%v: ranges %v", at, list)
		}
		ranges += len(list)
		for _, r := range list {
			m.state.claims.beside(at, r, func(claim) { contests[r.entry]++ })
			m.state.claims.inRange(at, r, func(c claim) { contests[r.entry]++; contests[c.entry]++ })
		}
	}
	for at, list := range m.state.claims.contested {
		if len(list) < 2 || m.state.claims.held[at] != list[0] || !slices.IsSortedFunc(list, claim.compare) {
			t.Fatalf("%v: contested by %v, held by %v", at, list, m.state.claims.held[at])
		}
		for _, c := range list {
			contests[c.entry]++
		}
	}
	for name, e := range m.state.entries {
		if e.contests != contests[e] {
			t.Fatalf("%s: %d contests, counted %d", name, contests[e], e.contests)
		}
		e.eachRange(func(at span, r claim) {
			if ranges--; !slices.Contains(m.state.claims.ranges[at], r) {
				t.Fatalf("%s: does not claim %v", name, at)
			}
		})
		e.each(func(at place, c claim) {
			if m.state.claims.contested[at] == nil && m.state.claims.held[at] != c {
				t.Fatalf("%s: does not hold %v", name, at)
			}
		})
	}
	if ranges != 0 {
		t.Fatalf("%d ranges of nobody", ranges)
	}
}

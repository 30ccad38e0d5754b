package model

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/types"
)

// State is what all addresses and ports of the node should do.
type State struct {
	globals  Globals
	entries  map[types.NamespacedName]*entry
	claims   claims
	hairpins map[Hairpin]int32
	counts   Counts
}

// Counts are sums over all Services.
type Counts struct {
	// Services, Ports (each in each of its families), Frontends, and Endpoints of Ports, counted as often as a Port has them
	// under the policy that has more.
	Services, Ports, Frontends, Endpoints int
	// NoLocal are Ports that drop for want of a local endpoint, under internal and external traffic policy
	// (sync_proxy_rules_no_local_endpoints_total).
	NoLocal [Families]struct{ Internal, External int }
}

// Globals is what goes for all Services. It is not to be changed.
func (s *State) Globals() *Globals { return &s.globals }

// Counts are the sums of now.
func (s *State) Counts() Counts { return s.counts }

// Service is what is to be done for a Service; nil if nothing is.
func (s *State) Service(name types.NamespacedName) *Service {
	if e := s.entries[name]; e != nil {
		return e.won
	}
	return nil
}

// Services are all, sorted by name.
func (s *State) Services() iter.Seq[*Service] {
	names := slices.SortedFunc(maps.Keys(s.entries), compareNames)
	return func(yield func(*Service) bool) {
		for _, n := range names {
			if e := s.entries[n]; e.won != nil && !yield(e.won) {
				return
			}
		}
	}
}

// Hairpins are all, sorted.
func (s *State) Hairpins() []Hairpin {
	return slices.SortedFunc(maps.Keys(s.hairpins), Hairpin.compare)
}

// Lookup finds who answers at an address and port, one of a range included; node ports are at the family's unspecified address.
func (s *State) Lookup(p Protocol, at netip.AddrPort) (*Service, *Port, *Frontend) {
	where := place{at.Addr(), at.Port(), p}
	c, ok := s.claims.held[where]
	if !ok || c.frontend < 0 || s.claims.shadowed(where, c) {
		if c, ok = s.claims.lookupRange(p, at); !ok {
			return nil, nil, nil
		}
	}
	return c.entry.won, &c.entry.raw.Ports[c.port], c.of()
}

// Claimants are the Services that claim an address and port, the one that holds it first; the same one may be there twice,
// for two of its ports.
func (s *State) Claimants(p Protocol, at netip.AddrPort) []types.NamespacedName {
	where := place{at.Addr(), at.Port(), p}
	list := s.claims.contested[where]
	if c, ok := s.claims.held[where]; ok && list == nil {
		list = []claim{c}
	}
	out := make([]types.NamespacedName, len(list))
	for i, c := range list {
		out[i] = c.entry.name
	}
	return out
}

// IsClusterIP is whether it is the cluster IP of a Service.
func (s *State) IsClusterIP(a netip.Addr) bool {
	_, ok := s.claims.held[place{addr: a}]
	return ok
}

// Equal is whether both would have packets treated the same.
func (s *State) Equal(o *State) bool { return s.diff(o) == "" }

// diff is the first difference; empty without one.
func (s *State) diff(o *State) string {
	if !s.globals.equal(&o.globals) {
		return "globals"
	}
	for name, e := range s.entries {
		if other := o.Service(name); !e.won.equal(other) {
			return e.won.String() + "\nother:\n" + other.String()
		}
	}
	for name, e := range o.entries {
		if e.won != nil && s.Service(name) == nil {
			return "none\nother:\n" + e.won.String()
		}
	}
	if !slices.Equal(s.Hairpins(), o.Hairpins()) {
		return "hairpins"
	}
	if s.counts != o.counts {
		return "counts"
	}
	return ""
}

// String is all of it, for people and for tests.
func (s *State) String() string {
	var b strings.Builder
	for f := range Family(Families) {
		b.WriteString(s.globals.Family[f].line(f) + "\n")
	}
	for svc := range s.Services() {
		b.WriteString(svc.String() + "\n")
	}
	return b.String()
}

// count adds a Service to the sums, or takes it away.
func (c *Counts) count(s *Service, sign int) {
	if s == nil {
		return
	}
	c.Services += sign
	c.Ports += sign * len(s.Ports)
	for i := range s.Ports {
		p := &s.Ports[i]
		c.Frontends += sign * (len(p.Frontends) + len(p.Ranges))
		c.Endpoints += sign * max(len(p.Cluster), len(p.Local))
		var inside, outside bool
		for j := range p.Frontends {
			f := &p.Frontends[j]
			inside = inside || f.Action == Drop && f.Kind == ClusterIP
			outside = outside || f.Action == Drop && f.Kind != ClusterIP
		}
		if inside {
			c.NoLocal[p.Family].Internal += sign
		}
		if outside {
			c.NoLocal[p.Family].External += sign
		}
	}
}

func compareNames(a, b types.NamespacedName) int {
	if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
		return c
	}
	return strings.Compare(a.Name, b.Name)
}

func (h Hairpin) compare(o Hairpin) int {
	if c := cmp.Compare(h.Protocol, o.Protocol); c != 0 {
		return c
	}
	return h.Endpoint.Compare(o.Endpoint)
}

func (g *Globals) equal(o *Globals) bool {
	for f := range Families {
		a, b := &g.Family[f], &o.Family[f]
		if a.Enabled != b.Enabled || a.Detector != b.Detector || a.NodePorts.Loopback != b.NodePorts.Loopback ||
			!slices.Equal(a.NodePorts.Prefixes, b.NodePorts.Prefixes) || !slices.Equal(a.ServiceCIDRs, b.ServiceCIDRs) {
			return false
		}
	}
	return true
}

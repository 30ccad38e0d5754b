package model

import (
	"slices"
	"strings"
	"unique"

	"k8s.io/apimachinery/pkg/types"
)

// Standing is an endpoint that slices have for a Port, and how it stands under a policy.
type Standing struct {
	// Endpoint has the weight that annotations give it, 1 without any.
	Endpoint
	// Ready, Serving and Terminating are its conditions.
	Ready, Serving, Terminating bool
	// Zones are those that it is hinted for.
	Zones []string
	// Share is which part of new connections it gets, from 0 to 1.
	Share float64
	// Why is why it gets that, for people.
	Why string
}

// Standings are all endpoints that slices have for a Port of a Service, sorted, with their shares under a policy, and what is made
// of their hints, for people; that is empty if there are none. Its cost is that of building the Port.
func (m *Model) Standings(service types.NamespacedName, p *Port, policy Policy) (list []Standing, hinted string) {
	e := m.state.entries[service]
	if e == nil || e.spec == nil {
		return nil, ""
	}
	from := indexSlices(nil, e.slices)
	from.weights, from.even = e.spec.weights, e.spec.even
	all := gather(nil, &from, portKey{p.Family, p.Protocol, unique.Make(p.Name)})
	used := p.Cluster
	if policy == Local {
		used = p.Local
	}
	shares := sharesOf(p, used)
	v := view{policy: policy, zone: m.circumstances.zone, hints: hintsOf(all, m.circumstances.zone)}
	for i := range all {
		c := all[i].conditions
		v.ready = v.ready || c.all(isReady) && (policy == Cluster || c.all(isLocal))
		v.anyHints = v.anyHints || c&(hasZones|hasNodes) != 0
	}
	for i := range all {
		c := &all[i]
		s := Standing{
			Endpoint: c.Endpoint, Ready: c.conditions.all(isReady), Serving: c.conditions.all(isServing),
			Terminating: c.conditions.all(isTerminating),
		}
		s.Weight = c.weight
		if c.conditions.all(hasZones) {
			s.Zones = strings.Split(strings.Trim(c.zones.Value(), "\x00"), "\x00\x00")
		}
		at := slices.IndexFunc(used, func(u Endpoint) bool { return u.compare(c.Endpoint) == 0 })
		if at >= 0 {
			s.Share = shares[at]
		}
		s.Why = v.why(c, at >= 0)
		list = append(list, s)
	}
	return list, v.hinted()
}

// sharesOf is which part of new connections each of a Port's endpoints gets: of many clients, where a hash says who.
func sharesOf(p *Port, used []Endpoint) []float64 {
	out := make([]float64, len(used))
	if table := p.Hash.Table(used); table != nil {
		for _, i := range table {
			out[i] += 1 / float64(len(table))
		}
		return out
	}
	shares, sum := Shares(used), 0
	for _, n := range shares {
		sum += n
	}
	for i := range out {
		if shares == nil {
			out[i] = 1 / float64(len(used))
		} else {
			out[i] = float64(shares[i]) / float64(sum)
		}
	}
	return out
}

// view is what the endpoints of a port have in common.
type view struct {
	policy          Policy
	zone            string
	hints           hints
	ready, anyHints bool
}

// hinted says what is made of hints.
func (v *view) hinted() string {
	switch {
	case !v.anyHints || v.policy == Local:
		return ""
	case !v.ready:
		return "hints are not followed: no endpoint is ready"
	case v.hints == byNodeHints:
		return "hints are followed: endpoints for this node"
	case v.hints == byZoneHints:
		return "hints are followed: endpoints for this node's zone, " + v.zone
	case v.zone == "":
		return "hints are not followed: this node has no zone, and not all endpoints have hints for nodes with one for this one"
	}
	return "hints are not followed: some endpoint has none, or none is for this node or its zone, " + v.zone
}

// why says why an endpoint is used, or is not.
func (v *view) why(c *candidate, used bool) string {
	is := c.conditions
	switch {
	case used && !is.all(isReady):
		return "terminating, but still serving, and none is ready"
	case used && v.policy == Cluster && v.hints == byNodeHints:
		return "ready, for this node"
	case used && v.policy == Cluster && v.hints == byZoneHints:
		return "ready, for this zone"
	case used:
		return "ready"
	case v.policy == Local && !is.all(isLocal):
		return "on another node, and the policy is Local"
	case is.all(isTerminating) && !is.all(isServing):
		return "terminating, and serving no more"
	case is.all(isTerminating) && !is.all(isReady):
		return "terminating, and others are ready"
	case !is.all(isReady):
		return "not ready"
	case v.policy == Cluster && v.hints == byNodeHints && !is.all(forNode):
		return "for other nodes, by its hints"
	case v.policy == Cluster && v.hints == byZoneHints && !c.inZone(v.zone):
		return "for other zones, by its hints"
	case c.weight == 0:
		return "weight 0"
	}
	return "ready, but the Service's port has no use for it under this policy"
}

// Node is the name of the node, and its zone, which is empty if it has none.
func (m *Model) Node() (name, zone string) { return m.config.NodeName, m.circumstances.zone }

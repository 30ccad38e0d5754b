package model

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Model computes a State, and what changes of it. It is not safe for concurrent use.
type Model struct {
	config Config
	rules  rules
	node   nodeFacts
	cidrs  map[string][]netip.Prefix
	slices map[types.NamespacedName]*slice
	// state is as of the last Commit.
	state         State
	circumstances circumstances
	dirty         map[*entry]struct{}
	// stale is whether the node, the configuration or ServiceCIDRs have changed.
	stale bool
	// there is whether there is a Node of the name.
	there bool
	// committed is whether there was a Commit.
	committed bool
	journal   journal
	scratch   scratch
}

// entry is one name: a Service, or slices of one that is not there, or both.
type entry struct {
	name types.NamespacedName
	spec *serviceSpec
	// slices are sorted by name.
	slices []*slice
	// raw is what is to be done if there were no other Service, won what is left of it by those that hold its addresses.
	raw, won *Service
	// created is that of the Service that raw was made of.
	created int64
	// contests is for how many of raw's places there are others.
	contests int32
	// crowded is whether it is left out for having too many endpoints.
	crowded bool
}

// New makes a Model with no Service. An error names the field of the Config and its value.
func New(c Config) (*Model, error) {
	m := &Model{
		cidrs:  map[string][]netip.Prefix{},
		slices: map[types.NamespacedName]*slice{},
		dirty:  map[*entry]struct{}{},
		state: State{
			entries:  map[types.NamespacedName]*entry{},
			claims:   claims{held: map[place]claim{}},
			hairpins: map[Hairpin]int32{},
		},
	}
	m.config.NodeName = c.NodeName
	return m, m.SetConfig(c)
}

// State is as of the last Commit, and changes with the next one. Before the first it is empty.
func (m *Model) State() *State { return &m.state }

// HasNode is whether there is a Node of the name.
func (m *Model) HasNode() bool { return m.there }

// Committed is whether there was a Commit: before the first nothing is known.
func (m *Model) Committed() bool { return m.committed }

// Problems are all that objects have now, in no order.
func (m *Model) Problems() []Problem {
	var out []Problem
	for _, list := range m.journal.now {
		out = append(out, list...)
	}
	return out
}

// SetConfig changes the configuration, all but the node's name. With an error nothing is changed.
func (m *Model) SetConfig(c Config) error {
	if c.NodeName != m.config.NodeName {
		return fmt.Errorf("NodeName: %q: it was %q, and cannot be changed", c.NodeName, m.config.NodeName)
	}
	r, err := readConfig(&c)
	if err != nil {
		return err
	}
	c.ClusterCIDRs, c.NodePortAddresses = slices.Clone(c.ClusterCIDRs), slices.Clone(c.NodePortAddresses)
	m.config, m.rules, m.stale = c, r, true
	return nil
}

// SetNode takes the node's own Node; nil is one that is not there.
func (m *Model) SetNode(n *corev1.Node) {
	m.there = n != nil
	facts, bad := reduceNode(n)
	m.journal.set(subject{kind: "Node", object: types.NamespacedName{Name: m.config.NodeName}}, bad)
	if facts != m.node {
		facts.zone = strings.Clone(facts.zone)
		m.node, m.stale = facts, true
	}
}

// SetServiceCIDR adds a ServiceCIDR, or changes it.
func (m *Model) SetServiceCIDR(c *networkingv1.ServiceCIDR) {
	list, bad := reduceServiceCIDR(c)
	m.journal.set(subject{kind: "ServiceCIDR", object: types.NamespacedName{Name: c.Name}}, bad)
	if !slices.Equal(m.cidrs[c.Name], list) {
		m.cidrs[c.Name], m.stale = list, true
	}
}

// DeleteServiceCIDR takes a ServiceCIDR away.
func (m *Model) DeleteServiceCIDR(name string) {
	m.journal.set(subject{kind: "ServiceCIDR", object: types.NamespacedName{Name: name}}, nil)
	if _, ok := m.cidrs[name]; ok {
		delete(m.cidrs, name)
		m.stale = true
	}
}

// SetService adds a Service, or changes it. The object is not kept.
func (m *Model) SetService(s *corev1.Service) {
	name := types.NamespacedName{Namespace: s.Namespace, Name: s.Name}
	spec, bad := reduceService(s)
	m.journal.set(subject{kind: "Service", object: name}, bad)
	m.setSpec(name, spec)
}

// DeleteService takes a Service away. Its slices stay until they are deleted.
func (m *Model) DeleteService(name types.NamespacedName) {
	m.journal.set(subject{kind: "Service", object: name}, nil)
	m.setSpec(name, nil)
}

func (m *Model) setSpec(name types.NamespacedName, spec *serviceSpec) {
	e := m.state.entries[name]
	if e == nil && spec != nil {
		e = m.entry(name)
	}
	if e != nil && !e.spec.equal(spec) {
		e.spec = spec
		m.touch(e)
	}
}

// SetSlice adds an EndpointSlice, or changes it. The object is not kept.
func (m *Model) SetSlice(s *discoveryv1.EndpointSlice) {
	name := types.NamespacedName{Namespace: s.Namespace, Name: s.Name}
	reduced, bad := reduceSlice(s, m.config.NodeName)
	m.journal.set(subject{kind: "EndpointSlice", object: name}, bad)
	m.setSlice(name, reduced)
}

// DeleteSlice takes an EndpointSlice away.
func (m *Model) DeleteSlice(name types.NamespacedName) {
	m.journal.set(subject{kind: "EndpointSlice", object: name}, nil)
	m.setSlice(name, nil)
}

func (m *Model) setSlice(name types.NamespacedName, s *slice) {
	old := m.slices[name]
	if old.equal(s) {
		return
	}
	if old != nil {
		e := m.state.entries[old.service]
		e.slices = slices.DeleteFunc(e.slices, func(o *slice) bool { return o == old })
		delete(m.slices, name)
		m.touch(e)
	}
	if s != nil {
		e := m.entry(s.service)
		s.service = e.name
		i, _ := slices.BinarySearchFunc(e.slices, s, func(a, b *slice) int { return strings.Compare(a.name, b.name) })
		e.slices = slices.Insert(e.slices, i, s)
		m.slices[name] = s
		m.touch(e)
	}
}

func (m *Model) entry(name types.NamespacedName) *entry {
	e := m.state.entries[name]
	if e == nil {
		e = &entry{name: name}
		m.state.entries[name] = e
	}
	return e
}

func (m *Model) touch(e *entry) { m.dirty[e] = struct{}{} }

package model

import (
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// FuzzObjects sends whatever JSON makes of an API server's objects past a Service that must not take notice, unless its
// addresses are claimed.
func FuzzObjects(f *testing.F) {
	r := chance{rand.New(rand.NewPCG(1, 2)), true}
	for range 50 {
		name := r.name()
		add := func(o any) []byte { b, _ := json.Marshal(o); return b }
		f.Add(add(r.service(name)), add(r.slice(name)), add(r.node()), add(r.serviceCIDR()))
	}
	f.Fuzz(func(t *testing.T, service1, slice2, node, cidr []byte) {
		var s corev1.Service
		var e discoveryv1.EndpointSlice
		var n corev1.Node
		var c networkingv1.ServiceCIDR
		// What cannot be read is half read: so much the better.
		_ = json.Unmarshal(service1, &s)
		_ = json.Unmarshal(slice2, &e)
		_ = json.Unmarshal(node, &n)
		_ = json.Unmarshal(cidr, &c)
		canary := []any{service("canary", "172.30.0.99"), slice1("canary", far+" far")}
		m := modelOf(t, canary...)
		k := newKernel()
		all := Delta{Globals: m.State().Globals()}
		for svc := range m.State().Services() {
			all.Services = append(all.Services, Change{Name: svc.Name, New: svc})
		}
		k.follow(t, &all)
		ours := m.State().Service(named(canary[0].(*corev1.Service)))
		m.SetService(&s)
		m.SetSlice(&e)
		m.SetNode(&n)
		m.SetServiceCIDR(&c)
		d := m.Commit()
		k.follow(t, &d)
		k.is(t, m.State())
		sound(t, m.State())
		_ = m.State().String()
		if named(&s) != ours.Name && e.Labels[discoveryv1.LabelServiceName] != "canary" && len(m.state.claims.contested) == 0 {
			if now := m.State().Service(ours.Name); !now.equal(ours) {
				t.Fatalf("the other Service was:\n%s\nis:\n%s", ours, now)
			}
		}
		full := modelOf(t, append(canary, &s, &e, &n, &c)...)
		if diff := m.State().diff(full.State()); diff != "" {
			t.Fatal(diff)
		}
		for _, p := range []Packet{packet(t, outside, webIP+":80"), packet(t, podHere, nodeSelf+":30080"), packet(t, "fd10:1::5", "[fd30::1]:80"), {}} {
			Decide(m.State(), p)
		}
		m.DeleteService(named(&s))
		m.DeleteSlice(named(&e))
		m.DeleteServiceCIDR(c.Name)
		d = m.Commit()
		k.follow(t, &d)
		k.is(t, m.State())
	})
}

// FuzzSequences has bytes choose what TestIncrementalEqualsFull leaves to chance.
func FuzzSequences(f *testing.F) {
	f.Add([]byte("a sequence of changes, some of them evil, over and over, until something gives"))
	f.Fuzz(func(t *testing.T, choices []byte) {
		if len(choices) > 4096 {
			t.Skip()
		}
		source := &chosen{bytes: choices}
		r := chance{rand.New(source), true}
		o := newObjects(r.config())
		m, err := New(o.config)
		if err != nil {
			t.Fatal(err)
		}
		k := newKernel()
		for len(source.bytes) > 0 {
			o.step(t, r, m)
			if r.in(2) {
				d := m.Commit()
				k.follow(t, &d)
			}
		}
		d := m.Commit()
		k.follow(t, &d)
		k.is(t, m.State())
		sound(t, m.State())
		full, _ := o.model(t)
		if diff := m.State().diff(full.State()); diff != "" {
			t.Fatal(diff)
		}
	})
}

// chosen is a source of numbers: the bytes of an input, two a number, and when they are used up what follows from nothing (no
// number over and over: rand would wait for another one).
type chosen struct {
	bytes []byte
	then  rand.PCG
}

func (c *chosen) Uint64() uint64 {
	if len(c.bytes) < 2 {
		c.bytes = nil
		return c.then.Uint64()
	}
	// The few values that matter are in the upper bits, and the lower ones must not keep rand from taking it.
	n := uint64(binary.LittleEndian.Uint16(c.bytes))<<48 | c.then.Uint64()>>16
	c.bytes = c.bytes[2:]
	return n
}

package model

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestStandings(t *testing.T) {
	a, b, c := "10.1.0.1:80", "10.2.0.1:80", "10.3.0.1:80"
	for name, x := range map[string]struct {
		endpoints []string
		weights   string
		policy    Policy
		want      []string
		hints     string
	}{
		"two alike": {[]string{a, b + " far"}, "", Cluster, []string{"50% ready", "50% ready"}, ""},
		"conditions": {
			[]string{a, b + " far notready", c + " far dead"}, "", Cluster,
			[]string{"100% ready", "0% not ready", "0% terminating, and serving no more"}, "",
		},
		"one that ends":   {[]string{a, b + " far dying"}, "", Cluster, []string{"100% ready", "0% terminating, and others are ready"}, ""},
		"all end":         {[]string{a + " dying", b + " far dead"}, "", Cluster, []string{"100% terminating, but still serving, and none is ready", "0% terminating, and serving no more"}, ""},
		"Local":           {[]string{a, b + " far"}, "", Local, []string{"100% ready", "0% on another node, and the policy is Local"}, ""},
		"Local that ends": {[]string{a + " dying", b + " far"}, "", Local, []string{"100% terminating, but still serving, and none is ready", "0% on another node, and the policy is Local"}, ""},
		"zones": {
			[]string{a + " zone=zone1", b + " far zone=zone2", c + " far notready"}, "", Cluster,
			[]string{"100% ready, for this zone", "0% for other zones, by its hints", "0% not ready"}, "hints are followed: endpoints for this node's zone, zone1",
		},
		"nodes": {
			[]string{a + " node=node2", b + " far node=node1"}, "", Cluster, []string{"0% for other nodes, by its hints", "100% ready, for this node"},
			"hints are followed: endpoints for this node",
		},
		"a hint is missing": {
			[]string{a + " zone=zone1", b + " far"}, "", Cluster, []string{"50% ready", "50% ready"},
			"hints are not followed: some endpoint has none, or none is for this node or its zone, zone1",
		},
		"weights":  {[]string{a, b + " far", c + " far"}, "10.1.0.1=3,10.3.0.1=0", Cluster, []string{"75% ready", "25% ready", "0% weight 0"}, ""},
		"all zero": {[]string{a, b + " far"}, "*=0", Cluster, []string{"50% ready", "50% ready"}, ""},
	} {
		s := web(withNodePort, externalLocal)
		if x.weights != "" {
			annotated(WeightsAnnotation, x.weights)(s)
		}
		m := modelOf(t, s, slice1("web", x.endpoints...))
		port := &m.State().Service(named(s)).Ports[0]
		list, hints := m.Standings(named(s), port, x.policy)
		var got []string
		for i, e := range list {
			got = append(got, fmt.Sprintf("%.0f%% %s", 100*e.Share, e.Why))
			if at := strings.Fields(x.endpoints[i])[0]; e.AddrPort().String() != at {
				t.Errorf("%s: %s is no. %d", name, e, i)
			}
		}
		if !slices.Equal(got, x.want) || hints != x.hints {
			t.Errorf("%s:\n%q, %q, want\n%q, %q", name, got, hints, x.want, x.hints)
		}
	}
}

// Whatever the objects, who gets a share is who is in the port's list, and all of them together get all of it.
func TestStandingsAreWhatPortsHave(t *testing.T) {
	for seed := range uint64(60) {
		r := chance{Rand: rand.New(rand.NewPCG(seed, 3)), evil: seed%2 == 0}
		o := newObjects(r.config())
		m, _ := o.model(t)
		for range 30 {
			o.step(t, r, m)
		}
		m.Commit()
		for svc := range m.State().Services() {
			for i := range svc.Ports {
				for _, policy := range []Policy{Cluster, Local} {
					p := &svc.Ports[i]
					list, _ := m.Standings(svc.Name, p, policy)
					used := [...][]Endpoint{p.Cluster, p.Local}[policy]
					sum, n := 0.0, 0
					for _, e := range list {
						if sum += e.Share; e.Share > 0 {
							n++
						}
						if strings.HasPrefix(e.Why, "ready, but") && len(used) > 0 {
							t.Errorf("seed %d: %s %s: %+v", seed, svc.Name, policy, e)
						}
					}
					if n != len(used) || n > 0 && math.Abs(sum-1) > 1e-9 {
						t.Errorf("seed %d: %s %s: %d endpoints have %v of it: %v, want %v", seed, svc.Name, policy, n, sum, list, used)
					}
				}
			}
		}
	}
}

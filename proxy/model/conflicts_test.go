package model

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func created(seconds int64) serviceOption {
	return func(s *corev1.Service) { s.CreationTimestamp = metav1.NewTime(time.Unix(seconds, 0)) }
}

// Of two Services with one address and port, the same one has it whatever the order in which they come, and it is told.
func TestTwoServicesClaimOneAddress(t *testing.T) {
	const a, b = "10.2.0.1:80", "10.2.0.2:80"
	withoutEndpoints := func(s *corev1.Service) { s.Spec.Ports[0].Name = "none" }
	for name, c := range map[string]struct {
		a, b  []serviceOption
		dst   string
		want  string
		field string
	}{
		"cluster IP before external IP": {
			[]serviceOption{created(2000)}, []serviceOption{created(1), withExternalIPs("172.30.0.1")}, "172.30.0.1:80", a, "spec.externalIPs",
		},
		"cluster IP without endpoints too": {
			[]serviceOption{withoutEndpoints}, []serviceOption{withExternalIPs("172.30.0.1")}, "172.30.0.1:80", "reject", "spec.externalIPs",
		},
		"cluster IP before load balancer": {
			nil, []serviceOption{created(1), withLB("172.30.0.1")}, "172.30.0.1:80", a, "status.loadBalancer.ingress",
		},
		"load balancer before external IP": {
			[]serviceOption{withLB(lbIP)}, []serviceOption{created(1), withExternalIPs(lbIP)}, lbIP + ":80", a + " masq", "spec.externalIPs",
		},
		"the older external IP": {
			[]serviceOption{created(1), withExternalIPs(externalIP)},
			[]serviceOption{created(2), withExternalIPs(externalIP)},
			externalIP + ":80", a + " masq", "spec.externalIPs",
		},
		"the one with endpoints": {
			[]serviceOption{created(2), withLB(lbIP)},
			[]serviceOption{created(1), withLB(lbIP), withoutEndpoints, func(s *corev1.Service) { s.Spec.Ports[0].NodePort++ }},
			lbIP + ":80", a + " masq", "status.loadBalancer.ingress",
		},
		"by name": {
			[]serviceOption{withNodePort}, []serviceOption{withNodePort}, nodeSelf + ":30080", a + " masq", "spec.ports[].nodePort",
		},
	} {
		t.Run(name, func(t *testing.T) {
			one, other := service("a", "172.30.0.1", c.a...), service("b", "172.30.0.2", c.b...)
			for _, order := range [][]any{{one, other}, {other, one}} {
				m := modelOf(t, append(order, slice1("a", a+" far"), slice1("b", b+" far"))...)
				check(t, m, flow{podFar, "172.30.0.2:80", map[bool]string{true: b, false: "reject"}[other.Spec.Ports[0].Name == "http"]})
				if v := Decide(m.State(), packet(t, outside, c.dst)); verdict(v) != c.want && verdict(v) != c.want+" masq" {
					t.Errorf("%s: %q, want %q", c.dst, verdict(v), c.want)
				}
				p := m.Problems()
				if len(p) != 1 || p[0].Object.Name != "b" || p[0].Field != c.field {
					t.Errorf("problems %v", p)
				}
				if names := fmt.Sprint(m.State().Claimants(TCP, at(c.dst))); names != "[default/a default/b]" {
					t.Errorf("claimants %s", names)
				}

				// When the one goes, the other has it; one Delta says so.
				m.DeleteService(types.NamespacedName{Namespace: "default", Name: "a"})
				d := m.Commit()
				if len(d.Services) != 2 || len(m.Problems()) > 0 || len(m.state.claims.contested) > 0 {
					t.Errorf("delta %+v, problems %v", d, m.Problems())
				}
				svc, _, _ := m.State().Lookup(TCP, at(c.dst))
				if svc == nil || svc.Name.Name != "b" {
					t.Errorf("held by %v", svc)
				}
				m.SetService(one)
				if d := m.Commit(); len(d.Services) != 2 || len(d.Problems) != 1 {
					t.Errorf("delta %+v", d)
				}
			}
		})
	}
}

// Who has an address is as it would be from the beginning also where what decides changes later.
func TestAClaimGrowsWeaker(t *testing.T) {
	const a, b = "10.2.0.1:80", "10.2.0.2:80"
	holder := func(m *Model, want string) {
		t.Helper()
		if svc, _, _ := m.State().Lookup(TCP, at(externalIP+":80")); svc == nil || svc.Name.Name != want {
			t.Errorf("held by %v, want %s", svc, want)
		}
		tallied(t, m)
	}
	m := modelOf(t, service("a", "172.30.0.1", withExternalIPs(externalIP)), service("b", "172.30.0.2", withExternalIPs(externalIP)),
		slice1("a", a+" far"), slice1("b", b+" far"))
	holder(m, "a")
	m.SetSlice(slice1("a"))
	if d := m.Commit(); len(d.Services) != 2 {
		t.Errorf("delta %+v", d)
	}
	holder(m, "b")
	m.SetSlice(slice1("b"))
	m.Commit()
	holder(m, "a")
	m.SetSlice(slice1("a", a+" far"))
	m.SetSlice(slice1("b", b+" far"))
	m.Commit()
	holder(m, "a")
	// It is deleted and made again between two Commits.
	m.SetService(service("a", "172.30.0.1", withExternalIPs(externalIP), created(5000)))
	m.Commit()
	holder(m, "b")
	m.SetService(service("b", "172.30.0.2", withExternalIPs(externalIP), created(6000)))
	m.Commit()
	holder(m, "a")
}

// at is where Lookup has an address: node ports are at the unspecified one.
func at(s string) netip.AddrPort {
	a := netip.MustParseAddrPort(s)
	if a.Addr() == netip.MustParseAddr(nodeSelf) {
		return netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port())
	}
	return a
}

func TestTwoPortsOfOneServiceClaimOneAddress(t *testing.T) {
	s := web(func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "other", Port: 80, Protocol: corev1.ProtocolTCP},
			corev1.ServicePort{Name: "dns", Port: 80, Protocol: corev1.ProtocolUDP})
	})
	m := modelOf(t, s, slice1("web", here))
	check(t, m, flow{podFar, webIP + ":80", here})
	if p := m.Problems(); len(p) != 1 || p[0].Value != webIP+":80/tcp" {
		t.Errorf("problems %v", p)
	}
	m.SetService(web())
	m.Commit()
	if len(m.Problems())+len(m.state.claims.contested) > 0 {
		t.Errorf("problems %v", m.Problems())
	}
}

// An address that many claim must not cost more for each of them: whoever may write down external IPs could slow all nodes.
func TestAnAddressThatManyClaimIsCheap(t *testing.T) {
	m := modelOf(t)
	const many = 5000
	for _, i := range rand.Perm(many) {
		m.SetService(service(fmt.Sprintf("s%d", i), fmt.Sprintf("172.30.%d.%d", i/250, 1+i%250), withExternalIPs(externalIP), created(int64(i))))
	}
	m.Commit()
	if svc, _, _ := m.State().Lookup(TCP, at(externalIP+":80")); svc == nil || svc.Name.Name != "s0" {
		t.Fatalf("held by %v", svc)
	}
	if n := len(m.Problems()); n != many-1 {
		t.Errorf("%d problems", n)
	}
	for i := range many - 1 {
		m.DeleteService(types.NamespacedName{Namespace: "default", Name: fmt.Sprintf("s%d", i)})
		if d := m.Commit(); len(d.Services) != 2 {
			t.Fatalf("%d: %d changes", i, len(d.Services))
		}
	}
}

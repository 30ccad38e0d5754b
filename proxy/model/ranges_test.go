package model

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func withRanges(text string) serviceOption { return annotated(PortRangesAnnotation, text) }

// What is sent to a range keeps its port; a port of the Service within the range is itself.
func TestPortRanges(t *testing.T) {
	m := modelOf(t, web(withLB(lbIP), withExternalIPs(externalIP), withSources("198.51.100.0/24"), withRanges("http=70-90,http=10000-20000/TCP")), slice1("web", here, far+" far"))
	check(t, m,
		flow{podHere, webIP + ":70", "10.1.0.1:70, 10.2.0.1:70"},
		flow{podHere, webIP + ":80", "10.1.0.1:8080, 10.2.0.1:8080"},
		flow{podHere, webIP + ":90", "10.1.0.1:90, 10.2.0.1:90"},
		flow{podHere, webIP + ":91", "reject"},
		flow{podHere, "udp " + webIP + ":75", "reject"},
		flow{outside, webIP + ":15000", "10.1.0.1:15000 masq, 10.2.0.1:15000 masq"},
		flow{outside, externalIP + ":20000", "10.1.0.1:20000 masq, 10.2.0.1:20000 masq"},
		flow{outside, lbIP + ":10000", "10.1.0.1:10000 masq, 10.2.0.1:10000 masq"},
		flow{"192.0.2.9", lbIP + ":10000", "drop"},
		flow{"192.0.2.9", externalIP + ":9999", "pass"},
		// A pod that reaches itself.
		flow{"10.1.0.1", webIP + ":70", "10.1.0.1:70 masq, 10.2.0.1:70"},
		flow{outside, nodeSelf + ":75", "pass"},
	)
	if h := m.State().Hairpins(); !slices.Contains(h, Hairpin{TCP, netip.MustParseAddrPort("10.1.0.1:0")}) || len(h) != 2 {
		t.Errorf("hairpins %v", h)
	}
}

// Policies are those of the address, and what has no endpoint is rejected.
func TestPortRangesFollowPolicies(t *testing.T) {
	m := modelOf(t, web(withLB(lbIP), externalLocal, withRanges("http=70-90")), slice1("web", far+" far"))
	check(t, m, flow{outside, lbIP + ":70", "drop"}, flow{podHere, lbIP + ":70", "10.2.0.1:70"}, flow{nodeSelf, lbIP + ":70", "10.2.0.1:70 masq"})
	m = modelOf(t, web(withLB(lbIP), withRanges("http=70-90")))
	check(t, m, flow{outside, lbIP + ":70", "reject"}, flow{podHere, webIP + ":70", "reject"})
}

// Two ports of one name are told apart by protocol.
func TestPortRangesByProtocol(t *testing.T) {
	two := func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: 80, Protocol: corev1.ProtocolUDP})
	}
	m := modelOf(t, web(two, withRanges("http=70-79/UDP")), sliceProtocol(slice1("web", far+" far"), corev1.ProtocolUDP))
	check(t, m, flow{podHere, "udp " + webIP + ":70", "10.2.0.1:70"}, flow{podHere, webIP + ":70", "reject"})
	m = modelOf(t, web(two, withRanges("http=70-79")), slice1("web", far+" far"))
	if p := m.Problems(); len(p) != 1 || !strings.Contains(p[0].Reason, "several") {
		t.Errorf("%v", p)
	}
	unnamed := func(s *corev1.Service) { s.Spec.Ports[0].Name = "" }
	slice := slice1("web", far+" far")
	slice.Ports[0].Name = ptr("")
	check(t, modelOf(t, web(unnamed, withRanges(" 70 - 79 ")), slice), flow{podHere, webIP + ":70", "10.2.0.1:70"})
}

func TestBadPortRanges(t *testing.T) {
	for _, text := range []string{"", "http", "http=70", "http=0-9", "http=9-8", "http=1-65536", "sip=70-79", "http=70-79/UDP", "http=70-79,http=79-80", "70-79"} {
		m := modelOf(t, web(withRanges(text)), slice1("web", here))
		check(t, m, flow{podHere, webIP + ":80", here}, flow{podHere, webIP + ":70", "reject"})
		if p := m.Problems(); len(p) != 1 || p[0].Field != "metadata.annotations[berth.run/port-ranges]" {
			t.Errorf("%q: %v", text, p)
		}
	}
	// What has no ranges says so, and so does a Service of too many addresses.
	c := testConfig
	c.NoRanges = true
	m := modelOf(t, c, web(withRanges("http=70-79")), slice1("web", here))
	check(t, m, flow{podHere, webIP + ":70", "reject"})
	if p := m.Problems(); len(p) != 1 || p[0].Value != "http=70-79/TCP" || !strings.Contains(p[0].Reason, "no ranges") {
		t.Errorf("%v", p)
	}
	m = modelOf(t, web(withExternalIPs("1.1.1.1", "1.1.1.2", "1.1.1.3"), withRanges("http=1-9,http=11-19,http=21-29,http=31-39,http=41-49")), slice1("web", here))
	if p := m.Problems(); len(p) != 1 || !strings.Contains(p[0].Reason, "too many") {
		t.Errorf("%v", p)
	}
}

// At the node's own addresses there are none: they would take the ports of the node's programs.
func TestPortRangesLeaveTheNodeItsPorts(t *testing.T) {
	m := modelOf(t, web(withExternalIPs(nodeSelf, "203.0.113.1", externalIP), withRanges("http=1-1000")), slice1("web", far+" far"))
	check(t, m, flow{outside, nodeSelf + ":22", "pass"}, flow{outside, "203.0.113.1:22", "pass"}, flow{outside, nodeSelf + ":80", far + " masq"},
		flow{outside, externalIP + ":22", "10.2.0.1:22 masq"})
	if p := m.Problems(); len(p) != 2 || !strings.Contains(p[0].Reason, "address of the node") {
		t.Errorf("%v", p)
	}
}

// Ports that others have, and ranges, are held by one, whatever came first, and passed on when that goes.
func TestPortRangesAndOthers(t *testing.T) {
	other := func(options ...serviceOption) *corev1.Service {
		s := service("other", "172.30.0.11", options...)
		s.CreationTimestamp = metav1.NewTime(time.Unix(2000, 0))
		return s
	}
	slices := []any{slice1("web", here), slice1("other", far+" far")}
	const at = externalIP
	for _, c := range []struct {
		name               string
		ranged, against    *corev1.Service
		port70, port80     string // outside, at the address
		problems           int
		afterwards70, gone string
	}{
		{"another's port", web(withExternalIPs(at), withRanges("http=70-90")), other(withExternalIPs(at), withPort(75)), "pass", here + " masq", 1, "10.1.0.1:70 masq", "other"},
		{"beside another's port", web(withExternalIPs(at), withRanges("http=70-90")), other(withExternalIPs(at), withPort(91)), "10.1.0.1:70 masq", here + " masq", 0, "10.1.0.1:70 masq", "other"},
		{"another's range, the older has it", web(withExternalIPs(at), withRanges("http=70-79")), other(withExternalIPs(at), withPort(443), withRanges("http=79-99")), "10.1.0.1:70 masq", here + " masq", 1, "pass", "web"},
	} {
		for _, order := range [][]any{{c.ranged, c.against}, {c.against, c.ranged}} {
			m := modelOf(t, append(order, slices...)...)
			check(t, m, flow{outside, at + ":70", c.port70}, flow{outside, at + ":80", c.port80})
			if p := m.Problems(); len(p) != c.problems {
				t.Errorf("%s: %v", c.name, p)
			}
			tallied(t, m)
			for _, s := range []*corev1.Service{c.ranged, c.against} {
				if s.Name == c.gone {
					m.DeleteService(named(s))
				}
			}
			m.Commit()
			tallied(t, m)
			check(t, m, flow{outside, at + ":70", c.afterwards70})
			if p := m.Problems(); len(p) != 0 {
				t.Errorf("%s, afterwards: %v", c.name, p)
			}
		}
	}
}

func withPort(n int32) serviceOption { return func(s *corev1.Service) { s.Spec.Ports[0].Port = n } }

// CVE-2020-8554: whoever writes another's cluster IP down as an external IP takes nothing of its ports, by a port or by a range.
func TestCVE_2020_8554_PortRanges(t *testing.T) {
	victim := web(withRanges("http=70-90"))
	attacker := service("evil", "172.30.0.66", withExternalIPs(webIP), withPort(75), func(s *corev1.Service) {
		s.CreationTimestamp = metav1.NewTime(time.Unix(1, 0))
	})
	m := modelOf(t, victim, slice1("web", here), attacker, slice1("evil", far+" far"))
	check(t, m, flow{podHere, webIP + ":75", "10.1.0.1:75"}, flow{podHere, webIP + ":80", here})
	if p := m.Problems(); len(p) != 1 || p[0].Object.Name != "evil" {
		t.Errorf("%v", p)
	}
	attacker.Spec.Ports[0].Port = 1000
	withRanges("http=1-999")(attacker)
	m = modelOf(t, victim, slice1("web", here), attacker, slice1("evil", far+" far"))
	check(t, m, flow{podHere, webIP + ":75", "10.1.0.1:75"}, flow{podHere, webIP + ":80", here}, flow{podHere, webIP + ":60", "reject"})
	if p := m.Problems(); len(p) != 1 || p[0].Object.Name != "evil" {
		t.Errorf("%v", p)
	}
}

// With session affinity a client gets one endpoint at all ports of a range.
func TestPortRangesWithAffinity(t *testing.T) {
	sticky := func(s *corev1.Service) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(60))}}
	}
	m := modelOf(t, web(sticky, withRanges("http=70-79")), slice1("web", here, far+" far", "10.2.0.2:8080 far"))
	one := Decide(m.State(), packet(t, outside, webIP+":70"))
	for _, port := range []string{"71", "75", "79"} {
		v := Decide(m.State(), packet(t, outside, webIP+":"+port))
		if len(v.Endpoints) != 1 || v.Endpoints[0].Addr != one.Endpoints[0].Addr {
			t.Errorf("%s: %v", port, v.Endpoints)
		}
	}
	if v := Decide(m.State(), packet(t, outside, webIP+":80")); len(v.Endpoints) != 3 {
		t.Errorf("whom affinity sends it to is not the model's to say: %v", v.Endpoints)
	}
	// That takes a hash, which nobody has asked for: what is told where there is none is about the ranges.
	for _, tc := range []struct {
		noRanges, noHash bool
		slice            *discoveryv1.EndpointSlice
		reason           string
	}{
		{true, true, slice1("web", here), "have no ranges"},
		{true, false, slice1("web", here), "have no ranges"},
		{false, true, slice1("web", here), "cannot hash; session affinity does not go for the ranges"},
		{false, false, crowdedSlice(defaultBuckets + 1), "1022 endpoints are more than 1021 buckets; session affinity does not go for the ranges"},
	} {
		c := testConfig
		c.NoRanges, c.NoHash = tc.noRanges, tc.noHash
		m := modelOf(t, c, web(sticky, withRanges("http=70-79")), tc.slice)
		p := m.Problems()
		if hashOf(t, m) != (Hash{}) || len(p) != 1 || p[0].Field != "metadata.annotations[berth.run/port-ranges]" || p[0].Value != "http=70-79/TCP" || !strings.Contains(p[0].Reason, tc.reason) {
			t.Errorf("%+v: %v, %v", tc, hashOf(t, m), p)
		}
	}
}

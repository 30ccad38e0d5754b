package model

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

func annotated(name, value string) serviceOption {
	return func(s *corev1.Service) {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations[name] = value
	}
}

// The endpoints of a test: three pods on two nodes in two zones, and a virtual machine.
func weightSlice() *discoveryv1.EndpointSlice {
	s := slice1("web", "10.1.0.1:8080", "10.2.0.1:8080 far", "10.2.0.2:8080 far", "10.2.0.3:8080 far")
	for i, pod := range []string{"web-canary-7d9f-x2x8z", "web-5c6b-aaaaa", "web-5c6b-bbbbb"} {
		s.Endpoints[i].TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: pod}
		s.Endpoints[i].Zone = ptr([]string{"a", "b", "b"}[i])
	}
	return s
}

// weights are the endpoints of web from outside, with their shares.
func weights(t *testing.T, m *Model) string {
	t.Helper()
	sound(t, m.State())
	v := Decide(m.State(), packet(t, outside, webIP+":80"))
	shares := Shares(v.Endpoints)
	var out []string
	for i, e := range v.Endpoints {
		n := 1
		if shares != nil {
			n = shares[i]
		}
		out = append(out, fmt.Sprintf("%s=%d", e.Addr, n))
	}
	return strings.Join(out, " ")
}

func TestWeights(t *testing.T) {
	for _, c := range []struct{ service, slice, want string }{
		{"", "", "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"10.1.0.1=3", "", "10.1.0.1=3 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"10.2.0.0/16=2, 10.1.0.1=4", "", "10.1.0.1=2 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"node/node1=5", "", "10.1.0.1=5 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"zone/b = 3,zone/a= 2", "", "10.1.0.1=2 10.2.0.1=3 10.2.0.2=3 10.2.0.3=1"},
		// A pod by its name, that of its ReplicaSet, that of its Deployment.
		{"pod/web-5c6b-bbbbb=0", "", "10.1.0.1=1 10.2.0.1=1 10.2.0.3=1"},
		{"pod/web-5c6b=9", "", "10.1.0.1=1 10.2.0.1=9 10.2.0.2=9 10.2.0.3=1"},
		{"pod/web-canary=1,*=33", "", "10.1.0.1=1 10.2.0.1=33 10.2.0.2=33 10.2.0.3=33"},
		// The first that is for an endpoint counts.
		{"*=7,10.1.0.1=3", "", "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		// 0 is none, unless all have it.
		{"*=0", "", "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"zone/b=0,10.2.0.3=0", "", "10.1.0.1=1"},
		// The slice's weight is that of endpoints that the Service says nothing of.
		{"", "5", "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1"},
		{"10.1.0.1=2", "4", "10.1.0.1=1 10.2.0.1=2 10.2.0.2=2 10.2.0.3=2"},
		{"10.1.0.1=2", "0", "10.1.0.1=1"},
		{"pod/web=3", "", "10.1.0.1=1 10.2.0.1=3 10.2.0.2=3 10.2.0.3=1"},
	} {
		svc, s := web(), weightSlice()
		if c.service != "" {
			annotated(WeightsAnnotation, c.service)(svc)
		}
		if c.slice != "" {
			s.Annotations = map[string]string{WeightAnnotation: c.slice}
		}
		if got := weights(t, modelOf(t, svc, s)); got != c.want {
			t.Errorf("Service %q, slice %q: %s, want %s", c.service, c.slice, got, c.want)
		}
	}
}

// Weights are those of the endpoints that a packet may go to: where those of one policy have the same, it has none.
func TestWeightsArePerPolicy(t *testing.T) {
	m := modelOf(t, web(withLB(lbIP), externalLocal, annotated(WeightsAnnotation, "10.1.0.1=0")), weightSlice())
	check(t, m, flow{outside, lbIP + ":80", "10.1.0.1:8080"}, flow{podHere, lbIP + ":80", "10.2.0.1:8080, 10.2.0.2:8080, 10.2.0.3:8080"})
}

// A mistake has a Problem, and the Service goes on without weights.
func TestBadWeights(t *testing.T) {
	for _, text := range []string{"", "10.1.0.1", "10.1.0.1=", "10.1.0.1=-1", "10.1.0.1=1001", "10.1.0.1=1.5", "10.1.0.300=1", "node/=1", "rack/a=1", "*=2,", strings.Repeat("*=2,", maxWeightRules) + "*=2"} {
		m := modelOf(t, web(annotated(WeightsAnnotation, text)), weightSlice())
		if got := weights(t, m); got != "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1" {
			t.Errorf("%q: %s", text, got)
		}
		if p := m.Problems(); len(p) != 1 || p[0].Kind != "Service" || p[0].Field != "metadata.annotations[berth.run/weights]" {
			t.Errorf("%q: problems %v", text, p)
		}
	}
	s := weightSlice()
	s.Annotations = map[string]string{WeightAnnotation: "much"}
	m := modelOf(t, web(), s)
	if p := m.Problems(); len(p) != 1 || p[0].Kind != "EndpointSlice" || p[0].Value != "much" {
		t.Errorf("problems %v", p)
	}
	if got := weights(t, m); got != "10.1.0.1=1 10.2.0.1=1 10.2.0.2=1 10.2.0.3=1" {
		t.Error(got)
	}
}

// Shares are the weights where there is room for them, and right to one number elsewhere.
func TestShares(t *testing.T) {
	of := func(weights ...uint16) (list []Endpoint) {
		for _, w := range weights {
			list = append(list, Endpoint{Weight: w})
		}
		return list
	}
	if got := Shares(of(1, 99)); !slices.Equal(got, []int{1, 99}) {
		t.Error(got)
	}
	if got := Shares(of(1000, 999)); !slices.Equal(got, []int{512, 512}) { // 512.256 and 511.744 of 1,024
		t.Error(got)
	}
	if got := Shares(of(0, 0, 0)); got != nil {
		t.Error(got)
	}
	r := rand.New(rand.NewPCG(1, 1))
	for range 3000 {
		list := make([]Endpoint, 2+r.IntN(300))
		sum := 0
		for i := range list {
			list[i].Weight = uint16(1 + r.IntN(MaxWeight))
			sum += int(list[i].Weight)
		}
		shares, total, raised := Shares(list), 0, 0
		for i, n := range shares {
			total += n
			if float64(list[i].Weight)*float64(max(fewShares, sharesEach*len(list)))/float64(sum) < 1 {
				raised++
			}
		}
		limit := max(fewShares, sharesEach*len(list))
		if total > limit+raised {
			t.Fatalf("%d numbers for %d endpoints", total, len(list))
		}
		for i, n := range shares {
			if want := float64(list[i].Weight) * float64(min(limit, sum)) / float64(sum); math.Abs(float64(n)-want) > 1 {
				t.Fatalf("%d numbers for weight %d of %d, of %d", n, list[i].Weight, sum, total)
			}
		}
	}
	// As many numbers as there can be are not too many.
	all := make([]Endpoint, maxWithShares)
	for i := range all {
		all[i].Weight = uint16(1 + i%MaxWeight)
	}
	total := 0
	for _, n := range Shares(all) {
		total += n
	}
	if total > 1<<16 || total < maxShares/2 {
		t.Error(total)
	}
	if got := Shares(append(all, all[0])); got != nil {
		t.Error("more endpoints than there are numbers for")
	}
}

func TestAnnotationsThatAreUnknownAreTold(t *testing.T) {
	m := modelOf(t, web(annotated("berth.run/weihgts", "node/a=3"), annotated("berth.run/consistent_hash", "source"), annotated("example.com/weights", "x")), slice1("web", here))
	p := m.Problems()
	if len(p) != 2 {
		t.Fatalf("%v", p)
	}
	for i, want := range []string{
		`Service default/web: metadata.annotations[berth.run/consistent_hash]: "source": is unknown, the nearest known is berth.run/consistent-hash; it is as if it were not there`,
		`Service default/web: metadata.annotations[berth.run/weihgts]: "node/a=3": is unknown, the nearest known is berth.run/weights; it is as if it were not there`,
	} {
		if p[i].String() != want {
			t.Errorf("%s", p[i])
		}
	}
	if m := modelOf(t, web(annotated(HashAnnotation, "source"), annotated(WeightsAnnotation, "*=2"), annotated(ResetAnnotation, "true"), annotated(PortRangesAnnotation, "http=70-79")), slice1("web", here)); len(m.Problems()) > 0 {
		t.Errorf("%v", m.Problems())
	}
}

package model

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// many are n endpoints, sorted.
func many(n int) (list []Endpoint) {
	for i := range n {
		list = append(list, Endpoint{Addr: netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), Port: 80})
	}
	return list
}

// Each bit of a key counts. That it is the kernel's hash is what TestHash of proxy/nft looks at, for all lengths that there are.
func TestJhash(t *testing.T) {
	seen := map[uint32]bool{}
	for n := 4; n <= 32; n += 4 {
		for i := range n {
			b := make([]byte, n)
			b[i] = 1
			seen[jhash(b, 0)] = true
		}
	}
	if len(seen) != 4+8+12+16+20+24+28+32 {
		t.Errorf("%d different ones", len(seen))
	}
}

// Each endpoint has as many buckets as any other, or one less.
func TestTableIsEven(t *testing.T) {
	for _, size := range HashBuckets {
		for _, n := range []int{2, 3, 10, 100, 251} {
			counts := make([]int, n)
			for _, i := range (Hash{BySource, size}).Table(many(n)) {
				counts[i]++
			}
			if slices.Max(counts)-slices.Min(counts) > 1 || slices.Min(counts) == 0 {
				t.Errorf("%d buckets for %d endpoints: %d to %d", size, n, slices.Min(counts), slices.Max(counts))
			}
		}
	}
}

// By weights it is as close.
func TestTableHasWeights(t *testing.T) {
	list := many(4)
	for i, w := range []uint16{1, 3, 6, 10} {
		list[i].Weight = w
	}
	counts := make([]int, 4)
	for _, i := range (Hash{BySource, 1021}).Table(list) {
		counts[i]++
	}
	for i, w := range []int{1, 3, 6, 10} {
		if want := 1021 * w / 20; counts[i] < want-1 || counts[i] > want+2 {
			t.Errorf("weight %d: %d buckets, not %d", w, counts[i], want)
		}
	}
	// None is left without.
	list[3].Weight = MaxWeight
	clear(counts)
	for _, i := range (Hash{BySource, 251}).Table(list) {
		counts[i]++
	}
	if slices.Min(counts) == 0 {
		t.Error(counts)
	}
}

// When an endpoint goes, few of the others' buckets move; when it comes back all is as it was.
func TestTableMovesLittle(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, c := range []struct {
		size uint16
		n    int
		most float64 // of the buckets of those that stay
	}{{251, 3, 0.08}, {251, 10, 0.10}, {1021, 3, 0.05}, {1021, 10, 0.05}, {1021, 50, 0.08}, {4093, 10, 0.03}, {4093, 100, 0.05}} {
		h, list := Hash{BySource, c.size}, many(c.n)
		before := h.Table(list)
		sum, worst := 0.0, 0.0
		const times = 20
		for range times {
			gone := r.IntN(c.n)
			after := h.Table(slices.Delete(slices.Clone(list), gone, gone+1))
			moved := 0
			for b, i := range before {
				now := int(after[b])
				if now >= gone {
					now++
				}
				if int(i) != gone && int(i) != now {
					moved++
				}
			}
			part := float64(moved) / float64(c.size)
			sum, worst = sum+part, max(worst, part)
		}
		t.Logf("%d buckets, %d endpoints: %.2f %% move beside those of the one that goes, %.2f %% at most", c.size, c.n, 100*sum/times, 100*worst)
		if sum/times > c.most {
			t.Errorf("%d buckets, %d endpoints: %.2f %% move", c.size, c.n, 100*sum/times)
		}
	}
}

func hashOf(t *testing.T, m *Model) Hash {
	t.Helper()
	sound(t, m.State())
	_, p, _ := m.State().Lookup(TCP, netip.MustParseAddrPort(webIP+":80"))
	return p.Hash
}

func TestHashAnnotation(t *testing.T) {
	slice := slice1("web", here, far+" far")
	for text, want := range map[string]Hash{
		"source": {BySource, 1021}, " source/251 ": {BySource, 251}, "source-and-port/4093": {BySourcePort, 4093},
	} {
		m := modelOf(t, web(annotated(HashAnnotation, text)), slice)
		if got := hashOf(t, m); got != want || len(m.Problems()) > 0 {
			t.Errorf("%q: %v, %v", text, got, m.Problems())
		}
	}
	for _, text := range []string{"", "destination", "source/", "source/1000", "source/-251", "SOURCE"} {
		m := modelOf(t, web(annotated(HashAnnotation, text)), slice)
		if p := m.Problems(); hashOf(t, m) != (Hash{}) || len(p) != 1 || p[0].Field != "metadata.annotations[berth.run/consistent-hash]" {
			t.Errorf("%q: %v", text, p)
		}
	}
	// What cannot hash draws, and says so, as it does for more endpoints than buckets.
	c := testConfig
	c.NoHash = true
	m := modelOf(t, c, web(annotated(HashAnnotation, "source")), slice)
	if p := m.Problems(); hashOf(t, m) != (Hash{}) || len(p) != 1 || p[0].Value != "source" || !strings.Contains(p[0].Reason, "cannot hash") {
		t.Errorf("problems %v", p)
	}
	m = modelOf(t, web(annotated(HashAnnotation, "source/251")), crowdedSlice(252))
	if p := m.Problems(); hashOf(t, m) != (Hash{}) || len(p) != 1 || p[0].Value != "source/251" || !strings.Contains(p[0].Reason, "port \"http\": 252 endpoints are more than 251 buckets") {
		t.Errorf("problems %v", p)
	}
	s := crowdedSlice(252)
	s.Endpoints = s.Endpoints[:251]
	m.SetSlice(s)
	m.Commit()
	if p := m.Problems(); hashOf(t, m) != (Hash{BySource, 251}) || len(p) != 0 {
		t.Errorf("problems %v", p)
	}
}

func crowdedSlice(n int) *discoveryv1.EndpointSlice {
	s := slice1("web")
	for i := range n {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)}})
	}
	return s
}

// A Service of very many addresses and ports is not multiplied by weights and buckets.
func TestManyFrontendsHaveNoWeights(t *testing.T) {
	var ips []string
	for i := range 1100 {
		ips = append(ips, fmt.Sprintf("1.1.%d.%d", i/250, 1+i%250))
	}
	s := slice1("web", here, far+" far")
	s.Annotations = map[string]string{WeightAnnotation: "3"}
	m := modelOf(t, web(withExternalIPs(ips...), annotated(WeightsAnnotation, "10.1.0.1=3"), annotated(HashAnnotation, "source")), s)
	v := Decide(m.State(), packet(t, outside, webIP+":80"))
	if Shares(v.Endpoints) != nil || v.Port.Hash != (Hash{}) || len(v.Endpoints) != 2 || len(m.Problems()) != 2 {
		t.Errorf("%v %v", v, m.Problems())
	}
}

// Which endpoint a client is sent to does not depend on slices, their order or the node.
func TestHashIsTheSameOnAllNodes(t *testing.T) {
	var all []string
	for i := range 20 {
		all = append(all, fmt.Sprintf("10.2.0.%d:8080 far", 1+i))
	}
	one, two := slice1("web", all[:9]...), slice1("web", all[9:]...)
	two.Name = "web-2"
	c := testConfig
	c.NodeName = "node2"
	other := slice1("web")
	other.Endpoints = append(slices.Clone(two.Endpoints), one.Endpoints...)
	svc := web(annotated(HashAnnotation, "source"))
	a, b := modelOf(t, svc, one, two), modelOf(t, c, &corev1.Node{}, other, svc)
	seen := map[Endpoint]bool{}
	for i := range 200 {
		src := fmt.Sprintf("198.51.100.%d", i)
		x, y := Decide(a.State(), packet(t, src, webIP+":80")), Decide(b.State(), packet(t, src, webIP+":80"))
		if len(x.Endpoints) != 1 || len(y.Endpoints) != 1 || x.Endpoints[0].Addr != y.Endpoints[0].Addr {
			t.Fatalf("%s: %v, %v", src, x.Endpoints, y.Endpoints)
		}
		seen[x.Endpoints[0]] = true
	}
	if len(seen) < 15 {
		t.Errorf("%d endpoints for 200 clients", len(seen))
	}
	// By the port as well, it is not known without one.
	m := modelOf(t, web(annotated(HashAnnotation, "source-and-port")), one)
	p := packet(t, outside, webIP+":80")
	if v := Decide(m.State(), p); len(v.Endpoints) != 9 {
		t.Error(v.Endpoints)
	}
	p.SrcPort = 12345
	if v := Decide(m.State(), p); len(v.Endpoints) != 1 {
		t.Error(v.Endpoints)
	}
}

func BenchmarkTable(b *testing.B) {
	for _, n := range []int{10, 200} {
		list := many(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for range b.N {
				Hash{BySource, 1021}.Table(list)
			}
		})
	}
}

package nft

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// BenchmarkLoad is the first load of Services of two endpoints each, and a start that finds all as it should be.
func BenchmarkLoad(b *testing.B) {
	for _, n := range []int{1000, 10000, 30000} {
		s := nodetest.Crowd(n, 2)
		for _, counters := range []bool{false, true} {
			b.Run(fmt.Sprintf("first/%d/counters=%t", n, counters), func(b *testing.B) {
				for range b.N {
					b.StopTimer()
					p := openAt(nodetest.NewSpace(b, "node"), Options{Counters: counters})
					b.StartTimer()
					if _, err := p.Sync(s); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		b.Run(fmt.Sprintf("again/%d", n), func(b *testing.B) {
			p := openAt(nodetest.NewSpace(b, "node"), Options{})
			if _, err := p.Sync(s); err != nil {
				b.Fatal(err)
			}
			b.ResetTimer()
			for range b.N {
				if _, err := p.Sync(s); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkChange is one change beside so many Services: a Service that comes and goes, and one whose endpoints move.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{0, 1000, 10000, 30000} {
		for _, counters := range []bool{false, true} {
			benchmarkChange(b, n, counters)
		}
	}
}

func benchmarkChange(b *testing.B, n int, counters bool) {
	p := openAt(nodetest.NewSpace(b, "node"), Options{Counters: counters})
	s := nodetest.Crowd(n, 2)
	if _, err := p.Sync(s); err != nil {
		b.Fatal(err)
	}
	fresh := func(pods ...string) *model.Service {
		return nodetest.ServiceOf("new", nodetest.PortOf(model.TCP, pods, nodetest.ClusterIP(netip.MustParseAddrPort("10.111.0.1:80").String())))
	}
	apply := func(b *testing.B, old, next *model.Service) {
		c := model.Change{Name: fresh("10.1.0.1:80").Name, Old: old, New: next}
		if _, err := p.Apply(&model.Delta{Services: []model.Change{c}}); err != nil {
			b.Fatal(err)
		}
	}
	one, two := fresh("10.1.0.1:80", "10.1.0.2:80"), fresh("10.1.0.1:80", "10.1.0.3:80")
	b.Run(fmt.Sprintf("createAndDelete/%d/counters=%t", n, counters), func(b *testing.B) {
		for range b.N {
			apply(b, nil, one)
			apply(b, one, nil)
		}
	})
	apply(b, nil, one)
	b.Run(fmt.Sprintf("move/%d/counters=%t", n, counters), func(b *testing.B) {
		for range b.N {
			apply(b, one, two)
			one, two = two, one
		}
	})
}

// BenchmarkManyEndpoints is the first load of 5,000 Services of 50 endpoints each (kubernetes#135639), and a Service whose
// endpoints are all others.
func BenchmarkManyEndpoints(b *testing.B) {
	s := nodetest.Crowd(5000, 50)
	for range b.N {
		b.StopTimer()
		p := openAt(nodetest.NewSpace(b, "node"), Options{})
		b.StartTimer()
		if _, err := p.Sync(s); err != nil {
			b.Fatal(err)
		}
	}
}

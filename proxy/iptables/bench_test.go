package iptables

import (
	"fmt"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// Beside so many Services of two endpoints each: the first load, a start that finds all as it should be, a Service that comes
// and goes, and one whose endpoints move.
func Benchmark(b *testing.B) {
	for _, backend := range backends {
		for _, n := range []int{1000, 10000} {
			crowd := nodetest.Crowd(n, 2)
			p := openAt(nodetest.NewSpace(b, "node"), backend)
			run := func(name string, do func()) {
				b.Run(fmt.Sprintf("%s/%d/%s", backend, n, name), func(b *testing.B) {
					for range b.N {
						do()
					}
				})
			}
			sync := func(p *Programmer) {
				if _, err := p.Sync(crowd); err != nil {
					b.Fatal(err)
				}
			}
			apply := func(old, next *model.Service) {
				c := model.Change{Old: old, New: next}
				if old != nil {
					c.Name = old.Name
				} else {
					c.Name = next.Name
				}
				if r, err := p.Apply(&model.Delta{Services: []model.Change{c}}); err != nil || r.Elements > 20 {
					b.Fatalf("%+v, %v", r, err)
				}
			}
			run("load", func() { sync(openAt(nodetest.NewSpace(b, "node"), backend)) })
			sync(p)
			run("restart", func() { sync(p) })
			of := func(pods ...string) *model.Service {
				return nodetest.ServiceOf("new", nodetest.PortOf(model.TCP, pods, nodetest.ClusterIP("10.111.0.1:80")))
			}
			one, two := of("10.1.0.1:80", "10.1.0.2:80"), of("10.1.0.1:80", "10.1.0.3:80")
			run("createAndDelete", func() {
				apply(nil, one)
				apply(one, nil)
			})
			apply(nil, one)
			run("move", func() {
				apply(one, two)
				one, two = two, one
			})
		}
	}
}

// BenchmarkCounters is what reading them takes.
func BenchmarkCounters(b *testing.B) {
	for _, backend := range backends {
		b.Run(backend, func(b *testing.B) {
			p := openAt(nodetest.NewSpace(b, "node"), backend)
			if _, err := p.Sync(nodetest.Crowd(5000, 2)); err != nil {
				b.Skip(err)
			}
			c := p.Counters()
			for b.Loop() {
				c.at = time.Time{}
				if all, err := c.Read(); err != nil || len(all) < 5000 {
					b.Fatal(len(all), err)
				}
			}
		})
	}
}

package nodetest

import (
	"math/rand/v2"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Churn programs so many Services, and up to twice as many, and changes one more, of up to that many endpoints, until an error:
// what a proxy does that is killed.
func Churn(p program.Programmer, services, endpoints int) error {
	f := Families[model.IPv4]
	shape := func() *model.Service {
		var pods []int
		for range 1 + rand.IntN(endpoints) {
			pods = append(pods, 1+rand.IntN(2))
		}
		port := PortOf(model.TCP, f.Pods(pods...), f.LoadBalancer(80), f.NodePort(30080))
		if rand.IntN(3) == 0 {
			port.Affinity = time.Hour
		}
		return ServiceOf("web", port)
	}
	now := shape()
	s := Crowd(services+rand.IntN(services), 1+rand.IntN(3))
	s.ServiceList = append(s.ServiceList, now)
	if _, err := p.Sync(s); err != nil {
		return err
	}
	for {
		next := shape()
		if _, err := p.Apply(s.Delta(now, next)); err != nil {
			return err
		}
		now = next
	}
}

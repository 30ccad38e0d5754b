package nft

import (
	"net"
	"net/netip"
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// answered connects from an address and port, and says which port at the end answers.
func (l *lab) answered(from *nodetest.Space, network string, src netip.AddrPort, to string) int {
	l.T.Helper()
	var n int
	err := from.Do(func() (err error) {
		n, err = portAtEnd(net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(src)}, network, to)
		return err
	})
	if err != nil {
		l.T.Fatal(err)
	}
	return n
}

// The kernel sends each client where the model says by the hash, and there nodetest.Again.
func TestHash(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		var backends []string
		for port := 9000; port < 9005; port++ {
			l.Pods[0].ServeTCPOnce(port)
			backends = append(backends, nodetest.At(f.PodIP(1), port))
		}
		first := netip.MustParseAddr(f.Client)
		var clients []netip.Addr
		for a := first.Next(); len(clients) < 24; a = a.Next() {
			clients = append(clients, a)
		}
		for _, a := range clients {
			bits := map[model.Family]int{model.IPv4: 24, model.IPv6: 64}[f.Of]
			l.Client.Link("eth0", netip.PrefixFrom(a, bits).String())
		}
		service := func(h model.Hash, backends []string) *model.Service {
			p := nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080))
			p.Hash = h
			return nodetest.ServiceOf("web", p)
		}
		s := nodetest.NewState()
		l.sync(s)
		var was *model.Service
		for _, c := range []struct {
			by    model.HashBy
			count int
		}{{model.BySource, 5}, {model.BySource, 4}, {model.BySourcePort, 5}} {
			h := model.Hash{By: c.by, Buckets: 251}
			next := service(h, backends[:c.count])
			l.apply(s, was, next)
			was = next
			list := next.Ports[0].Cluster
			table := h.Table(list)
			seen := map[int]bool{}
			for i, a := range clients {
				src := netip.AddrPortFrom(a, uint16(20000+100*int(c.by)+10*c.count+i))
				port := src.Port()
				if c.by == model.BySource {
					port = 0
				}
				want := int(list[table[h.Bucket(a, port)]].Port)
				for _, to := range []string{nodetest.At(f.Cluster, 80), nodetest.At(f.Node, 30080)} {
					if got := l.answered(l.Client, f.TCP, src, to); got != want {
						t.Errorf("%v: from %s to %s: %d, not %d", h, src, to, got, want)
					}
				}
				seen[want] = true
			}
			if len(seen) < c.count-1 {
				t.Errorf("%v: %d endpoints for %d clients", h, len(seen), len(clients))
			}
		}
		if r, err := l.p.Verify(); err != nil || r.Elements != 0 {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

// With a hash a restart changes nothing, and an endpoint that goes changes no more than its buckets and those few that move.
func TestHashIsElementsAlone(t *testing.T) {
	p := openAt(nodetest.NewSpace(t, "node"), Options{})
	service := func(backends ...string) *model.Service {
		port := nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP("10.96.0.1:80"))
		port.Hash = model.Hash{By: model.BySource, Buckets: 1021}
		return nodetest.ServiceOf("web", port)
	}
	all := []string{"10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80", "10.1.0.4:80", "10.1.0.5:80"}
	one := service(all...)
	s := nodetest.NewState(one)
	if _, err := p.Sync(s); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Sync(s); err != nil || r != (Report{}) {
		t.Errorf("a restart: %+v, %v", r, err)
	}
	if r, err := p.Apply(s.Delta(one, service(all[1:]...))); err != nil || r.Transactions != 1 || r.Objects != 0 || r.Elements < 1021/5 || r.Elements > 1021/5+100 {
		t.Errorf("%+v, %v", r, err)
	}
}

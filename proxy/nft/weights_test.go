package nft

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// tally connects so many times, and counts which port at the end answers (serveTCPOnce).
func (l *lab) tally(from *nodetest.Space, network, to string, times int) map[int]int {
	l.T.Helper()
	got := map[int]int{}
	err := from.Do(func() error {
		for range times {
			n, err := portAtEnd(net.Dialer{}, network, to)
			if err != nil {
				return err
			}
			got[n]++
		}
		return nil
	})
	if err != nil {
		l.T.Fatal(err)
	}
	return got
}

// portAtEnd connects and says which port at the end answers. It is for the network namespace of the calling thread.
func portAtEnd(d net.Dialer, network, to string) (int, error) {
	d.Timeout = nodetest.Patience
	c, err := d.Dial(network, to)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(nodetest.Patience))
	b, err := io.ReadAll(c)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// fits says whether counts are what comes of shares: Pearson's sum of squares over all but one is larger than unlikely once in
// 10^9 times.
func fits(t *testing.T, counts map[int]int, shares map[int]int) {
	t.Helper()
	total, sum := 0, 0
	for at := range shares {
		total, sum = total+counts[at], sum+shares[at]
	}
	squares := 0.0
	for at, share := range shares {
		want := float64(total) * float64(share) / float64(sum)
		squares += (float64(counts[at]) - want) * (float64(counts[at]) - want) / want
	}
	if unlikely := map[int]float64{1: 37.4, 2: 41.5, 3: 44.9}[len(shares)-1]; squares > unlikely || len(counts) > len(shares) {
		t.Errorf("%v connections for shares %v: sum of squares %.1f", counts, shares, squares)
	}
}

func weighted(p model.Port, weights ...uint16) model.Port {
	for i, w := range weights {
		p.Cluster[i].Weight = w
	}
	return p
}

// Endpoints get new connections by their weights, at each address, from each source, also after they change.
func TestWeights(t *testing.T) {
	const times = 1000
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		var backends []string
		for port := 9000; port < 9004; port++ {
			l.Pods[0].ServeTCPOnce(port)
			backends = append(backends, nodetest.At(f.PodIP(1), port))
		}
		service := func(weights ...uint16) *model.Service {
			return nodetest.ServiceOf("web", weighted(nodetest.PortOf(model.TCP, backends[:len(weights)], nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080)), weights...))
		}
		was := service(1, 3, 6)
		s := nodetest.NewState(was)
		l.sync(s)
		fits(t, l.tally(l.Pods[1], f.TCP, nodetest.At(f.Cluster, 80), times), map[int]int{9000: 1, 9001: 3, 9002: 6})
		fits(t, l.tally(l.Client, f.TCP, nodetest.At(f.Node, 30080), times), map[int]int{9000: 1, 9001: 3, 9002: 6})
		// More numbers than have a rule of their own, and so many that they are rounded.
		for _, weights := range [][]uint16{{1, 49}, {1000, 500, 999, 100}} {
			next := service(weights...)
			l.apply(s, was, next)
			was = next
			want := map[int]int{}
			for i, w := range weights {
				want[9000+i] = int(w)
			}
			fits(t, l.tally(l.Pods[1], f.TCP, nodetest.At(f.Cluster, 80), times), want)
		}
		if r, err := l.p.Verify(); err != nil || r.Elements != 0 {
			t.Errorf("the kernel has not what it should: %+v, %v", r, err)
		}
	})
}

// What a weight changes in the kernel is what it moves, and a restart changes nothing.
func TestWeightsAreElementsAlone(t *testing.T) {
	p := openAt(nodetest.NewSpace(t, "node"), Options{})
	one := nodetest.ServiceOf("web", weighted(nodetest.PortOf(model.TCP, []string{"10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"}, nodetest.ClusterIP("10.96.0.1:80")), 5, 5, 2))
	s := nodetest.NewState(one)
	if _, err := p.Sync(s); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Sync(s); err != nil || r != (Report{}) {
		t.Errorf("a restart: %+v, %v", r, err)
	}
	// 5+5+2 numbers, then 5+5+3: one more, and how many.
	two := nodetest.ServiceOf("web", weighted(nodetest.PortOf(model.TCP, []string{"10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80"}, nodetest.ClusterIP("10.96.0.1:80")), 5, 5, 3))
	if r, err := p.Apply(s.Delta(one, two)); err != nil || r != (Report{Transactions: 1, Elements: 3}) {
		t.Errorf("%+v, %v", r, err)
	}
	e := elements{groups: newGroups()}
	e.service(two)
	counts := map[netip.AddrPort]int{}
	for _, el := range e.all[model.IPv4][endpoints] {
		counts[endpointOf(&el.value, layers[model.IPv4])]++
	}
	if got := fmt.Sprint(counts); got != "map[10.1.0.1:80:5 10.1.0.2:80:5 10.1.0.3:80:3]" {
		t.Error(got)
	}
}

package nft

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// counts reads counters now.
func counts(t testing.TB, p *Programmer) map[program.Counted]uint64 {
	t.Helper()
	c := p.Counters()
	c.reading.Lock()
	c.at = time.Time{}
	c.reading.Unlock()
	all, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	packets := map[program.Counted]uint64{}
	for of, n := range all {
		packets[of] = n.Packets
		if (n.Packets == 0) != (n.Bytes == 0) {
			t.Errorf("%v: %+v", of, n)
		}
	}
	return packets
}

func wantCounts(t testing.TB, p *Programmer, what string, want map[program.Counted]uint64) {
	t.Helper()
	if got := counts(t, p); !maps.Equal(got, want) {
		t.Errorf("%s:\n%v, want\n%v", what, got, want)
	}
}

// countedAt names a port of a test's Service.
func countedAt(f nodetest.Family, service string, p model.Protocol, c program.Cause) program.Counted {
	return program.Counted{Service: types.NamespacedName{Namespace: "test", Name: service}, Port: "p", Family: f.Of, Protocol: p, Cause: c}
}

// Each new connection is counted once, whoever opens it and by whichever way it goes: with and without masquerading, session
// affinity, an external policy, to an address and to a node port.
func TestEachConnectionIsCountedOnce(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		web := nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080))
		dns := nodetest.PortOf(model.UDP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), nodetest.LocalPolicy(f.NodePort(30080)))
		dns.Local = dns.Cluster
		sticky := nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Other, 443)), nodetest.LocalPolicy(f.NodePort(30443)))
		sticky.Local, sticky.Affinity = sticky.Cluster, time.Hour
		s := nodetest.NewState(nodetest.ServiceOf("web", web, dns), nodetest.ServiceOf("sticky", sticky))
		s.HairpinList = []model.Hairpin{nodetest.HairpinOf(model.TCP, f.Pod(1)), nodetest.HairpinOf(model.UDP, f.Pod(1))}
		l.sync(s)
		ask := func(from *nodetest.Space, network, to string, times int) {
			for range times {
				if got := from.Ask(network, to); got == nodetest.Refused || got == nodetest.Silence || got == nodetest.Denied {
					t.Errorf("%s to %s: %s", from.Name, to, got)
				}
			}
		}
		want := map[program.Counted]uint64{
			countedAt(f, "web", model.TCP, program.Connections): 0, countedAt(f, "web", model.UDP, program.Connections): 0, countedAt(f, "sticky", model.TCP, program.Connections): 0,
		}
		wantCounts(t, l.p, "before", want)
		for _, from := range []*nodetest.Space{l.Client, l.Pods[0], l.Node} {
			ask(from, f.TCP, nodetest.At(f.Cluster, 80), 3)
			ask(from, f.TCP, nodetest.At(f.LoadIP, 80), 2)
			ask(from, f.TCP, nodetest.At(f.Node, 30080), 2)
			ask(from, f.UDP, nodetest.At(f.Cluster, 80), 2)
			ask(from, f.UDP, nodetest.At(f.Node, 30080), 1)
			ask(from, f.TCP, nodetest.At(f.Other, 443), 2)
			ask(from, f.TCP, nodetest.At(f.Node, 30443), 1)
		}
		want[countedAt(f, "web", model.TCP, program.Connections)] = 21
		want[countedAt(f, "web", model.UDP, program.Connections)] = 9
		want[countedAt(f, "sticky", model.TCP, program.Connections)] = 9
		wantCounts(t, l.p, "after", want)
		// Packets of a connection that is there are not.
		c, err := l.Client.Dial(f.TCP, nodetest.At(f.Cluster, 80))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for range 5 {
			nodetest.Again(c)
		}
		want[countedAt(f, "web", model.TCP, program.Connections)]++
		wantCounts(t, l.p, "an open one", want)
		// What is in the kernel outlives the process, which has nothing to change.
		p := openAt(l.Node, Options{Counters: true})
		if r, err := p.Sync(s); err != nil || r.Elements != 0 || r.Objects != 0 {
			t.Errorf("a restart: %+v, %v", r, err)
		}
		wantCounts(t, p, "after a restart", want)
	})
}

func TestRefusalsAreCountedByTheirCause(t *testing.T) {
	eachFamily(t, 1, func(t *testing.T, l *lab, f nodetest.Family) {
		none, away, restricted := nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), nodetest.LocalPolicy(f.NodePort(30080)), f.LoadBalancer(53)
		none.Action, away.Action = model.Reject, model.Drop
		restricted.Restricted, restricted.Sources = true, prefixes(f.Narrow)
		// The node reaches all endpoints, and so does a pod.
		nowhere := nodetest.ServiceOf("nowhere", nodetest.PortOf(model.UDP, nil, none))
		remote := nodetest.ServiceOf("remote", nodetest.PortOf(model.UDP, f.Pods(1), away))
		guarded := nodetest.ServiceOf("guarded", nodetest.PortOf(model.UDP, f.Pods(1), restricted))
		l.sync(nodetest.NewState(nowhere, remote, guarded))
		for range 2 {
			l.Want(l.Client, f.UDP, nodetest.At(f.Cluster, 80), nodetest.Refused)
			l.Want(l.Node, f.UDP, nodetest.At(f.Cluster, 80), nodetest.Refused)
		}
		for range 2 {
			l.Want(l.Client, f.UDP, nodetest.At(f.Node, 30080), nodetest.Silence)
		}
		if got := l.Node.Ask(f.UDP, nodetest.At(f.Node, 30080)); got == nodetest.Silence {
			t.Error(got)
		}
		l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 53), nodetest.Silence)
		l.Want(l.Client, f.UDP, nodetest.At(f.Other, 53), nodetest.Silence)
		wantCounts(t, l.p, "refusals", map[program.Counted]uint64{
			countedAt(f, "nowhere", model.UDP, program.Connections): 4, countedAt(f, "nowhere", model.UDP, program.NoEndpoints): 4,
			countedAt(f, "remote", model.UDP, program.Connections): 3, countedAt(f, "remote", model.UDP, program.NoLocal): 2,
			countedAt(f, "guarded", model.UDP, program.Connections): 0, countedAt(f, "guarded", model.UDP, program.SourceRanges): 1,
			{Family: f.Of, Cause: program.Unallocated}: 1,
		})
	})
}

// Ranges of ports are counted as their port is: each connection once, with session affinity elsewhere and without, refusals by their cause;
// and what was refused stays when there are endpoints.
func TestRangesOfPortsAreCounted(t *testing.T) {
	eachFamily(t, 1, func(t *testing.T, l *lab, f nodetest.Family) {
		l.Pods[0].Serve(15000)
		restricted, away, none := f.LoadBalancer(10000), nodetest.LocalPolicy(f.LoadBalancer(30000)), nodetest.ClusterIP(nodetest.At(f.Other, 10000))
		restricted.Restricted, restricted.Sources = true, prefixes(f.Narrow)
		away.Action, none.Action = model.Drop, model.Reject
		ranged := func(protocol model.Protocol, last uint16, pods []string, of ...model.Frontend) model.Port {
			p := withRange(nodetest.PortOf(protocol, pods, of...), last)
			p.Frontends = nil
			return p
		}
		empty := nodetest.ServiceOf("empty", ranged(model.UDP, 20000, nil, none))
		full := nodetest.ServiceOf("empty", ranged(model.UDP, 20000, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Other, 10000))))
		s := nodetest.NewState(
			nodetest.ServiceOf("rtp", ranged(model.TCP, 20000, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 10000)), f.LoadBalancer(10000)),
				ranged(model.UDP, 20000, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 10000)), restricted)),
			nodetest.ServiceOf("away", ranged(model.UDP, 40000, f.Pods(1), away)), empty)
		want := map[program.Counted]uint64{}
		step := func(sticky bool) {
			t.Helper()
			for _, from := range []*nodetest.Space{l.Client, l.Node} {
				for _, to := range []string{nodetest.At(f.Cluster, 15000), nodetest.At(f.LoadIP, 15000)} {
					if got := from.Ask(f.TCP, to); !strings.HasPrefix(got, "pod1 ") {
						t.Errorf("%s to %s: %q", from.Name, to, got)
					}
				}
				if got := from.Ask(f.UDP, nodetest.At(f.Cluster, 15000)); !strings.HasPrefix(got, "pod1 ") {
					t.Errorf("%s: %q", from.Name, got)
				}
				l.Want(from, f.UDP, nodetest.At(f.Other, 15000), nodetest.Refused)
			}
			l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 15000), nodetest.Silence)
			l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 35000), nodetest.Silence)
			want[countedAt(f, "rtp", model.TCP, program.Connections)] += 4
			want[countedAt(f, "rtp", model.UDP, program.Connections)] += 2
			want[countedAt(f, "rtp", model.UDP, program.SourceRanges)]++
			want[countedAt(f, "away", model.UDP, program.Connections)]++
			want[countedAt(f, "away", model.UDP, program.NoLocal)]++
			want[countedAt(f, "empty", model.UDP, program.Connections)] += 2
			want[countedAt(f, "empty", model.UDP, program.NoEndpoints)] += 2
			wantCounts(t, l.p, fmt.Sprintf("with session affinity of another: %t", sticky), want)
		}
		l.sync(s)
		step(false)
		sticky := nodetest.ServiceOf("sticky", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Other, 443)))))
		l.apply(s, nil, sticky)
		want[countedAt(f, "sticky", model.TCP, program.Connections)] = 0
		step(true)
		l.apply(s, empty, full)
		wantCounts(t, l.p, "there are endpoints", want)
		if r, err := l.p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
	})
}

// What a Service's port has counted does not go back when elements go and come with its endpoints and addresses, when another
// program empties the table, and whether it is read meanwhile or not. It does when the Service goes.
func TestCountsDoNotGoBack(t *testing.T) {
	for _, read := range []bool{false, true} {
		t.Run(fmt.Sprintf("read between %t", read), func(t *testing.T) {
			t.Parallel()
			l, f := newLab(t, 1), nodetest.Families[0]
			none := nodetest.ClusterIP(nodetest.At(f.Cluster, 80))
			none.Action = model.Reject
			empty := nodetest.ServiceOf("web", nodetest.PortOf(model.UDP, nil, none, f.LoadBalancer(80)))
			empty.Ports[0].Frontends[1].Action = model.Reject
			full := nodetest.ServiceOf("web", nodetest.PortOf(model.UDP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80))))
			s := nodetest.NewState(empty)
			l.sync(s)
			look := func(connections, refusals uint64) {
				t.Helper()
				if read {
					l.wantOf(connections, refusals)
				}
			}
			l.Want(l.Client, f.UDP, nodetest.At(f.Cluster, 80), nodetest.Refused)
			l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 80), nodetest.Refused)
			look(2, 2)
			l.apply(s, empty, full) // without the other address, too
			look(2, 2)
			l.apply(s, full, empty)
			l.Want(l.Client, f.UDP, nodetest.At(f.LoadIP, 80), nodetest.Refused)
			look(3, 3)
			l.apply(s, empty, full)
			l.Client.Ask(f.UDP, nodetest.At(f.Cluster, 80))
			l.wantOf(4, 3)
			l.Node.Run("nft", "flush", "set", "ip", Table, "frontends")
			l.wantOf(4, 3)
			if _, err := l.p.Verify(); err != nil {
				t.Fatal(err)
			}
			l.wantOf(4, 3)
			l.Client.Ask(f.UDP, nodetest.At(f.Cluster, 80))
			l.wantOf(5, 3)
			l.apply(s, full, nil)
			if got := counts(t, l.p); len(got) != 0 || len(l.p.counters.base) != 0 {
				t.Errorf("nothing is left of a Service that is gone: %v, %v", got, l.p.counters.base)
			}
			l.apply(s, nil, full)
			l.wantOf(0, 0)
		})
	}
}

func (l *lab) wantOf(connections, refusals uint64) {
	l.T.Helper()
	want := map[program.Counted]uint64{countedAt(nodetest.Families[0], "web", model.UDP, program.Connections): connections}
	if refusals > 0 {
		want[countedAt(nodetest.Families[0], "web", model.UDP, program.NoEndpoints)] = refusals
	}
	wantCounts(l.T, l.p, "web", want)
}

// Another start may count or not: the sets are others then, and replaced with what is in them in one transaction.
func TestCountersComeAndGoWithoutALostConnection(t *testing.T) {
	l, f := newLab(t, 1), nodetest.Families[0]
	s := nodetest.Crowd(2000, 1)
	s.ServiceList = append(s.ServiceList, nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080))))
	l.sync(s)
	var stop atomic.Bool
	var asked, lost atomic.Int32
	var all sync.WaitGroup
	for _, to := range []string{nodetest.At(f.Cluster, 80), nodetest.At(f.Node, 30080)} {
		all.Go(func() {
			for !stop.Load() {
				asked.Add(1)
				if l.Client.Ask(f.TCP, to) == nodetest.Refused {
					lost.Add(1)
				}
			}
		})
	}
	for i := range 6 {
		p := openAt(l.Node, Options{Counters: i%2 == 1})
		r, err := p.Sync(s)
		if err != nil || r.Objects == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	stop.Store(true)
	all.Wait()
	if lost.Load() != 0 || asked.Load() < 10 {
		t.Errorf("%d of %d connections were nodetest.Refused", lost.Load(), asked.Load())
	}
}

// Who reads while Services come and go has a whole answer, which never is less than before.
func TestCountersAreReadDuringChanges(t *testing.T) {
	l, f := newLab(t, 1), nodetest.Families[0]
	none := nodetest.ClusterIP(nodetest.At(f.Cluster, 80))
	none.Action = model.Reject
	empty, full := nodetest.ServiceOf("web", nodetest.PortOf(model.UDP, nil, none)), nodetest.ServiceOf("web", nodetest.PortOf(model.UDP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80))))
	s := nodetest.NewState(empty)
	l.sync(s)
	var refusals, untold atomic.Uint64
	var all sync.WaitGroup
	done := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				switch l.Client.Ask(f.UDP, nodetest.At(f.Cluster, 80)) {
				case nodetest.Refused:
					refusals.Add(1)
				case nodetest.Silence: // a kernel that is busy with an ICMP error sends no other one
					untold.Add(1)
				}
			}
		}
	})
	all.Go(func() {
		was := uint64(0)
		for {
			select {
			case <-done:
				return
			default:
			}
			l.p.counters.reading.Lock()
			l.p.counters.at = time.Time{}
			l.p.counters.reading.Unlock()
			sum, _ := l.p.Counters().Read() // may find no nodetest.Quiet moment
			is := sum[countedAt(f, "web", model.UDP, program.NoEndpoints)].Packets
			if is < was {
				t.Errorf("%d after %d", is, was)
			}
			was = is
		}
	})
	for i := 0; i < 300 || refusals.Load() < 10; i++ {
		l.apply(s, empty, full)
		l.apply(s, full, empty)
	}
	close(done)
	all.Wait()
	// What is rejected between the last look at an element and the commit is lost: here, where it goes at once, a part of all.
	if got := counts(t, l.p)[countedAt(f, "web", model.UDP, program.NoEndpoints)]; got > refusals.Load()+untold.Load() {
		t.Errorf("%d rejected and %d without an answer, %d counted", refusals.Load(), untold.Load(), got)
	}
}

// What is added up, without a kernel.
func TestSumsOfCounters(t *testing.T) {
	key := func(b byte) elemKey { return elemKey{set: frontends, size: 1, bytes: [longestKey]byte{b}} }
	of := func(name string, c program.Cause) program.Counted {
		return program.Counted{Service: types.NamespacedName{Name: name}, Cause: c}
	}
	n := func(packets uint64) program.Count { return program.Count{Packets: packets, Bytes: 100 * packets} }
	type step struct {
		owners map[elemKey]program.Counted
		now    map[elemKey]program.Count
		want   map[program.Counted]program.Count
	}
	a, b := of("a", program.Connections), of("b", program.Connections)
	for name, steps := range map[string][]step{
		"two addresses are one sum": {
			{map[elemKey]program.Counted{key(1): a, key(2): a}, map[elemKey]program.Count{key(1): n(3), key(2): n(4)}, map[program.Counted]program.Count{a: n(7)}},
		},
		"what nobody wants does not count": {
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(2): n(4)}, map[program.Counted]program.Count{a: {}}},
		},
		"an address goes, and comes nodetest.Again": {
			{map[elemKey]program.Counted{key(1): a, key(2): a}, map[elemKey]program.Count{key(1): n(3), key(2): n(4)}, map[program.Counted]program.Count{a: n(7)}},
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(5)}, map[program.Counted]program.Count{a: n(9)}},
			{map[elemKey]program.Counted{key(1): a, key(2): a}, map[elemKey]program.Count{key(1): n(5), key(2): n(1)}, map[program.Counted]program.Count{a: n(10)}},
		},
		"an element is lost, and made nodetest.Again": {
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(3)}, map[program.Counted]program.Count{a: n(3)}},
			{map[elemKey]program.Counted{key(1): a}, nil, map[program.Counted]program.Count{a: n(3)}},
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(1)}, map[program.Counted]program.Count{a: n(4)}},
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(2)}, map[program.Counted]program.Count{a: n(5)}},
		},
		"another Service has the address": {
			{map[elemKey]program.Counted{key(1): a, key(2): b}, map[elemKey]program.Count{key(1): n(3), key(2): n(1)}, map[program.Counted]program.Count{a: n(3), b: n(1)}},
			{map[elemKey]program.Counted{key(1): b, key(2): b, key(3): a}, map[elemKey]program.Count{key(1): n(5), key(2): n(1)}, map[program.Counted]program.Count{a: n(3), b: n(6)}},
		},
		"a Service goes, and its count": {
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(3)}, map[program.Counted]program.Count{a: n(3)}},
			{nil, map[elemKey]program.Count{key(1): n(3)}, map[program.Counted]program.Count{}},
			{map[elemKey]program.Counted{key(1): a}, map[elemKey]program.Count{key(1): n(0)}, map[program.Counted]program.Count{a: {}}},
		},
		"refusals stay while the port does": {
			{map[elemKey]program.Counted{key(1): a, key(2): of("a", program.NoLocal)}, map[elemKey]program.Count{key(2): n(3)}, map[program.Counted]program.Count{a: {}, of("a", program.NoLocal): n(3)}},
			{map[elemKey]program.Counted{key(1): a}, nil, map[program.Counted]program.Count{a: {}, of("a", program.NoLocal): n(3)}},
		},
	} {
		c := &Counters{base: map[program.Counted]program.Count{}}
		for i, s := range steps {
			c.add(s.owners, s.now)
			if !maps.Equal(c.sum, s.want) {
				t.Errorf("%s, step %d: %v, want %v", name, i, c.sum, s.want)
			}
		}
	}
}

// BenchmarkCounters is what counting costs: a new connection, and who reads.
func BenchmarkCounters(b *testing.B) {
	for _, on := range []bool{false, true} {
		b.Run(fmt.Sprintf("connection/counters=%t", on), func(b *testing.B) {
			n := nodetest.NewSpace(b, "node")
			n.Link("lo")
			p := openAt(n, Options{Counters: on})
			s := nodetest.Crowd(10000, 2)
			s.ServiceList = append(s.ServiceList, nodetest.ServiceOf("web", nodetest.PortOf(model.UDP, []string{"127.0.0.1:53"}, nodetest.ClusterIP("127.0.0.9:53"))))
			if _, err := p.Sync(s); err != nil {
				b.Fatal(err)
			}
			to := &net.UDPAddr{IP: net.ParseIP("127.0.0.9"), Port: 53}
			b.ResetTimer()
			err := n.Do(func() error {
				for range b.N {
					c, err := net.DialUDP("udp4", nil, to)
					if err != nil {
						return err
					}
					_, _ = c.Write([]byte("x")) // each socket is a connection of its own
					c.Close()
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		})
	}
	b.Run("read/10000", func(b *testing.B) {
		p := openAt(nodetest.NewSpace(b, "node"), Options{Counters: true})
		if _, err := p.Sync(nodetest.Crowd(10000, 2)); err != nil {
			b.Fatal(err)
		}
		var took []time.Duration
		b.ReportAllocs()
		for b.Loop() {
			start := time.Now()
			counts(b, p)
			took = append(took, time.Since(start))
		}
		b.ReportMetric(float64(slices.Max(took).Milliseconds()), "ms-max")
	})
}

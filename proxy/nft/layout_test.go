package nft

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// everything is a State that has something in each set, in both families.
func everything(affinity [model.Families]bool) *nodetest.State {
	s := nodetest.NewState()
	for _, f := range nodetest.Families {
		port := func(p model.Protocol) model.Port {
			front := f.LoadBalancer(80)
			front.Restricted, front.Sources = true, prefixes(f.Wide, f.Narrow)
			none, nowhere := nodetest.ClusterIP(nodetest.At(f.Other, 80)), f.NodePort(30082)
			none.Action, nowhere.Action = model.Reject, model.Drop
			out := nodetest.PortOf(p, []string{f.Pod(1) + "*", f.Pod(2)}, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), front, f.NodePort(30080), nodetest.LocalPolicy(f.NodePort(30081)), none, nowhere)
			if affinity[f.Of] {
				out.Affinity = time.Hour
			}
			return out
		}
		s.ServiceList = append(s.ServiceList, nodetest.ServiceOf(f.Name, port(model.TCP), port(model.UDP), port(model.SCTP)))
		s.HairpinList = append(s.HairpinList, nodetest.HairpinOf(model.TCP, f.Pod(1)))
		var many []string
		for i := range 20 {
			many = append(many, nodetest.At(f.PodIP(1), 9000+i))
		}
		s.ServiceList = append(s.ServiceList, nodetest.ServiceOf(f.Name+"-many", nodetest.PortOf(model.TCP, many, f.LoadBalancer(443), f.NodePort(30443))))
		for i, by := range []model.HashBy{model.BySource, model.BySourcePort} {
			hashed := nodetest.PortOf(model.TCP, []string{f.Pod(1) + "*", f.Pod(2), f.Pod(3) + "*"}, nodetest.LocalPolicy(f.LoadBalancer(8000+i)), nodetest.LocalPolicy(f.NodePort(31000+i)))
			hashed.Hash = model.Hash{By: by, Buckets: 251}
			s.ServiceList = append(s.ServiceList, nodetest.ServiceOf(fmt.Sprintf("%s-hashed%d", f.Name, i), hashed))
		}
	}
	return s
}

// addRanges adds ranges of ports to a State.
func addRanges(s *nodetest.State) {
	for _, f := range nodetest.Families {
		reach := f.LoadBalancer(10000)
		reach.Restricted, reach.Sources = true, prefixes(f.Wide)
		rtp := nodetest.ServiceOf(f.Name+"-range", withRange(nodetest.PortOf(model.UDP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 10000)), reach), 20000))
		rtp.ClusterIPs = nil // another Service has it
		s.ServiceList = append(s.ServiceList, rtp)
	}
}

// withRange makes ranges of ports of what a port's frontends answer at.
func withRange(p model.Port, last uint16) model.Port {
	for _, f := range p.Frontends {
		if f.Kind != model.NodePort {
			f.Last = last
			p.Ranges = append(p.Ranges, f)
		}
	}
	return p
}

// What the kernel was given is what nft shows: what it makes of its own listing is what the kernel was given. Of the map of
// clients in IPv6 nft 1.0.6 (Debian 12) can show the rule, not read it: it ends with an assertion.
func TestListingLoadsAsTheSameRules(t *testing.T) {
	for i, affinity := range [][model.Families]bool{{}, {true, false}, {true, false}} {
		s := nodetest.NewSpace(t, "node")
		p := openAt(s, Options{Counters: affinity[model.IPv4]})
		st := everything(affinity)
		others := []string{"source-check", "affinity-remember"}
		if i == 2 {
			addRanges(st)
			addResets(st)
			others = append(others, "range-source-check", "range-check", "filter-input", "services", "port-range", "port-range-cluster")
		}
		if _, err := p.Sync(st); err != nil {
			t.Fatal(err)
		}
		list := s.Run("nft", "list", "ruleset")
		if out, err := s.Input("flush ruleset\n"+list, "nft", "-f", "-"); err != nil {
			t.Fatalf("nft does not load its listing: %s", out)
		}
		if again := s.Run("nft", "list", "ruleset"); again != list {
			t.Error("another listing")
		}
		// nft has another way for two rules: it turns a byte around before it looks for a range, and has other registers for
		// what it remembers.
		for f := range layers {
			got, err := readTable(p.conn, layers[f], Table)
			if err != nil {
				t.Fatal(err)
			}
			want := newLayout(layers[f], &p.params[f])
			sets := len(slices.DeleteFunc(slices.Clone(want.sets), func(s set) bool { return s.absent }))
			if len(got.chains) != len(want.chains) || len(got.sets) != sets {
				t.Fatalf("%d chains and %d sets, not %d and %d", len(got.chains), len(got.sets), len(want.chains), sets)
			}
			for i := range want.chains {
				w := &want.chains[i]
				if g := got.find(w.name); g == nil || !w.is(g) && !slices.Contains(others, w.name) {
					t.Errorf("%s chain %s is another one", layers[f], w.name)
				}
			}
		}
		if r, err := p.Verify(); err != nil || r.Elements != 0 {
			t.Errorf("affinity %v: nft has made other elements: %+v, %v", affinity, r, err)
		}
	}
}

// A person finds the Service by its name.
func TestListingIsReadable(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	st := everything([model.Families]bool{true, true})
	addRanges(st)
	if _, err := p.Sync(st); err != nil {
		t.Fatal(err)
	}
	list := s.Run("nft", "list", "ruleset")
	for _, want := range []string{
		`10.96.0.1 . tcp . 80 comment "test/IPv4:p"`, `fd96::1 . udp . 80 comment "test/IPv6:p"`, `sctp . 30081 comment "test/IPv4:p"`,
		"10.96.0.1 . tcp . 80 . 0 : 10.1.1.2 . 8080", "fd96::1 . tcp . 80 . 1 : fd01:0:0:2::2 . 8080", "tcp . 30081 . 65536 : 10.1.1.2 . 8080",
		"203.0.113.1 . tcp . 80 . 192.0.2.0/24", "timeout 1h : ip daddr . th dport", `comment "` + tableComment,
		`10.96.0.1 . udp . 10000-20000 comment "test/IPv4-range:p"`, "fd03::1 . udp . 10000-20000 . fd02::/64", "jhash ip6 saddr . th sport mod 251",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("%q is not in the listing", want)
		}
	}
	if strings.Contains(list, "Error") || strings.Contains(list, "@nh") || strings.Contains(list, "unknown") {
		t.Error(list)
	}
}

// Chains, rules and sets are as many for ten thousand Services as for none, and so they are with large ones and affinity for
// ten as for a thousand.
func TestK8s135639_ObjectsAreAsManyForAnyNumberOfServices(t *testing.T) {
	count := func(s *nodetest.State) string {
		node := nodetest.NewSpace(t, "node")
		p := openAt(node, Options{})
		r, err := p.Sync(s)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("again: %+v, %v", r, err)
		}
		return fmt.Sprint(r.Objects)
	}
	none := count(nodetest.NewState())
	for _, n := range []int{1, 10000} {
		if got := count(nodetest.Crowd(n, 2)); got != none {
			t.Errorf("%d Services: %s objects, for none %s", n, got, none)
		}
	}
	large := func(n int) *nodetest.State {
		s := nodetest.Crowd(n, 40)
		for _, svc := range s.ServiceList {
			svc.Ports[0].Affinity = time.Hour
		}
		return s
	}
	if a, b := count(large(10)), count(large(1000)); a != b {
		t.Errorf("with affinity: 10 Services %s objects, 1000 %s", a, b)
	}
}

// A Service of more endpoints than there are rules for numbers of is spread over all of them.
func TestManyEndpoints(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		for _, n := range []int{17, 23, 100} {
			var backends []string
			for i := range n {
				port := 10000 + 200*n + i
				l.Pods[0].ServeTCPOnce(port)
				backends = append(backends, nodetest.At(f.PodIP(1), port))
			}
			s := nodetest.NewState(nodetest.ServiceOf("many", nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080))))
			l.sync(s)
			seen := map[int]int{}
			for range 8 * n {
				c, err := l.Pods[1].Dial(f.TCP, nodetest.At(f.Cluster, 80))
				if err != nil {
					t.Fatal(err)
				}
				seen[l.PortAtEnd(c)]++
				c.Close()
			}
			if len(seen) < n-2 { // each is missed once in 3,000 times
				t.Errorf("%d endpoints: %d were reached", n, len(seen))
			}
			if c, err := l.Client.Dial(f.TCP, nodetest.At(f.Node, 30080)); err != nil {
				t.Error(err)
			} else {
				c.Close()
			}
		}
	})
}

// The order of sets is that in which elements may come and go.
func TestSetsAreInOrder(t *testing.T) {
	names := newLayout(layers[model.IPv4], &params{}).sets
	at := func(name string) int { return slices.IndexFunc(names, func(s set) bool { return s.name == name }) }
	for _, o := range [][2]string{
		{"endpoints", "frontends"},
		{"sizes", "frontends"},
		{"restricted", "frontends"},
		{"sources", "restricted"},
		{"masqueraded", "frontends"},
		{"affinity-timeouts", "affinity-groups"},
		{"frontends", "cluster-ips"},
		{"cluster-ips", "service-cidrs"},
		{"nodeport-endpoints", "nodeports"},
	} {
		if at(o[0]) < 0 || at(o[0]) > at(o[1]) {
			t.Errorf("%s is not before %s", o[0], o[1])
		}
	}
}

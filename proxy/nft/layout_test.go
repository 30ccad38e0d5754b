package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// everything is a State that has something in each set, in both families.
func everything(affinity [model.Families]bool) *state {
	s := newState()
	for _, f := range families {
		port := func(p model.Protocol) model.Port {
			front := f.loadBalancer(80)
			front.Restricted, front.Sources = true, prefixes(f.wide, f.narrow)
			none, nowhere := clusterIP(at(f.other, 80)), f.nodePort(30082)
			none.Action, nowhere.Action = model.Reject, model.Drop
			out := portOf(p, []string{f.pod(1) + "*", f.pod(2)}, clusterIP(at(f.cluster, 80)), front, f.nodePort(30080), local(f.nodePort(30081)), none, nowhere)
			if affinity[f.of] {
				out.Affinity = time.Hour
			}
			return out
		}
		s.services = append(s.services, serviceOf(f.name, port(model.TCP), port(model.UDP), port(model.SCTP)))
		s.hairpins = append(s.hairpins, hairpinOf(model.TCP, f.pod(1)))
		var many []string
		for i := range 20 {
			many = append(many, at(f.podIP(1), 9000+i))
		}
		s.services = append(s.services, serviceOf(f.name+"-many", portOf(model.TCP, many, f.loadBalancer(443), f.nodePort(30443))))
	}
	return s
}

// What the kernel was given is what nft shows: what it makes of its own listing is what the kernel was given. Of the map of
// clients in IPv6 nft 1.0.6 (Debian 12) can show the rule, not read it: it ends with an assertion.
func TestListingLoadsAsTheSameRules(t *testing.T) {
	for _, affinity := range [][model.Families]bool{{}, {true, false}} {
		s := newSpace(t, "node")
		p := s.program(Options{})
		st := everything(affinity)
		if _, err := p.Sync(st); err != nil {
			t.Fatal(err)
		}
		list := s.run("nft", "list", "ruleset")
		if out, err := s.input("flush ruleset\n"+list, "nft", "-f", "-"); err != nil {
			t.Fatalf("nft does not load its listing: %s", out)
		}
		if again := s.run("nft", "list", "ruleset"); again != list {
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
			if len(got.chains) != len(want.chains) || len(got.sets) != len(want.sets) {
				t.Fatalf("%d chains and %d sets, not %d and %d", len(got.chains), len(got.sets), len(want.chains), len(want.sets))
			}
			for i := range want.chains {
				w := &want.chains[i]
				if g := got.find(w.name); g == nil || !w.is(g) && w.name != "source-check" && w.name != "affinity-remember" {
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
	s := newSpace(t, "node")
	p := s.program(Options{})
	if _, err := p.Sync(everything([model.Families]bool{true, true})); err != nil {
		t.Fatal(err)
	}
	list := s.run("nft", "list", "ruleset")
	for _, want := range []string{
		`10.96.0.1 . tcp . 80 comment "test/IPv4:p"`, `fd96::1 . udp . 80 comment "test/IPv6:p"`, `sctp . 30081 comment "test/IPv4:p"`,
		"10.96.0.1 . tcp . 80 . 0 : 10.1.1.2 . 8080", "fd96::1 . tcp . 80 . 1 : fd01:0:0:2::2 . 8080", "tcp . 30081 . 65536 : 10.1.1.2 . 8080",
		"203.0.113.1 . tcp . 80 . 192.0.2.0/24", "timeout 1h : ip daddr . th dport", `comment "` + tableComment,
	} {
		if !strings.Contains(list, want) {
			t.Errorf("%q is not in the listing", want)
		}
	}
	if strings.Contains(list, "Error") || strings.Contains(list, "@nh") || strings.Contains(list, "unknown") {
		t.Error(list)
	}
}

// crowd is a State of so many Services, with so many endpoints each.
func crowd(n, endpoints int) *state {
	s := newState()
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, byte(100 + i>>16), byte(i >> 8), byte(i)})
		var backends []string
		for j := range endpoints {
			backends = append(backends, fmt.Sprintf("10.1.%d.%d:80", (i+j)>>8&255, (i+j)&255))
		}
		s.services = append(s.services, serviceOf(fmt.Sprintf("s%d", i), portOf(model.TCP, backends, clusterIP(netip.AddrPortFrom(a, 80).String()))))
	}
	return s
}

// Chains, rules and sets are as many for ten thousand Services as for none, and so they are with large ones and affinity for
// ten as for a thousand.
func TestObjectsAreAsManyForAnyNumberOfServices(t *testing.T) {
	count := func(s *state) string {
		node := newSpace(t, "node")
		p := node.program(Options{})
		r, err := p.Sync(s)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("again: %+v, %v", r, err)
		}
		return fmt.Sprint(r.Objects)
	}
	none := count(newState())
	for _, n := range []int{1, 10000} {
		if got := count(crowd(n, 2)); got != none {
			t.Errorf("%d Services: %s objects, for none %s", n, got, none)
		}
	}
	large := func(n int) *state {
		s := crowd(n, 40)
		for _, svc := range s.services {
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
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		for _, n := range []int{17, 23, 100} {
			var backends []string
			for i := range n {
				port := 10000 + 200*n + i
				l.pods[0].serveTCPOnce(port)
				backends = append(backends, at(f.podIP(1), port))
			}
			s := newState(serviceOf("many", portOf(model.TCP, backends, clusterIP(at(f.cluster, 80)), f.nodePort(30080))))
			l.sync(s)
			seen := map[int]int{}
			for range 8 * n {
				c, err := l.pods[1].dial(f.tcp, at(f.cluster, 80))
				if err != nil {
					t.Fatal(err)
				}
				seen[l.portAtEnd(c)]++
				c.Close()
			}
			if len(seen) < n-2 { // each is missed once in 3,000 times
				t.Errorf("%d endpoints: %d were reached", n, len(seen))
			}
			if c, err := l.client.dial(f.tcp, at(f.node, 30080)); err != nil {
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

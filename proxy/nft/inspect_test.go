package nft

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

func inspect(t *testing.T, p *Programmer, scope program.Scope) *program.Inspection {
	t.Helper()
	found, err := p.Inspector().Inspect(scope)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func nameOf(service string) types.NamespacedName {
	return types.NamespacedName{Namespace: "test", Name: service}
}

// What another program changes is found, whatever it is; of a Service what is its own, and the rules.
func TestInspectFindsWhatIsNotAsItShouldBe(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{Counters: true})
	if found, err := p.Inspector().Inspect(program.Scope{}); !errors.Is(err, program.ErrLoading) {
		t.Errorf("before the first sync: %v, %v", found, err)
	}
	if _, err := p.Sync(everything([model.Families]bool{true, true})); err != nil {
		t.Fatal(err)
	}
	all, own := program.Scope{}, program.Scope{Services: []types.NamespacedName{nameOf("IPv4")}}
	other := program.Scope{Services: []types.NamespacedName{nameOf("IPv4-many")}}
	at := program.Scope{At: []program.Place{{Protocol: model.TCP, Addr: netip.MustParseAddrPort("10.96.7.7:80")}}}
	for _, scope := range []program.Scope{all, own, other} {
		if found := inspect(t, p, scope); len(found.Differences) != 0 || found.Elements == 0 {
			t.Errorf("%v: %+v", scope, found)
		}
	}
	for _, c := range []struct {
		change string
		where  program.Scope // the narrowest that finds it
		want   string
	}{
		{"delete element ip berth-proxy frontends { 10.96.0.1 . tcp . 80 }", own, `table ip berth-proxy set frontends: missing: should be 10.96.0.1 . tcp . 80 comment "test/IPv4:p"`},
		{"delete element ip berth-proxy endpoints { 203.0.113.1 . udp . 80 . 1 }", own, "set endpoints: missing: should be 203.0.113.1 . udp . 80 . 1 : 10.1.2.2 . 8080"},
		{"add element ip berth-proxy endpoints { 203.0.113.1 . tcp . 80 . 2 : 192.0.2.66 . 80 }", own, "set endpoints: not berth's: is 203.0.113.1 . tcp . 80 . 2 : 192.0.2.66 . 80"},
		{"add element ip berth-proxy nodeport-endpoints { sctp . 30081 . 7 : 192.0.2.66 . 80 }", own, "not berth's: is sctp . 30081 . 7 : 192.0.2.66 . 80"},
		{"delete element ip berth-proxy endpoints { 203.0.113.1 . tcp . 80 . 0 }\nadd element ip berth-proxy endpoints { 203.0.113.1 . tcp . 80 . 0 : 192.0.2.66 . 80 }", own, "set endpoints: another value: should be 203.0.113.1 . tcp . 80 . 0 : 10.1.1.2 . 8080: is 203.0.113.1 . tcp . 80 . 0 : 192.0.2.66 . 80"},
		{"add element ip berth-proxy sources { 203.0.113.1 . tcp . 80 . 8.0.0.0/8 }", own, "set sources: not berth's: is 203.0.113.1 . tcp . 80 . 8.0.0.0-8.255.255.255"},
		{"delete element ip berth-proxy cluster-ips { 10.96.0.1 }", own, "set cluster-ips: missing: should be 10.96.0.1"},
		{"delete element ip berth-proxy hairpin { 10.1.1.2 . 10.1.1.2 . tcp . 8080 }", own, "set hairpin: missing: should be 10.1.1.2 . 10.1.1.2 . tcp . 8080"},
		{"flush set ip berth-proxy affinity-timeouts", own, "set affinity-timeouts: missing"},
		{"add element ip berth-proxy rejected { 10.96.7.7 . tcp . 80 }", at, "set rejected: not berth's: is 10.96.7.7 . tcp . 80"},
		{"add element ip berth-proxy cluster-ips { 10.96.7.7 }", at, "set cluster-ips: not berth's: is 10.96.7.7"},
		{"flush set ip berth-proxy service-cidrs", at, "set service-cidrs: missing: should be 10.96.0.0"},
		{"add element ip6 berth-proxy nodeports { tcp . 31999 }", all, "table ip6 berth-proxy set nodeports: not berth's: is tcp . 31999"},
		{"flush chain ip berth-proxy masquerading", other, "chain masquerading: other rules: should be"},
		{"insert rule ip berth-proxy services counter drop", other, "chain services: other rules"},
		{"add chain ip6 berth-proxy mine", other, "table ip6 berth-proxy chain mine: not berth's"},
		{"add set ip berth-proxy mine { type ipv4_addr; }", other, "set mine: not berth's"},
		{"delete table ip6 berth-proxy", other, "table ip6 berth-proxy: missing"},
	} {
		if out, err := s.Input(c.change, "nft", "-f", "-"); err != nil {
			t.Fatalf("%s: %s", c.change, out)
		}
		for _, scope := range []program.Scope{c.where, all} {
			found := inspect(t, p, scope).Differences
			if !slices.ContainsFunc(found, func(d program.Difference) bool { return strings.Contains(d.String(), c.want) }) {
				t.Errorf("%s: %v, want %s", c.change, found, c.want)
			}
		}
		if narrow := !c.where.All() && !slices.Equal(c.where.Services, other.Services); narrow {
			if found := inspect(t, p, other).Differences; len(found) != 0 && !strings.Contains(c.change, "service-cidrs") {
				t.Errorf("%s is none of %v: %v", c.change, other.Services, found)
			}
		}
		if _, err := p.Verify(); err != nil {
			t.Fatal(err)
		}
		if found := inspect(t, p, all); len(found.Differences) != 0 {
			t.Errorf("mended: %v", found.Differences)
		}
	}
	have := strings.Join(inspect(t, p, own).Have, "\n")
	for _, want := range []string{
		`ip frontends: 10.96.0.1 . tcp . 80 comment "test/IPv4:p" counter packets 0 bytes 0`, "ip endpoints: 10.96.0.1 . tcp . 80 . 0 : 10.1.1.2 . 8080",
		"ip nodeport-dropped: tcp . 30082", "ip sources: 203.0.113.1 . tcp . 80 . 192.0.2.0-192.0.2.255",
	} {
		if !strings.Contains(have, want) {
			t.Errorf("the kernel has no %s:\n%s", want, have)
		}
	}
	if strings.Contains(have, "fd96::") || strings.Contains(have, "443") {
		t.Errorf("others' elements are told:\n%s", have)
	}
}

func TestInspectTellsAForeignTable(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	s.Run("nft", "add", "table", "ip", Table)
	p := openAt(s, Options{})
	_, _ = p.Sync(nodetest.NewState())
	found := inspect(t, p, program.Scope{}).Differences
	if len(found) != 2 || found[0].What != program.Foreign || found[1].What != program.Missing {
		t.Error(found)
	}
}

// Who looks on while Services come and go sees no difference that is none.
func TestInspectDuringChanges(t *testing.T) {
	p := openAt(nodetest.NewSpace(t, "node"), Options{Counters: true})
	s := nodetest.Crowd(300, 2)
	if _, err := p.Sync(s); err != nil {
		t.Fatal(err)
	}
	one := nodetest.ServiceOf("one", nodetest.PortOf(model.TCP, nodetest.Families[0].Pods(1), nodetest.ClusterIP("10.96.0.1:80")))
	two := nodetest.ServiceOf("one", nodetest.PortOf(model.TCP, nodetest.Families[0].Pods(2, 3), nodetest.ClusterIP("10.96.0.1:80")))
	if _, err := p.Apply(s.Delta(nil, one)); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 20 {
			found, err := p.Inspector().Inspect(program.Scope{Services: []types.NamespacedName{nameOf("one")}})
			if err != nil || found.Elements == 0 {
				t.Errorf("%+v, %v", found, err)
			}
			// A change may be under way at each of its looks: those are told for what they are.
			for _, d := range found.Differences {
				if !strings.Contains(d.String(), "10.96.0.1") {
					t.Error(d)
				}
			}
		}
	}()
	for range 100 {
		if _, err := p.Apply(s.Delta(one, two)); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Apply(s.Delta(two, one)); err != nil {
			t.Fatal(err)
		}
	}
	<-done
	if found := inspect(t, p, program.Scope{}); len(found.Differences) != 0 {
		t.Error(found.Differences)
	}
}

func TestInspectTellsTheEndpointOfAClient(t *testing.T) {
	l, f := newLab(t, 2), nodetest.Families[0]
	port := nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80))))
	l.sync(nodetest.NewState(nodetest.ServiceOf("web", port)))
	client := netip.MustParseAddr(f.Client)
	ask := func() (netip.AddrPort, time.Duration, bool) {
		t.Helper()
		to, left, ok, err := l.p.Inspector().Client(client, nameOf("web"), &port, model.Cluster)
		if err != nil {
			t.Fatal(err)
		}
		return to, left, ok
	}
	if to, _, ok := ask(); ok {
		t.Errorf("nobody was sent anywhere yet: %s", to)
	}
	answer := l.Client.Ask(f.TCP, nodetest.At(f.Cluster, 80))
	to, left, ok := ask()
	if want := "pod" + strings.Split(to.Addr().String(), ".")[2] + " "; !ok || !strings.HasPrefix(answer, want) || left > time.Hour || left < 50*time.Minute {
		t.Errorf("%s for %s, %t; %q answered, want %q", to, left, ok, answer, want)
	}
}

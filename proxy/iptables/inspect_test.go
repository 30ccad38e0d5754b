package iptables

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
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

// What another program changes is found, whatever it is, and named; of a Service what is its own, and what goes for all.
func TestInspectFindsWhatIsNotAsItShouldBe(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		s := nodetest.NewSpace(t, "node")
		p := openAt(s, backend)
		if found, err := p.Inspector().Inspect(program.Scope{}); !errors.Is(err, program.ErrLoading) {
			t.Errorf("before the first sync: %v, %v", found, err)
		}
		if _, err := p.Sync(some()); err != nil {
			t.Fatal(err)
		}
		all, own := program.Scope{}, program.Scope{Services: []types.NamespacedName{nameOf("test", "a")}}
		six := program.Scope{Services: []types.NamespacedName{nameOf("test", "c")}}
		other := program.Scope{Services: []types.NamespacedName{nameOf("test", "b")}}
		refused := program.Scope{Services: []types.NamespacedName{nameOf("test", "d")}}
		at := program.Scope{At: []program.Place{{Protocol: model.TCP, Addr: netip.MustParseAddrPort("10.96.7.7:80")}}}
		for _, scope := range []program.Scope{all, own, six, other, refused} {
			if found := inspect(t, p, scope); len(found.Differences) != 0 || found.Elements == 0 {
				t.Errorf("%v: %+v", scope, found)
			}
		}
		a, c := hash("test/a:p", "tcp"), hash("test/c:p", "sctp")
		first, second := endpointChain+hash("test/a:p", "tcp", "10.1.1.2:8080"), endpointChain+hash("test/a:p", "tcp", "10.1.2.2:8080")
		last := endpointChain + hash("test/c:p", "sctp", "[fd01::3]:80")
		const draws, sends = " -m comment --comment web -m statistic --mode random --probability 0.25 -j ", " -p tcp -m tcp -j DNAT --to-destination 192.0.2.66:80"
		for _, tc := range []struct {
			family model.Family
			change string        // arguments of iptables, several lines of them
			where  program.Scope // the narrowest that finds it
			want   []string
		}{
			{model.IPv4, "-t nat -D KUBE-SVC-" + a + " 4", own, []string{"table ip nat chain KUBE-SVC-" + a + ": missing: should be ", "-j " + first + " (50.0% to 10.1.1.2:8080)"}},
			{model.IPv4, "-t nat -R KUBE-SVC-" + a + " 4 -m comment --comment x -m statistic --mode random --probability 0.25 -j " + first, own,
				[]string{": another share: should be ", "(50.0% to 10.1.1.2:8080): is ", "(25.0% to 10.1.1.2:8080)"}},
			{model.IPv6, "-t nat -R KUBE-SVC-" + c + " 3" + draws + endpointChain + hash("test/c:p", "sctp", "[fd01::2]:80"), six, []string{": another share: should be ", "(33.3% to [fd01::2]:80): is ", "(16.7% to [fd01::2]:80)"}},
			{model.IPv4, "-t nat -R " + first + " 2" + sends, own, []string{"table ip nat chain " + first + ": another value: should be ", "--to-destination 10.1.1.2:8080: is ", "--to-destination 192.0.2.66:80"}},
			{model.IPv6, "-t nat -F " + last, six, []string{"table ip6 nat chain " + last + ": missing: should be ", "--to-destination [fd01::3]:80"}},
			{model.IPv4, "-t nat -N KUBE-SEP-MINE\n-t nat -A KUBE-SEP-MINE" + sends + "\n-t nat -I KUBE-SVC-" + a + " 4 -j KUBE-SEP-MINE", own, []string{": not berth's: is -j KUBE-SEP-MINE (100.0% to 192.0.2.66:80)"}},
			{model.IPv4, "-t nat -F KUBE-SVC-" + a + "\n-t nat -F KUBE-EXT-" + a + "\n-t nat -F KUBE-FW-" + a + "\n-t nat -D KUBE-SERVICES -d 10.96.0.1 -p tcp -m comment --comment test/a:p__cluster__IP -m tcp --dport 80 -j KUBE-SVC-" + a +
				"\n-t nat -F " + first + "\n-t nat -X " + first, own, []string{"table ip nat chain " + first + ": missing: should be the chain", "chain KUBE-SERVICES: missing: should be -d 10.96.0.1/32 -p tcp"}},
			{model.IPv4, "-t nat -D KUBE-FW-" + a + " 1", own, []string{"table ip nat chain KUBE-FW-" + a + ": missing: should be -s "}},
			{model.IPv4, "-t nat -I KUBE-FW-" + a + " -s 8.0.0.0/8 -j KUBE-EXT-" + a, own, []string{"not berth's: is -s 8.0.0.0/8 -j KUBE-EXT-" + a}},
			{model.IPv4, "-F KUBE-PROXY-FIREWALL", own, []string{"table ip filter chain KUBE-PROXY-FIREWALL: missing: should be -d 203.0.113.1/32", "-j DROP"}},
			{model.IPv4, "-I KUBE-SERVICES -d 10.96.0.1 -j DROP", own, []string{"table ip filter chain KUBE-SERVICES: not berth's: is -d 10.96.0.1/32 -j DROP"}},
			{model.IPv4, "-t nat -I KUBE-SERVICES ! -d 10.9.9.9 -j RETURN", own, []string{"not berth's: is ! -d 10.9.9.9/32 -j RETURN"}},
			{model.IPv4, "-t nat -I KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j ACCEPT", own, []string{"chain KUBE-NODEPORTS: not berth's: is -p tcp -m tcp --dport 30080 -j ACCEPT"}},
			{model.IPv4, "-D KUBE-EXTERNAL-SERVICES 1", refused, []string{"chain KUBE-EXTERNAL-SERVICES: missing: should be -d 203.0.113.9/32", "has no endpoints"}},
			{model.IPv4, "-t nat -I KUBE-SERVICES -d 10.96.7.7 -p tcp -m tcp --dport 80 -j ACCEPT", at, []string{"not berth's: is -d 10.96.7.7/32 -p tcp -m tcp --dport 80 -j ACCEPT"}},
			{model.IPv4, "-D KUBE-CLUSTER-IPS 1", all, []string{"chain KUBE-CLUSTER-IPS: missing"}},
			{model.IPv4, "-t nat -D PREROUTING 1", other, []string{"table ip nat chain PREROUTING: missing: should be ", "-j KUBE-SERVICES"}},
			{model.IPv4, "-t mangle -X KUBE-PROXY-CANARY", other, []string{"table ip mangle chain KUBE-PROXY-CANARY: missing"}},
			{model.IPv4, "-F KUBE-FIREWALL", other, []string{"chain KUBE-FIREWALL: missing: should be ! -s 127.0.0.0/8 -d 127.0.0.0/8"}},
			{model.IPv4, "-A KUBE-FORWARD -j DROP", other, []string{"chain KUBE-FORWARD: not berth's: is -j DROP"}},
			{model.IPv4, "-t nat -R KUBE-MARK-MASQ 1 -j MARK --set-xmark 0x8000/0x8000", other, []string{"chain KUBE-MARK-MASQ: another value: should be -j MARK --set-xmark 0x4000/0x4000: is -j MARK --set-xmark 0x8000/0x8000"}},
			{model.IPv4, "-t nat -D KUBE-POSTROUTING 1\n-t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN", other, []string{"chain KUBE-POSTROUTING: another order: should be -m mark ! --mark 0x4000/0x4000 -j RETURN before -j MARK"}},
			{model.IPv4, "-t nat -N KUBE-SVC-AAAAAAAAAAAAAAAA", all, []string{"chain KUBE-SVC-AAAAAAAAAAAAAAAA: not berth's: is a chain of 0 rules"}},
		} {
			for line := range strings.Lines(tc.change) {
				args := strings.Fields(line)
				for i := range args { // words that are one
					args[i] = strings.ReplaceAll(args[i], "__", " ")
				}
				s.Run(programs{family: tc.family, backend: backend}.name(""), args...)
			}
			for _, scope := range []program.Scope{tc.where, all} {
				found := inspect(t, p, scope).Differences
				for _, want := range tc.want {
					if !slices.ContainsFunc(found, func(d program.Difference) bool { return strings.Contains(d.String(), want) }) {
						t.Errorf("%s: %v, want %s", tc.change, found, want)
					}
				}
			}
			if narrow := !tc.where.All() && !slices.Equal(tc.where.Services, other.Services) && !strings.Contains(tc.change, "! -d"); narrow {
				if found := inspect(t, p, other).Differences; len(found) != 0 {
					t.Errorf("%s is none of %v: %v", tc.change, other.Services, found)
				}
			}
			if _, err := p.Verify(); err != nil {
				t.Fatal(err)
			}
			if found := inspect(t, p, all); len(found.Differences) != 0 {
				t.Fatalf("%s: mended: %v", tc.change, found.Differences)
			}
		}
		have := strings.Join(inspect(t, p, own).Have, "\n")
		for _, want := range []string{
			"ip nat KUBE-SERVICES: -d 10.96.0.1/32 -p tcp -m comment --comment \"test/a:p cluster IP\" -m tcp --dport 80 -j KUBE-SVC-" + a + " counter packets 0 bytes 0",
			"--probability 0.50000000000 -j " + first + " (50.0% to 10.1.1.2:8080)", "-j " + second + " (50.0% to 10.1.2.2:8080)", "-j " + first + " (to 10.1.1.2:8080)",
			"ip nat KUBE-FW-" + a + ": -s ", "-j KUBE-EXT-" + a, "ip nat KUBE-NODEPORTS: ", "ip filter KUBE-PROXY-FIREWALL: -d 203.0.113.1/32", "DNAT --to-destination 10.1.2.2:8080",
		} {
			if !strings.Contains(have, want) {
				t.Errorf("the kernel has no %s:\n%s", want, have)
			}
		}
		if strings.Contains(have, "test/b") || strings.Contains(have, "fd96") || strings.Contains(have, "203.0.113.9") {
			t.Errorf("others' rules are told:\n%s", have)
		}
		if have := strings.Join(inspect(t, p, refused).Have, "\n"); !strings.Contains(have, "ip filter KUBE-EXTERNAL-SERVICES: -d 203.0.113.9/32") || !strings.Contains(have, "-j REJECT") {
			t.Errorf("of what is rejected:\n%s", have)
		}
		if _, _, ok, err := p.Inspector().Client(netip.MustParseAddr("192.0.2.1"), nameOf("test", "a"), nil, model.Cluster); ok || !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%v, %v", ok, err)
		}
	})
}

// Random Services are as they should be, each alone and all of them, whatever they are.
func TestInspectFindsNothingWrong(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		for seed := range 2 {
			r := nodetest.NewWorld(seed)
			m, err := model.New(r.Config())
			if err != nil {
				t.Fatal(err)
			}
			for n := range 6 {
				m.SetService(r.Service(n))
				m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv4))
				m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv6))
			}
			m.Commit()
			p := openAt(nodetest.NewSpace(t, "node"), backend)
			if _, err := p.Sync(m.State()); err != nil {
				t.Fatal(err)
			}
			if found := inspect(t, p, program.Scope{}); len(found.Differences) != 0 {
				t.Errorf("seed %d: %v", seed, found.Differences)
			}
			for svc := range m.State().Services() {
				scope := program.Scope{Services: []types.NamespacedName{svc.Name}}
				found := inspect(t, p, scope)
				if len(found.Differences) != 0 || len(found.Have) != found.Elements || found.Elements == 0 {
					t.Errorf("seed %d: %s: %+v", seed, svc.Name, found)
				}
			}
		}
	})
}

// Who looks on while Services come and go sees no difference of a Service that does not change.
func TestInspectDuringChanges(t *testing.T) {
	eachBackend(t, func(t *testing.T, backend string) {
		p := openAt(nodetest.NewSpace(t, "node"), backend)
		s := nodetest.Crowd(20, 2)
		one, two, still := served(1), served(2), nodetest.ServiceOf("still", nodetest.PortOf(model.TCP, ip4.Pods(1, 2), nodetest.ClusterIP("10.96.9.9:80")))
		s.ServiceList = append(s.ServiceList, one, still)
		if _, err := p.Sync(s); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 5 {
				found, err := p.Inspector().Inspect(program.Scope{Services: []types.NamespacedName{still.Name}})
				if err != nil || found.Elements == 0 || len(found.Differences) > 0 {
					t.Errorf("%+v, %v", found, err)
				}
			}
		}()
		for begun, n := time.Now(), 0; ; n++ {
			was, is := one, two
			if n%2 == 1 {
				was, is = two, one
			}
			if _, err := p.Apply(s.Delta(was, is)); err != nil {
				t.Fatal(err)
			}
			select {
			case <-done:
			default:
				if time.Since(begun) < time.Minute {
					continue
				}
				t.Error("nobody has looked")
			}
			break
		}
		<-done
		if found := inspect(t, p, program.Scope{}); len(found.Differences) != 0 {
			t.Error(found.Differences)
		}
	})
}

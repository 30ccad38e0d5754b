package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

var ip4 = nodetest.Families[model.IPv4]

// text is what is written for a Service, with names of chains in the place of their hashes.
func text(x parts, s *model.Service, names map[string]string) string {
	p := x.service(s)
	var lines []string
	for _, o := range p.own {
		for _, r := range o.rules {
			lines = append(lines, o.name+" "+r)
		}
	}
	slices.SortStableFunc(p.shared, func(a, b shared) int {
		return strings.Compare(a.chain.table.String()+a.chain.name, b.chain.table.String()+b.chain.name)
	})
	for _, r := range p.shared {
		lines = append(lines, r.chain.table.String()+" "+r.chain.name+" "+r.rule)
	}
	out := strings.Join(lines, "\n")
	for hash, name := range names {
		out = strings.ReplaceAll(out, hash, name)
	}
	return out
}

// Rules of Services are these: kube-proxy's, where it has such.
func TestRules(t *testing.T) {
	s := nodetest.NewState()
	g := &s.All.Family[model.IPv4]
	names := map[string]string{hash("test/web:p", "tcp"): "WEB", hash("test/web:p", "tcp", "10.1.1.2:8080"): "ONE", hash("test/web:p", "tcp", "10.1.2.2:8080"): "TWO"}
	lb := ip4.LoadBalancer(80)
	lb.Restricted, lb.Sources = true, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	none := nodetest.ClusterIP("10.96.0.1:80")
	none.Action = model.Reject
	noLB := lb
	noLB.Action = model.Reject
	noLocal := nodetest.LocalPolicy(ip4.NodePort(30080))
	noLocal.Action = model.Drop
	endpoints := `KUBE-SEP-ONE -s 10.1.1.2/32 -m comment --comment "test/web:p" -j KUBE-MARK-MASQ
KUBE-SEP-ONE -p tcp -m comment --comment "test/web:p" -m tcp -j DNAT --to-destination 10.1.1.2:8080
KUBE-SEP-TWO -s 10.1.2.2/32 -m comment --comment "test/web:p" -j KUBE-MARK-MASQ
KUBE-SEP-TWO -p tcp -m comment --comment "test/web:p" -m tcp -j DNAT --to-destination 10.1.2.2:8080
`
	half := `KUBE-SVC-WEB -m comment --comment "test/web:p -> 10.1.1.2:8080" -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-ONE
KUBE-SVC-WEB -m comment --comment "test/web:p -> 10.1.2.2:8080" -j KUBE-SEP-TWO
`
	refused := `filter KUBE-CLUSTER-IPS -d 10.96.0.1/32 -m comment --comment "test/web has no such port" -j KUBE-REJECT
`
	for _, tc := range []struct {
		name string
		port model.Port
		want string
	}{
		{"cluster IP", nodetest.PortOf(model.TCP, ip4.Pods(1, 2), nodetest.ClusterIP("10.96.0.1:80")),
			`KUBE-SVC-WEB ! -s 10.1.0.0/16 -d 10.96.0.1/32 -p tcp -m comment --comment "test/web:p cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
` + half + endpoints + refused + `nat KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "test/web:p cluster IP" -m tcp --dport 80 -j KUBE-SVC-WEB`},
		{"node port", nodetest.PortOf(model.TCP, ip4.Pods(1, 2), ip4.NodePort(30080)),
			`KUBE-EXT-WEB -m comment --comment "masquerade traffic for test/web:p external destinations" -j KUBE-MARK-MASQ
KUBE-EXT-WEB -j KUBE-SVC-WEB
` + half + endpoints + `nat KUBE-NODEPORTS -p tcp -m comment --comment "test/web:p" -m tcp --dport 30080 -j KUBE-EXT-WEB`},
		{"source ranges", nodetest.PortOf(model.TCP, ip4.Pods(1, 2), lb),
			`KUBE-EXT-WEB -m comment --comment "masquerade traffic for test/web:p external destinations" -j KUBE-MARK-MASQ
KUBE-EXT-WEB -j KUBE-SVC-WEB
KUBE-FW-WEB -s 192.0.2.0/24 -m comment --comment "test/web:p loadbalancer IP" -j KUBE-EXT-WEB
KUBE-FW-WEB -m comment --comment "other traffic to test/web:p will be dropped by KUBE-PROXY-FIREWALL"
` + half + endpoints + `filter KUBE-PROXY-FIREWALL -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p traffic not accepted by KUBE-FW-WEB" -m tcp --dport 80 -j DROP
nat KUBE-SERVICES -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p loadbalancer IP" -m tcp --dport 80 -g KUBE-FW-WEB`},
		{"no endpoints", nodetest.PortOf(model.TCP, nil, none, noLB),
			refused + `filter KUBE-EXTERNAL-SERVICES -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p has no endpoints" -m tcp --dport 80 -j REJECT --reject-with tcp-reset
filter KUBE-PROXY-FIREWALL -s 192.0.2.0/24 -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p is rejected elsewhere" -m tcp --dport 80 -j RETURN
filter KUBE-PROXY-FIREWALL -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p traffic not accepted by KUBE-FW-WEB" -m tcp --dport 80 -j DROP
filter KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "test/web:p has no endpoints" -m tcp --dport 80 -j REJECT --reject-with tcp-reset
nat KUBE-SERVICES -d 203.0.113.1/32 -p tcp -m comment --comment "test/web:p loadbalancer IP" -m tcp --dport 80 -j RETURN`},
		{"external policy Local without a local endpoint", nodetest.PortOf(model.TCP, ip4.Pods(1, 2), noLocal),
			`KUBE-EXT-WEB -s 10.1.0.0/16 -m comment --comment "pod traffic for test/web:p external destinations" -j KUBE-SVC-WEB
KUBE-EXT-WEB -m comment --comment "masquerade LOCAL traffic for test/web:p external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
KUBE-EXT-WEB -m comment --comment "route LOCAL traffic for test/web:p external destinations" -m addrtype --src-type LOCAL -j KUBE-SVC-WEB
` + half + endpoints + `filter KUBE-EXTERNAL-SERVICES ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -p tcp -m comment --comment "test/web:p has no local endpoints" -m tcp --dport 30080 -j DROP
nat KUBE-NODEPORTS -p tcp -m comment --comment "test/web:p" -m tcp --dport 30080 -j KUBE-EXT-WEB`},
		{"session affinity", nodetest.Sticky(3*time.Hour, nodetest.PortOf(model.TCP, ip4.Pods(1), ip4.NodePort(30080))),
			`KUBE-EXT-WEB -m comment --comment "masquerade traffic for test/web:p external destinations" -j KUBE-MARK-MASQ
KUBE-EXT-WEB -j KUBE-SVC-WEB
KUBE-SVC-WEB -m comment --comment "test/web:p -> 10.1.1.2:8080" -m recent --rcheck --seconds 10800 --reap --name KUBE-SEP-ONE --mask 255.255.255.255 --rsource -j KUBE-SEP-ONE
KUBE-SVC-WEB -m comment --comment "test/web:p -> 10.1.1.2:8080" -j KUBE-SEP-ONE
KUBE-SEP-ONE -s 10.1.1.2/32 -m comment --comment "test/web:p" -j KUBE-MARK-MASQ
KUBE-SEP-ONE -p tcp -m comment --comment "test/web:p" -m recent --set --name KUBE-SEP-ONE --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.1.1.2:8080
nat KUBE-NODEPORTS -p tcp -m comment --comment "test/web:p" -m tcp --dport 30080 -j KUBE-EXT-WEB`},
	} {
		if got := text(parts{model.IPv4, g}, nodetest.ServiceOf("web", tc.port), names); got != tc.want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.name, got, tc.want)
		}
	}
}

// Names of chains are those that kube-proxy 1.37 gives to the same.
func TestChainNamesAreKubeProxys(t *testing.T) {
	// From its own tests (proxier_test.go).
	for got, want := range map[string]string{
		clusterChain + hash("ns1/svc1:p80", "tcp"):                   "KUBE-SVC-XPGD46QRK7WJZT7O",
		endpointChain + hash("ns1/svc1:p80", "tcp", "10.180.0.1:80"): "KUBE-SEP-SXIVWICOYRO3J4NJ",
		externalChain + hash("ns2/svc2:p80", "tcp"):                  "KUBE-EXT-GNZBNJ2PO5MGZ6GT",
	} {
		if got != want {
			t.Errorf("%s, not %s", got, want)
		}
	}
}

// The kernel gets the same probabilities as from kube-proxy, and by weights each endpoint its share.
func TestProbabilities(t *testing.T) {
	for n, want := range map[int]string{1: "1.00000000000", 2: "0.50000000000", 3: "0.33333333349", 7: "0.14285714272"} {
		if got := draw(1, n); !strings.HasSuffix(got, " "+want) {
			t.Errorf("%d: %s", n, got)
		}
	}
	p := nodetest.PortOf(model.TCP, ip4.Pods(1, 2, 3), ip4.NodePort(30080))
	for i := range p.Cluster {
		p.Cluster[i].Weight = uint16(1 + 2*i) // 1, 3, 5
	}
	var got []string
	for _, o := range (parts{model.IPv4, &model.FamilyGlobals{}}).service(nodetest.ServiceOf("web", p)).own {
		for _, r := range o.rules {
			if _, p, ok := strings.Cut(r, "--probability "); ok {
				got = append(got, strings.Fields(p)[0])
			}
		}
	}
	if fmt.Sprint(got) != "[0.11111111101 0.37500000000]" { // 1 of 9, 3 of 8, the rest
		t.Error(got)
	}
}

// No name of the API server's becomes a rule.
func TestNamesEndNoComment(t *testing.T) {
	for _, evil := range []string{"a\"\n-A INPUT -j DROP\nCOMMIT", "a\\", "a' -j ACCEPT '", "é\x00\t", strings.Repeat("x", 1000), "-j", "!"} {
		p := nodetest.PortOf(model.TCP, ip4.Pods(1), nodetest.ClusterIP("10.96.0.1:80"), ip4.LoadBalancer(80), ip4.NodePort(30080))
		p.Name = evil
		s := nodetest.ServiceOf(evil, p)
		s.HealthCheck.Port = 31000
		was := nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, ip4.Pods(1), nodetest.ClusterIP("10.96.0.1:80"), ip4.LoadBalancer(80), ip4.NodePort(30080)))
		was.HealthCheck.Port = 31000
		x := parts{model.IPv4, &model.FamilyGlobals{}}
		for i, r := range x.service(s).shared {
			plain := x.service(was).shared[i]
			if len(split(r.rule)) != len(split(plain.rule)) || strings.ContainsAny(r.rule, "\n\\\x00\t'") || target(r.rule)[:5] != target(plain.rule)[:5] {
				t.Errorf("%q: %s", evil, r.rule)
			}
			for _, w := range split(r.rule) {
				if len(w.text) > maxComment {
					t.Errorf("%d bytes", len(w.text))
				}
			}
		}
	}
}

// Prefixes of node ports have no loopback address where these are not served.
func TestNodePortAddresses(t *testing.T) {
	for _, tc := range []struct {
		prefixes []string
		loopback bool
		want     string
	}{
		{[]string{"0.0.0.0/0"}, false, "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL"},
		{[]string{"0.0.0.0/0"}, true, "-m addrtype --dst-type LOCAL"},
		{[]string{"10.0.0.0/8", "127.0.0.0/8"}, false, "-d 10.0.0.0/8 -m addrtype --dst-type LOCAL"},
		{[]string{"127.0.0.1/32"}, true, "-d 127.0.0.1/32 -m addrtype --dst-type LOCAL"},
		{[]string{"124.0.0.0/6"}, false, "-d 124.0.0.0/7 -m addrtype --dst-type LOCAL; -d 126.0.0.0/8 -m addrtype --dst-type LOCAL"},
	} {
		var a model.NodePortAddresses
		for _, p := range tc.prefixes {
			a.Prefixes = append(a.Prefixes, netip.MustParsePrefix(p))
		}
		a.Loopback = tc.loopback
		if got := strings.Join((parts{model.IPv4, &model.FamilyGlobals{NodePorts: a}}).nodePortAddresses(), "; "); got != tc.want {
			t.Errorf("%v: %s", tc.prefixes, got)
		}
	}
}

func TestKeys(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		same bool
	}{
		{`-p tcp -d 1.1.1.1/32 -m tcp --dport 80 -j X`, `-d 1.1.1.1/32 -p tcp -m comment -m tcp --dport 80 -j X`, true},
		{`-m comment --comment a -j X`, `-m comment --comment "a" -j X`, true},
		{`-m comment --comment "a \"b" -j X`, `-m comment --comment "a b" -j X`, false},
		{`! -s 1.1.1.1/32 -j X`, `-s 1.1.1.1/32 -j X`, false},
		{`-j X`, `-g X`, false},
		{`-m comment --comment "-j Y" -j X`, `-j Y -m comment --comment X`, false},
		{`-m mark ! --mark 0x4000/0x4000 -j RETURN`, `-m mark --mark 0x4000/0x4000 -j RETURN`, false},
	} {
		if same(tc.a, tc.b) != tc.same {
			t.Errorf("%s, %s: %q, %q", tc.a, tc.b, key(tc.a), key(tc.b))
		}
	}
	if to := target(`-m comment --comment "x -j A" -m tcp -j KUBE-SEP-B --random`); to != "KUBE-SEP-B" {
		t.Error(to)
	}
}

// Whatever there is to be read: it is read without a fault, and what was written from it is read as the same.
func FuzzParse(f *testing.F) {
	f.Add("*nat\n:KUBE-SERVICES - [0:0]\n:PREROUTING ACCEPT [1:2]\n[3:4] -A KUBE-SERVICES -m comment --comment \"a \\\" b\" -j KUBE-SVC-A\nCOMMIT\n# x\n")
	f.Add("*filter\n-A\n-A \n:\n: -\n[\n[] -A X\nCOMMIT\n*raw\n:A -\n")
	f.Add("# Table `nat' is incompatible, use 'nft' tool.\n")
	f.Fuzz(func(t *testing.T, text string) {
		have, err := parse(text)
		if err != nil {
			return
		}
		b := &batch{}
		for _, c := range sortedChains(have) {
			if strings.ContainsAny(c.name, " \r") || c.name == "" {
				return
			}
			for _, r := range have[c] {
				if strings.ContainsAny(r, "\r") {
					return
				}
				_, _ = target(r), key(r)
			}
			b.write(c, have[c])
		}
		again, err := parse(b.String())
		if err != nil || len(again) != len(have) {
			t.Fatalf("%v: %q\n%q", err, text, b)
		}
		for c, rules := range have {
			if !slices.Equal(again[c], rules) {
				t.Fatalf("%v: %q, %q", c, rules, again[c])
			}
		}
		_ = difference(have, map[chain]*wanted{}, true).String()
		for tb := range table(tables) {
			_ = removal(have, tb).String()
		}
	})
}

package nft

import (
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
)

// connections are some that are open to a Service.
func (l *lab) connections(from *space, network, to string, n int) (all []net.Conn) {
	l.t.Helper()
	for range n {
		c, err := from.dial(network, to)
		if err != nil {
			l.t.Fatal(err)
		}
		l.t.Cleanup(func() { c.Close() })
		all = append(all, c)
	}
	return all
}

func (l *lab) alive(all []net.Conn) {
	l.t.Helper()
	for i, c := range all {
		if a := again(c); !strings.HasPrefix(a, "pod") {
			l.t.Errorf("connection %d: %q", i, a)
		}
	}
}

// A restart changes nothing in the kernel, whatever is programmed; connections go on.
func TestRestartChangesNothing(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		front := f.loadBalancer(80)
		front.Restricted, front.Sources = true, prefixes(f.wide, f.narrow)
		var many []string
		for i := range 20 {
			many = append(many, at(f.podIP(1), 9000+i))
		}
		s := newState(
			serviceOf("a", sticky(time.Hour, portOf(model.TCP, f.pods(1, 2), clusterIP(at(f.cluster, 80)), front, f.nodePort(30080)))),
			serviceOf("b", portOf(model.UDP, []string{f.pod(1) + "*", f.pod(2)}, clusterIP(at(f.other, 80)), local(f.nodePort(30080)))),
			serviceOf("c", portOf(model.SCTP, many, local(f.loadBalancer(90)))))
		s.hairpins = []model.Hairpin{hairpinOf(model.TCP, f.pod(1))}
		l.sync(s)
		open := l.connections(l.client, f.tcp, at(f.loadIP, 80), 10)
		who := again(open[0])
		l.alive(open)
		for range 3 {
			if err := l.p.Close(); err != nil {
				t.Fatal(err)
			}
			l.alive(open)
			l.p = l.node.program(Options{})
			if r := l.sync(s); r != (Report{}) {
				t.Errorf("a restart has changed something: %+v", r)
			}
			l.alive(open)
			l.want(l.client, f.tcp, at(f.loadIP, 80), who) // and is remembered
		}
	})
}

// What has changed while the proxy was away is all that is changed.
func TestRestartCommitsTheDifference(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		s := newState(serviceOf("a", portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80)))), serviceOf("b", portOf(model.TCP, f.pods(1), clusterIP(at(f.other, 81)))))
		l.sync(s)
		l.p.Close()
		s.delta(s.services[0], serviceOf("a", portOf(model.TCP, f.pods(2), clusterIP(at(f.cluster, 80)))))
		l.p = l.node.program(Options{})
		if r := l.sync(s); r != (Report{Transactions: 1, Elements: 1}) {
			t.Errorf("%+v", r)
		}
		l.want(l.pods[2], f.tcp, at(f.cluster, 80), "pod2 "+f.podIP(3))
		l.want(l.pods[2], f.tcp, at(f.other, 81), "pod1 "+f.podIP(3))
	})
}

// New connections of a Service never fail while its endpoints are changed, and old ones go on.
func TestChangesLoseNoConnection(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f family) {
		shapes := [][]int{{1, 2}, {1}, {2}, {1, 2, 1, 2}, {2, 1, 2}}
		var services []*model.Service
		for _, shape := range shapes {
			var backends []string
			for range 5 * len(shape) / 2 {
				backends = append(backends, f.pods(shape...)...)
			}
			services = append(services, serviceOf("web", portOf(model.TCP, backends, clusterIP(at(f.cluster, 80)))))
		}
		s := newState(services[0])
		l.sync(s)
		open := l.connections(l.pods[2], f.tcp, at(f.cluster, 80), 10)
		const enough = 1000
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			for i := range enough {
				if a := l.pods[2].ask(f.tcp, at(f.cluster, 80)); !strings.HasPrefix(a, "pod") {
					t.Errorf("connection %d: %q", i, a)
				}
			}
		}()
		for i := 0; ; i++ {
			l.apply(s, services[i%len(services)], services[(i+1)%len(services)])
			select {
			case <-asked:
				t.Logf("%d connections during %d changes", enough, i)
				l.alive(open)
				return
			default:
			}
		}
	})
}

// Whatever another program takes away or puts in is mended.
func TestForeignChangesAreMended(t *testing.T) {
	l := newLab(t, 2)
	f := families[0]
	s := newState(serviceOf("a", sticky(time.Hour, portOf(model.TCP, f.pods(1, 2), clusterIP(at(f.cluster, 80)), f.nodePort(30080)))))
	l.sync(s)
	before := l.listing()
	for _, foreign := range []string{
		"flush ruleset",
		"delete table ip berth-proxy",
		"flush map ip berth-proxy endpoints",
		"delete element ip berth-proxy frontends { 10.96.0.1 . tcp . 80 }",
		"add element ip berth-proxy rejected { 10.96.0.1 . tcp . 80 }",
		"add element ip berth-proxy service-cidrs { 172.16.0.0/12 }",
		"flush chain ip berth-proxy vip",
		// As many rules, of the same expressions, with another set.
		"flush chain ip berth-proxy cluster-ip-check; add rule ip berth-proxy cluster-ip-check ip daddr @cluster-ips goto refuse; " +
			"add rule ip berth-proxy cluster-ip-check ip daddr @nodeport-addresses counter drop",
		"insert rule ip berth-proxy services drop",
		"add chain ip berth-proxy other; add rule ip berth-proxy filter-input jump other",
		"add set ip berth-proxy mine { type ipv4_addr; }; add rule ip berth-proxy vip ip saddr @mine drop",
		"flush table ip berth-proxy; delete chain ip berth-proxy nat-prerouting; add chain ip berth-proxy nat-prerouting { type nat hook prerouting priority 50; }",
		"flush table ip berth-proxy; delete set ip berth-proxy frontends; add set ip berth-proxy frontends { type ipv4_addr; }",
	} {
		l.node.run("nft", foreign)
		select {
		case by := <-l.p.Changed():
			if by != "nft" {
				t.Errorf("%s: changed by %q", foreign, by)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: not seen", foreign)
		}
		r, err := l.p.Verify()
		if err != nil {
			t.Fatalf("%s: %v", foreign, err)
		}
		if r == (Report{}) {
			t.Errorf("%s: nothing was mended", foreign)
		}
		if after := l.listing(); after != before {
			t.Errorf("%s: not as it was: %s", foreign, difference(before, after))
		}
		if a := l.client.ask(f.tcp, at(f.node, 30080)); !strings.HasPrefix(a, "pod") {
			t.Errorf("%s: %q", foreign, a)
		}
	}
	// Its own changes, and those of other tables, are none.
	l.apply(s, s.services[0], serviceOf("a", portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80)))))
	l.node.run("nft", "add table ip other; add chain ip other c; add table inet berth-proxy")
	select {
	case by := <-l.p.Changed():
		t.Errorf("told of a change by %q", by)
	case <-time.After(300 * time.Millisecond):
	}
}

// listing is what nft shows, in lines and elements, without the order in which the kernel keeps those.
func (l *lab) listing() string {
	l.t.Helper()
	var lines []string
	for _, line := range strings.Split(l.node.run("nft", "-s", "list", "table", "ip", Table), "\n") {
		line = strings.TrimPrefix(strings.TrimSpace(line), "elements = { ")
		for _, e := range strings.Split(line, ", ") {
			if strings.Contains(e, " timeout 1h : 10.") {
				continue // a client
			}
			lines = append(lines, strings.TrimRight(e, " ,}"))
		}
	}
	return sorted(lines)
}

// difference are the lines that only one of two has.
func difference(before, after string) (out []string) {
	count := map[string]int{}
	for _, line := range strings.Split(before, "\n") {
		count[line]--
	}
	for _, line := range strings.Split(after, "\n") {
		count[line]++
	}
	for line, n := range count {
		if n != 0 {
			out = append(out, fmt.Sprintf("%+d %s", n, line))
		}
	}
	return out
}

// A change that does not fit what the kernel has is made after the kernel was read.
func TestApplyMendsWhatDoesNotFit(t *testing.T) {
	l := newLab(t, 3)
	f := families[0]
	one := serviceOf("a", portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80))))
	two := serviceOf("a", portOf(model.TCP, f.pods(2), clusterIP(at(f.cluster, 80))))
	s := newState(one)
	l.sync(s)
	for _, foreign := range []string{
		"flush map ip berth-proxy endpoints",
		"delete element ip berth-proxy endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.1.1.2 . 8080 }; add element ip berth-proxy endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.9.9.9 . 9 }",
		"flush ruleset",
	} {
		l.node.run("nft", foreign)
		l.apply(s, one, two)
		l.want(l.pods[2], f.tcp, at(f.cluster, 80), "pod2 "+f.podIP(3))
		l.apply(s, two, one)
		l.want(l.pods[2], f.tcp, at(f.cluster, 80), "pod1 "+f.podIP(3))
	}
}

func TestTableOfAnotherIsLeftAlone(t *testing.T) {
	for _, c := range []struct{ table, want string }{
		{"table ip berth-proxy {\n comment \"mine\"\n}", `table ip berth-proxy is not berth's (comment "mine")`},
		{"table ip6 berth-proxy {\n chain c {\n }\n}", `nft delete table ip6 berth-proxy`},
	} {
		s := newSpace(t, "node")
		if out, err := s.input(c.table+"\n", "nft", "-f", "-"); err != nil {
			t.Fatal(out)
		}
		before := s.run("nft", "list", "ruleset")
		_, err := s.program(Options{}).Sync(newState())
		var foreign *ForeignTableError
		if !errors.As(err, &foreign) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.table, err)
		}
		if err := s.do(func() error { _, err := Remove(Options{}); return err }); err != nil {
			t.Error(err)
		}
		if after := s.run("nft", "list", "ruleset"); after != before {
			t.Errorf("touched:\n%s", after)
		}
	}
}

// A table that a process keeps for itself (NFT_TABLE_F_OWNER) cannot be berth's, and the error says whose it is.
func TestTableWithAnOwner(t *testing.T) {
	s := newSpace(t, "node")
	var owner *nftables.Conn
	err := s.do(func() (err error) {
		if owner, err = nftables.Open(); err != nil {
			return err
		}
		var b nftables.Batch
		b.Begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_IPV6, "")
		b.String(unix.NFTA_TABLE_NAME, Table)
		b.Uint32(unix.NFTA_TABLE_FLAGS, 2)
		b.Bytes(nftaTableUserdata, userdataOf(tableComment))
		b.End()
		return owner.Commit(&b)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer owner.Close()
	var foreign *ForeignTableError
	if _, err := s.program(Options{}).Sync(newState()); !errors.As(err, &foreign) || foreign.Owner != owner.Port() {
		t.Errorf("%v", err)
	}
}

// While other programs change their tables all the time, this one is read as it is.
func TestReadsBesideOthersChanges(t *testing.T) {
	s := newSpace(t, "node")
	p := s.program(Options{})
	if _, err := p.Sync(crowd(5000, 2)); err != nil {
		t.Fatal(err)
	}
	var other *nftables.Conn
	if err := s.do(func() (err error) { other, err = nftables.Open(); return err }); err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			var b nftables.Batch
			b.Begin(uint16([]int{unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE}[n%2]), unix.NLM_F_CREATE, unix.NFPROTO_IPV4, "")
			b.String(unix.NFTA_TABLE_NAME, "other")
			b.End()
			if err := other.Commit(&b); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 5 {
		if r, err := p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
	}
	close(stop)
	t.Logf("%d changes of another table meanwhile", <-done)
}

// Tables go with Remove, and nothing else does.
func TestRemove(t *testing.T) {
	s := newSpace(t, "node")
	s.run("nft", "add table ip other")
	before := s.run("nft", "list", "ruleset")
	if _, err := s.program(Options{}).Sync(newState()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, false} {
		var was bool
		if err := s.do(func() (err error) { was, err = Remove(Options{}); return err }); err != nil || was != want {
			t.Errorf("%v, %v", was, err)
		}
		if after := s.run("nft", "list", "ruleset"); after != before {
			t.Errorf("left behind:\n%s", after)
		}
	}
}

// A family that the node does not do has no table.
func TestFamilyIsDisabled(t *testing.T) {
	s := newSpace(t, "node")
	p := s.program(Options{})
	st := newState(serviceOf("web", portOf(model.TCP, []string{"10.1.0.1:80"}, clusterIP("10.96.0.1:80"))))
	for _, both := range []bool{true, false, true} {
		st.globals.Family[model.IPv6].Enabled = both
		if _, err := p.Sync(st); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(s.run("nft", "list", "tables"), "ip6 "+Table); got != both {
			t.Errorf("table of IPv6: %v", got)
		}
		if r, err := p.Verify(); err != nil || r != (Report{}) {
			t.Errorf("%+v, %v", r, err)
		}
	}
}

// Rules of another layout are replaced in one transaction; connections go on, and elements stay.
func TestUpgradeReplacesRules(t *testing.T) {
	l := newLab(t, 2)
	f := families[0]
	s := newState(serviceOf("a", portOf(model.TCP, f.pods(1), clusterIP(at(f.cluster, 80)))))
	l.sync(s)
	open := l.connections(l.pods[1], f.tcp, at(f.cluster, 80), 5)
	l.p.Close()
	l.node.run("nft", "delete chain ip berth-proxy layout-1; add chain ip berth-proxy layout-0; add set ip berth-proxy old { type ipv4_addr; }; "+
		"insert rule ip berth-proxy services ip daddr @old goto vip; add chain ip berth-proxy older; add rule ip berth-proxy vip jump older")
	l.p = l.node.program(Options{})
	if r := l.sync(s); r.Transactions != 1 || r.Elements != 0 || r.Objects == 0 {
		t.Errorf("%+v", r)
	}
	if list := l.node.run("nft", "list", "table", "ip", Table); strings.Contains(list, "old") || strings.Contains(list, "layout-0") || !strings.Contains(list, version) {
		t.Error(list)
	}
	l.alive(open)
	l.want(l.pods[1], f.tcp, at(f.cluster, 80), "pod1 "+f.podIP(2))
}

// Detection of pods by interface.
func TestDetectorByInterface(t *testing.T) {
	for _, d := range []model.Detector{{Interface: "pod2"}, {InterfacePrefix: "po"}, {}} {
		t.Run(fmt.Sprintf("%q%q", d.Interface, d.InterfacePrefix), func(t *testing.T) {
			eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
				s := newState(serviceOf("a", portOf(model.TCP, []string{f.pod(1)}, clusterIP(at(f.cluster, 80)))),
					serviceOf("b", portOf(model.TCP, []string{f.pod(1)}, local(f.loadBalancer(80)))))
				s.services[1].Ports[0].Frontends[0].Action = model.Drop
				s.globals.Family[f.of].Detector = d
				l.sync(s)
				l.want(l.pods[1], f.tcp, at(f.cluster, 80), "pod1 "+f.podIP(2))
				if d == (model.Detector{}) {
					l.want(l.client, f.tcp, at(f.cluster, 80), "pod1 "+f.client)
					l.want(l.pods[1], f.tcp, at(f.loadIP, 80), silence)
					return
				}
				if a := l.client.ask(f.tcp, at(f.cluster, 80)); !strings.HasPrefix(a, "pod1 ") || strings.HasSuffix(a, f.client) {
					t.Errorf("from outside: %q", a)
				}
				l.want(l.pods[1], f.tcp, at(f.loadIP, 80), "pod1 "+f.podIP(2))
				l.want(l.client, f.tcp, at(f.loadIP, 80), silence)
				if r, err := l.p.Verify(); err != nil || r != (Report{}) {
					t.Errorf("%+v, %v", r, err)
				}
			})
		})
	}
}

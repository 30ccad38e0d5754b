package nft

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// A restart changes nothing in the kernel, whatever is programmed; connections go on.
func TestRestartChangesNothing(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		front := f.LoadBalancer(80)
		front.Restricted, front.Sources = true, prefixes(f.Wide, f.Narrow)
		var many []string
		for i := range 20 {
			many = append(many, nodetest.At(f.PodIP(1), 9000+i))
		}
		s := nodetest.NewState(
			nodetest.ServiceOf("a", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), front, f.NodePort(30080)))),
			nodetest.ServiceOf("b", nodetest.PortOf(model.UDP, []string{f.Pod(1) + "*", f.Pod(2)}, nodetest.ClusterIP(nodetest.At(f.Other, 80)), nodetest.LocalPolicy(f.NodePort(30080)))),
			nodetest.ServiceOf("c", nodetest.PortOf(model.SCTP, many, nodetest.LocalPolicy(f.LoadBalancer(90)))))
		s.HairpinList = []model.Hairpin{nodetest.HairpinOf(model.TCP, f.Pod(1))}
		l.sync(s)
		open := l.Connections(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), 10)
		who := nodetest.Again(open[0])
		l.Alive(open)
		for range 3 {
			if err := l.p.Close(); err != nil {
				t.Fatal(err)
			}
			l.Alive(open)
			l.p = openAt(l.Node, Options{Counters: true})
			if r := l.sync(s); r != (Report{}) {
				t.Errorf("a restart has changed something: %+v", r)
			}
			l.Alive(open)
			l.Want(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), who) // and is remembered
		}
	})
}

// What has changed while the proxy was away is all that is changed.
func TestRestartCommitsTheDifference(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		s := nodetest.NewState(nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))), nodetest.ServiceOf("b", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Other, 81)))))
		l.sync(s)
		l.p.Close()
		s.Delta(s.ServiceList[0], nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))
		l.p = openAt(l.Node, Options{Counters: true})
		if r := l.sync(s); r != (Report{Transactions: 1, Elements: 1}) {
			t.Errorf("%+v", r)
		}
		l.Want(l.Pods[2], f.TCP, nodetest.At(f.Cluster, 80), "pod2 "+f.PodIP(3))
		l.Want(l.Pods[2], f.TCP, nodetest.At(f.Other, 81), "pod1 "+f.PodIP(3))
	})
}

// New connections of a Service never fail while its endpoints are changed, and old ones go on.
func TestChangesLoseNoConnection(t *testing.T) {
	eachFamily(t, 3, func(t *testing.T, l *lab, f nodetest.Family) {
		shapes := [][]int{{1, 2}, {1}, {2}, {1, 2, 1, 2}, {2, 1, 2}}
		var services []*model.Service
		for _, shape := range shapes {
			var backends []string
			for range 5 * len(shape) / 2 {
				backends = append(backends, f.Pods(shape...)...)
			}
			services = append(services, nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, backends, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))
		}
		s := nodetest.NewState(services[0])
		l.sync(s)
		open := l.Connections(l.Pods[2], f.TCP, nodetest.At(f.Cluster, 80), 10)
		const enough = 1000
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			for i := range enough {
				if a := l.Pods[2].Ask(f.TCP, nodetest.At(f.Cluster, 80)); !strings.HasPrefix(a, "pod") {
					t.Errorf("connection %d: %q", i, a)
				}
			}
		}()
		for i := 0; ; i++ {
			l.apply(s, services[i%len(services)], services[(i+1)%len(services)])
			select {
			case <-asked:
				t.Logf("%d connections during %d changes", enough, i)
				l.Alive(open)
				return
			default:
			}
		}
	})
}

// Whatever another program takes away or puts in is mended.
func TestForeignChangesAreMended(t *testing.T) {
	l := newLab(t, 2)
	f := nodetest.Families[0]
	s := nodetest.NewState(nodetest.ServiceOf("a", nodetest.Sticky(time.Hour, nodetest.PortOf(model.TCP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080)))))
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
		l.Node.Run("nft", foreign)
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
		if a := l.Client.Ask(f.TCP, nodetest.At(f.Node, 30080)); !strings.HasPrefix(a, "pod") {
			t.Errorf("%s: %q", foreign, a)
		}
	}
	// Its own changes, and those of other tables, are none.
	l.apply(s, s.ServiceList[0], nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))
	l.Node.Run("nft", "add table ip other; add chain ip other c; add table inet berth-proxy")
	select {
	case by := <-l.p.Changed():
		t.Errorf("told of a change by %q", by)
	case <-time.After(300 * time.Millisecond):
	}
}

// listing is what nft shows, in lines and elements, without the order in which the kernel keeps those.
func (l *lab) listing() string {
	l.T.Helper()
	var lines []string
	for _, line := range strings.Split(l.Node.Run("nft", "-s", "list", "table", "ip", Table), "\n") {
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
	f := nodetest.Families[0]
	one := nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80))))
	two := nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80))))
	s := nodetest.NewState(one)
	l.sync(s)
	for _, foreign := range []string{
		"flush map ip berth-proxy endpoints",
		"delete element ip berth-proxy endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.1.1.2 . 8080 }; add element ip berth-proxy endpoints { 10.96.0.1 . tcp . 80 . 0 : 10.9.9.9 . 9 }",
		"flush ruleset",
	} {
		l.Node.Run("nft", foreign)
		l.apply(s, one, two)
		l.Want(l.Pods[2], f.TCP, nodetest.At(f.Cluster, 80), "pod2 "+f.PodIP(3))
		l.apply(s, two, one)
		l.Want(l.Pods[2], f.TCP, nodetest.At(f.Cluster, 80), "pod1 "+f.PodIP(3))
	}
}

func TestTableOfAnotherIsLeftAlone(t *testing.T) {
	for _, c := range []struct{ table, want string }{
		{"table ip berth-proxy {\n comment \"mine\"\n}", `table ip berth-proxy is not berth's (comment "mine")`},
		{"table ip6 berth-proxy {\n chain c {\n }\n}", `nft delete table ip6 berth-proxy`},
	} {
		s := nodetest.NewSpace(t, "node")
		if out, err := s.Input(c.table+"\n", "nft", "-f", "-"); err != nil {
			t.Fatal(out)
		}
		before := s.Run("nft", "list", "ruleset")
		_, err := openAt(s, Options{}).Sync(nodetest.NewState())
		var foreign *ForeignTableError
		if !errors.As(err, &foreign) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.table, err)
		}
		if err := s.Do(func() error { _, err := Remove(Options{}); return err }); err != nil {
			t.Error(err)
		}
		if after := s.Run("nft", "list", "ruleset"); after != before {
			t.Errorf("touched:\n%s", after)
		}
	}
}

// kubernetes#136786: nft crashed on what a newer nft had noted of another program's set, and Services were never programmed. Here is a
// set whose key is told in terms that no nft has; nobody who programs Services reads it, and it stays.
func TestK8s136786_OthersSetsAreNotRead(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	var other *nftables.Conn
	if err := s.Do(func() (err error) { other, err = nftables.Open(); return err }); err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	const expression = 4711
	noted := udata(udata32(nil, udataKeyOrder, bigEndian), udataKeyTypeof, describeExpr(expression, []byte{0, 200, 1})(nil))
	for _, f := range layers {
		var b nftables.Batch
		b.Begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, f.family, "")
		b.String(unix.NFTA_TABLE_NAME, "newer")
		b.End()
		b.Begin(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, f.family, "")
		b.String(unix.NFTA_SET_TABLE, "newer")
		b.String(unix.NFTA_SET_NAME, "odd")
		b.Uint32(unix.NFTA_SET_ID, 1)
		b.Uint32(unix.NFTA_SET_KEY_TYPE, f.typeAddr)
		b.Uint32(unix.NFTA_SET_KEY_LEN, uint32(f.size))
		b.Bytes(unix.NFTA_SET_USERDATA, noted)
		b.End()
		if err := other.Commit(&b); err != nil {
			t.Fatal(err)
		}
	}
	p := openAt(s, Options{Counters: true})
	web := nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, []string{"10.1.1.2:80"}, nodetest.ClusterIP("10.96.0.1:80")))
	state := nodetest.NewState()
	if _, err := p.Sync(state); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Apply(state.Delta(nil, web)); err != nil {
		t.Fatal(err)
	}
	if r, err := p.Verify(); err != nil || r != (Report{}) {
		t.Errorf("%+v, %v", r, err)
	}
	if i, err := p.Inspector().Inspect(program.Scope{}); err != nil || len(i.Differences) > 0 {
		t.Errorf("%+v, %v", i, err)
	}
	if err := s.Do(func() error { _, err := Remove(Options{}); return err }); err != nil {
		t.Error(err)
	}
	for _, f := range layers {
		there := 0
		if err := other.Get(unix.NFT_MSG_GETSET, 0, f.family, func(b *nftables.Buffer) {
			b.String(unix.NFTA_SET_TABLE, "newer")
			b.String(unix.NFTA_SET_NAME, "odd")
		}, func(byte, []byte) { there++ }); err != nil || there != 1 {
			t.Errorf("%s: the other's set is there %d times, %v", f, there, err)
		}
		if got, err := readTable(other, f, Table); err != nil || got.there {
			t.Errorf("%s: Remove leaves %+v, %v", f, got, err)
		}
	}
}

// A table that a process keeps for itself (NFT_TABLE_F_OWNER) cannot be berth's, and the error says whose it is.
func TestTableWithAnOwner(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	var owner *nftables.Conn
	err := s.Do(func() (err error) {
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
	if _, err := openAt(s, Options{}).Sync(nodetest.NewState()); !errors.As(err, &foreign) || foreign.Owner != owner.Port() {
		t.Errorf("%v", err)
	}
}

// While other programs change their tables all the time, this one is read as it is.
func TestReadsBesideOthersChanges(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	if _, err := p.Sync(nodetest.Crowd(5000, 2)); err != nil {
		t.Fatal(err)
	}
	var other *nftables.Conn
	if err := s.Do(func() (err error) { other, err = nftables.Open(); return err }); err != nil {
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
	s := nodetest.NewSpace(t, "node")
	s.Run("nft", "add table ip other")
	before := s.Run("nft", "list", "ruleset")
	if _, err := openAt(s, Options{}).Sync(nodetest.NewState()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, false} {
		var was bool
		if err := s.Do(func() (err error) { was, err = Remove(Options{}); return err }); err != nil || was != want {
			t.Errorf("%v, %v", was, err)
		}
		if after := s.Run("nft", "list", "ruleset"); after != before {
			t.Errorf("left behind:\n%s", after)
		}
	}
}

// A family that the node does not do has no table.
func TestFamilyIsDisabled(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	st := nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, []string{"10.1.0.1:80"}, nodetest.ClusterIP("10.96.0.1:80"))))
	for _, both := range []bool{true, false, true} {
		st.All.Family[model.IPv6].Enabled = both
		if _, err := p.Sync(st); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(s.Run("nft", "list", "tables"), "ip6 "+Table); got != both {
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
	f := nodetest.Families[0]
	s := nodetest.NewState(nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))))
	l.sync(s)
	open := l.Connections(l.Pods[1], f.TCP, nodetest.At(f.Cluster, 80), 5)
	l.p.Close()
	l.Node.Run("nft", "delete chain ip berth-proxy layout-1; add chain ip berth-proxy layout-0; add set ip berth-proxy old { type ipv4_addr; }; "+
		"insert rule ip berth-proxy services ip daddr @old goto vip; add chain ip berth-proxy older; add rule ip berth-proxy vip jump older")
	l.p = openAt(l.Node, Options{Counters: true})
	if r := l.sync(s); r.Transactions != 1 || r.Elements != 0 || r.Objects == 0 {
		t.Errorf("%+v", r)
	}
	if list := l.Node.Run("nft", "list", "table", "ip", Table); strings.Contains(list, "old") || strings.Contains(list, "layout-0") || !strings.Contains(list, version) {
		t.Error(list)
	}
	l.Alive(open)
	l.Want(l.Pods[1], f.TCP, nodetest.At(f.Cluster, 80), "pod1 "+f.PodIP(2))
}

// Detection of pods by interface.
func TestDetectorByInterface(t *testing.T) {
	for _, d := range []model.Detector{{Interface: "pod2"}, {InterfacePrefix: "po"}, {}} {
		t.Run(fmt.Sprintf("%q%q", d.Interface, d.InterfacePrefix), func(t *testing.T) {
			eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
				s := nodetest.NewState(nodetest.ServiceOf("a", nodetest.PortOf(model.TCP, []string{f.Pod(1)}, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)))),
					nodetest.ServiceOf("b", nodetest.PortOf(model.TCP, []string{f.Pod(1)}, nodetest.LocalPolicy(f.LoadBalancer(80)))))
				s.ServiceList[1].Ports[0].Frontends[0].Action = model.Drop
				s.All.Family[f.Of].Detector = d
				l.sync(s)
				l.Want(l.Pods[1], f.TCP, nodetest.At(f.Cluster, 80), "pod1 "+f.PodIP(2))
				if d == (model.Detector{}) {
					l.Want(l.Client, f.TCP, nodetest.At(f.Cluster, 80), "pod1 "+f.Client)
					l.Want(l.Pods[1], f.TCP, nodetest.At(f.LoadIP, 80), nodetest.Silence)
					return
				}
				if a := l.Client.Ask(f.TCP, nodetest.At(f.Cluster, 80)); !strings.HasPrefix(a, "pod1 ") || strings.HasSuffix(a, f.Client) {
					t.Errorf("from outside: %q", a)
				}
				l.Want(l.Pods[1], f.TCP, nodetest.At(f.LoadIP, 80), "pod1 "+f.PodIP(2))
				l.Want(l.Client, f.TCP, nodetest.At(f.LoadIP, 80), nodetest.Silence)
				if r, err := l.p.Verify(); err != nil || r != (Report{}) {
					t.Errorf("%+v, %v", r, err)
				}
			})
		})
	}
}

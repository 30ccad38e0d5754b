package hostports

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNode runs a test in a network namespace of its own, with a bridge, on a thread that ends with it.
func inNode(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pods0", "pods1"} {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
}

func newTable() (*Table, *strings.Builder) {
	log := &strings.Builder{}
	return New("berth-hostports", slog.New(slog.NewTextHandler(log, nil))), log
}

// nft runs nft, which shows what is there as people see it.
func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func addrs(all ...string) []netip.Addr {
	var list []netip.Addr
	for _, a := range all {
		list = append(list, netip.MustParseAddr(a))
	}
	return list
}

func web(id, addr string, ports ...Port) Target {
	return Target{Pod{id, "shop/" + id, ports}, addrs(addr), "pods0"}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What people see with nft.
func TestListing(t *testing.T) {
	inNode(t)
	tab, _ := newTable()
	must(t, tab.Set(Target{
		Pod{"1", "shop/web-0", []Port{{TCP, netip.Addr{}, 80, 8080}, {UDP, netip.MustParseAddr("192.0.2.1"), 53, 5353}, {SCTP, netip.MustParseAddr("2001:db8::1"), 7, 9}}},
		addrs("10.1.0.5", "fd00::5"), "pods0",
	}))
	if version := nft(t, "--version"); !strings.Contains(version, "v1.0.6") {
		t.Skip("another nft shows things in another way: " + version)
	}
	want, err := os.ReadFile("testdata/listing.nft")
	must(t, err)
	if got := nft(t, "list", "ruleset"); got != string(want) {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func countRules(t *testing.T) int {
	t.Helper()
	n := 0
	for _, chain := range allChains {
		for _, line := range strings.Split(nft(t, "list", "chain", "inet", "berth-hostports", chain), "\n") {
			if strings.HasPrefix(line, "\t\t") && !strings.Contains(line, "hook") {
				n++
			}
		}
	}
	return n
}

func TestNumberOfRulesIsConstant(t *testing.T) {
	inNode(t)
	tab, _ := newTable()
	must(t, tab.Set(web("first", "10.1.0.5", port(TCP, 1, ""))))
	one := countRules(t)
	for i := range 20 {
		var ports []Port
		for n := range 10 {
			ports = append(ports, port(TCP, uint16(1000+10*i+n), ""))
		}
		must(t, tab.Set(web(fmt.Sprint(i), fmt.Sprintf("10.1.1.%d", i), ports...)))
	}
	if got := countRules(t); got != one || got != len(rules()) {
		t.Errorf("%d rules for 201 ports, %d for one", got, one)
	}
	if n := strings.Count(nft(t, "list", "map", "inet", "berth-hostports", ports4), "tcp ."); n != 201 {
		t.Errorf("%d ports are there", n)
	}
	have, err := tab.stored()
	must(t, err)
	if del, add := diff(have, elementsOf(tab.want)); len(del)+len(add) > 0 {
		t.Errorf("strange: %s, missing: %s", show(del), show(add))
	}
}

// More than fits into one message, and all of it in one transaction.
func TestManyPortsAtOnce(t *testing.T) {
	inNode(t)
	tab, _ := newTable()
	var ports []Port
	for n := range 3000 {
		ports = append(ports, port(UDP, uint16(n+1), "2001:db8::1"))
	}
	pod := Target{Pod{"1", strings.Repeat("n", 300), ports}, addrs("fd00::5"), "pods0"}
	must(t, tab.Set(web("other", "10.1.0.5", port(TCP, 1, ""))))
	must(t, tab.Set(pod))
	have, err := tab.stored()
	must(t, err)
	if len(have) != 3002 {
		t.Errorf("%d elements", len(have))
	}
	must(t, tab.Remove("1"))
	if have, err = tab.stored(); err != nil || len(have) != 2 {
		t.Errorf("%d elements stay, %v", len(have), err)
	}
}

// Pods come and go one by one, and the table is there as long as one has a port.
func TestSetAndRemove(t *testing.T) {
	inNode(t)
	tab, _ := newTable()
	a, b := web("a", "10.1.0.5", port(TCP, 80, ""), port(TCP, 81, "192.0.2.1")), web("b", "10.1.0.6", port(TCP, 80, ""))
	b.Link = "pods1"
	steps := []struct {
		what string
		do   func() error
		want []Target
	}{
		{"one", func() error { return tab.Set(a) }, []Target{a}},
		{"the same again", func() error { return tab.Set(a) }, []Target{a}},
		{"another one with the same port", func() error { return tab.Set(b) }, []Target{a, b}},
		{"which goes", func() error { return tab.Remove("b") }, []Target{a}},
		{"and is gone", func() error { return tab.Remove("b") }, []Target{a}},
		{"with other ports", func() error { a.Ports = a.Ports[:1]; return tab.Set(a) }, []Target{web("a", "10.1.0.5", port(TCP, 80, ""))}},
		{"the last one goes", func() error { return tab.Remove("a") }, nil},
		{"one comes anew", func() error { return tab.Set(b) }, []Target{b}},
	}
	for _, s := range steps {
		must(t, s.do())
		have, err := tab.stored()
		must(t, err)
		if del, add := diff(have, elementsOf(s.want)); len(del)+len(add) > 0 {
			t.Errorf("%s: strange: %s, missing: %s", s.what, show(del), show(add))
		}
		if there := nft(t, "list", "tables") != ""; there != (len(s.want) > 0) {
			t.Errorf("%s: the table is there: %v", s.what, there)
		}
		for _, link := range []string{"pods0", "pods1"} {
			setting, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + link + "/route_localnet")
			must(t, err)
			if want := localnet(s.want)[link]; (strings.TrimSpace(string(setting)) == "1") != want {
				t.Errorf("%s: route_localnet of %s is %q", s.what, link, setting)
			}
		}
	}
}

// What fails leaves nothing.
func TestSetFails(t *testing.T) {
	inNode(t)
	tab, _ := newTable()
	lost := web("a", "10.1.0.5", port(TCP, 80, ""))
	lost.Link = "nowhere"
	if err := tab.Set(lost); err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("%v", err)
	}
	if got := nft(t, "list", "tables"); got != "" {
		t.Errorf("left: %s", got)
	}
	b := web("b", "10.1.0.6", port(TCP, 80, ""))
	must(t, tab.Set(b))
	if err := tab.Set(lost); err == nil {
		t.Error("no error")
	}
	have, err := tab.stored()
	must(t, err)
	if del, add := diff(have, elementsOf([]Target{b})); len(del)+len(add) > 0 {
		t.Errorf("strange: %s, missing: %s", show(del), show(add))
	}
}

// Whatever is done to the table, it is as it was afterwards, and what is others' is as they made it.
func TestCheck(t *testing.T) {
	inNode(t)
	tab, log := newTable()
	pod := web("a", "10.1.0.5", port(TCP, 80, ""), port(UDP, 53, "192.0.2.1"))
	must(t, tab.Adopt([]Target{pod}))
	nft(t, "add table ip others; add map ip others m { type inet_service : ipv4_addr; elements = { 80 : 192.0.2.7 }; }")
	others, ours := nft(t, "list", "table", "ip", "others"), nft(t, "list", "table", "inet", "berth-hostports")
	must(t, tab.Check())
	if log.Len() > 0 {
		t.Errorf("nothing was changed: %s", log)
	}
	for what, change := range map[string]string{
		"nothing is left":      "flush ruleset",
		"the table is gone":    "delete table inet berth-hostports",
		"a chain has no rules": "flush chain inet berth-hostports prerouting",
		"no chain has":         "flush table inet berth-hostports",
		"a port is gone":       "delete element inet berth-hostports ports-ipv4 { tcp . 80 }",
		"a port leads elsewhere": "delete element inet berth-hostports ports-ipv4 { tcp . 80 }; " +
			"add element inet berth-hostports ports-ipv4 { tcp . 80 : 10.1.0.99 . 80 }",
		"there is a port more": "add element inet berth-hostports ports-ipv4 { tcp . 99 : 10.1.0.99 . 80 }",
		"there is a rule more": "insert rule inet berth-hostports to-pods accept",
		"no link is there":     "flush set inet berth-hostports links",
		"another table instead": "delete table inet berth-hostports; add table inet berth-hostports; " +
			"add set inet berth-hostports links { type ipv4_addr; elements = { 192.0.2.1 }; }",
	} {
		log.Reset()
		nft(t, change)
		must(t, tab.Check())
		if got := nft(t, "list", "table", "inet", "berth-hostports"); got != ours {
			t.Errorf("%s: got\n%s", what, got)
		}
		if !strings.Contains(log.String(), "level=WARN msg=\"host ports of pods were changed by somebody else, and are as they should be again\" table=\"inet berth-hostports\"") {
			t.Errorf("%s: log: %q", what, log)
		}
		if what == "nothing is left" {
			nft(t, "add table ip others; add map ip others m { type inet_service : ipv4_addr; elements = { 80 : 192.0.2.7 }; }")
		}
		if got := nft(t, "list", "table", "ip", "others"); got != others {
			t.Errorf("%s: another table is %s", what, got)
		}
	}
	nft(t, "delete table inet berth-hostports")
	must(t, tab.Set(web("b", "10.1.0.6", port(TCP, 81, "")))) // whoever comes first finds it
	must(t, tab.Remove("b"))
	if got := nft(t, "list", "table", "inet", "berth-hostports"); got != ours {
		t.Errorf("after another pod: %s", got)
	}
}

// A process that takes over knows the pods, and what else is there belongs to none.
func TestAdopt(t *testing.T) {
	inNode(t)
	before, _ := newTable()
	a, b := web("a", "10.1.0.5", port(TCP, 80, "")), web("b", "10.1.0.6", port(TCP, 81, ""))
	b.Link = "pods1"
	must(t, before.Set(a))
	must(t, before.Set(b))
	after, log := newTable()
	must(t, after.Check()) // it does not know yet
	have, err := after.stored()
	must(t, err)
	if len(have) != 4 {
		t.Errorf("%d elements before it is known whose they are", len(have))
	}
	must(t, after.Adopt([]Target{a}))
	if have, err = after.stored(); err != nil {
		t.Fatal(err)
	}
	if del, add := diff(have, elementsOf([]Target{a})); len(del)+len(add) > 0 {
		t.Errorf("strange: %s, missing: %s", show(del), show(add))
	}
	setting, err := os.ReadFile("/proc/sys/net/ipv4/conf/pods1/route_localnet")
	must(t, err)
	if strings.TrimSpace(string(setting)) != "0" {
		t.Error("the link without a pod still lets 127.0.0.1 out")
	}
	last, _ := newTable()
	must(t, last.Adopt(nil))
	if got := nft(t, "list", "tables"); got != "" {
		t.Errorf("without a pod there is %s", got)
	}
	if log.Len() > 0 {
		t.Errorf("log: %s", log)
	}
}

// rancher-archives/rke#3440, CVE-2025-54388: who reloads a firewall removes all rules. They are back as soon as the kernel
// tells, which it does for whole transactions of others alone.
func TestWatch(t *testing.T) {
	inNode(t)
	tab, log := newTable()
	must(t, tab.Adopt([]Target{web("a", "10.1.0.5", port(TCP, 80, ""))}))
	ours := nft(t, "list", "ruleset")
	ns, err := os.Open("/proc/thread-self/ns/net")
	must(t, err)
	defer ns.Close() //nolint:errcheck // opened for reading
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked, either
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		tab.Watch(stop)
	}()
	for i := range 3 {
		start := time.Now()
		for nft(t, "flush", "ruleset"); nft(t, "list", "ruleset") != ours; time.Sleep(10 * time.Millisecond) {
			if time.Since(start) > 5*time.Second { // long before it would be looked for
				t.Fatalf("time %d: not back: %s, log: %s", i, nft(t, "list", "ruleset"), log)
			}
		}
	}
	close(stop)
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("the watch does not end")
	}
}

func TestSupported(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	must(t, Supported())
}

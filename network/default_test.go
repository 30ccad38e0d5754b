package network

import (
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func cidrs(t *testing.T, joined string) []netip.Prefix {
	t.Helper()
	all, err := ParsePodCIDRs(joined)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestDefaultConflist(t *testing.T) {
	const (
		limits = `{"capabilities":{"bandwidth":true},"type":"bandwidth"}`
		meta   = `{"capabilities":{"portMappings":true},"type":"portmap"},` + limits
	)
	for _, tc := range []struct {
		cidrs   string
		mtu     int
		byTable bool
		want    string
	}{
		{"10.244.1.0/24", 0, true, `{"berthHostPorts":{"link":"NAME"},"cniVersion":"1.0.0","name":"NAME","plugins":[{"bridge":"NAME","hairpinMode":true,
			"ipam":{"dataDir":"/leases","ranges":[[{"subnet":"10.244.1.0/24"}]],"type":"host-local"},
			"ipMasq":true,"isDefaultGateway":true,"type":"bridge"},` + limits + `]}`},
		{"10.244.1.0/24", 1450, false, `{"cniVersion":"1.0.0","name":"NAME","plugins":[{"bridge":"NAME","hairpinMode":true,
			"ipam":{"dataDir":"/leases","ranges":[[{"subnet":"10.244.1.0/24"}]],"type":"host-local"},
			"ipMasq":true,"isDefaultGateway":true,"mtu":1450,"type":"bridge"},` + meta + `]}`},
		{"fd00:1::/64,10.244.1.0/24", 0, false, `{"cniVersion":"1.0.0","name":"NAME","plugins":[{"bridge":"NAME","hairpinMode":true,
			"ipam":{"dataDir":"/leases","ranges":[[{"subnet":"fd00:1::/64"}],[{"subnet":"10.244.1.0/24"}]],"type":"host-local"},
			"ipMasq":true,"isDefaultGateway":true,"type":"bridge"},` + meta + `]}`},
	} {
		c, err := defaultConflist(cidrs(t, tc.cidrs), tc.mtu, "/leases", tc.byTable)
		if err != nil {
			t.Fatal(err)
		}
		var got, want any
		if err := json.Unmarshal(c.Bytes, &got); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(strings.ReplaceAll(tc.want, "NAME", c.Name)), &want); err != nil {
			t.Fatal(err)
		}
		g, _ := json.MarshalIndent(got, "", " ")
		w, _ := json.MarshalIndent(want, "", " ")
		if string(g) != string(w) {
			t.Errorf("%s: %s\nwant %s", tc.cidrs, g, w)
		}
		if again, err := parseConflist(c.Bytes, nil); err != nil || (again.ports != nil) != tc.byTable || tc.byTable && again.ports.Link != c.Name {
			t.Errorf("%s: host ports %+v, %v", tc.cidrs, again.ports, err)
		}
	}
}

// A range that comes or goes beside that of IPv4 leaves pods on the bridge where they are; another one of IPv4 does not fit
// on it.
func TestDefaultName(t *testing.T) {
	name := func(joined string) string { return defaultName(cidrs(t, joined)) }
	for _, same := range [][2]string{
		{"10.1.0.0/24", "10.1.0.0/24,fd00::/64"}, {"fd00::/64,10.1.0.0/24", "10.1.0.0/24,fd00:2::/64"}, {"10.1.0.9/24", "10.1.0.0/24"},
	} {
		if name(same[0]) != name(same[1]) {
			t.Errorf("%v have different names", same)
		}
	}
	for _, other := range [][2]string{{"10.1.0.0/24", "10.1.0.0/25"}, {"10.1.0.0/24", "10.1.1.0/24"}, {"fd00::/64", "fd00:1::/64"}} {
		if name(other[0]) == name(other[1]) {
			t.Errorf("%v have the same name", other)
		}
	}
	if n := name("10.1.0.0/24"); len(n) > 15 || !strings.HasPrefix(n, "berth-") {
		t.Errorf("%s is no name for a link", n)
	}
}

// bare is a node that has the plugins of the default network, and no configuration.
func bare(t *testing.T) *node {
	t.Helper()
	n := newNode(t)
	for _, typ := range []string{"bridge", "host-local", "portmap", "bandwidth"} {
		n.plugin(typ, good)
	}
	return n
}

const (
	someCIDR  = "10.89.7.0/24"
	otherCIDR = "10.89.8.0/24"
)

func defaultOf(t *testing.T, m *Manager, joined string) {
	t.Helper()
	if err := m.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
		return
	}
	if now := m.Current(); now.Name != defaultName(cidrs(t, joined)) || now.From != "pod CIDR "+joined {
		t.Errorf("the network is %+v, want that of %s", now, joined)
	}
}

func TestBareNodeIsReadyWithThePodCIDR(t *testing.T) {
	n := bare(t)
	n.exec = []string{ExecAll} // so that they have to be installed
	m := n.open()
	readyWithin(t, m, 0, "no network configuration (*.conflist, *.conf, *.json) in "+n.conf+", and no pod CIDR from the kubelet to make one of (on a node without a kubelet --pod-cidr gives one)")
	m.SetPodCIDRs("")
	readyWithin(t, m, 0, "no pod CIDR from the kubelet")
	m.SetPodCIDRs(someCIDR)
	readyWithin(t, m, 0, "")
	defaultOf(t, m, someCIDR)
	if _, err := os.ReadDir(n.conf); err != nil {
		t.Error(err)
	}
	if err := os.RemoveAll(n.conf); err != nil { // no directory is needed
		t.Fatal(err)
	}
	m.refresh()
	defaultOf(t, m, someCIDR)

	m.SetPodCIDRs(otherCIDR)
	defaultOf(t, m, otherCIDR)
	m.SetPodCIDRs("10.89.7.0/24,10.89.8.0/24")
	readyWithin(t, m, 0, "of the same family")
	if err := os.Remove(n.bin + "/portmap"); err != nil {
		t.Fatal(err)
	}
	m.SetPodCIDRs(someCIDR)
	readyWithin(t, m, 0, "(pod CIDR "+someCIDR+"): no plugin portmap in "+n.bin)
}

func TestDefaultNetworkAfterARestart(t *testing.T) {
	n := bare(t)
	kept := func(o *Options) { o.PodCIDRFile = n.cache + ".podcidr" }
	n.open(kept).SetPodCIDRs(someCIDR)
	defaultOf(t, n.open(kept), someCIDR)
}

func TestConfiguredPodCIDRsWin(t *testing.T) {
	n := bare(t)
	m := n.open(func(o *Options) { o.PodCIDRs = cidrs(t, someCIDR) })
	defaultOf(t, m, someCIDR)
	m.SetPodCIDRs(otherCIDR)
	defaultOf(t, m, someCIDR)
	if log := n.daemonLog.String(); !strings.Contains(log, "other pod CIDRs are configured") {
		t.Errorf("log: %s", log)
	}
}

func TestDefaultNetworkCanBeTurnedOff(t *testing.T) {
	n := bare(t)
	m := n.open(func(o *Options) { o.NoDefault = true })
	m.SetPodCIDRs(someCIDR)
	readyWithin(t, m, 0, "no network configuration")
}

// A configuration that comes later is preferred; pods are torn down by what made them.
func TestConfigurationIsPreferredToTheDefaultNetwork(t *testing.T) {
	n := bare(t)
	m := n.open()
	m.SetPodCIDRs(someCIDR)
	p := n.pod()
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "bridge ADD", "portmap ADD", "bandwidth ADD")

	n.plugin("x", strings.NewReplacer("10.90.0.", "10.95.0.", "fd00:90::", "fd00:95::").Replace(good)) // another range
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	for start := time.Now(); m.Current().Name != "a"; time.Sleep(5 * time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("the network is %+v", m.Current())
		}
	}
	if now := m.Current(); now.From != n.conf+"/10-a.conflist" || now.PodsElsewhere[defaultName(cidrs(t, someCIDR))] != 1 {
		t.Errorf("%+v", now)
	}
	if want := "network changed from pod CIDR " + someCIDR + " to " + n.conf + "/10-a.conflist"; !strings.Contains(n.daemonLog.String(), want) {
		t.Errorf("the log does not say %q: %s", want, n.daemonLog.String())
	}
	other := p
	other.ID = otherID
	if _, err := m.Setup(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "x ADD")
	if err := m.Teardown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "bandwidth DEL", "portmap DEL", "bridge DEL")
	if err := m.Teardown(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	n.same(n.calls(), "x DEL")
}

// Add-ons take their configuration away while they are replaced: no pod must get another network then.
func TestDefaultNetworkDoesNotStandInForOneThatIsAway(t *testing.T) {
	n := bare(t)
	n.plugin("x", good)
	n.write(n.conf+"/10-a.conflist", list("a", "x"))
	m := n.open()
	m.SetPodCIDRs(someCIDR)
	if now := m.Current(); now.Name != "a" {
		t.Errorf("%+v", now)
	}
	if err := os.Remove(n.conf + "/10-a.conflist"); err != nil {
		t.Fatal(err)
	}
	why := "where " + n.conf + "/10-a.conflist was"
	readyWithin(t, m, 5*time.Second, why)
	later := n.open() // another daemon, after a reboot perhaps
	later.SetPodCIDRs(someCIDR)
	readyWithin(t, later, 0, why)
	readyWithin(t, later, 0, "remove "+n.cache+"/configured)")

	defaultOf(t, n.open(func(o *Options) { o.PodCIDRs = cidrs(t, otherCIDR) }), otherCIDR)

	if err := os.Remove(n.cache + "/configured"); err != nil {
		t.Fatal(err)
	}
	readyWithin(t, m, 5*time.Second, "")
	defaultOf(t, m, someCIDR)
}

func TestBrokenConfigurationIsNotReplacedByTheDefaultNetwork(t *testing.T) {
	n := bare(t)
	m := n.open()
	m.SetPodCIDRs(someCIDR)
	n.write(n.conf+"/10-a.conflist", "{")
	readyWithin(t, m, 5*time.Second, "10-a.conflist:1: not a configuration")
}

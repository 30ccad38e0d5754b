package network

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// ofRange is a list whose first plugin has addresses of host-local.
func ofRange(name, typ, subnet, more string) string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[{"type":%q,%s"ipam":{"type":"host-local","ranges":[[{"subnet":%q}]]}}]}`, name, typ, more, subnet)
}

func TestPoolOf(t *testing.T) {
	for conf, want := range map[string]string{
		ofRange("a", "bridge", "10.1.0.0/24", `"isGateway":true,`):                                    "[10.1.0.0/24] cni0",
		ofRange("a", "bridge", "10.1.0.9/24", `"isDefaultGateway":true,"bridge":"b",`):                "[10.1.0.0/24] b",
		ofRange("a", "bridge", "10.1.0.0/24", `"bridge":"b",`):                                        "[10.1.0.0/24] ", // on a segment of others
		ofRange("a", "macvlan", "10.1.0.0/24", ""):                                                    "[10.1.0.0/24] ",
		`{"name":"a","plugins":[{"type":"ptp","ipam":{"type":"host-local","subnet":"10.1.0.0/24"}}]}`: "[10.1.0.0/24] ",
		`{"name":"a","plugins":[{"type":"bridge","isGateway":true,"ipam":{"type":"dhcp"}}]}`:          "[] ",
		`{"name":"a","plugins":[{"type":"flannel","delegate":{"bridge":"b"}}]}`:                       "[] ",
		`{"name":"a","plugins":[{"type":"bridge","ipam":{"type":"host-local","ranges":"none"}}]}`:     "[] ",
		`{"name":"a","plugins":[{"type":"bridge","ipam":{"type":"host-local","subnet":"nonsense"}}]}`: "[] ",
	} {
		c, err := parseConflist([]byte(conf), nil)
		if err != nil {
			t.Fatal(err)
		}
		if p := poolOf(c); fmt.Sprint(p.ranges, " ", p.bridge) != want {
			t.Errorf("%s: %v", conf, p)
		}
	}
}

// The pods of fake plugins have 10.90.0.5/24.
const fakeRange = "10.90.0.0/24"

// A configuration that comes later is preferred to the default network, but not where it is made of the same addresses: pods of
// both would have the same, and of two bridges the kernel takes one.
func TestConfigurationOfTheDefaultNetworksRange(t *testing.T) {
	n := bare(t)
	n.plugin("x", good)
	n.exec = []string{ExecAll}
	m := n.open()
	m.SetPodCIDRs(fakeRange)
	p := n.pod()
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	why := "network a (" + n.conf + "/10-a.conflist): pods on network " + defaultName(cidrs(t, fakeRange)) + " have addresses of its range 10.90.0.0/25, "
	n.write(n.conf+"/10-a.conflist", ofRange("a", "x", "10.90.0.0/25", ""))
	readyWithin(t, m, 5*time.Second, why)
	if _, err := m.Conflist(); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("a pod is set up: %v", err)
	}
	if log := n.daemonLog.String(); !strings.Contains(log, "network is not ready") {
		t.Errorf("log: %s", log)
	}
	n.write(n.conf+"/10-a.conflist", ofRange("a", "x", "10.91.0.0/25", "")) // another range
	readyWithin(t, m, 5*time.Second, "")
	n.write(n.conf+"/10-a.conflist", ofRange("a", "x", fakeRange, ""))
	readyWithin(t, m, 5*time.Second, "pods on network")
	if err := m.Teardown(t.Context(), p); err != nil { // the node is drained
		t.Fatal(err)
	}
	readyWithin(t, m, 5*time.Second, "")
	if now := m.Current(); now.Name != "a" {
		t.Errorf("%+v", now)
	}
}

// host-local keeps addresses by the network's name: one that is renamed begins anew.
func TestRenamedNetworkOfTheSameRange(t *testing.T) {
	n := newNode(t)
	n.exec = []string{ExecAll}
	n.plugin("x", good)
	n.plugin("host-local", good)
	n.write(n.conf+"/10-a.conflist", ofRange("a", "x", fakeRange, ""))
	m := n.open()
	p := n.pod()
	if _, err := m.Setup(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	n.write(n.conf+"/10-a.conflist", ofRange("b", "x", fakeRange, ""))
	readyWithin(t, m, 5*time.Second, "pods on network a have addresses of its range "+fakeRange)
	n.write(n.conf+"/10-a.conflist", ofRange("a", "x", fakeRange, `"mtu":1400,`)) // the name is what counts
	readyWithin(t, m, 5*time.Second, "")

	n.write(n.conf+"/10-a.conflist", ofRange("b", "x", fakeRange, ""))
	readyWithin(t, m, 5*time.Second, "pods on network a")
	n.plugin("x", "exit 1") // its DEL fails for good; who has let the pod go does not wait for it
	if err := m.Owe(p, errors.New("exit 1")); err != nil {
		t.Fatal(err)
	}
	readyWithin(t, m, 5*time.Second, "")
}

// What range a network has is not always in its configuration (flannel). Then it shows with the first address.
func TestAddressesOfAnotherNetworksPodsAreRefused(t *testing.T) {
	gives := func(address string) string {
		return strings.ReplaceAll(good, "10.90.0.5/24", address)
	}
	for name, tc := range map[string]struct {
		former, address string
		refused         string
	}{
		"the very address":                       {"a", "10.90.0.5/24", "address 10.90.0.5 is that of a pod on network a"},
		"another one of a network's range":       {"a", "10.90.0.6/24", ""},
		"the very address, of the default one":   {"", "10.90.0.5/24", "address 10.90.0.5 is that of a pod on network berth-"},
		"another one of the default one's range": {"", "10.90.0.6/24", "address 10.90.0.6 is of the range 10.90.0.0/24, which pods on the default network"},
		"of no other network's range":            {"", "10.94.0.5/24", ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := bare(t)
			n.plugin("x", good)
			n.exec = []string{ExecAll}
			if tc.former != "" {
				n.write(n.conf+"/10-a.conflist", list(tc.former, "x"))
			}
			m := n.open()
			m.SetPodCIDRs(fakeRange)
			if _, err := m.Setup(t.Context(), n.pod()); err != nil {
				t.Fatal(err)
			}
			n.plugin("z", strings.ReplaceAll(gives(tc.address), "fd00:90::5/64", "fd00:94::5/64"))
			n.write(n.conf+"/10-a.conflist", list("z", "z"))
			eventually(t, "z is the network", func() bool { return m.Current().Name == "z" && m.Ready() == nil })
			other := n.pod()
			other.ID = otherID
			_, err := m.Setup(t.Context(), other)
			if (err == nil) != (tc.refused == "") || err != nil && !strings.Contains(err.Error(), tc.refused) {
				t.Errorf("%v, want %q", err, tc.refused)
			}
			n.lines()
			if err := m.Teardown(t.Context(), other); err != nil {
				t.Fatal(err)
			}
			n.same(n.calls(), "z DEL")
		})
	}
}

// The real ones: while a pod is on the default network, a configuration of another bridge with the same range is not used, and
// the pod goes on working. Once it is gone, so is its bridge, and pods on the other are reached.
func TestTwoBridgesOfOneRange(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const cidr, port = "10.89.9.0/24", 8080
	leases := t.TempDir()
	bridged := func(name, bridge string) string {
		conf := ofRange(name, "bridge", cidr, fmt.Sprintf(`"bridge":%q,"isGateway":true,`, bridge))
		return strings.Replace(conf, `"type":"host-local",`, fmt.Sprintf(`"type":"host-local","dataDir":%q,`, leases), 1)
	}
	host := newLinks(t)
	n := newNode(t)
	n.bin = bin
	m := n.open()
	if err := m.Close(); err != nil { // the watch would look at this machine's links
		t.Fatal(err)
	}
	add := func(id string) (p Pod, ip netip.Addr) {
		t.Helper()
		p = n.pod()
		p.ID = id
		host.do(func() (err error) {
			if p.Conflist, err = m.Conflist(); err != nil {
				return err
			}
			res, err := m.Setup(t.Context(), p)
			if err == nil {
				ip = res.IPs[0]
			}
			return err
		})
		serve(t, p.NetNS, port)
		return p, ip
	}
	answers := func(ip netip.Addr) {
		t.Helper()
		if got, err := ask(host.ns, ip.String(), port); err != nil {
			t.Errorf("%q, %v", got, err)
		}
	}
	ready := func() (err error) {
		host.do(func() error {
			m.refresh()
			err = m.Ready()
			return nil
		})
		return err
	}
	host.do(func() error {
		m.SetPodCIDRs(cidr)
		return nil
	})
	former, formerIP := add(podID)
	answers(formerIP)
	n.write(n.conf+"/10-a.conflist", bridged("a", "other0"))
	if err := ready(); err == nil || !strings.Contains(err.Error(), "have addresses of its range "+cidr) {
		t.Errorf("ready: %v", err)
	}
	answers(formerIP)
	host.do(func() error { return m.Teardown(t.Context(), former) })
	if err := ready(); err != nil {
		t.Error(err)
	}
	host.do(func() error {
		if _, err := netlink.LinkByName(defaultName(cidrs(t, cidr))); err == nil {
			t.Error("the bridge of the default network is left")
		}
		return nil
	})
	later, laterIP := add(otherID)
	answers(laterIP)
	host.do(func() error { return m.Teardown(t.Context(), later) })

	// The bridge of a configuration that is no more: nothing says whose it is.
	n.write(n.conf+"/10-a.conflist", bridged("b", "new0"))
	if err := ready(); err == nil || !strings.Contains(err.Error(), "bridge other0 has 10.89.9.1 of its range "+cidr) || !strings.Contains(err.Error(), "(ip link delete other0)") {
		t.Errorf("ready: %v", err)
	}
	host.do(func() error {
		link, err := netlink.LinkByName("other0")
		if err == nil {
			err = netlink.LinkDel(link)
		}
		return err
	})
	if err := ready(); err != nil {
		t.Error(err)
	}
}

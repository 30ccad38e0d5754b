package network

import (
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// Two daemons of a node with roots of their own and the same pod CIDR: the second would come to the bridge of the first, and give
// its addresses out again.
func TestDefaultNetworkOfTwoRoots(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const cidr = "10.89.9.0/24"
	name := defaultName(cidrs(t, cidr))
	host := newLinks(t)
	open := func() (*node, *Manager) {
		n := newNode(t)
		n.bin = bin
		m := n.open()
		if err := m.Close(); err != nil { // the watch would look at this machine's links
			t.Fatal(err)
		}
		host.do(func() error {
			m.SetPodCIDRs(cidr)
			return nil
		})
		return n, m
	}
	setup := func(m *Manager, p Pod) (err error) {
		host.do(func() error {
			_, err = m.Setup(t.Context(), p)
			return nil
		})
		return err
	}
	ready := func(m *Manager) (err error) {
		host.do(func() error {
			m.refresh()
			err = m.Ready()
			return nil
		})
		return err
	}
	alias := func(set ...string) (now string) {
		host.do(func() error {
			link, err := netlink.LinkByName(name)
			if err == nil && len(set) > 0 {
				err = netlink.LinkSetAlias(link, set[0])
			}
			if err == nil {
				now = link.Attrs().Alias
			}
			return err
		})
		return now
	}
	first, one := open()
	second, two := open() // both are ready, as long as there is no bridge
	if err := setup(one, first.pod()); err != nil {
		t.Fatal(err)
	}
	other := second.pod()
	other.ID = otherID
	why := "bridge " + name + " is that of another berth on this node, with its addresses in " + first.cache + ": "
	if err := setup(two, other); err == nil || !strings.Contains(err.Error(), why) {
		t.Errorf("a pod of the second is set up before it has looked again: %v", err)
	}
	if err := ready(two); err == nil || !strings.Contains(err.Error(), "pod CIDR "+cidr+": "+why) || !strings.Contains(err.Error(), "--pod-cidr") {
		t.Errorf("the second is ready: %v", err)
	}
	if err := ready(one); err != nil {
		t.Errorf("the first: %v", err)
	}

	// One without a mark is an earlier version's, and that of whoever has pods on it.
	alias("")
	if err := ready(two); err != nil || alias() != "" {
		t.Errorf("the second: %v, alias %q", err, alias())
	}
	if err := ready(one); err != nil || alias() != markPrefix+first.cache {
		t.Errorf("the first: %v, alias %q", err, alias())
	}
	if err := ready(two); err == nil {
		t.Error("the second is ready")
	}

	// Another path to the same root is no other root.
	moved := first.cache + ".link"
	if err := os.Symlink(first.cache, moved); err != nil {
		t.Fatal(err)
	}
	alias(markPrefix + moved)
	if err := ready(one); err != nil {
		t.Errorf("the first, by another path: %v", err)
	}

	alias(markPrefix + first.cache)
	if err := os.Rename(first.cache, first.cache+".gone"); err != nil {
		t.Fatal(err)
	}
	if err := ready(two); err != nil {
		t.Errorf("the root of the first is gone: %v", err)
	}
	if err := setup(two, other); err != nil || alias() != markPrefix+second.cache {
		t.Errorf("the second: %v, alias %q", err, alias())
	}
	if err := os.Rename(first.cache+".gone", first.cache); err != nil {
		t.Fatal(err)
	}
	if err := ready(one); err == nil || !strings.Contains(err.Error(), second.cache) {
		t.Errorf("the first is back, and ready: %v", err)
	}

	alias("uplink of rack 7") // somebody's own words
	if err := ready(two); err != nil || alias() != "uplink of rack 7" {
		t.Errorf("%v, alias %q", err, alias())
	}
}

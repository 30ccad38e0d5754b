package conntrack

import (
	"fmt"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/proxy/model"
)

// nodeHas gives the node addresses.
func nodeHas(t *testing.T, addrs ...string) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			t.Fatalf("%s: %v", a, err)
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

// What leads from a Service to an endpoint that it has lost is removed, in both families, and nothing else.
func TestEntriesToALostEndpointAreRemoved(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("dns", nil, "10.96.0.10", "fd96::10")
	k.service("other", nil, "10.96.0.11")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.slice("dns", "2", "fd01::1", "fd01::2")
	k.slice("other", "1", "10.1.0.1")
	k.all()
	b.sweep()
	stays := []flow{
		"udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.2:53",        // the other endpoint
		"udp 198.51.100.1:4002>10.96.0.10:54>10.1.0.1:53",        // another port, which is nobody's
		"udp 198.51.100.1:4003>10.96.0.11:53>10.1.0.1:53",        // another Service, which has it still
		"udp 198.51.100.1:4004>10.1.0.1:53>10.1.0.1:53",          // the pod itself
		"udp 10.1.0.1:4005>198.51.100.1:53>198.51.100.1:53",      // what the pod sends
		"udp 198.51.100.1:4006>10.96.0.10:53>10.1.0.9:53",        // led there by somebody else
		"tcp 198.51.100.1:4001>10.96.0.10:53>10.1.0.1:53",        // no UDP
		"udp [2001:db8::1]:4000>[fd96::10]:53>[fd01::2]:53",      //
		"udp [2001:db8::1]:4001>[2001:db8::2]:53>[fd01::1]:53",   // not sent to a Service
		"udp [2001:db8::1]:4002>[fd96::10]:53>[fd01::1]:5353",    // another port of the pod
		"tcp [2001:db8::1]:4003>[fd96::10]:53>[fd01::1]:53",      //
		"udp 198.51.100.1:4007>203.0.113.1:53>203.0.113.1:53",    // the world's
		"udp 198.51.100.1:4008>203.0.113.1:30053>10.1.0.1:30053", //
	}
	b.track(append(slices.Clone(stays),
		"udp 198.51.100.2:4000>10.96.0.10:53>10.1.0.1:53",
		"udp [2001:db8::2]:4000>[fd96::10]:53>[fd01::1]:53")...)
	k.slice("dns", "1", "10.1.0.2")
	k.slice("dns", "2", "fd01::2", "fd01::3")
	k.commit()
	b.sweep()
	b.has(stays...)
	if b.removed != [model.Families]int{1, 1} {
		t.Errorf("removed %v", b.removed)
	}
}

// Services without endpoints, deleted ones, and those that get their first one, were overlooked.
func TestK8s139628_NoEndpointsLeft(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32")
	k := newCluster(t, b.Cleaner)
	k.service("statsd", nodePort(30053), "10.96.0.10")
	k.slice("statsd", "1", "10.1.0.1")
	k.all()
	b.sweep()
	b.track("udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.1:53", "udp 198.51.100.1:4001>192.0.2.1:30053>10.1.0.1:53")
	k.slice("statsd", "1")
	k.commit()
	b.sweep()
	b.has()
}

func TestK8s135323_DeletedService(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32")
	k := newCluster(t, b.Cleaner)
	k.service("statsd", func(s *corev1.Service) {
		nodePort(30053)(s)
		s.Spec.ExternalIPs = []string{"203.0.113.5"}
	}, "10.96.0.10")
	k.slice("statsd", "1", "10.1.0.1")
	k.all()
	b.sweep()
	stays := []flow{"udp 198.51.100.1:4003>203.0.113.6:53>10.1.0.1:53"}
	b.track(append(slices.Clone(stays), "udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.1:53",
		"udp 198.51.100.1:4001>192.0.2.1:30053>10.1.0.1:53", "udp 198.51.100.1:4002>203.0.113.5:53>10.1.0.1:53")...)
	k.delete("statsd") // the slice is deleted later
	k.commit()
	b.sweep()
	b.has(stays...)
}

// What was sent while there was no endpoint went on as it was, and would do so for as long as somebody sends.
func TestEntriesThatWereLedNowhereAreRemovedWithTheFirstEndpoint(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32", "192.0.2.9/32")
	k := newCluster(t, b.Cleaner)
	k.all()
	b.sweep()
	b.track("udp 198.51.100.1:4000>10.96.0.10:53>10.96.0.10:53", "udp 198.51.100.1:4001>192.0.2.1:30053>192.0.2.1:30053")
	k.service("dns", nodePort(30053), "10.96.0.10")
	k.commit()
	b.sweep()
	if n := len(b.flows()); n != 2 {
		t.Errorf("%d entries: a Service without endpoints leads nobody elsewhere", n)
	}
	k.slice("dns", "1", "10.1.0.1")
	k.commit()
	b.sweep()
	b.has()

	// And not with the second.
	again := flow("udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.1:53")
	b.track(again)
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.commit()
	b.sweep()
	b.has(again)
}

// A node port is one at the node's own addresses, where node ports are served.
func TestNodePortsAreTheNodes(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32", "203.0.113.9/32", "fd02::1/128")
	k := newCluster(t, b.Cleaner)
	k.service("dns", nodePort(30053), "10.96.0.10", "fd96::10")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.slice("dns", "2", "fd01::1", "fd01::2")
	k.all()
	b.sweep()
	stays := []flow{
		"udp 10.1.0.7:4000>192.0.2.77:30053>192.0.2.77:30053",    // a pod talks to another node's
		"udp 10.1.0.7:4001>192.0.2.77:30053>10.1.0.1:53",         // and is led there by whoever
		"udp 198.51.100.1:4002>203.0.113.9:30053>10.1.0.1:53",    // an address of the node without node ports
		"udp 198.51.100.1:4003>192.0.2.1:30054>10.1.0.1:53",      // a host port
		"udp 198.51.100.1:4004>192.0.2.1:30053>10.1.0.99:53",     // a host port of the same number
		"udp 198.51.100.1:4005>192.0.2.1:30053>10.1.0.2:53",      // an endpoint that is still there
		"tcp 198.51.100.1:4006>192.0.2.1:30053>10.1.0.1:53",      //
		"udp 192.0.2.1:30053>198.51.100.1:30053>198.51.100.1:53", // the node sends
		"udp [fd02::9]:4000>[fd02::77]:30053>[fd01::1]:53",       //
		"udp [fd02::9]:4000>[fd02::1]:30053>[fd01::2]:53",        //
	}
	b.track(append(slices.Clone(stays), "udp 198.51.100.1:4000>192.0.2.1:30053>10.1.0.1:53", "udp [fd02::9]:4001>[fd02::1]:30053>[fd01::1]:53")...)
	k.slice("dns", "1", "10.1.0.2")
	k.slice("dns", "2", "fd01::2")
	k.commit()
	b.sweep()
	b.has(stays...)
}

// Endpoints that end go on with what they have; those that are published although they are not ready are as good as others
// (kube-proxy removes these at each change).
func TestEntriesOfServingEndpointsStay(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("dns", nil, "10.96.0.10")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2", "10.1.0.3")
	k.all()
	b.sweep()
	stays := []flow{"udp 198.51.100.1:4001>10.96.0.10:53>10.1.0.1:53", "udp 198.51.100.1:4002>10.96.0.10:53>10.1.0.2:53"}
	b.track(append(slices.Clone(stays), "udp 198.51.100.1:4003>10.96.0.10:53>10.1.0.3:53")...)
	k.slice("dns", "1", "10.1.0.1~", "10.1.0.2-")
	k.commit()
	b.sweep()
	b.has(stays...)
}

// The first time everything is compared: whatever happened while no proxy ran.
func TestRestartComparesAll(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32")
	k := newCluster(t, b.Cleaner)
	k.service("dns", func(s *corev1.Service) {
		nodePort(30053)(s)
		s.Spec.ExternalIPs = []string{"203.0.113.5"}
	}, "10.96.0.10", "fd96::10")
	k.service("none", nil, "10.96.0.11")
	k.slice("dns", "1", "10.1.0.1")
	k.slice("dns", "2", "fd01::1")
	stays := []flow{
		"udp 198.51.100.1:4001>10.96.0.10:53>10.1.0.1:53",
		"udp 198.51.100.1:4002>203.0.113.5:53>10.1.0.1:53",
		"udp 198.51.100.1:4003>192.0.2.1:30053>10.1.0.1:53",
		"udp 198.51.100.1:4004>10.97.0.1:53>10.1.0.9:53",        // no cluster IP
		"udp 198.51.100.1:4005>10.96.0.99:53>10.96.0.99:53",     // one that is nobody's, led nowhere
		"udp 198.51.100.1:4006>192.0.2.1:30054>10.1.0.9:53",     // a host port
		"udp 198.51.100.1:4007>192.0.2.2:30053>10.1.0.9:53",     // another node
		"tcp 198.51.100.1:4008>10.96.0.10:53>10.1.0.9:53",       //
		"udp [2001:db8::1]:4000>[fd96::10]:53>[fd01::1]:53",     //
		"udp [2001:db8::1]:4000>[2001:db8::2]:53>[fd01::99]:53", //
	}
	b.track(append(slices.Clone(stays),
		"udp 198.51.100.1:4009>10.96.0.10:53>10.1.0.9:53",   // an endpoint that has gone
		"udp 198.51.100.1:4010>10.96.0.10:53>10.96.0.10:53", // from before there was one
		"udp 198.51.100.1:4011>10.96.0.11:53>10.1.0.9:53",   // the last endpoint
		"udp 198.51.100.1:4012>10.96.0.12:53>10.1.0.9:53",   // a deleted Service
		"udp 198.51.100.1:4013>10.96.0.10:54>10.1.0.9:53",   // a deleted port
		"udp 198.51.100.1:4014>203.0.113.5:53>10.1.0.9:53",  //
		"udp 198.51.100.1:4015>192.0.2.1:30053>10.1.0.9:53", //
		"udp [2001:db8::1]:4001>[fd96::10]:53>[fd01::9]:53", //
		"udp [2001:db8::1]:4002>[fd96::99]:53>[fd01::9]:53")...)
	k.all()
	b.sweep()
	b.has(stays...)

	// Once: what others make of what is no change of a Service is theirs.
	theirs := flow("udp 198.51.100.1:4100>10.96.0.10:53>10.1.0.9:53")
	b.track(theirs)
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.commit()
	b.sweep()
	b.has(append(stays, theirs)...)
}

// What is sent to a range of ports keeps its port: there only the endpoint's address counts.
func TestEntriesOfPortRanges(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("rtp", func(s *corev1.Service) {
		s.Annotations = map[string]string{model.PortRangesAnnotation: "p=10000-20000"}
	}, "10.96.0.10")
	k.slice("rtp", "1", "10.1.0.1", "10.1.0.2")
	stays := []flow{
		"udp 198.51.100.1:4001>10.96.0.10:10000>10.1.0.2:10000",
		"udp 198.51.100.1:4002>10.96.0.10:20000>10.1.0.2:20000",
		"udp 198.51.100.1:4003>10.96.0.10:53>10.1.0.2:53",
	}
	stale := flow("udp 198.51.100.1:4004>10.96.0.10:15000>10.1.0.1:15000")
	b.track(append(slices.Clone(stays), stale, "udp 198.51.100.1:4005>10.96.0.10:20001>10.1.0.1:20001", "udp 198.51.100.1:4006>10.96.0.10:15000>10.1.0.9:15000")...)
	k.all()
	b.sweep()
	b.has(append(slices.Clone(stays), stale)...)
	k.slice("rtp", "1", "10.1.0.2")
	k.commit()
	b.sweep()
	b.has(stays...)
}

// An address and port that passes from one Service to another leads to the endpoints of the other.
func TestAnAddressThatPassesToAnotherService(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	external := func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"203.0.113.5"} }
	k.service("a", external, "10.96.0.10")
	k.service("b", nil, "10.96.0.11")
	k.slice("a", "1", "10.1.0.1", "10.1.0.3")
	k.slice("b", "1", "10.1.0.2", "10.1.0.3")
	k.all()
	b.sweep()
	stays := []flow{"udp 198.51.100.1:4001>203.0.113.5:53>10.1.0.3:53", "udp 198.51.100.1:4002>10.96.0.10:53>10.1.0.1:53"}
	b.track(append(slices.Clone(stays), "udp 198.51.100.1:4000>203.0.113.5:53>10.1.0.1:53")...)
	k.service("a", nil, "10.96.0.10")
	k.service("b", external, "10.96.0.11")
	k.commit()
	b.sweep()
	b.has(stays...)
}

// Changes that come before the kernel has them are waited with; those that come meanwhile go together.
func TestChangesGoTogether(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("dns", nil, "10.96.0.10")
	k.slice("dns", "1", "10.1.0.1")
	k.all()
	b.sweep()
	stays := flow("udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.1:53")
	b.track(stays)
	for i := range 100 { // more often than is remembered one by one
		gone := flow(fmt.Sprintf("udp 198.51.100.1:4001>10.96.0.10:53>10.1.1.%d:53", i))
		k.slice("dns", "1", "10.1.0.1", fmt.Sprintf("10.1.1.%d", i))
		d := k.Commit()
		b.Will(&d)
		b.sweep() // the kernel does not have it yet
		if i == 50 {
			b.track(gone)
		}
	}
	b.Done()
	b.sweep()
	b.has(stays)
	if n := len(b.held.places) + len(b.pending.places) + len(b.active.places); n != 0 {
		t.Errorf("%d places are remembered", n)
	}

	// What goes and comes back before anybody looks has lost nothing.
	k.slice("dns", "1")
	d := k.Commit()
	b.Will(&d)
	k.slice("dns", "1", "10.1.0.1")
	k.commit()
	b.sweep()
	b.has(stays)
}

// What comes back while the table is read is not removed any more.
func TestAnEndpointThatComesBackMeanwhile(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("dns", nil, "10.96.0.10")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2")
	k.all()
	b.sweep()
	stays := flow("udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.1:53")
	b.track(stays, "udp 198.51.100.1:4001>10.96.0.10:53>10.1.0.2:53")
	k.slice("dns", "1")
	k.commit()
	b.take()
	// The table is read, and then what is stale is removed.
	b.active, b.pending = b.pending, work{}
	var stale []found
	if err := b.open(); err != nil {
		t.Fatal(err)
	}
	if err := b.conn.Each(conntrack.Filter{}, func(e *conntrack.Entry) bool {
		if at, target, _ := b.active.find(e, nil); target != nil && target.stale(e.Original.Dst, e.Reply.Src) {
			stale = append(stale, found{key: e.Key(), original: e.Original, reply: e.Reply, at: at})
		}
		return true
	}); err != nil || len(stale) != 2 {
		t.Fatalf("%d are stale, %v", len(stale), err)
	}
	k.slice("dns", "1", "10.1.0.1")
	k.commit()
	if n, err := b.remove(stale); n != [model.Families]int{1, 0} || err != nil {
		t.Errorf("removed %v, %v", n, err)
	}
	b.has(stays)
}

// What fails is tried again, with what has come meanwhile.
func TestWhatFailsIsTriedAgain(t *testing.T) {
	b := newTable(t)
	k := newCluster(t, b.Cleaner)
	k.service("dns", nil, "10.96.0.10")
	k.slice("dns", "1", "10.1.0.1", "10.1.0.2", "10.1.0.3")
	b.track("udp 198.51.100.1:4000>10.96.0.10:53>10.1.0.9:53", "udp 198.51.100.1:4001>10.96.0.10:53>10.1.0.1:53",
		"udp 198.51.100.1:4002>10.96.0.10:53>10.1.0.2:53", "udp 198.51.100.1:4003>10.96.0.99:53>10.1.0.9:53")
	fail := func() {
		t.Helper()
		b.take()
		b.sweepWithout(t)
	}
	k.all()
	fail()
	k.slice("dns", "1", "10.1.0.2", "10.1.0.3")
	k.commit()
	fail()
	k.slice("dns", "1", "10.1.0.3")
	k.commit()
	b.sweep()
	b.has()
}

// sweepWithout sweeps with a connection that is of no use.
func (b *table) sweepWithout(t *testing.T) {
	t.Helper()
	b.open()
	b.conn.Close()
	if err := b.Cleaner.sweep(t.Context()); err == nil {
		t.Fatal("no error")
	}
}

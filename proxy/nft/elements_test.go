package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

func prefixes(all ...string) (out []netip.Prefix) {
	for _, p := range all {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestRangesDoNotTouch(t *testing.T) {
	for _, c := range []struct {
		in   []netip.Prefix
		want string
	}{
		{prefixes(), "[]"},
		{prefixes("10.0.0.0/8", "10.1.0.0/16"), "[10.0.0.0-10.255.255.255]"},
		{prefixes("10.1.0.0/16", "10.0.0.0/16"), "[10.0.0.0-10.1.255.255]"},
		{prefixes("10.0.0.0/16", "10.2.0.0/16"), "[10.0.0.0-10.0.255.255 10.2.0.0-10.2.255.255]"},
		{prefixes("128.0.0.0/1", "255.255.255.255/32", "0.0.0.0/1"), "[0.0.0.0-255.255.255.255]"},
		{prefixes("::/0", "fd00::/8"), "[::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]"},
		{prefixes("fd00::1/128"), "[fd00::1-fd00::1]"},
	} {
		if got := fmt.Sprint(ranges(c.in)); got != c.want {
			t.Errorf("%v: %s, want %s", c.in, got, c.want)
		}
	}
}

func TestNodePortRangesWithoutLoopback(t *testing.T) {
	for _, c := range []struct {
		family   model.Family
		prefix   string
		loopback bool
		want     string
	}{
		{model.IPv4, "0.0.0.0/0", false, "[0.0.0.0-126.255.255.255 128.0.0.0-255.255.255.255]"},
		{model.IPv4, "127.0.0.0/8", false, "[]"},
		{model.IPv4, "127.0.0.0/8", true, "[127.0.0.0-127.255.255.255]"},
		{model.IPv6, "::/127", false, "[::-::]"},
		{model.IPv6, "fd00::/8", false, "[fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]"},
	} {
		got := nodePortRanges(c.family, model.NodePortAddresses{Prefixes: prefixes(c.prefix), Loopback: c.loopback})
		if fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, want %s", c.prefix, got, c.want)
		}
	}
}

func TestSizes(t *testing.T) {
	for n := 1; n <= clusterOffset; n++ {
		size := int(sizeFor(n))
		switch {
		case size < n:
			t.Fatalf("%d endpoints, but numbers up to %d", n, size)
		case n <= exactSizes && size != n:
			t.Fatalf("%d: %d", n, size)
		case 3*n < 2*size: // a third of the draws would find nothing
			t.Fatalf("%d of %d", n, size)
		}
	}
	if n := sizeFor(0); n != 0 {
		t.Error(n)
	}
	if !slices.IsSorted(wideSizes) || wideSizes[len(wideSizes)-1] != clusterOffset {
		t.Error(wideSizes)
	}
}

// Elements of a Service depend on it alone, and no two are in the same place.
func TestElementsOfAServiceAreDistinct(t *testing.T) {
	f := nodetest.Families[0]
	s := nodetest.ServiceOf("web",
		nodetest.Sticky(10, nodetest.PortOf(model.TCP, []string{"10.1.0.1:80*", "10.1.0.2:80", "10.1.0.3:80"}, nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), nodetest.LocalPolicy(f.LoadBalancer(80)), nodetest.LocalPolicy(f.NodePort(30080)))),
		nodetest.PortOf(model.UDP, f.Pods(1, 2), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.LoadBalancer(80), f.NodePort(30080)))
	e := elements{groups: newGroups()}
	e.service(s)
	seen := map[elemKey]bool{}
	e.each(func(el *elem) {
		if seen[el.key] {
			t.Errorf("twice in %d: %x", el.key.set, el.key.content())
		}
		seen[el.key] = true
	})
	again := elements{groups: newGroups()}
	again.service(s)
	again.each(func(el *elem) { delete(seen, el.key) })
	if len(seen) != 0 {
		t.Error("not the same again")
	}
}

// Timeouts of session affinity are not as many as users can think of.
func TestTimeoutsAreFew(t *testing.T) {
	for in, want := range map[time.Duration]uint32{
		0: 1, time.Millisecond: 1, 999 * time.Second: 999, 1001 * time.Second: 1010, 3 * time.Hour: 10800, 24 * time.Hour: 86400, 12345 * time.Second: 12400,
	} {
		if got := seconds(in); got != want {
			t.Errorf("%s: %d, want %d", in, got, want)
		}
	}
	all := map[uint32]bool{}
	for n := range 86400 {
		all[seconds(time.Duration(n)*time.Second)] = true
	}
	if len(all) > 3000 {
		t.Errorf("%d different ones", len(all))
	}
}

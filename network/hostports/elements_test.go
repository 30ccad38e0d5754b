package hostports

import (
	"fmt"
	"net/netip"
	"testing"
)

// show is what elements mean.
func show(all []entry) string {
	var s string
	for _, e := range all {
		if f, ok := e.flow(); ok {
			s += fmt.Sprintf("%s %v %d %v -> %v (%s)\n", e.set, f.protocol, f.port, f.at, f.pod, e.note)
			continue
		}
		s += fmt.Sprintf("%s %q\n", e.set, e.key)
	}
	return s
}

func TestElements(t *testing.T) {
	web := Pod{"1", "shop/web", []Port{port(TCP, 80, ""), port(UDP, 53, "192.0.2.1"), port(SCTP, 7, "2001:db8::1"), port(TCP, 81, "0.0.0.0"), port(TCP, 82, "::")}}
	for name, tc := range map[string]struct {
		targets []Target
		want    string
	}{
		"nothing":  {nil, ""},
		"no ports": {[]Target{{Pod{ID: "1"}, addrs("10.1.0.5"), "b"}}, ""},
		"both families": {[]Target{{web, addrs("10.1.0.5", "fd00::5", "10.1.0.6"), "b"}}, `hostip-ports-ipv4 UDP 53 192.0.2.1 -> 10.1.0.5 (shop/web)
hostip-ports-ipv6 SCTP 7 2001:db8::1 -> fd00::5 (shop/web)
links "b\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
ports-ipv4 TCP 80 invalid IP -> 10.1.0.5 (shop/web)
ports-ipv4 TCP 81 invalid IP -> 10.1.0.5 (shop/web)
ports-ipv6 TCP 80 invalid IP -> fd00::5 (shop/web)
ports-ipv6 TCP 82 invalid IP -> fd00::5 (shop/web)
`},
		"IPv6 alone": {[]Target{{web, addrs("fd00::5"), ""}}, `hostip-ports-ipv6 SCTP 7 2001:db8::1 -> fd00::5 (shop/web)
ports-ipv6 TCP 80 invalid IP -> fd00::5 (shop/web)
ports-ipv6 TCP 82 invalid IP -> fd00::5 (shop/web)
`},
		"no address of the family": {[]Target{{Pod{"1", "a", []Port{port(TCP, 80, "192.0.2.1")}}, addrs("fd00::5"), "b"}}, ""},
		"the later one has it": {[]Target{
			{Pod{"1", "old", []Port{port(TCP, 80, "")}}, addrs("10.1.0.5"), ""}, {Pod{"2", "new", []Port{port(TCP, 80, "")}}, addrs("10.1.0.6"), ""},
		}, "ports-ipv4 TCP 80 invalid IP -> 10.1.0.6 (new)\n"},
	} {
		t.Run(name, func(t *testing.T) {
			del, add := diff(nil, elementsOf(tc.targets))
			if got := show(add); got != tc.want || len(del) > 0 {
				t.Errorf("got\n%swant\n%s", got, tc.want)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	pod := func(addr string, ports ...Port) Target { return Target{Pod{addr, addr, ports}, addrs(addr), "b"} }
	have := elementsOf([]Target{pod("10.1.0.5", port(TCP, 1, ""), port(TCP, 2, "")), pod("10.1.0.6", port(TCP, 3, ""))})
	want := elementsOf([]Target{pod("10.1.0.7", port(TCP, 1, "")), pod("10.1.0.6", port(TCP, 3, ""), port(TCP, 4, ""))})
	del, add := diff(have, want)
	if got, want := show(del), "ports-ipv4 TCP 1 invalid IP -> 10.1.0.5 (10.1.0.5)\nports-ipv4 TCP 2 invalid IP -> 10.1.0.5 (10.1.0.5)\n"; got != want {
		t.Errorf("goes: %s", got)
	}
	if got, want := show(add), "ports-ipv4 TCP 1 invalid IP -> 10.1.0.7 (10.1.0.7)\nports-ipv4 TCP 4 invalid IP -> 10.1.0.6 (10.1.0.6)\n"; got != want {
		t.Errorf("comes: %s", got)
	}
	if del, add := diff(want, want); len(del)+len(add) > 0 {
		t.Errorf("between the same: %v, %v", del, add)
	}
}

// Only what led to the pod that has gone, or goes past the pod that has come, is forgotten: not what others send elsewhere.
func TestStaleConnections(t *testing.T) {
	entries := func(pod string, ports ...Port) []entry {
		_, add := diff(nil, elementsOf([]Target{{Pod{"1", "a", ports}, addrs(pod), ""}}))
		return add
	}
	s := staleFlows{
		gone: udpFlows(entries("10.1.0.5", port(UDP, 53, ""), port(TCP, 80, "")), false),
		come: udpFlows(entries("10.1.0.6", port(UDP, 53, ""), port(UDP, 54, "192.0.2.1")), false),
		node: map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true, netip.MustParseAddr("192.0.2.2"): true},
	}
	for _, tc := range []struct {
		port     uint16
		to, with string
		want     bool
	}{
		{53, "192.0.2.1", "10.1.0.5", true},     // where the port led
		{53, "192.0.2.1", "10.1.0.6", false},    // where it leads
		{53, "192.0.2.2", "192.0.2.2", true},    // to the node itself
		{53, "127.0.0.1", "127.0.0.1", true},    //
		{53, "8.8.8.8", "8.8.8.8", false},       // a server of names far away
		{53, "10.96.0.10", "10.1.0.9", false},   // a Service
		{53, "10.96.0.10", "10.1.0.5", true},    // one that led to the pod
		{53, "10.1.0.5", "10.1.0.5", false},     // to the pod itself
		{80, "192.0.2.1", "10.1.0.5", false},    // a port of TCP
		{54, "192.0.2.1", "192.0.2.1", true},    // at that address
		{54, "192.0.2.2", "192.0.2.2", false},   // at another
		{99, "192.0.2.1", "192.0.2.1", false},   // no host port
		{53, "192.0.2.1", "198.51.100.7", true}, // an earlier pod's
	} {
		if got := s.stale(tc.port, netip.MustParseAddr(tc.to), netip.MustParseAddr(tc.with)); got != tc.want {
			t.Errorf("port %d of %s, led to %s: %v", tc.port, tc.to, tc.with, got)
		}
	}
}

package hostports

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func port(p Protocol, host uint16, at string) Port {
	out := Port{Protocol: p, Host: host, To: 1}
	if at != "" {
		out.At = netip.MustParseAddr(at)
	}
	return out
}

func TestOverlaps(t *testing.T) {
	for _, tc := range []struct {
		a, b Port
		want bool
	}{
		{port(TCP, 80, ""), port(TCP, 80, ""), true},
		{port(TCP, 80, ""), port(TCP, 81, ""), false},
		{port(TCP, 80, ""), port(UDP, 80, ""), false},
		{port(TCP, 80, ""), port(SCTP, 80, ""), false},
		{port(TCP, 80, ""), port(TCP, 80, "192.0.2.1"), true},
		{port(TCP, 80, ""), port(TCP, 80, "2001:db8::1"), true},
		{port(TCP, 80, ""), port(TCP, 80, "0.0.0.0"), true},
		{port(TCP, 80, ""), port(TCP, 80, "::"), true},
		{port(TCP, 80, "0.0.0.0"), port(TCP, 80, "0.0.0.0"), true},
		{port(TCP, 80, "0.0.0.0"), port(TCP, 80, "192.0.2.1"), true},
		{port(TCP, 80, "0.0.0.0"), port(TCP, 80, "127.0.0.1"), true},
		{port(TCP, 80, "0.0.0.0"), port(UDP, 80, "192.0.2.1"), false},
		{port(TCP, 80, "0.0.0.0"), port(TCP, 80, "2001:db8::1"), false},
		{port(TCP, 80, "0.0.0.0"), port(TCP, 80, "::"), false}, // each leads packets of its family alone
		{port(TCP, 80, "::"), port(TCP, 80, "2001:db8::1"), true},
		{port(TCP, 80, "::"), port(TCP, 80, "192.0.2.1"), false},
		{port(TCP, 80, "192.0.2.1"), port(TCP, 80, "192.0.2.1"), true},
		{port(TCP, 80, "192.0.2.1"), port(TCP, 80, "192.0.2.2"), false},
		{port(TCP, 80, "2001:db8::1"), port(TCP, 80, "2001:db8::2"), false},
	} {
		if tc.a.overlaps(tc.b) != tc.want || tc.b.overlaps(tc.a) != tc.want {
			t.Errorf("%v and %v: %v, %v, want %v", tc.a, tc.b, tc.a.overlaps(tc.b), tc.b.overlaps(tc.a), tc.want)
		}
	}
}

func TestClaims(t *testing.T) {
	const long = "0123456789abcdef0123456789abcdef"
	var c Claims
	take := func(id string, want string, ports ...Port) {
		t.Helper()
		err := c.Take(Pod{id, "shop/" + id, ports})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want) || !errdefs.IsFailedPrecondition(err)) {
			t.Errorf("%s: %v, want %q", id, err, want)
		}
	}
	take(long, "", port(TCP, 80, ""), port(UDP, 53, "192.0.2.1"))
	take(long, "", port(TCP, 80, "")) // the same again
	take("b", "TCP port 80 at 192.0.2.9: pod shop/"+long+" (0123456789ab) has TCP port 80, until its network is torn down",
		port(TCP, 81, ""), port(TCP, 80, "192.0.2.9"))
	take("c", "", port(TCP, 81, "")) // of which b has taken none
	take("d", "")
	take("e", "", port(UDP, 80, ""))
	c.Free(long)
	c.Free("nobody")
	take("b", "", port(TCP, 80, ""))
	c.Keep(Pod{"old", "shop/old", []Port{port(TCP, 80, "")}}) // whoever has it
	c.Free("b")
	take("f", "pod shop/old", port(TCP, 80, ""))
}

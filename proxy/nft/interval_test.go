package nft

import (
	"testing"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
)

// The sets of intervals take any change, in one step.
func TestIntervalsChange(t *testing.T) {
	s := nodetest.NewSpace(t, "node")
	p := openAt(s, Options{})
	st := nodetest.NewState()
	var shapes [][2][]string
	v4 := [][]string{{"0.0.0.0/0"}, {"192.0.2.0/24"}, {}, {"192.0.2.0/24", "192.0.2.128/25", "10.0.0.0/8"}, {"10.0.0.0/9", "10.128.0.0/9"}, {"127.0.0.0/8"}, {"255.255.255.255/32", "0.0.0.0/32"}}
	v6 := [][]string{{"::/0"}, {"fd02::/64"}, {}, {"fd02::/64", "fd02::8000/113", "fd00::/16"}, {"::/127"}, {"fd00::/9", "fd80::/9"}, {"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"}}
	for i := range v4 {
		for j := range v4 {
			shapes = append(shapes, [2][]string{v4[i], v6[i]}, [2][]string{v4[j], v6[j]})
		}
	}
	for _, shape := range shapes {
		for f := range model.Families {
			st.All.Family[f].NodePorts.Prefixes = prefixes(shape[f]...)
			st.All.Family[f].ServiceCIDRs = prefixes(shape[f]...)
		}
		if _, err := p.Sync(st); err != nil {
			t.Fatalf("%v: %v", shape, err)
		}
		if r, err := p.Sync(st); err != nil || r != (Report{}) {
			t.Fatalf("%v, again: %+v, %v", shape, r, err)
		}
	}
}

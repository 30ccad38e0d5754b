package cni

import (
	"os"
	"testing"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// The sample that an iptables has made is what is made here: of the one that this machine has.
func TestRulesAreThoseOfIPTables(t *testing.T) {
	needRoot(t)
	for name, v6 := range map[string]bool{"iptables": false, "ip6tables": true} {
		if _, err := identify(name); err != nil {
			t.Skip(err)
		}
		if err := compareSample(name, v6); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

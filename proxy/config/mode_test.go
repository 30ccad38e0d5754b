package config

import (
	"strings"
	"testing"
)

// What is for mode iptables has an effect there, and is told of elsewhere.
func TestIPTablesSettings(t *testing.T) {
	for _, tc := range []struct {
		args     []string
		loopback bool
		unused   string
	}{
		{[]string{"--proxy-mode", "iptables"}, true, ""},
		{[]string{"--proxy-mode", "iptables", "--iptables-localhost-nodeports=false", "--iptables-masquerade-bit", "15"}, false, ""},
		{nil, false, ""},
		{[]string{"--proxy-mode", "nftables", "--iptables-localhost-nodeports=false"}, false, "iptables.localhostNodePorts"},
		{[]string{"--iptables-masquerade-bit", "15"}, false, "iptables.masqueradeBit"},
	} {
		c := mustLoad(t, tc.args...)
		if m := c.Model("n", true, true); m.LoopbackNodePorts != tc.loopback {
			t.Errorf("%q: loopback %v", tc.args, m.LoopbackNodePorts)
		}
		if got := strings.Join(c.Unused(), "\n"); got == "" != (tc.unused == "") || !strings.Contains(got, tc.unused) {
			t.Errorf("%q: unused %q", tc.args, got)
		}
	}
}

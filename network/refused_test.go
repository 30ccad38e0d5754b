package network

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// A plugin that cannot read its configuration refuses DEL as it did ADD: what the others of the chain have made is released, and
// nothing is owed.
func TestRefusedConfigurationIsNotOwed(t *testing.T) {
	needRoot(t)
	leases := t.TempDir()
	conf := func(subnet, rate string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"a","plugins":[
			{"type":"bridge","bridge":"b0","isGateway":true,"ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":%q}]]}},
			{"type":"bandwidth","ingressRate":%s}]}`, leases, subnet, rate)
	}
	for name, tc := range map[string]struct {
		conf, refused, why string
		refuses            bool
	}{
		"addresses":               {conf("10.68.0.0/99", "0"), "host-local", `plugin type="bridge" failed (add): invalid CIDR address: 10.68.0.0/99 (code 999)`, true},
		"the second of the chain": {conf("10.68.0.0/24", `"x"`), "bandwidth", `plugin type="bandwidth" failed (add): `, true},
		// It may be that an earlier version took it.
		"addresses, not known of at ADD": {conf("10.68.0.0/99", "0"), "host-local", "10.68.0.0/99", false},
	} {
		t.Run(name, func(t *testing.T) {
			host := newLinks(t)
			n := newNode(t)
			m := n.open()
			p := n.pod()
			p.Conflist = []byte(tc.conf)
			var err error
			host.do(func() error {
				_, err = m.Setup(t.Context(), p)
				return nil
			})
			if err == nil || !strings.Contains(err.Error(), tc.why) || strings.Count(err.Error(), "(code ") != 1 {
				t.Fatalf("ADD: %v", err)
			}
			if !tc.refuses {
				c, err := parseConflist(p.Conflist, nil)
				if err == nil {
					err = m.intend(p, c)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			later := n.open() // another daemon
			host.do(func() error {
				err = later.Teardown(t.Context(), p)
				return nil
			})
			if (err == nil) != tc.refuses {
				t.Fatalf("DEL: %v", err)
			}
			if err != nil {
				return
			}
			if log := n.daemonLog.String(); strings.Count(log, "refuses its configuration") != 1 || !strings.Contains(log, "plugin="+tc.refused+" pod="+p.ID) {
				t.Errorf("log: %s", log)
			}
			n.same(n.intents(), p.ID+doneSuffix)
			links{t, p.NetNS}.do(func() error {
				if _, err := netlink.LinkByName(IfName); err == nil {
					t.Error("the interface is left")
				}
				return nil
			})
			left, err := filepath.Glob(leases + "/a/10.*")
			if err != nil || len(left) > 0 {
				t.Errorf("addresses are left: %v, %v", left, err)
			}
			if _, err := os.Stat(leases + "/a"); tc.refused == "bandwidth" && err != nil {
				t.Errorf("no address was given: %v", err)
			}
		})
	}
}

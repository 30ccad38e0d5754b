package cni_test

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/network"
	"github.com/berth-run/berth/network/cni"
)

func (g generator) firewall() object {
	o := object{"type": "firewall"}
	g.may(o, 2, "backend", "iptables", "iptables", "iptables", "", "other", "firewalld", 1)
	g.may(o, 3, "iptablesAdminChainName", "DOCKER-USER", "DOCKER-USER", "a234567890-234567890-2345678", 5)
	g.may(o, 2, "ingressPolicy", "open", "same-bridge", "same-bridge", "isolated", "isolated", "other", "", 7)
	g.may(o, 8, "firewalldZone", "public", true)
	return o
}

// wrongChain are names that iptables may refuse. The reference tells so for a family that it picks at random.
func (g generator) wrongChain() string {
	return pick(g, "ADMIN", "a b", "-x", "CNI-FORWARD", "FORWARD", "ACCEPT", "LOG", "a234567890-234567890-23456789")
}

// attachment is a plugin whose pods have addresses of one family, of both, several of one, or none.
func (g generator) attachment() object {
	ranges := pick(g, []any{[]object{{"subnet": "10.88.0.0/24"}}}, []any{[]object{{"subnet": "fd00:88::/64"}}},
		[]any{[]object{{"subnet": "10.88.0.0/24"}}, []object{{"subnet": "fd00:88::/64"}}}, []any{[]object{{"subnet": "10.88.0.0/24"}}, []object{{"subnet": "10.89.0.0/24"}}})
	o := object{"type": pick(g, "bridge", "bridge", "ptp"), "bridge": pick(g, "br0", "br0", "a-bridge.with123", "br+", "b r"), "ipam": object{"type": "host-local", "dataDir": "DIR/ipam", "ranges": ranges}}
	if g.seldom(10) {
		return object{"type": "bridge", "bridge": "br0"}
	}
	g.may(o, 3, "ipMasq", true)
	return o
}

func (g generator) firewallCalls() []step {
	return pick(g,
		[]step{{do: "ADD"}, {do: "CHECK"}, {do: "DEL"}, {do: "DEL"}, {do: "CHECK"}},
		[]step{{do: "ADD"}, {do: "ADD"}, {do: "CHECK"}, {do: "DEL"}},
		[]step{{do: "filter has its own"}, {do: "ADD"}, {do: "ADD", pod: 1}, {do: "CHECK"}, {do: "DEL", pod: 1}, {do: "ADD", pod: 2}, {do: "DEL"}, {do: "DEL", pod: 2}},
		[]step{{do: "ADD"}, {do: "lose"}, {do: "DEL"}, {do: "ADD", pod: 1}, {do: "DEL", pod: 1}},
		[]step{{do: "ADD"}, {do: "DEL", noNetNS: true}, {do: "DEL"}},
		[]step{{do: "ADD", noNetNS: true}, {do: "STATUS"}, {do: "VERSION"}, {do: "ADD"}, {do: "ADD", pod: 1}, {do: "GC"}, {do: "DEL"}},
		[]step{{do: "DEL"}, {do: "ADD"}, {do: "pods' rules go"}, {do: "CHECK"}, {do: "DEL"}, {do: "ADD"}, {do: "CHECK"}},
		[]step{{do: "ADD"}, {do: pick(g, "IPv4 filter is empty", "IPv6 filter is empty")}, {do: "CHECK"}, {do: "ADD", pod: 1}, {do: "CHECK", pod: 1}, {do: "DEL"}, {do: "DEL", pod: 1}},
	)
}

func TestFirewallIsTheReferences(t *testing.T) {
	differential(t, 20, func(g generator) scenario {
		plugins := []object{g.attachment(), g.firewall()}
		if g.seldom(6) {
			one := []any{[]object{{"subnet": pick(g, "10.88.0.0/24", "fd00:88::/64")}}}
			plugins[0]["ipam"] = object{"type": "host-local", "dataDir": "DIR/ipam", "ranges": one}
			plugins[1]["iptablesAdminChainName"] = g.wrongChain()
		}
		switch g.IntN(7) {
		case 0:
			plugins = append(plugins, g.portmap())
		case 1:
			plugins = append(plugins[:1:1], g.portmap(), plugins[1])
		case 2:
			plugins = plugins[1:] // nothing before it
		case 3:
			plugins = append(plugins, g.firewall()) // for which much is there already
		}
		return scenario{conf: g.list(plugins...), caps: object{"portMappings": g.portMappings()}, steps: g.firewallCalls()}
	})
}

// Without iptables the reference refuses ADD and DEL.
func TestFirewallWithoutIPTables(t *testing.T) {
	ref, ours, exec := both(t)
	t.Setenv("PATH", "/nonexistent")
	cni.ForgetIPTables()
	t.Cleanup(cni.ForgetIPTables)
	for _, backend := range []string{"", "iptables"} {
		compare(t, ref, ours, scenario{
			name:  "backend " + backend,
			conf:  fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","bridge":"br0","ipam":{"type":"static","addresses":[{"address":"10.88.0.5/24"}]}},{"type":"firewall","backend":%q}]}`, backend),
			steps: []step{{do: "ADD"}, {do: "DEL"}},
		})
	}
	if exec.programs > 0 {
		t.Errorf("%d calls were left to programs", exec.programs)
	}
}

// What the rules are for: on a node that forwards nothing by itself, pods of two bridges reach each other, or do not.
func TestFirewallLetsThrough(t *testing.T) {
	for policy, reached := range map[string]bool{"open": true, "same-bridge": false, "isolated": false} {
		t.Run(policy, func(t *testing.T) {
			_, w, exec := both(t)
			conf := func(n int) scenario {
				return scenario{conf: fmt.Sprintf(`{"cniVersion":"1.0.0","name":"net%[1]d","plugins":[{"type":"bridge","bridge":"br%[1]d","isGateway":true,
"ipam":{"type":"host-local","dataDir":"DIR/ipam","ranges":[[{"subnet":"10.88.%[1]d.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},{"type":"firewall","ingressPolicy":%[2]q}]}`, n, policy)}
			}
			call := func(do string, n int) {
				t.Helper()
				if out := w.run(conf(n), step{do: do, pod: n}); strings.HasPrefix(out, "error") {
					t.Fatalf("%s: %s", do, out)
				}
			}
			call("filter has its own", 0)
			call("ADD", 0)
			call("ADD", 1)
			if err := w.connect(0, 1, "10.88.1.2"); (err == nil) != reached {
				t.Errorf("from pod to pod: %v", err)
			}
			call("DEL", 0)
			call("ADD", 2)
			if err := w.connect(2, 1, "10.88.1.2"); (err == nil) != reached {
				t.Errorf("from the next pod to that pod: %v", err)
			}
			if exec.programs > 0 {
				t.Errorf("%d calls were left to programs", exec.programs)
			}
		})
	}
}

// connect connects from one pod to another, which listens.
func (w *world) connect(from, to int, addr string) error {
	var l net.Listener
	if err := network.InNamespaces([]string{w.pod(to)}, func() (err error) {
		l, err = net.Listen("tcp4", addr+":8080")
		return err
	}); err != nil {
		w.t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test
	return network.InNamespaces([]string{w.pod(from)}, func() error {
		c, err := net.DialTimeout("tcp4", addr+":8080", time.Second)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

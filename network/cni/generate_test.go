package cni_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// object is one of JSON.
type object = map[string]any

// generator makes configurations, valid and not.
type generator struct{ *rand.Rand }

func pick[T any](g generator, from ...T) T { return from[g.IntN(len(from))] }

// seldom is true once in n.
func (g generator) seldom(n int) bool { return g.IntN(n) == 0 }

// may sets a field once in n.
func (g generator) may(o object, n int, name string, values ...any) {
	if g.seldom(n) {
		o[name] = pick(g, values...)
	}
}

func (g generator) hostLocal() object {
	o := object{"type": "host-local", "dataDir": "DIR/ipam"}
	v4, v6 := []object{{"subnet": "10.88.0.0/24"}}, []object{{"subnet": "fd00:88::/64"}}
	switch g.IntN(16) {
	case 0, 1, 2:
		o["ranges"] = []any{v4}
	case 3, 4:
		o["ranges"] = []any{v6}
	case 5, 6, 7, 8:
		o["ranges"] = []any{v4, v6}
	case 9:
		o["subnet"], o["rangeStart"], o["rangeEnd"], o["gateway"] = "10.88.0.0/24", "10.88.0.10", "10.88.0.12", pick(g, "10.88.0.254", "10.88.0.11", "10.99.0.1")
	case 10:
		o["ranges"] = []any{[]object{{"subnet": pick(g, "10.88.0.0/30", "10.88.0.0/29", "fd00:88::/126", "10.88.0.0/31", "10.88.0.0/32")}}}
	case 11:
		o["ranges"] = []any{[]object{{"subnet": "10.88.0.0/29"}, {"subnet": "10.88.1.0/29"}}, v6}
	case 12:
		o["ranges"] = []any{v4, []object{{"subnet": pick(g, "10.88.0.128/25", "10.88.1.0/24", "10.88.0.5/24")}}}
	case 13:
		o["ranges"] = pick[any](g, []any{}, []any{[]any{}}, []any{append(append([]object{}, v4...), v6...)}, "no list")
	case 14:
		o["ranges"] = []any{[]object{{"subnet": "10.88.0.0/24", "rangeStart": pick(g, "10.88.0.20", "10.89.0.1", "x"), "rangeEnd": pick(g, "10.88.0.21", "10.88.0.19")}}}
	case 15:
		o["ranges"] = []any{[]object{{"subnet": "10.88.0.0/24", "gateway": "10.88.0.200"}}}
	}
	g.may(o, 2, "routes", []object{{"dst": "0.0.0.0/0"}}, []object{{"dst": "0.0.0.0/0"}, {"dst": "::/0"}}, []object{{"dst": "10.77.0.0/16", "gw": "10.88.0.1"}},
		[]object{{"dst": "10.77.0.0/16", "priority": 50, "table": 100, "scope": 0}}, []object{{"dst": "10.77.0.0/16", "gw": "10.1.2.3"}}, []object{{"dst": "::/0", "gw": "fd00:88::1", "mtu": 1400}})
	g.may(o, 8, "resolvConf", "DIR/ipam/../resolv", "/nonexistent/resolv.conf", "/etc/resolv.conf")
	return o
}

func (g generator) bridge() object {
	o := object{"type": "bridge", "bridge": "br0"}
	if !g.seldom(6) {
		o["ipam"] = g.hostLocal()
	} else if g.seldom(4) {
		o["ipam"] = object{"type": "no-such-plugin"}
	}
	for _, f := range []string{"isGateway", "isDefaultGateway", "ipMasq", "hairpinMode", "forceAddress"} {
		g.may(o, 2, f, true)
	}
	for _, f := range []string{"promiscMode", "preserveDefaultVlan", "macspoofchk", "enabledad", "disableContainerInterface", "portIsolation"} {
		g.may(o, 9, f, true)
	}
	g.may(o, 8, "ipMasqBackend", "iptables", "nftables", "other")
	g.may(o, 4, "mtu", 1400, 9000, 0, 60, 70000, "1400")
	g.may(o, 8, "vlan", 100, 4094, 4095, -1)
	g.may(o, 8, "vlanTrunk", []object{{"minID": 200, "maxID": 203}}, []object{{"id": 7}, {"minID": 10, "maxID": 11}}, []object{{"minID": 5}}, []object{{"maxID": 5}},
		[]object{{"minID": 9, "maxID": 5}}, []object{{"minID": 0, "maxID": 5}}, []object{{"minID": 1, "maxID": 5000}}, []object{{"id": 4095}}, []object{})
	g.may(o, 10, "dns", object{"nameservers": []string{"10.96.0.10"}, "search": []string{"svc"}, "domain": "d"}, object{"options": []string{}})
	g.may(o, 10, "args", object{"cni": object{"mac": "00:11:22:33:44:66"}}, object{"cni": object{"mac": "nonsense"}}, object{"cni": object{"ips": []string{"10.88.0.50"}}}, object{"cni": object{"ips": []string{"10.99.0.50"}}})
	if g.seldom(8) {
		o["capabilities"] = object{"mac": true, "ips": true, "ipRanges": true}
	}
	return o
}

func (g generator) portmap() object {
	o := object{"type": "portmap", "capabilities": object{"portMappings": true}}
	g.may(o, 5, "snat", true, false)
	g.may(o, 6, "masqAll", true)
	g.may(o, 8, "markMasqBit", 0, 5, 31, 32, -1)
	g.may(o, 4, "backend", "iptables", "nftables", "nftables", "nftables", "other")
	g.may(o, 12, "conditionsV4", []string{"-i", "br0"}, []string{"!", "-d", "192.0.2.0/24"}, []string{"iif", "br0"}, []string{})
	g.may(o, 12, "externalSetMarkChain", "OTHER-MARK")
	return o
}

func (g generator) portMappings() []object {
	var all []object
	for range g.IntN(4) {
		m := object{"hostPort": 8000 + g.IntN(100), "containerPort": 1 + g.IntN(9000), "protocol": pick(g, "tcp", "tcp", "tcp", "udp", "udp", "sctp")}
		g.may(m, 3, "hostIP", "127.0.0.1", "192.0.2.1", "0.0.0.0", "::1", "2001:db8::1", "::", "nonsense")
		g.may(m, 20, "hostPort", 0, -1, 70000)
		g.may(m, 20, "containerPort", 0, 65536)
		g.may(m, 20, "protocol", "icmp", "TCP", "")
		all = append(all, m)
	}
	if g.seldom(6) {
		for i := range 20 { // more than multiport takes at once
			all = append(all, object{"hostPort": 9000 + i, "containerPort": 80 + i, "protocol": "tcp"})
		}
	}
	return all
}

func (g generator) limits() object {
	o := object{}
	for _, way := range []string{"ingress", "egress"} {
		if g.seldom(3) {
			continue
		}
		o[way+"Rate"], o[way+"Burst"] = pick(g, 8, 1000000, 80000000, uint64(1)<<40), pick(g, 8, 80000, 2147483647, uint64(1)<<35)
		g.may(o, 10, way+"Rate", 0, -1, "fast")
		g.may(o, 10, way+"Burst", 0, uint64(1)<<36)
	}
	return o
}

func (g generator) bandwidth() object {
	o := object{"type": "bandwidth", "capabilities": object{"bandwidth": true}}
	if g.seldom(3) {
		for k, v := range g.limits() {
			o[k] = v
		}
	}
	return o
}

func (g generator) tuning() object {
	o := object{"type": "tuning", "dataDir": "DIR/tuning", "capabilities": object{"mac": true}}
	g.may(o, 2, "sysctl", object{"net.ipv4.conf.IFNAME.arp_filter": "1"}, object{"net.core.somaxconn": "500", "net/ipv4/conf/all/log_martians": "1"},
		object{"kernel.hostname": "x"}, object{"net.no.such": "1"}, object{"net.core.somaxconn": "nonsense"}, object{"net.../../kernel.hostname": "x"}, object{}, "text")
	g.may(o, 3, "mac", "00:11:22:33:44:88", "nonsense", "01:00:00:00:00:00")
	g.may(o, 4, "promisc", true)
	g.may(o, 3, "mtu", 1400, 9000, 60, -1)
	g.may(o, 4, "txQLen", 500, 0, -1)
	g.may(o, 4, "allmulti", true, false)
	g.may(o, 6, "args", object{"cni": object{"mac": "00:11:22:33:44:99", "mtu": 1300, "promisc": true}}, object{"cni": object{"txQLen": 77, "allmulti": true}})
	return o
}

func (g generator) static() object {
	o := object{"type": "static"}
	g.may(o, 1, "addresses", []object{{"address": "10.88.0.5/24", "gateway": "10.88.0.1"}}, []object{{"address": "10.88.0.5/24"}, {"address": "fd00:88::5/64", "gateway": "fd00:88::1"}},
		[]object{{"address": "10.88.0.5"}}, []object{{"address": "10.88.0.5/24", "gateway": "10.88.0.1"}, {"address": "10.88.1.5/24", "gateway": "10.88.1.1"}}, []object{}, []object{{"address": "nonsense"}}, []object{{"address": "::ffff:10.88.0.9/120"}})
	g.may(o, 2, "routes", []object{{"dst": "0.0.0.0/0"}}, []object{{"dst": "::/0"}})
	g.may(o, 4, "dns", object{"nameservers": []string{"10.96.0.10"}})
	return o
}

func (g generator) ptp() object {
	o := object{"type": "ptp", "ipam": pick(g, g.hostLocal(), g.hostLocal(), g.static())}
	g.may(o, 2, "ipMasq", true)
	g.may(o, 8, "ipMasqBackend", "iptables", "nftables", "other")
	g.may(o, 4, "mtu", 1400, 60, "1400")
	g.may(o, 8, "dns", object{"nameservers": []string{"10.96.0.10"}}, object{"options": []string{}})
	g.may(o, 8, "capabilities", object{"ips": true})
	return o
}

func (g generator) list(plugins ...object) string {
	data, err := json.Marshal(object{"cniVersion": pick(g, "0.3.1", "0.4.0", "1.0.0", "1.0.0", "1.1.0", "1.1.0"), "name": "net", "plugins": plugins})
	if err != nil {
		panic(err)
	}
	return string(data)
}

func (g generator) capabilities() object {
	caps := object{}
	if !g.seldom(4) {
		caps["portMappings"] = g.portMappings()
	}
	g.may(caps, 6, "mac", "00:11:22:33:44:55", "nonsense")
	g.may(caps, 6, "ips", []string{"10.88.0.60"}, []string{"10.88.0.60/24", "fd00:88::60"}, []string{"10.88.0.1"}, []string{"10.88.0.61", "fd00:88::61"})
	g.may(caps, 8, "ipRanges", []any{[]object{{"subnet": "10.87.0.0/24"}}})
	return caps
}

func (g generator) args() [][2]string {
	return pick(g, nil, nil, nil, nil, [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAME", "web"}}, [][2]string{{"K8S_POD_NAME", "web"}},
		[][2]string{{"IgnoreUnknown", "1"}, {"IP", "10.88.0.70"}}, [][2]string{{"IgnoreUnknown", "1"}, {"MAC", "00:11:22:33:44:77"}}, [][2]string{{"IP", "nonsense"}})
}

// calls are what is done with a configuration.
func (g generator) calls() []step {
	return pick(g,
		[]step{{do: "ADD"}, {do: "CHECK"}, {do: "DEL"}, {do: "DEL"}},
		[]step{{do: "ADD"}, {do: "ADD"}, {do: "CHECK"}, {do: "DEL"}, {do: "CHECK"}},
		[]step{{do: "ADD"}, {do: "ADD", pod: 1}, {do: "ADD", pod: 2}, {do: "DEL", pod: 1}, {do: "ADD", pod: 3}, {do: "CHECK", pod: 2}, {do: "DEL"}, {do: "DEL", pod: 2}, {do: "DEL", pod: 3}},
		[]step{{do: "ADD"}, {do: "lose"}, {do: "DEL"}, {do: "ADD", pod: 1}, {do: "DEL", pod: 1}},
		[]step{{do: "ADD"}, {do: "DEL", noNetNS: true}, {do: "DEL"}},
		[]step{{do: "DEL"}, {do: "ADD"}, {do: "eth0 goes"}, {do: "CHECK"}, {do: "DEL"}},
		[]step{{do: "ADD", noNetNS: true}, {do: "STATUS"}, {do: "VERSION"}, {do: "ADD"}, {do: "ADD", pod: 1}, {do: "GC"}, {do: "DEL"}},
		[]step{{do: "bridge address"}, {do: "ADD"}, {do: "DEL"}},
		[]step{{do: "bridge is a dummy"}, {do: "ADD"}, {do: "DEL"}},
		[]step{{do: "eth0 is there"}, {do: "ADD"}, {do: "DEL"}},
		[]step{{do: "old lease"}, {do: "ADD"}, {do: "CHECK"}, {do: "DEL"}},
		[]step{{do: "ADD"}, {do: "torn last_reserved_ip"}, {do: "ADD", pod: 1}, {do: "leases go"}, {do: "CHECK"}, {do: "DEL"}, {do: "DEL", pod: 1}},
	)
}

// configurations is how many are generated for a test, and where to begin.
func configurations(t *testing.T, n int) (from, to int) {
	t.Helper()
	for name, into := range map[string]*int{"BERTH_CNI_CONFIGS": &n, "BERTH_CNI_SEED": &from} {
		if v := os.Getenv(name); v != "" {
			var err error
			if *into, err = strconv.Atoi(v); err != nil {
				t.Fatal(err)
			}
		}
	}
	return from, from + n
}

// differential compares generated scenarios.
func differential(t *testing.T, n int, generate func(generator) scenario) {
	t.Helper()
	from, to := configurations(t, n)
	for seed := from; seed < to; seed++ {
		t.Run(strconv.Itoa(seed), func(t *testing.T) {
			s := generate(generator{rand.New(rand.NewPCG(uint64(seed), 0))})
			s.name = fmt.Sprintf("seed %d", seed)
			ref, ours, _ := both(t)
			compare(t, ref, ours, s)
		})
	}
}

func TestLoopbackIsTheReferences(t *testing.T) {
	differential(t, 6, func(g generator) scenario {
		return scenario{conf: g.list(object{"type": "loopback"}), args: g.args(), steps: pick(g,
			[]step{{do: "ADD"}, {do: "CHECK"}, {do: "DEL"}, {do: "CHECK"}, {do: "ADD"}},
			[]step{{do: "ADD"}, {do: "lose"}, {do: "DEL"}, {do: "CHECK"}},
			[]step{{do: "ADD", noNetNS: true}, {do: "DEL", noNetNS: true}, {do: "STATUS"}, {do: "VERSION"}, {do: "GC"}},
		)}
	})
}

func TestBridgeIsTheReferences(t *testing.T) {
	differential(t, 25, func(g generator) scenario {
		return scenario{conf: g.list(g.bridge()), caps: g.capabilities(), args: g.args(), steps: g.calls()}
	})
}

func TestBandwidthIsTheReferences(t *testing.T) {
	differential(t, 12, func(g generator) scenario {
		first := object{"type": "bridge", "bridge": "br0", "mtu": pick(g, 0, 1400), "ipam": g.hostLocal()}
		return scenario{conf: g.list(first, g.bandwidth()), caps: object{"bandwidth": g.limits()}, steps: g.calls()}
	})
}

func TestTuningIsTheReferences(t *testing.T) {
	differential(t, 12, func(g generator) scenario {
		first := object{"type": "bridge", "bridge": "br0", "ipam": g.hostLocal()}
		return scenario{conf: g.list(first, g.tuning()), caps: g.capabilities(), args: g.args(), steps: g.calls()}
	})
}

func TestPtpIsTheReferences(t *testing.T) {
	differential(t, 15, func(g generator) scenario {
		return scenario{conf: g.list(g.ptp()), caps: g.capabilities(), args: g.args(), steps: g.calls()}
	})
}

func TestStaticIsTheReferences(t *testing.T) {
	differential(t, 12, func(g generator) scenario {
		first := object{"type": "bridge", "bridge": "br0", "isGateway": g.seldom(2), "ipam": g.static(), "capabilities": object{"ips": true}}
		args := pick(g, g.args(), [][2]string{{"IgnoreUnknown", "1"}, {"IP", "10.88.0.70/24, fd00:88::70/64"}, {"GATEWAY", "10.88.0.1"}}, [][2]string{{"GATEWAY", "x"}})
		return scenario{conf: g.list(first), caps: g.capabilities(), args: args, steps: g.calls()}
	})
}

// Of two faults in a configuration the reference's first is told.
func TestFirstFaultIsTheReferences(t *testing.T) {
	ref, ours, _ := both(t)
	for _, more := range []string{`"backend":"nftables","externalSetMarkChain":"X"`, `"backend":"other"`, `"conditionsV4":["a","b"],"backend":"nftables"`} {
		compare(t, ref, ours, scenario{
			name: more, conf: `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"portmap","capabilities":{"portMappings":true},` + more + `}]}`,
			caps: object{"portMappings": []object{{"hostPort": 80, "containerPort": 0, "protocol": "tcp"}}}, steps: []step{{do: "DEL"}},
		})
	}
}

func TestPortmapIsTheReferences(t *testing.T) {
	differential(t, 25, func(g generator) scenario {
		first := object{"type": "bridge", "bridge": "br0", "isGateway": true, "ipMasq": g.seldom(2), "ipam": g.hostLocal()}
		g.may(first, 4, "ipMasqBackend", "nftables")
		return scenario{conf: g.list(first, g.portmap()), caps: object{"portMappings": g.portMappings()}, steps: g.calls()}
	})
}

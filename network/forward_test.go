package network

import (
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// iptablesOf are the programs of iptables that this machine has, with and without nf_tables.
func iptablesOf(t *testing.T, ns string) (all [][2]string) {
	t.Helper()
	for _, kind := range []string{"-nft", "-legacy"} {
		pair := [2]string{"iptables" + kind, "ip6tables" + kind}
		ok := true
		for _, program := range pair {
			_ = InNamespaces([]string{ns}, func() error {
				if exec.Command(program, "-S").Run() != nil {
					ok = false
				}
				return nil
			})
		}
		if ok {
			all = append(all, pair)
		}
	}
	return all
}

// A node with Docker drops what is forwarded, unless a rule lets it through: pods of the default network were not reached, nor
// got out. What the node's operator drops by a rule stays dropped.
func TestDefaultNetworkWhereForwardingIsDropped(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	const (
		port, hostPort = 8080, 18080
		range4, range6 = "10.89.9.0/24", "fd89:9::/64"
	)
	programs := iptablesOf(t, newLinks(t).ns)
	if len(programs) == 0 {
		t.Skip("needs iptables")
	}
	for _, program := range programs {
		t.Run(program[0], func(t *testing.T) {
			host, outside := wired(t, 1400)
			run := func(args ...string) string {
				var out []byte
				host.do(func() (err error) {
					if out, err = exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
						t.Errorf("%v: %v: %s", args, err, out)
					}
					return nil
				})
				return string(out)
			}
			for _, family := range program {
				// As Docker has it: chains of its own first, which let through and drop what is its own.
				for _, args := range []string{
					"-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -p tcp --dport 8081 -j DROP", "-A FORWARD -j DOCKER-USER", "-A FORWARD -o docker0 -j DROP",
				} {
					run(append([]string{family}, strings.Fields(args)...)...)
				}
			}
			n := newNode(t)
			n.bin = bin
			m := n.open()
			if err := m.Close(); err != nil { // the watch would look at this machine's firewall
				t.Fatal(err)
			}
			p := n.pod()
			p.PortMappings = []PortMapping{{Protocol: "tcp", ContainerPort: port, HostPort: hostPort}}
			var ip4, ip6 string
			host.do(func() (err error) {
				m.SetPodCIDRs(range4 + "," + range6)
				if p.Conflist, err = m.Conflist(); err != nil {
					return err
				}
				res, err := m.Setup(t.Context(), p)
				if err == nil {
					ip4, ip6 = res.IPs[0].String(), res.IPs[1].String()
				}
				return err
			})
			for cidr, gw := range map[string]string{range4: "192.168.99.1", range6: "fd99::1"} {
				_, dst, _ := net.ParseCIDR(cidr)
				outside.route(netlink.Route{Dst: dst, Gw: net.ParseIP(gw)}) // another node, say
			}
			for _, at := range []int{port, port + 1} {
				serve(t, p.NetNS, at)
			}
			serve(t, outside.ns, port)
			tries := map[string]struct {
				from, to string
				port     int
			}{
				"in":              {outside.ns, ip4, port},
				"in, IPv6":        {outside.ns, ip6, port},
				"out":             {p.NetNS, "192.168.99.2", port},
				"out, IPv6":       {p.NetNS, "fd99::2", port},
				"host port":       {outside.ns, "192.168.99.1", hostPort},
				"host port, IPv6": {outside.ns, "fd99::1", hostPort},
			}
			if got, err := askWithin(time.Second, outside.ns, ip4, port); err == nil {
				t.Errorf("the policy drops nothing: %q", got)
			}
			host.do(func() error {
				m.letThrough(true)
				return nil
			})
			for what, try := range tries {
				if got, err := ask(try.from, try.to, try.port); err != nil {
					t.Errorf("%s: %q, %v", what, got, err)
				}
			}
			if got, err := askWithin(time.Second, outside.ns, ip4, port+1); err == nil {
				t.Errorf("what the operator drops comes through: %q", got)
			}
			if log := n.daemonLog.String(); strings.Count(log, "let through what is for pods") != 1 || !strings.Contains(log, range4+","+range6) {
				t.Errorf("log: %s", log)
			}
			before := run(program[0], "-S")
			host.do(func() error {
				m.letThrough(true)
				return nil
			})
			if after := run(program[0], "-S"); after != before || strings.Count(after, "-s "+range4) != 1 {
				t.Errorf("twice: %s\nbefore: %s", after, before)
			}
			// Whatever takes them away, they come again.
			run(program[0], "-F", "FORWARD")
			host.do(func() error {
				m.letThrough(true)
				return nil
			})
			if got, err := ask(outside.ns, ip4, port); err != nil {
				t.Errorf("after a flush: %q, %v", got, err)
			}
			if after := run(program[0], "-S"); strings.Count(after, "-s "+range4) != 1 {
				t.Errorf("after a flush: %s", after)
			}
			host.do(func() error { return m.Teardown(t.Context(), p) })
		})
	}
}

// Without the policy nothing is made, nor a table.
func TestFirewallThatForwardsIsLeftAlone(t *testing.T) {
	needRoot(t)
	host := newLinks(t)
	n := bare(t)
	m := n.open()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	rules := func() (out []byte) {
		host.do(func() (err error) {
			m.letThrough(true)
			out, err = exec.Command("nft", "list", "ruleset").Output()
			return err
		})
		return out
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip("needs nft")
	}
	host.do(func() error {
		m.SetPodCIDRs(someCIDR)
		return m.Ready()
	})
	if got := rules(); len(got) > 0 {
		t.Errorf("%s", got)
	}
	host.do(func() error { return exec.Command("iptables-nft", "-A", "FORWARD", "-i", "x", "-j", "DROP").Run() })
	if got := rules(); strings.Contains(string(got), "BERTH") {
		t.Errorf("%s", got)
	}
	if log := n.daemonLog.String(); strings.Contains(log, "firewall") {
		t.Errorf("log: %s", log)
	}
}

package network

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const somePort = 18080

var somePorts = []PortMapping{
	{Protocol: "tcp", ContainerPort: 8080, HostPort: somePort}, {Protocol: "udp", ContainerPort: 8080, HostPort: somePort},
}

// answers says who answers at the node's port, from outside.
func (n *portNode) answers(t *testing.T, want string) {
	t.Helper()
	for _, to := range []string{nodeAddr4, nodeAddr6} {
		patience := soon
		if want == "" {
			patience = not
		}
		if got, _, _ := strings.Cut(newSender(t, n.outside.ns, to, somePort).ask(patience), " "); got != want {
			t.Errorf("at %s %q answers, want %q", to, got, want)
		}
	}
}

func (n *portNode) named(t *testing.T, name string) Connected {
	t.Helper()
	p := n.setUp(t, somePorts...)
	serveUDP(t, p.NetNS, name, ":8080")
	return p
}

// containernetworking/plugins#683, #512: rules of a pod whose DEL was lost stayed before those of the next pod that has the port.
func TestLostDELAndThePortIsTheNextPods(t *testing.T) {
	n := newPortNode(t, byTable)
	lost := n.named(t, "lost")
	n.answers(t, "lost")
	if err := Unpin(lost.NetNS); err != nil { // the node's daemon is killed, and the pod's record is lost
		t.Fatal(err)
	}
	n.restart(t, byTable)
	if left := n.nft(t, "list", "tables"); strings.Contains(left, "berth-hostports") {
		t.Errorf("left: %s", left)
	}
	next := n.named(t, "next")
	n.answers(t, "next")

	// The same with a daemon that has not noticed.
	n.m.claims.Free(next.ID)
	third := n.named(t, "third")
	n.answers(t, "third")
	n.tearDown(t, next)
	n.answers(t, "third")
	n.tearDown(t, third)
	n.answers(t, "")
}

// A daemon that takes over finds the ports as they were, those of pods that are being torn down excepted.
func TestHostPortsAfterARestart(t *testing.T) {
	n := newPortNode(t, byTable)
	stays := n.named(t, "stays")
	gone := n.setUp(t, PortMapping{Protocol: "tcp", ContainerPort: 8080, HostPort: somePort + 1})
	gone.IPs = nil
	before := n.nft(t, "list", "map", "inet", n.m.table.Name(), "ports-ipv4")
	n.restart(t, byTable, stays, gone)
	n.answers(t, "stays")
	after := n.nft(t, "list", "map", "inet", n.m.table.Name(), "ports-ipv4")
	if !strings.Contains(before, fmt.Sprint(somePort+1)) || strings.Contains(after, fmt.Sprint(somePort+1)) {
		t.Errorf("before %s, after %s", before, after)
	}
	for _, p := range []Connected{stays, gone} { // which has its port until the teardown has ended
		other := n.pod()
		other.ID, other.PortMappings = otherID, p.PortMappings
		if err := n.m.ClaimPorts(other); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "shop/"+p.Name) {
			t.Errorf("%v", err)
		}
	}
	n.tearDown(t, stays)
	n.tearDown(t, gone)
	other := n.setUp(t, append(somePorts, gone.PortMappings...)...)
	serveUDP(t, other.NetNS, "other", ":8080")
	n.answers(t, "other")
}

// rancher-archives/rke#3440, CVE-2025-54388: somebody reloads the firewall.
func TestHostPortsAreBackAfterAFlush(t *testing.T) {
	n := newPortNode(t, byTable)
	n.host.do(func() error { return n.m.adoptPorts(nil) })
	n.named(t, "pod")
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		_ = InNamespaces([]string{n.host.ns}, func() error { n.m.table.Watch(stop); return nil })
	}()
	end := sync.OnceFunc(func() { close(stop); <-done })
	defer end()
	n.answers(t, "pod")
	sent := newSender(t, n.outside.ns, nodeAddr4, somePort) // goes on while there is no rule
	sent.ask(soon)
	n.nft(t, "flush", "ruleset")
	sent.ask(0)
	start := time.Now()
	for !strings.HasPrefix(sent.ask(not), "pod") {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("not back: %s", n.nft(t, "list", "ruleset"))
		}
	}
	t.Logf("back after %v", time.Since(start))
	n.answers(t, "pod")
	end()
	if log := n.daemonLog.String(); !strings.Contains(log, "host ports of pods were changed by somebody else") {
		t.Errorf("log: %s", log)
	}
}

// A client of UDP keeps its port, and what the kernel knows of its packets stays as long as it sends: yet they go where the port
// leads now. What it knows of others stays.
func TestUDPGoesWhereThePortLeads(t *testing.T) {
	for name, table := range map[string]bool{"table": byTable, "portmap": byPlugin} {
		t.Run(name, func(t *testing.T) {
			n := newPortNode(t, table)
			n.setUp(t) // from here on the kernel tracks connections
			for _, to := range []string{nodeAddr4, nodeAddr6} {
				client := newSender(t, n.outside.ns, to, somePort)
				if got := client.ask(not); got != "" {
					t.Errorf("%q answers before there is a pod", got)
				}
				for _, who := range []string{"first", "second"} {
					p := n.named(t, who)
					if got := client.ask(soon); !strings.HasPrefix(got, who) {
						t.Errorf("%s: %q answers, want the %s pod", to, got, who)
					}
					n.tearDown(t, p)
				}
			}
			if table == byPlugin {
				return // which has the connections of others to that port forgotten, too
			}
			serveUDP(t, n.outside.ns, "far", fmt.Sprintf(":%d", somePort))
			through := n.setUp(t)
			if got := newSender(t, through.NetNS, farAddr4, somePort).ask(soon); !strings.HasPrefix(got, "far") {
				t.Fatalf("%q", got)
			}
			n.tearDown(t, n.named(t, "third"))
			n.host.do(func() error {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
				for _, f := range flows {
					if f.Forward.DstIP.String() == farAddr4 && f.Forward.DstPort == somePort {
						return nil
					}
				}
				return errors.Join(err, errors.New("a connection of a pod to the same port elsewhere is forgotten"))
			})
		})
	}
}

// Rules of a plugin whose DEL fails lead to where the pod was: nobody else gets the port meanwhile, nor after a restart.
func TestOwedPortsStayTaken(t *testing.T) {
	n, m, p, res := added(t)
	p.Conflist, p.PortMappings = res.Conflist, somePorts
	if err := m.ClaimPorts(p); err != nil {
		t.Fatal(err)
	}
	other := p
	other.ID, other.Name = otherID, "next"
	refused := func(m *Manager) {
		t.Helper()
		if err := m.ClaimPorts(other); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "TCP port 18080: pod shop/web-0 (0123456789ab) has") {
			t.Errorf("%v", err)
		}
	}
	refused(m)
	n.plugin("y", `echo '{"code":5,"msg":"disk"}'; exit 1`)
	m.owedFirst = time.Hour
	if err := m.Owe(p, errors.New("disk")); err != nil {
		t.Fatal(err)
	}
	m.FreePorts(p.ID) // the pod is forgotten
	refused(m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	tried := func(m *Manager) { // else it is under way yet when the directory is removed: Close does not wait for it
		t.Helper()
		eventually(t, "the teardown has been tried", func() bool { owed := m.Owed(); return len(owed) == 1 && owed[0].Tries > 0 })
	}
	again := n.open()
	refused(again)
	tried(again)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}

	// After a reboot no rule is left.
	owed := read(t, m.owedFile(p.ID))
	n.write(m.owedFile(p.ID), strings.Replace(owed, m.boot, "another", 1))
	rebooted := n.open()
	if err := rebooted.ClaimPorts(other); err != nil {
		t.Error(err)
	}
	tried(rebooted)
	if err := rebooted.Close(); err != nil {
		t.Fatal(err)
	}
	n.write(m.owedFile(p.ID), owed)

	again = n.open()
	n.plugin("y", good)
	again.owedFirst = time.Millisecond
	eventually(t, "the port is free", func() bool { return again.ClaimPorts(other) == nil })
	eventually(t, "nothing is owed any more", func() bool { return len(again.Owed()) == 0 })
}

// What the operator's portmap does is what it does anywhere.
func TestConfiguredPortmapMakesItsOwnRules(t *testing.T) {
	if _, err := exec.LookPath("iptables"); err != nil {
		t.Skip("no iptables")
	}
	n := newPortNode(t, byTable)
	n.write(n.conf+"/10-net.conflist", `{"cniVersion":"1.0.0","name":"net","plugins":[
		{"type":"bridge","bridge":"net0","isDefaultGateway":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"`+n.cache+`/x","ranges":[[{"subnet":"10.89.10.0/24"}]]}},
		{"type":"portmap","capabilities":{"portMappings":true}}]}`)
	n.host.do(func() (err error) {
		n.m.refresh()
		n.conflist, err = n.m.Conflist()
		return err
	})
	p := n.setUp(t, somePorts...)
	if rules := n.nft(t, "list", "ruleset"); strings.Contains(rules, "berth-hostports") || !strings.Contains(rules, "CNI-HOSTPORT-DNAT") {
		t.Errorf("rules: %s", rules)
	}
	n.tearDown(t, p)
}

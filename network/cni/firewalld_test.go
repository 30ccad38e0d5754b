package cni_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"

	"github.com/godbus/dbus/v5"
)

// zones is what firewalld keeps of sources, behind a bus of its own: here is no firewalld to run, but the bus is a real one.
type zones struct {
	mu    sync.Mutex
	of    map[string]string // the zone of each source
	calls []string
}

func (z *zones) call(method, zone, source string) *dbus.Error {
	z.calls = append(z.calls, fmt.Sprintf("%s %s %s", method, zone, source))
	if zone != "trusted" && zone != "public" {
		return dbus.NewError("org.fedoraproject.FirewallD1.Exception", []any{"INVALID_ZONE: " + zone})
	}
	return nil
}

func (z *zones) add(zone, source string) (string, *dbus.Error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if err := z.call("add", zone, source); err != nil {
		return "", err
	}
	switch was := z.of[source]; was {
	case "":
	case zone:
		return "", dbus.NewError("org.fedoraproject.FirewallD1.Exception", []any{"ZONE_ALREADY_SET: '" + source + "' already bound to '" + was + "'"})
	default:
		return "", dbus.NewError("org.fedoraproject.FirewallD1.Exception", []any{"ZONE_CONFLICT: '" + source + "' already bound to '" + was + "'"})
	}
	z.of[source] = zone
	return zone, nil
}

func (z *zones) remove(zone, source string) (string, *dbus.Error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if err := z.call("remove", zone, source); err != nil {
		return "", err
	}
	if z.of[source] != zone {
		return "", dbus.NewError("org.fedoraproject.FirewallD1.Exception", []any{"UNKNOWN_SOURCE: " + source})
	}
	delete(z.of, source)
	return zone, nil
}

func (z *zones) query(zone, source string) (bool, *dbus.Error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.of[source] == zone, z.call("query", zone, source)
}

// use has all calls be about these sources from here on.
func (z *zones) use(of map[string]string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.of = of
}

// take is what was called since.
func (z *zones) take() []string {
	z.mu.Lock()
	defer z.mu.Unlock()
	calls := z.calls
	z.calls = nil
	return calls
}

// systemBus has the system's bus be one of this test. It is at a path: abstract addresses are those of a network namespace.
func systemBus(t *testing.T) *dbus.Conn {
	t.Helper()
	program, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip(err)
	}
	address := "unix:path=" + t.TempDir() + "/bus"
	cmd := exec.Command(program, "--session", "--nofork", "--nopidfile", "--print-address", "--address="+address)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// serve is firewalld on a bus.
func (z *zones) serve(t *testing.T, bus *dbus.Conn) {
	t.Helper()
	methods := map[string]any{"addSource": z.add, "removeSource": z.remove, "querySource": z.query}
	if err := bus.ExportMethodTable(methods, "/org/fedoraproject/FirewallD1", "org.fedoraproject.FirewallD1.zone"); err != nil {
		t.Fatal(err)
	}
	if r, err := bus.RequestName("org.fedoraproject.FirewallD1", dbus.NameFlagDoNotQueue); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
		t.Fatal(r, err)
	}
}

func firewalldScenario(g generator) scenario {
	firewall := object{"type": "firewall"}
	g.may(firewall, 2, "backend", "firewalld", "firewalld", "other", "iptables")
	g.may(firewall, 2, "firewalldZone", "public", "no-such-zone")
	g.may(firewall, 4, "ingressPolicy", "same-bridge", "isolated", "other")
	plugins := []object{g.attachment(), firewall}
	if g.seldom(3) {
		plugins = append(plugins, firewall) // for which all is there already
	}
	return scenario{conf: g.list(plugins...), steps: g.firewallCalls()}
}

// firewalld is asked for what the reference asks it for.
func TestFirewalldIsAskedAsByTheReference(t *testing.T) {
	bus, now := systemBus(t), &zones{}
	now.serve(t, bus)
	asked := 0
	differential(t, 8, func(g generator) scenario {
		s := firewalldScenario(g)
		kept := map[*world]map[string]string{}
		var turn sync.Mutex
		s.around = func(w *world, call func()) {
			turn.Lock()
			defer turn.Unlock()
			if kept[w] == nil {
				kept[w] = map[string]string{}
			}
			now.use(kept[w])
			call()
			w.asked = now.take()
			asked += len(w.asked)
		}
		return s
	})
	if asked == 0 && os.Getenv("BERTH_CNI_CONFIGS") == "" {
		t.Error("nobody has asked firewalld")
	}
}

// On a node with a bus and without firewalld the rules are iptables', unless firewalld is asked for.
func TestFirewallWithoutFirewalld(t *testing.T) {
	systemBus(t)
	differential(t, 3, firewalldScenario)
}

//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// TestProxySwitch has a node change from the real kube-proxy to berth and back, in each mode to each, as docs/operations.md has an operator
// do it: one is stopped, the other started. Meanwhile clients connect, and hold connections. After that nothing of the former one is left.
func TestProxySwitch(t *testing.T) {
	if tools.KubeProxy == "" {
		built, err := lab.BuildTools(t.Context(), os.Stderr, "kube-proxy")
		must(t, err)
		tools.KubeProxy = built.KubeProxy
	}
	w := newProxyWorld(t)
	for _, name := range []string{"web", "node-port", "load", "local", "moving"} {
		w.serve(byName(name))
	}
	n := w.nodes[0]
	n.countsRejections()
	// What is there where no other proxy ever was.
	n.start("iptables")
	alone := n.kubeChains()
	must(t, n.proxy.Stop())
	n.clean()
	if len(alone) < 10 || len(n.kubeChains()) != 0 {
		t.Fatalf("%v, and cleaned %v", alone, n.kubeChains())
	}
	modes := []string{"iptables", "nftables"}
	for _, from := range modes {
		// What kube-proxy needs for a restart of its own.
		n.kubeProxy(from)
		clients := w.connect()
		must(t, n.proxy.Stop())
		n.kubeProxy(from)
		itself := clients.end()
		t.Logf("kube-proxy, restarted in mode %s: %s", from, itself)
		for _, to := range modes {
			t.Run("kube-proxy "+from+" to berth "+to, func(t *testing.T) {
				w := w.on(t)
				w.checkAll(switched)
				clients := w.connect()
				must(t, n.proxy.Stop())
				n.start(to)
				w.eventually(promise{"web", "a2 out1", "cluster:80", "a1 b1", "", "tcp"})
				n.wantNothingOfKubeProxy(to, alone)
				w.move(byName("moving"), pods("b1")...) // rules that nobody keeps up would send elsewhere
				w.eventually(promise{"moving", "a2 out1 node-1", "cluster:80", "b1", "", "tcp udp"})
				there := clients.end()
				t.Logf("there: %s", there)
				if there.failed != 0 || there.broken != 0 {
					t.Errorf("there: %s, and with kube-proxy's own restart %s; who rejected:\n%s", there, itself, n.rejections())
				}
				w.checkAll(switched)

				clients = w.connect()
				must(t, n.proxy.Stop())
				if to == "iptables" && from == "nftables" {
					// kube-proxy in mode nftables removes all rules of mode iptables before it has made any: these go first.
					n.start(from)
					must(t, n.proxy.Stop())
				}
				n.kubeProxy(from)
				w.move(byName("moving"), pods("a1")...)
				out := n.berth("proxy", "--cleanup-own")
				w.eventually(promise{"moving", "a2 out1 node-1", "cluster:80", "a1", "", "tcp udp"})
				back := clients.end()
				t.Logf("back: %s; removed:\n%s", back, out)
				if back.failed != 0 || back.broken != 0 {
					t.Errorf("back: %s; who rejected:\n%s", back, n.rejections())
				}
				w.checkAll(switched)
				if left := script(t, n.ns, "nft list ruleset 2>/dev/null | grep -i -e berth -e KUBE-CLUSTER-IPS -e KUBE-REJECT || true"); left != "" {
					t.Errorf("--cleanup-own leaves\n%s", left)
				}
			})
		}
		must(t, n.proxy.Stop())
		n.clean()
	}
}

// switched are the promises that both keep.
var switched = []promise{
	{"web", "a2 node-1 out1", "cluster:80", "a1 b1", "", "tcp udp"},
	{"web", "a2", "cluster:80", "a1 b1", "own", "tcp udp"},
	{"node-port", "out1 a2", "node-1:port", "a1 b1", "", "tcp udp"},
	{"load", "out1 a2 node-1", "load:80", "a1 b1", "", "tcp udp"},
	{"local", "out1", "load:80", "a1", "own", "tcp udp"},
}

// countsRejections has the node count what it sends to those whom it rejects, which tells whose rule it was: kube-proxy's is ICMP, and
// berth's of TCP a reset.
func (n *worldNode) countsRejections() {
	script(n.world.t, n.ns, `nft -f - <<-'END'
		table inet rejections {
			chain sent {
				type filter hook output priority 300
				icmp type destination-unreachable counter comment "by ICMP"
				icmpv6 type destination-unreachable counter comment "by ICMP"
				tcp flags & rst == rst counter comment "by reset"
			}
		}
	END`)
}

func (n *worldNode) rejections() string {
	return script(n.world.t, n.ns, "nft list table inet rejections | grep counter")
}

// kubeProxy has the node's proxy be kube-proxy, and waits until it has programmed all.
func (n *worldNode) kubeProxy(mode string) {
	w := n.world
	w.t.Helper()
	n.log = filepath.Join(w.dir, fmt.Sprintf("%s-kube-proxy-%d.log", n.name, logNumber.Add(1)))
	p, err := lab.StartIn(n.ns, "kube-proxy", n.log, nil, tools.KubeProxy, n.flags("--proxy-mode", mode)...)
	must(w.t, err)
	n.watch(p)
	must(w.t, lab.Eventually(w.t.Context(), 2*time.Minute, "kube-proxy has programmed all", func(context.Context) error {
		_, _, metrics, err := w.get(n.name, "http://127.0.0.1:10249/metrics")
		synced := 0
		for line := range bytes.Lines(metrics) {
			f := strings.Fields(string(line))
			if len(f) == 2 && strings.HasPrefix(f[0], "kubeproxy_sync_proxy_rules_last_timestamp_seconds{") && f[1] != "0" {
				synced++
			}
		}
		if err == nil && synced < 2 {
			err = fmt.Errorf("%d of 2 families", synced)
		}
		return err
	}))
}

// kubeChains are the chains of a proxy in mode iptables, by program, table and name, with the number of their rules.
func (n *worldNode) kubeChains() map[string]int {
	out := map[string]int{}
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		table := ""
		for line := range strings.Lines(script(n.world.t, n.ns, program+" 2>/dev/null || true")) {
			f := strings.Fields(line)
			switch {
			case len(f) == 0:
			case strings.HasPrefix(f[0], "*"):
				table = f[0]
			case strings.HasPrefix(f[0], ":KUBE-") && f[0] != ":KUBE-FIREWALL": // which is the kubelet's
				out[program+" "+table+" "+f[0][1:]] += 0
			case f[0] == "-A" && strings.HasPrefix(f[1], "KUBE-") && f[1] != "KUBE-FIREWALL":
				out[program+" "+table+" "+f[1]]++
			}
		}
	}
	return out
}

func (n *worldNode) wantNothingOfKubeProxy(mode string, alone map[string]int) {
	t := n.world.t
	t.Helper()
	want := map[string]int{}
	if mode == "iptables" {
		want = alone
	}
	must(t, lab.Eventually(t.Context(), soon, "nothing is left of kube-proxy", func(context.Context) error {
		if tables := script(t, n.ns, "nft list tables"); strings.Contains(tables, "kube-proxy") {
			return errors.New(tables)
		}
		if got := n.kubeChains(); !maps.Equal(got, want) {
			return fmt.Errorf("chains %v, want %v", got, want)
		}
		return nil
	}))
}

// berth runs a command in the node's network namespace.
func (n *worldNode) berth(args ...string) (out string) {
	t := n.world.t
	t.Helper()
	must(t, network.InNamespaces([]string{n.ns}, func() (err error) { out, err = lab.RunBerth(args...); return err }))
	return out
}

// clients connect all the time, and hold connections, until the end.
type clients struct {
	w    *proxyWorld
	stop chan struct{}
	all  sync.WaitGroup

	mu sync.Mutex
	outcome
}

// outcome is what clients saw: how many connections, how many of them failed, how many broke that were open, and how long the
// longest took that was made, or during which none could be.
type outcome struct {
	asked, failed, broken int
	longest               time.Duration
	said                  string
}

func (o outcome) String() string {
	return fmt.Sprintf("%d connections, %d failed %s, %d broken, %v the longest", o.asked, o.failed, o.said, o.broken, o.longest.Round(time.Millisecond))
}

func (w *proxyWorld) connect() *clients {
	w.t.Helper()
	c := &clients{w: w, stop: make(chan struct{})}
	for f := range 2 {
		tcp, web := fmt.Sprint("tcp", []int{4, 6}[f]), byName("web")
		for from, to := range map[string]string{
			"a2": net.JoinHostPort(web.clusterIP(f), "80"), "node-1": net.JoinHostPort(web.clusterIP(f), "80"),
			"out1": net.JoinHostPort(byName("load").loadIP(f), "80"),
			"b2":   net.JoinHostPort(w.nodes[0].addr[f], fmt.Sprint(byName("node-port").nodePort())),
		} {
			open, err := w.places[from].dial(tcp, to, patient)
			must(w.t, err)
			first := askAgain(open, patient)
			if len(strings.Fields(first)) != 3 {
				w.t.Fatalf("%s to %s: %q", from, to, first)
			}
			c.all.Go(func() { c.run(w.places[from], tcp, to, open, first) })
		}
	}
	return c
}

func (c *clients) run(from *place, network, to string, open net.Conn, first string) {
	defer func() { _ = open.Close() }()
	good := time.Now()
	for {
		select {
		case <-c.stop:
			return
		case <-time.After(5 * time.Millisecond): // eight of them, on few processors
		}
		began := time.Now()
		got := from.ask(network, to, patient)
		still := askAgain(open, patient)
		c.mu.Lock()
		c.asked++
		if len(strings.Fields(got)) == 3 {
			good = time.Now()
		} else {
			c.failed++
			if c.failed <= 10 {
				c.said += fmt.Sprintf("(%s from %s to %s, since %v: %s)", time.Now().Format(time.StampMicro), from.name, to, time.Since(began), got)
			}
			began = good
		}
		c.longest = max(c.longest, time.Since(began))
		if still != first {
			c.broken++
			c.said = fmt.Sprintf("(%s to %s: a connection to %q is one to %q)", from.name, to, first, still)
		}
		c.mu.Unlock()
		if still != first {
			return
		}
	}
}

func (c *clients) end() outcome {
	close(c.stop)
	c.all.Wait()
	return c.outcome
}

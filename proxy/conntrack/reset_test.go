package conntrack

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
	"github.com/berth-run/berth/proxy/nodetest"
	"github.com/berth-run/berth/proxy/program"
)

// resetting is a lab whose node has a proxy's rules, and a Cleaner that resets connections of TCP.
type resetting struct {
	*proxied
	programmer *nft.Programmer
	count      atomic.Int64
}

func newResetting(t *testing.T, f nodetest.Family) *resetting {
	l := nodetest.New(t, 3)
	p := &resetting{proxied: &proxied{Lab: l, family: f}}
	if err := l.Node.Do(func() (err error) {
		p.programmer, err = nft.Open(nft.Options{Log: slog.New(slog.DiscardHandler)})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.programmer.Close() })
	if !p.programmer.Abilities().Resets {
		t.Fatal("the kernel cannot reset")
	}
	p.cluster = newCluster(t, p.cleans(t))
	p.port, p.protocol = nodetest.PodPort, corev1.ProtocolTCP
	p.program = func(d *model.Delta) {
		if _, err := p.programmer.Apply(d); err != nil {
			t.Fatal(err)
		}
	}
	p.begins()
	return p
}

// cleans starts a Cleaner of the node.
func (p *resetting) cleans(t *testing.T) *Cleaner {
	c := New(Options{
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Swept: func(model.Family, time.Duration, int) {},
		Resets: p.programmer.Resets(), Reset: func(_ model.Family, n int) { p.count.Add(int64(n)) },
	})
	runIn(p.Node.T, p.Node.NS, c)
	return c
}

// begins is what a proxy does first.
func (p *resetting) begins() {
	p.t.Helper()
	p.Commit()
	p.c.WillAll(p.State())
	if _, err := p.programmer.Sync(p.State()); err != nil {
		p.t.Fatal(err)
	}
	p.c.Done()
}

// eachResetting runs a test on a lab for both families.
func eachResetting(t *testing.T, test func(*testing.T, *resetting)) {
	for _, f := range nodetest.Families {
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			test(t, newResetting(t, f))
		})
	}
}

func asks(value string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		if value != "" {
			s.Annotations = map[string]string{model.ResetAnnotation: value}
		}
		nodePort(30053)(s)
	}
}

// ends sets which pods are endpoints; those with a tilde or a minus behind as slice has it.
func (p *resetting) ends(service string, pods ...string) {
	var ips []string
	for _, pod := range pods {
		n, err := strconv.Atoi(pod[:1])
		if err != nil {
			p.t.Fatal(err)
		}
		ips = append(ips, p.family.PodIP(n)+pod[1:])
	}
	p.slice(service, p.family.Name, ips...)
	p.commit()
}

// open is a connection that a pod has answered on.
func (p *resetting) open(from *nodetest.Space, to, pod string) net.Conn {
	p.t.Helper()
	c, err := from.Dial(p.family.TCP, to)
	if err != nil {
		p.t.Fatalf("%s to %s: %v", from.Name, to, err)
	}
	p.t.Cleanup(func() { c.Close() })
	if a := nodetest.Again(c); !strings.HasPrefix(a, pod+" ") {
		p.t.Fatalf("%s to %s: %q answers, want %s", from.Name, to, a, pod)
	}
	return c
}

// told waits for a connection to be reset without sending anything, and says how long it took.
func told(t *testing.T, what string, c net.Conn) time.Duration {
	t.Helper()
	begin := time.Now()
	// After 15 s the kernel would send something.
	if err := errors.Join(c.(*net.TCPConn).SetKeepAlive(false), c.SetDeadline(begin.Add(2*nodetest.Patience))); err != nil {
		t.Error(err)
	}
	if n, err := c.Read(make([]byte, 100)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s: %d bytes, %v", what, n, err)
	}
	return time.Since(begin)
}

func (p *resetting) die(n int) {
	p.t.Helper()
	if err := p.Pods[n-1].Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	}); err != nil {
		p.t.Fatal(err)
	}
}

// Whoever has a connection to an endpoint that is gone learns it although nobody sends anything: from outside, by the cluster IP
// and a node port, from a pod and from the node. Nobody else does.
func TestK8s108523_IdleClientsOfAnEndpointThatIsGoneAreReset(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		other := map[model.Family]string{model.IPv4: "10.96.0.2", model.IPv6: "fd96::2"}[p.family.Of]
		p.service("web", asks("true"), p.family.Cluster)
		p.service("other", func(s *corev1.Service) { s.Annotations = map[string]string{model.ResetAnnotation: "true"} }, other)
		p.ends("web", "1")
		p.ends("other", "1")
		cluster, node := nodetest.At(p.family.Cluster, 53), nodetest.At(p.family.Node, 30053)
		stale := map[string]net.Conn{
			"outside, cluster IP": p.open(p.Client, cluster, "pod1"), "outside, node port": p.open(p.Client, node, "pod1"),
			"pod": p.open(p.Pods[2], cluster, "pod1"), "pod, node port": p.open(p.Pods[2], node, "pod1"),
			"node": p.open(p.Node, cluster, "pod1"), "node, node port": p.open(p.Node, node, "pod1"),
		}
		stay := map[string]net.Conn{
			"the other Service":             p.open(p.Client, nodetest.At(other, 53), "pod1"),
			"the other Service, from a pod": p.open(p.Pods[2], nodetest.At(other, 53), "pod1"),
			"the pod itself":                p.open(p.Pods[2], nodetest.At(p.family.PodIP(1), nodetest.PodPort), "pod1"),
		}
		p.ends("web", "1", "2")
		p.ends("web", "2", "1~") // terminating, and then not even serving: it is still there
		p.ends("web", "2", "1-")
		for _, from := range []*nodetest.Space{p.Client, p.Pods[2], p.Node} {
			stay["another endpoint, from "+from.Name] = p.openSoon(from, cluster, "pod2")
		}
		for what, c := range stale {
			if a := nodetest.Again(c); !strings.HasPrefix(a, "pod1 ") {
				t.Fatalf("%s: %q while the endpoint is there", what, a)
			}
		}
		p.ends("web", "2")
		var all sync.WaitGroup
		for what, c := range stale {
			all.Go(func() { t.Logf("%s: told after %s", what, told(t, what, c).Round(time.Millisecond)) })
		}
		all.Wait()
		time.Sleep(askAgain + 100*time.Millisecond) // they are asked again
		for what, c := range stay {
			if a := nodetest.Again(c); !strings.HasPrefix(a, "pod") {
				t.Errorf("%s: %q", what, a)
			}
		}
		p.reset(int64(len(stale)))
		p.noneLeft("web", cluster, p.family.PodIP(1))
	})
}

// openSoon is open where there are several endpoints.
func (p *resetting) openSoon(from *nodetest.Space, to, pod string) net.Conn {
	p.t.Helper()
	for range 100 {
		c, err := from.Dial(p.family.TCP, to)
		if err != nil {
			p.t.Fatal(err)
		}
		if a := nodetest.Again(c); strings.HasPrefix(a, pod+" ") {
			p.t.Cleanup(func() { c.Close() })
			return c
		}
		c.Close()
	}
	p.t.Fatalf("%s never answers", pod)
	return nil
}

// noneLeft fails the test if the kernel has established connections to a Service's address that lead to a pod.
func (p *resetting) noneLeft(service, at, pod string) {
	p.t.Helper()
	if err := p.Node.Do(func() error {
		c, err := conntrack.Open()
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Each(conntrack.Filter{}, func(e *conntrack.Entry) bool {
			if e.Protocol == unix.IPPROTO_TCP && e.TCPState == established && e.Original.Dst == netip.MustParseAddrPort(at) && e.Reply.Src.Addr() == netip.MustParseAddr(pod) {
				p.t.Errorf("%s: %s is still there", service, flowOf(e))
			}
			return true
		})
	}); err != nil {
		p.t.Fatal(err)
	}
}

// Both ends learn it, also where the pod lives and is only no endpoint any more.
func TestTheEndpointIsResetToo(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		ended := make(chan error, 10)
		p.Pods[0].ListenTCP(8081, func(c net.Conn) {
			fmt.Fprintln(c, "hello")
			_, err := c.Read(make([]byte, 10))
			ended <- err
			c.Close()
		})
		p.port = 8081
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		for _, from := range []*nodetest.Space{p.Client, p.Pods[2], p.Node} {
			c, err := from.Dial(p.family.TCP, nodetest.At(p.family.Cluster, 53))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Read(make([]byte, 10)); err != nil {
				t.Fatal(err)
			}
		}
		p.ends("web")
		for range 3 {
			select {
			case err := <-ended:
				if !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("a pod's connection ends by %v", err)
				}
			case <-time.After(nodetest.Patience):
				t.Fatal("a pod's connection does not end")
			}
		}
	})
}

// A node that is gone answers nothing: clients learn it nevertheless.
func TestClientsOfADeadPodAreReset(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		var all sync.WaitGroup
		var clients []net.Conn
		for _, from := range []*nodetest.Space{p.Client, p.Pods[2], p.Node} {
			clients = append(clients, p.open(from, nodetest.At(p.family.Cluster, 53), "pod1"))
		}
		// One has sent what nobody has got.
		p.die(1)
		if _, err := io.WriteString(clients[0], "who\n"); err != nil {
			t.Fatal(err)
		}
		p.ends("web")
		for i, c := range clients {
			all.Go(func() { told(t, fmt.Sprint("client ", i), c) })
		}
		all.Wait()
	})
}

// Where packets that draw others do not get through, who sends learns it by the answer.
func TestWhoSendsIsResetByTheAnswer(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.Node.Run("nft", "add table inet firewall; add chain inet firewall out { type filter hook postrouting priority 0; }; add rule inet firewall out tcp flags syn tcp window 0 drop")
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		var clients []net.Conn
		for _, from := range []*nodetest.Space{p.Client, p.Pods[2], p.Node} {
			clients = append(clients, p.open(from, nodetest.At(p.family.Cluster, 53), "pod1"))
		}
		p.die(1)
		p.ends("web", "2")
		p.reset(3)
		for i, c := range clients {
			if a := nodetest.Again(c); !strings.Contains(a, "reset") {
				t.Errorf("client %d: %q", i, a)
			}
		}
	})
}

// reset waits until so many connections are counted, and fails the test if there are more.
func (p *resetting) reset(n int64) {
	p.t.Helper()
	for deadline := time.Now().Add(nodetest.Patience); p.count.Load() < n; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%d connections were reset, not %d", p.count.Load(), n)
		}
	}
	if got := p.count.Load(); got != n {
		p.t.Errorf("%d connections were reset, not %d", got, n)
	}
}

// Whoever connects again by the same address and port has a connection like any other.
func TestTheSameAddressesAndPortsAgain(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		connect := func(from *nodetest.Space, to string) net.Conn {
			d := net.Dialer{Timeout: nodetest.Patience, LocalAddr: &net.TCPAddr{Port: 12345}, Control: func(_, _ string, raw syscall.RawConn) error {
				var failed error
				return errors.Join(raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }), failed)
			}}
			var c net.Conn
			if err := from.Do(func() (err error) { c, err = d.Dial(p.family.TCP, to); return err }); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c
		}
		web := nodetest.At(p.family.Cluster, 53)
		clients := []*nodetest.Space{p.Client, p.Pods[2]}
		var all []net.Conn
		for _, from := range clients {
			c := connect(from, web)
			if a := nodetest.Again(c); !strings.HasPrefix(a, "pod1 ") {
				t.Fatal(a)
			}
			all = append(all, c)
		}
		p.ends("web", "2")
		for i, c := range all {
			told(t, "client", c)
			c.Close()
			all[i] = connect(clients[i], web)
		}
		// The endpoint that is gone answers by the same addresses and ports as it did, to one that it is the same for.
		all = append(all, connect(p.Pods[2], nodetest.At(p.family.PodIP(1), nodetest.PodPort)))
		for range 20 {
			for i, want := range []string{"pod2 ", "pod2 ", "pod1 "} {
				if a := nodetest.Again(all[i]); !strings.HasPrefix(a, want) {
					t.Fatal(i, a)
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		p.reset(2)
	})
}

// Nothing happens to whoever did not ask for it; a change of mind counts for what was lost before, too.
func TestConnectionsAreResetOnlyIfAskedFor(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.service("web", asks(""), p.family.Cluster)
		p.ends("web", "1")
		c := p.open(p.Client, nodetest.At(p.family.Cluster, 53), "pod1")
		for _, value := range []string{"", "false", "yes"} {
			p.service("web", asks(value), p.family.Cluster)
			p.ends("web", "1")
			p.ends("web", "2")
		}
		if list := p.Node.Run("nft", "list", "ruleset"); strings.Contains(list, "reset-") {
			t.Error("there are rules for what nobody asked for")
		}
		if a := nodetest.Again(c); !strings.HasPrefix(a, "pod1 ") {
			t.Fatal(a)
		}
		p.service("web", asks("true"), p.family.Cluster)
		p.commit()
		told(t, "client", c)
		p.reset(1)
		// And back: connections to an endpoint that goes then are left alone, and there are no rules once all is compared.
		c = p.open(p.Client, nodetest.At(p.family.Cluster, 53), "pod2")
		p.service("web", asks("false"), p.family.Cluster)
		p.ends("web", "1")
		if a := nodetest.Again(c); !strings.HasPrefix(a, "pod2 ") {
			t.Error(a)
		}
		if _, err := p.programmer.Verify(); err != nil {
			t.Fatal(err)
		}
		if list := p.Node.Run("nft", "list", "ruleset"); strings.Contains(list, "reset-") {
			t.Error("rules are left")
		}
	})
}

// A Service that is deleted does not say that its endpoints are gone, whoever has its address next, at once or later.
func TestConnectionsOfADeletedServiceStay(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		for _, later := range []bool{true, false} {
			p.service("web", asks("true"), p.family.Cluster)
			p.ends("web", "1")
			c := p.open(p.Client, nodetest.At(p.family.Cluster, 53), "pod1")
			p.delete("web")
			if later {
				p.commit()
			}
			p.service("heir", asks("true"), p.family.Cluster)
			p.ends("heir", "2")
			time.Sleep(askAgain) // for what should not happen
			if a := nodetest.Again(c); !strings.HasPrefix(a, "pod1 ") {
				t.Errorf("later %v: %s", later, a)
			}
			p.delete("heir")
			p.commit()
		}
	})
}

// Kernels before Linux 6.1 acknowledge so many packets that are out of place a second, and no more: those of others are told a second later.
func TestManyAreResetThoughAKernelAnswersFew(t *testing.T) {
	const n, limit = 300, 100
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.Pods[2].Sysctl("net/ipv4/tcp_challenge_ack_limit", fmt.Sprint(limit))
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		all := p.Connections(p.Pods[2], p.family.TCP, nodetest.At(p.family.Cluster, 53), n)
		p.die(1)
		p.ends("web", "2")
		var clients sync.WaitGroup
		took := make([]time.Duration, n)
		for i, c := range all {
			clients.Go(func() { took[i] = told(t, fmt.Sprint("connection ", i), c) })
		}
		clients.Wait()
		t.Logf("the first one after %s, the last one after %s", slices.Min(took).Round(time.Millisecond), slices.Max(took).Round(time.Millisecond))
	})
}

// What was lost while no proxy ran is found by the next one, whose rules are there already.
func TestConnectionsAreResetAfterARestart(t *testing.T) {
	eachResetting(t, func(t *testing.T, p *resetting) {
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		stale := p.open(p.Client, nodetest.At(p.family.Cluster, 53), "pod1")
		p.ends("web", "1", "3")
		stays := p.openSoon(p.Client, nodetest.At(p.family.Cluster, 53), "pod3")
		p.c = New(Options{Log: slog.New(slog.DiscardHandler), Swept: func(model.Family, time.Duration, int) {}}) // it is told of nothing
		p.ends("web", "3")
		if a := nodetest.Again(stale); !strings.HasPrefix(a, "pod1 ") {
			t.Fatal(a)
		}
		p.c = p.cleans(t)
		p.begins()
		told(t, "client", stale)
		if a := nodetest.Again(stays); !strings.HasPrefix(a, "pod3 ") {
			t.Error(a)
		}
	})
}

// Thousands at once are told, in batches.
func TestThousandsOfConnectionsAreReset(t *testing.T) {
	const n = 5000
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 2*n+2000 {
		t.Skipf("%d files at a time, %v", limit.Cur, err)
	}
	for _, f := range nodetest.Families { // one after the other
		p := newResetting(t, f)
		p.service("web", asks("true"), p.family.Cluster)
		p.ends("web", "1")
		all := make([]net.Conn, 0, n)
		if err := p.Pods[2].Do(func() error {
			for range n {
				c, err := net.DialTimeout(p.family.TCP, nodetest.At(p.family.Cluster, 53), nodetest.Patience)
				if err != nil {
					return err
				}
				all = append(all, c)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		p.ends("web", "1", "2")
		stays := p.openSoon(p.Pods[2], nodetest.At(p.family.Cluster, 53), "pod2")
		p.die(1)
		begin := time.Now()
		p.ends("web", "2")
		changed := time.Since(begin)
		var told sync.WaitGroup
		took := make([]time.Duration, n)
		for i, c := range all {
			told.Go(func() {
				if err := errors.Join(c.(*net.TCPConn).SetKeepAlive(false), c.SetReadDeadline(begin.Add(3*nodetest.Patience))); err != nil {
					t.Error(err)
				}
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("connection %d: %v", i, err)
				}
				took[i] = time.Since(begin)
			})
		}
		told.Wait()
		slices.Sort(took)
		t.Logf("%s, %d idle clients: the change took %s, half were told after %s, 99 of 100 after %s, the last one after %s", f.Name, n, changed.Round(time.Microsecond),
			took[n/2].Round(time.Millisecond), took[n*99/100].Round(time.Millisecond), took[n-1].Round(time.Millisecond))
		if a := nodetest.Again(stays); !strings.HasPrefix(a, "pod2 ") {
			t.Error(a)
		}
		p.reset(n)
		for _, c := range all {
			c.Close()
		}
	}
}

// recorder is a Resetter that has no kernel.
type recorder struct {
	flows []program.Flow
	err   error
}

func (r *recorder) Answer(flows []program.Flow) error {
	r.flows = append(r.flows, flows...)
	return r.err
}

func (r *recorder) Answering() (map[program.Flow]struct{}, error) { return nil, r.err }

// resets has a table's Cleaner reset connections of both families.
func (b *table) resets() *recorder {
	r := &recorder{}
	b.Resets, b.Reset = r, func(f model.Family, n int) { b.removed[f] += n }
	b.t.Cleanup(b.probes.close)
	return r
}

// Of the kernel's table those connections are reset that lead from a Service to an endpoint that it has lost.
func TestWhichConnectionsAreReset(t *testing.T) {
	b := newTable(t)
	nodeHas(t, "192.0.2.1/32")
	b.resets()
	k := newCluster(t, b.Cleaner)
	k.protocol = corev1.ProtocolTCP
	k.service("web", func(s *corev1.Service) {
		asks("true")(s)
		s.Annotations[model.PortRangesAnnotation] = "p=10000-20000"
	}, "10.96.0.10", "fd96::10")
	k.service("other", func(s *corev1.Service) { s.Annotations = map[string]string{model.ResetAnnotation: "true"} }, "10.96.0.11")
	k.service("silent", nil, "10.96.0.12")
	k.slice("web", "1", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4")
	k.slice("web", "2", "fd01::1", "fd01::2")
	k.slice("other", "1", "10.1.0.1")
	k.slice("silent", "1", "10.1.0.1")
	stays := []flow{
		"tcp 198.51.100.1:4000>10.96.0.10:53>10.1.0.2:53",       // another endpoint
		"tcp 198.51.100.1:4001>10.96.0.10:53>10.1.0.3:53",       // one that ends
		"tcp 198.51.100.1:4002>10.96.0.10:53>10.1.0.4:53",       // one that does not serve
		"tcp 198.51.100.1:4003>10.96.0.11:53>10.1.0.1:53",       // another Service
		"tcp 198.51.100.1:4004>10.96.0.12:53>10.1.0.1:53",       // one that did not ask for it
		"tcp 198.51.100.1:4005>10.96.0.10:54>10.1.0.1:53",       // another port
		"tcp 198.51.100.1:4006>10.1.0.1:53>10.1.0.1:53",         // the pod itself
		"tcp 198.51.100.1:4007>10.96.0.10:53>10.96.0.10:53",     // led nowhere
		"tcp 198.51.100.1:4008>192.0.2.2:30053>10.1.0.1:53",     // another node
		"tcp 198.51.100.1:4009>10.96.0.10:20001>10.1.0.1:20001", // no port of the range
		"udp 198.51.100.1:4010>10.96.0.10:53>10.1.0.1:53",       //
		"tcp [2001:db8::1]:4000>[fd96::10]:53>[fd01::2]:53",     //
	}
	stale := []flow{
		"tcp 198.51.100.1:4100>10.96.0.10:53>10.1.0.1:53",
		"tcp 198.51.100.1:4101>192.0.2.1:30053>10.1.0.1:53",
		"tcp 198.51.100.1:4102>10.96.0.10:15000>10.1.0.1:15000",
		"tcp [2001:db8::1]:4100>[fd96::10]:53>[fd01::1]:53",
	}
	k.all()
	b.sweep()
	b.track(append(slices.Clone(stays), stale...)...)
	k.slice("web", "1", "10.1.0.2", "10.1.0.3~", "10.1.0.4-")
	k.slice("web", "2", "fd01::2")
	k.commit()
	b.sweep()
	b.has(stays...)
	if b.removed != [model.Families]int{3, 1} {
		t.Errorf("%v are counted", b.removed)
	}
}

// Ten thousand at once go in batches, and none of those beside them.
func TestTenThousandConnectionsAreReset(t *testing.T) {
	const n = 10000
	b := newTable(t)
	programmer, err := nft.Open(nft.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { programmer.Close() })
	b.resets()
	b.Resets = programmer.Resets()
	k := newCluster(t, b.Cleaner)
	k.protocol = corev1.ProtocolTCP
	k.service("web", asks("true"), "10.96.0.10")
	k.slice("web", "1", "10.1.0.1", "10.1.0.2")
	k.all()
	if _, err := programmer.Sync(k.State()); err != nil {
		t.Fatal(err)
	}
	b.sweep()
	var stale, stays []flow
	for i := range n {
		stale = append(stale, flow(fmt.Sprintf("tcp 198.51.%d.%d:4000>10.96.0.10:53>10.1.0.1:53", 100+i/250, i%250+1)))
	}
	for i := range 100 {
		stays = append(stays, flow(fmt.Sprintf("tcp 203.0.113.%d:4000>10.96.0.10:53>10.1.0.2:53", i+1)))
	}
	b.track(append(stale, stays...)...)
	k.slice("web", "1", "10.1.0.2")
	k.commit()
	begin := time.Now()
	b.sweep()
	t.Logf("%d connections in %s", n, time.Since(begin).Round(time.Millisecond))
	b.has(stays...)
	if b.removed[model.IPv4] != n {
		t.Errorf("%v are counted", b.removed)
	}
	if flows, err := b.Resets.Answering(); err != nil || len(flows) != 2*n {
		t.Errorf("%d flows, %v", len(flows), err)
	}
}

// Before an entry is removed its packets are answered, each way; where that fails the entry stays, and it is tried again.
func TestPacketsAreAnsweredBeforeTheEntryIsRemoved(t *testing.T) {
	b := newTable(t)
	r := b.resets()
	k := newCluster(t, b.Cleaner)
	k.protocol = corev1.ProtocolTCP
	k.service("web", asks("true"), "10.96.0.10")
	k.slice("web", "1", "10.1.0.1")
	k.all()
	b.sweep()
	stale := flow("tcp 198.51.100.1:4100>10.96.0.10:53>10.1.0.1:53")
	b.track(stale)
	r.err = errors.New("refused")
	k.slice("web", "1")
	k.commit()
	b.take()
	if err := b.Cleaner.sweep(t.Context()); !errors.Is(err, r.err) {
		t.Fatal(err)
	}
	b.has(stale)
	r.err, r.flows = nil, nil
	b.sweep()
	b.has()
	at := netip.MustParseAddrPort
	want := []program.Flow{{Src: at("198.51.100.1:4100"), Dst: at("10.96.0.10:53")}, {Src: at("10.1.0.1:53"), Dst: at("198.51.100.1:4100")}}
	if !slices.Equal(r.flows, want) {
		t.Errorf("answered are %v", r.flows)
	}
}

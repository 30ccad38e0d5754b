//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// TestK8s135639_ProxyScale has a node with forwarded connections to a Service start its proxy again in a cluster of 250,000 endpoints in 5,000
// Services (kubernetes#135639: minutes, and processors that are locked up). It tells how long that takes, how much memory, and for
// how long at most what is forwarded had to wait.
func TestK8s135639_ProxyScale(t *testing.T) {
	if os.Getenv("BERTH_PROXY_SCALE") == "" {
		t.Skip("BERTH_PROXY_SCALE is not set: it takes minutes, see make test-proxy-scale")
	}
	const services, each = 5000, 50
	root, err := lab.RepoRoot()
	must(t, err)
	berth := filepath.Join(root, "bin/berth")
	cluster := newProxyCrowd(t)
	n := newProxyNode(t, cluster.cp, "berth")
	traffic := newForwarded(t, n)
	traffic.vip, err = cluster.createService(t.Context(), "ping")
	must(t, err)
	must(t, cluster.request(t.Context(), "POST", slicesPath, sliceOf("ping", forwardedPod)))
	n.start(berth, "proxy")
	n.synced()
	must(t, lab.Eventually(t.Context(), soon, "the first Service", func(context.Context) error { return traffic.once() }))
	must(t, n.proxy.Kill())

	began := time.Now()
	cluster.fill(t, services, func(i int) (addrs []string) {
		for j := range each {
			k := i*each + j
			addrs = append(addrs, netip.AddrFrom4([4]byte{10, 64 + byte(k>>16), byte(k >> 8), byte(k)}).String())
		}
		return addrs
	})
	t.Logf("the API server took %v for %d endpoints in %d Services", time.Since(began).Round(time.Second), services*each, services)
	quiet := traffic.during(t, func() { time.Sleep(5 * time.Second) })
	t.Logf("without a proxy: %s", quiet)
	busy := traffic.during(t, func() {
		began = time.Now()
		n.start(berth, "proxy")
		n.synced()
		took := time.Since(began)
		t.Logf("loaded %v after the start, RSS %d MiB, at most %d MiB, %v of a processor", took.Round(time.Millisecond),
			statusKiB(t, n.proxy.PID(), "VmRSS")>>10, peakKiB(t, n.proxy.PID())>>10, cpu(t, n.proxy.PID()))
	})
	t.Logf("while it was loaded: %s", busy)
	if busy.failed > 0 || busy.gap > time.Minute {
		t.Errorf("what is forwarded was broken off or held up: %s", busy)
	}
	changed := traffic.during(t, func() { // all endpoints of 100 Services are others, one after the other
		began = time.Now()
		for i := range 100 {
			name := fmt.Sprintf("load-%06d", i)
			must(t, cluster.request(t.Context(), "PUT", slicesPath+"/"+name, sliceOf(name, endpointA)))
		}
		n.answered(cluster.vips[:100])
	})
	t.Logf("100 changes of 50 endpoints each were seen after %v; meanwhile %s", time.Since(began).Round(time.Millisecond), changed)
	must(t, n.proxy.Stop())
	again := traffic.during(t, func() {
		began = time.Now()
		n.start(berth, "proxy")
		n.synced()
		t.Logf("started again, nothing to change: %v", time.Since(began).Round(time.Millisecond))
	})
	t.Logf("meanwhile %s", again)
	if again.failed > 0 || changed.failed > 0 {
		t.Errorf("connections failed: %s, %s", changed, again)
	}
}

const forwardedPod = "10.201.0.2"

// forwarded is traffic from a client outside of a node through it to a pod of it.
type forwarded struct {
	vip    netip.Addr
	client string // path of its network namespace
}

// waits are the longest ones of some time.
type waits struct {
	gap     time.Duration // of answers of an open connection
	connect time.Duration // of a new connection, until its first answer
	asked   int
	opened  int
	failed  int
}

func (w waits) String() string {
	return fmt.Sprintf("an open connection's answer took at most %v (of %d), a new connection %v (of %d), %d failed",
		w.gap.Round(10*time.Microsecond), w.asked, w.connect.Round(10*time.Microsecond), w.opened, w.failed)
}

func newForwarded(t *testing.T, n *proxyNode) *forwarded {
	t.Helper()
	dir := t.TempDir()
	f := &forwarded{client: namespace(t, filepath.Join(dir, "client"))}
	pod := namespace(t, filepath.Join(dir, "pod"))
	script(t, n.netns, fmt.Sprintf(`
		ip link add client0 type veth peer name eth0 netns %s
		ip link add pod0 type veth peer name eth0 netns %s
		ip addr add 10.202.0.1/24 dev client0
		ip addr add 10.201.0.1/24 dev pod0
		ip link set client0 up
		ip link set pod0 up
		echo 1 > /proc/sys/net/ipv4/ip_forward`, f.client, pod))
	for netns, addr := range map[string]string{f.client: "10.202.0", pod: "10.201.0"} {
		script(t, netns, fmt.Sprintf("ip addr add %s.2/24 dev eth0; ip link set eth0 up; ip route add default via %[1]s.1", addr))
	}
	var l net.Listener
	must(t, network.InNamespaces([]string{pod}, func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", endpointPort))
		return err
	}))
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	return f
}

// dial connects, from the client's namespace, whose thread calls it.
func (f *forwarded) dial() (net.Conn, error) {
	return net.DialTimeout("tcp4", netip.AddrPortFrom(f.vip, 80).String(), time.Minute)
}

// ping asks and waits for the answer.
func ping(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

func (f *forwarded) once() error {
	return network.InNamespaces([]string{f.client}, func() error {
		c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(f.vip, 80).String(), time.Second)
		if err != nil {
			return err
		}
		return errors.Join(ping(c), c.Close())
	})
}

// during asks on one connection a thousand times a second, and opens some hundred others, while something is done.
func (f *forwarded) during(t *testing.T, what func()) waits {
	t.Helper()
	var w waits
	var stop atomic.Bool
	var both sync.WaitGroup
	var fresh waits
	loop := func(w *waits, each func() error) {
		both.Go(func() {
			err := network.InNamespaces([]string{f.client}, func() error {
				for !stop.Load() {
					if err := each(); err != nil {
						t.Log(err)
						w.failed++
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	var open net.Conn
	loop(&w, func() (err error) {
		if open == nil {
			if open, err = f.dial(); err != nil {
				return err
			}
		}
		began := time.Now()
		if err := ping(open); err != nil {
			_ = open.Close()
			open = nil
			return err
		}
		w.gap, w.asked = max(w.gap, time.Since(began)), w.asked+1
		time.Sleep(time.Millisecond)
		return nil
	})
	loop(&fresh, func() error {
		began := time.Now()
		c, err := f.dial()
		if err != nil {
			return err
		}
		err = errors.Join(ping(c), c.Close())
		fresh.connect, fresh.opened = max(fresh.connect, time.Since(began)), fresh.opened+1
		time.Sleep(5 * time.Millisecond)
		return err
	})
	what()
	stop.Store(true)
	both.Wait()
	if open != nil {
		_ = open.Close()
	}
	w.connect, w.opened, w.failed = fresh.connect, fresh.opened, w.failed+fresh.failed
	return w
}

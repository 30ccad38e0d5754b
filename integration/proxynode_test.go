//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// The endpoints of proxyNode, in each of them the same.
const (
	endpointA, endpointB = "10.200.0.1", "10.200.0.2"
	endpointPort         = 8080
)

// proxyNode is a node of which nothing runs but a Service proxy, in a network namespace of its own. Both endpoints are
// addresses of the namespace and answer there with their own address, so that whatever the proxy has done is seen by one
// connection from inside.
type proxyNode struct {
	t     testing.TB
	cp    *lab.ControlPlane
	name  string // of its Node
	netns string
	dir   string
	proxy *lab.Process
}

func newProxyNode(t testing.TB, cp *lab.ControlPlane, name string) *proxyNode {
	t.Helper()
	n := &proxyNode{t: t, cp: cp, name: name, dir: t.TempDir()}
	n.netns = namespace(t, filepath.Join(n.dir, "netns"))
	// What no proxy has anything to do with leaves by a link that leads nowhere.
	script(t, n.netns, `
		ip link set lo up
		ip addr add `+endpointA+`/32 dev lo
		ip addr add `+endpointB+`/32 dev lo
		ip link add out type veth peer name nowhere
		ip addr add 10.199.0.1/24 dev out
		ip link set nowhere up
		ip link set out up
		ip neigh add 10.199.0.254 lladdr 02:00:00:00:00:01 dev out nud permanent
		ip route add default via 10.199.0.254 dev out`)
	forward, err := lab.NewForward(n.netns, cp.Address())
	must(t, err)
	t.Cleanup(func() { must(t, forward.Close()) })
	n.serve()
	must(t, cp.Create(t.Context(), "/api/v1/nodes", "apiVersion: v1\nkind: Node\nmetadata: {name: "+name+", labels: {kubernetes.io/hostname: "+name+"}}\n"))
	_, err = cp.Do(t.Context(), http.MethodPatch, "/api/v1/nodes/"+name+"/status", "application/merge-patch+json",
		[]byte(`{"status":{"addresses":[{"type":"InternalIP","address":"10.199.0.1"}]}}`))
	must(t, err)
	return n
}

// in runs f in the namespace.
func (n *proxyNode) in(f func() error) error { return network.InNamespaces([]string{n.netns}, f) }

// serve answers each connection with the address that it was made to.
func (n *proxyNode) serve() {
	n.t.Helper()
	var l net.Listener
	must(n.t, n.in(func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", endpointPort))
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			at, _ := netip.ParseAddrPort(c.LocalAddr().String())
			_, _ = io.WriteString(c, at.Addr().String())
			_ = c.Close()
		}
	}()
	n.t.Cleanup(func() { _ = l.Close(); <-done })
}

// start runs a proxy with a configuration of kube-proxy's, and begins to count. What there is of conntrack is the machine's, and left.
func (n *proxyNode) start(program string, args ...string) {
	n.t.Helper()
	config := filepath.Join(n.dir, "config.conf")
	must(n.t, os.WriteFile(config, []byte(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
hostnameOverride: `+n.name+`
clientConnection: {kubeconfig: `+n.cp.Kubeconfig+`}
clusterCIDR: 10.88.0.0/16
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
`), 0o600))
	var err error
	n.proxy, err = lab.StartIn(n.netns, n.name, filepath.Join(n.dir, "proxy.log"), nil, program, append(args, "--config", config)...)
	must(n.t, err)
	p := n.proxy
	n.t.Cleanup(func() {
		if n.t.Failed() {
			n.t.Logf("the end of the log of %s:\n%s", n.name, p.Tail(20))
		}
		if err := p.Kill(); err != nil {
			n.t.Error(err)
		}
	})
}

// askClusterIP connects to a cluster IP from inside the namespace, whose thread calls it, and is what answers; empty if nothing does.
// All ends of a connection are in the namespace, so that it is there as soon as the kernel has been asked for it, or never.
func askClusterIP(vip netip.Addr) string {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: vip.As4()}); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return ""
	}
	within := func(events int16, d time.Duration) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		for deadline := time.Now().Add(d); ; {
			n, err := unix.Poll(fds, max(int(time.Until(deadline).Milliseconds()), 0))
			if !errors.Is(err, unix.EINTR) {
				return n > 0 && err == nil
			}
		}
	}
	if !within(unix.POLLOUT, 2*time.Millisecond) {
		return ""
	}
	if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || code != 0 {
		return ""
	}
	b := make([]byte, 64)
	if !within(unix.POLLIN, time.Second) {
		return ""
	}
	k, err := unix.Read(fd, b)
	if err != nil || k < 0 {
		return ""
	}
	return string(b[:k])
}

// until is how long after its begin a change is seen: that connections to the address are answered as wanted.
func (n *proxyNode) until(vip netip.Addr, wanted func(answer string) bool, change func() error) time.Duration {
	n.t.Helper()
	began, changed := time.Now(), make(chan error, 1)
	go func() { changed <- change() }()
	var took time.Duration
	err := n.in(func() error {
		for last := ""; ; time.Sleep(500 * time.Microsecond) {
			if last = askClusterIP(vip); wanted(last) {
				took = time.Since(began)
				return nil
			}
			if time.Since(began) > 5*time.Minute { // of a busy machine
				return fmt.Errorf("a change of %s is not seen after five minutes, it answers %q", vip, last)
			}
		}
	})
	must(n.t, errors.Join(err, <-changed))
	return took
}

// answered waits until all of the addresses answer.
func (n *proxyNode) answered(vips []netip.Addr) {
	n.t.Helper()
	deadline := time.Now().Add(20 * time.Minute)
	must(n.t, n.in(func() error {
		for _, vip := range vips {
			for askClusterIP(vip) == "" {
				if time.Now().After(deadline) || !n.proxy.Alive() {
					return fmt.Errorf("%s does not answer; the proxy's log:\n%s", vip, n.proxy.Tail(20))
				}
				time.Sleep(500 * time.Microsecond)
			}
		}
		return nil
	}))
}

// synced waits until the proxy says that it has programmed all there is.
func (n *proxyNode) synced() {
	n.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (c net.Conn, err error) {
		return c, n.in(func() (err error) { c, err = net.Dial(network, address); return err })
	}}}
	for deadline := time.Now().Add(20 * time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if resp, err := client.Get("http://127.0.0.1:10249/metrics"); err == nil {
			text, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			must(n.t, err)
			for line := range bytes.Lines(text) {
				f := strings.Fields(string(line))
				if len(f) == 2 && strings.HasPrefix(f[0], "kubeproxy_sync_proxy_rules_last_timestamp_seconds") && f[1] != "0" {
					return
				}
			}
		}
		if time.Now().After(deadline) || !n.proxy.Alive() {
			n.t.Fatalf("%s has not programmed all there is:\n%s", n.name, n.proxy.Tail(20))
		}
	}
}

// cpu is the processor time that a process and the children that it has waited for have taken, in user and kernel mode.
func cpu(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(t, err)
	// Behind the name, which may hold anything: state is the third field, and 14 to 17 are times.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	var ticks int64
	for _, f := range fields[14-3 : 18-3] {
		n, err := strconv.ParseInt(f, 10, 64)
		must(t, err)
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 on all that berth runs on
}

package loopback

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

const patience = 20 * time.Second

// newPorts makes a Ports for both families that ends with the test, and leaves nothing.
func newPorts(t *testing.T, o Options) *Ports {
	t.Helper()
	before := runtime.NumGoroutine()
	o.IPv4, o.IPv6 = true, true
	p := New(o)
	t.Cleanup(func() {
		p.Close()
		for deadline := time.Now().Add(patience); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				b := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, b[:runtime.Stack(b, true)])
			}
		}
	})
	return p
}

// freePort is one that nothing listens at, and none that the kernel gives to others.
func freePort(t *testing.T) uint16 {
	t.Helper()
	for range 1000 {
		n := 20000 + rand.IntN(10000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n))
		if err != nil {
			continue
		}
		_ = l.Close()
		return uint16(n)
	}
	t.Fatal("no port is free")
	return 0
}

// service is one with a node port.
func service(name string, protocol model.Protocol, port uint16, endpoints ...netip.AddrPort) *model.Service {
	p := model.Port{Protocol: protocol, Cluster: make([]model.Endpoint, 0, len(endpoints))}
	front := model.Frontend{Kind: model.NodePort, Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), port), Action: model.Forward}
	if len(endpoints) == 0 {
		front.Action = model.Reject
	} else if endpoints[0].Addr().Is6() {
		p.Family, front.Addr = model.IPv6, netip.AddrPortFrom(netip.IPv6Unspecified(), port)
	}
	for _, e := range endpoints {
		p.Cluster = append(p.Cluster, model.Endpoint{Addr: e.Addr(), Port: e.Port()})
	}
	p.Frontends = []model.Frontend{front}
	return &model.Service{Name: types.NamespacedName{Namespace: "default", Name: name}, Ports: []model.Port{p}}
}

func change(old, next *model.Service) model.Change {
	if next == nil {
		return model.Change{Name: old.Name, Old: old}
	}
	return model.Change{Name: next.Name, Old: old, New: next}
}

func apply(p *Ports, changes ...model.Change) { p.Apply(&model.Delta{Services: changes}) }

// endpoint answers each connection with its name, then with what it is sent, until half a close.
func endpoint(t *testing.T, name string) netip.AddrPort {
	return endpointThat(t, "127.0.0.1:0", func(c net.Conn) {
		defer c.Close()
		_, _ = fmt.Fprintln(c, name)
		_, _ = io.Copy(c, c)
	})
}

func endpointThat(t *testing.T, at string, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	return netip.MustParseAddrPort(l.Addr().String())
}

func dial(t *testing.T, port uint16) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// who is the name of the endpoint that a new connection leads to; what is sent there comes back.
func who(t *testing.T, port uint16) string {
	t.Helper()
	c := dial(t, port)
	defer c.Close()
	if _, err := io.WriteString(c, "something"); err != nil {
		t.Fatal(err)
	}
	_ = c.(*net.TCPConn).CloseWrite()
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	name, rest, _ := strings.Cut(string(all), "\n")
	if rest != "something" {
		t.Errorf("%q came back", rest)
	}
	return name
}

// end is how a connection ends that sends nothing; it may be reset before it is known to be there.
func end(port uint16) error {
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), patience)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadAll(c)
	return err
}

func refused(port uint16) bool {
	c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), patience)
	if err == nil {
		_ = c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

func TestEachEndpointIsReached(t *testing.T) {
	a, b := endpoint(t, "a"), endpoint(t, "b")
	p, port := newPorts(t, Options{}), freePort(t)
	apply(p, change(nil, service("x", model.TCP, port, a, b)))
	got := map[string]int{}
	for range 40 {
		got[who(t, port)]++
	}
	if len(got) != 2 || got["a"] == 0 || got["b"] == 0 {
		t.Errorf("%v", got)
	}
}

func TestIPv6(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6: ", err)
	}
	_ = l.Close()
	at := endpointThat(t, "[::1]:0", func(c net.Conn) { _, _ = fmt.Fprintln(c, "six"); _ = c.Close() })
	p, port := newPorts(t, Options{}), freePort(t)
	apply(p, change(nil, service("x", model.TCP, port, at)))
	if !refused(port) {
		t.Error("IPv4 is served")
	}
	c, err := net.DialTimeout("tcp", fmt.Sprintf("[::1]:%d", port), patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if s, err := bufio.NewReader(c).ReadString('\n'); s != "six\n" {
		t.Error(s, err)
	}
}

func TestPortsFollowTheirServicesAtOnce(t *testing.T) {
	a, b := endpoint(t, "a"), endpoint(t, "b")
	p, port := newPorts(t, Options{}), freePort(t)
	x := service("x", model.TCP, port, a)
	apply(p, change(nil, x))
	open := dial(t, port)
	in := bufio.NewReader(open)
	if s, err := in.ReadString('\n'); s != "a\n" {
		t.Fatal(s, err)
	}
	moved := service("x", model.TCP, port, b)
	apply(p, change(x, moved))
	if got := who(t, port); got != "b" {
		t.Errorf("after a change of endpoints %q", got)
	}
	// The port goes to another Service, in one Delta.
	y := service("y", model.TCP, port, a)
	apply(p, change(nil, y), change(moved, nil))
	if got := who(t, port); got != "a" {
		t.Errorf("of the other Service %q", got)
	}
	none := service("y", model.TCP, port)
	apply(p, change(y, none))
	if !refused(port) {
		t.Error("a Service without endpoints is served")
	}
	apply(p, change(none, y))
	if got := who(t, port); got != "a" {
		t.Errorf("again %q", got)
	}
	apply(p, change(y, nil))
	if !refused(port) {
		t.Error("a Service that is gone is served")
	}
	// The connection of before goes on.
	if _, err := io.WriteString(open, "still\n"); err != nil {
		t.Fatal(err)
	}
	if s, err := in.ReadString('\n'); s != "still\n" {
		t.Error(s, err)
	}
}

// What ends a connection on one side is seen on the other as it was.
func TestEndsAreToldTheOtherSide(t *testing.T) {
	seen := make(chan error, 10)
	at := endpointThat(t, "127.0.0.1:0", func(c net.Conn) {
		first, err := bufio.NewReader(c).ReadString('\n')
		switch {
		case err != nil:
			seen <- err
			_ = c.Close()
		case first == "half\n": // it speaks on when it has read the end
			_, err := io.Copy(io.Discard, c)
			seen <- err
			_, _ = io.WriteString(c, "and now I")
			_ = c.Close()
		case first == "reset\n":
			reset(c)
		default:
			_, err := io.Copy(io.Discard, c)
			seen <- err
			_ = c.Close()
		}
	})
	p, port := newPorts(t, Options{}), freePort(t)
	apply(p, change(nil, service("x", model.TCP, port, at)))

	c := dial(t, port)
	_, _ = io.WriteString(c, "half\n")
	_ = c.(*net.TCPConn).CloseWrite()
	if all, err := io.ReadAll(c); string(all) != "and now I" || err != nil {
		t.Errorf("after half a close: %q, %v", all, err)
	}
	if err := <-seen; err != nil {
		t.Errorf("the endpoint saw %v", err)
	}
	c = dial(t, port)
	_, _ = io.WriteString(c, "reset\n")
	if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after a reset: %v", err)
	}
	c = dial(t, port)
	_, _ = io.WriteString(c, "other\n")
	for deadline := time.Now().Add(patience); len(p.slots[0]) != 1 && time.Now().Before(deadline); { // the first two have ended
		time.Sleep(time.Millisecond)
	}
	reset(c)
	if err := <-seen; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the endpoint of a client's reset saw %v", err)
	}
}

func TestEndpointsThatDoNotAnswerAreLeftOut(t *testing.T) {
	a, dead := endpoint(t, "a"), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), freePort(t))
	lost := 0
	p, port := newPorts(t, Options{Refused: func(model.Family) { lost++ }}), freePort(t)
	x := service("x", model.TCP, port, a, dead)
	apply(p, change(nil, x))
	for range 20 {
		if got := who(t, port); got != "a" {
			t.Fatalf("%q", got)
		}
	}
	apply(p, change(x, service("x", model.TCP, port, dead)))
	if err := end(port); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("with no endpoint that answers: %v", err)
	}
	p.Close()
	if lost != 1 {
		t.Errorf("%d were refused", lost)
	}
}

func TestSessionAffinity(t *testing.T) {
	now := time.Unix(1000, 0)
	var all []netip.AddrPort
	for i := range uint16(50) {
		all = append(all, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), i+1))
	}
	b := &balancer{timeNow: func() time.Time { return now }}
	b.update(&target{endpoints: all, affinity: time.Minute})
	client, other := netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.0.2.1")
	first := b.pick(client, nil)
	for range 10 { // each connection begins the timeout anew
		now = now.Add(50 * time.Second)
		if got := b.pick(client, nil); got != first {
			t.Fatalf("%s and then %s", first, got)
		}
	}
	spread := map[netip.AddrPort]bool{}
	for range 20 {
		now = now.Add(2 * time.Minute)
		spread[b.pick(client, nil)], spread[b.pick(other, nil)] = true, true
	}
	if len(spread) < 5 {
		t.Errorf("after the timeout only %d of 50", len(spread))
	}
	last := b.pick(client, nil)
	if got := b.pick(client, []netip.AddrPort{last}); got == last {
		t.Error("one that did not answer is tried again")
	}
	last = b.pick(client, nil)
	var rest []netip.AddrPort
	for _, e := range all {
		if e != last {
			rest = append(rest, e)
		}
	}
	b.update(&target{endpoints: rest, affinity: time.Minute})
	if got := b.pick(client, nil); got == last {
		t.Error("an endpoint that is gone is used")
	}
	for i := range 4 * maxClients {
		b.pick(netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), nil)
	}
	if len(b.pins) > maxClients {
		t.Errorf("%d clients are remembered", len(b.pins))
	}
}

func TestWeights(t *testing.T) {
	var list []model.Endpoint
	for i, w := range []uint16{1, 6, 3} {
		list = append(list, model.Endpoint{Addr: netip.MustParseAddr("10.0.0.1"), Port: uint16(i), Weight: w})
	}
	b := &balancer{timeNow: time.Now}
	b.update(newTarget(types.NamespacedName{}, 0, list))
	got := map[uint16]int{}
	for range 10000 {
		got[b.pick(netip.Addr{}, nil).Port()]++
	}
	for i, want := range []int{1000, 6000, 3000} {
		if n := got[uint16(i)]; n < want*8/10 || n > want*12/10 {
			t.Errorf("endpoint %d of weights 1, 6, 3: %d of 10,000", i, n)
		}
	}
}

// A Service with externalTrafficPolicy Local: endpoints of this node, or else all.
func TestLocalEndpointsComeFirst(t *testing.T) {
	a, b := endpoint(t, "local"), endpoint(t, "far")
	p, port := newPorts(t, Options{}), freePort(t)
	x := service("x", model.TCP, port, a, b)
	x.Ports[0].Local = x.Ports[0].Cluster[:1]
	f := &x.Ports[0].Frontends[0]
	f.Policy, f.ShortCircuit = model.Local, true
	apply(p, change(nil, x))
	for range 20 {
		if got := who(t, port); got != "local" {
			t.Fatalf("%q", got)
		}
	}
	y := service("x", model.TCP, port, b)
	f = &y.Ports[0].Frontends[0]
	f.Policy, f.ShortCircuit, f.Action = model.Local, true, model.Drop
	apply(p, change(x, y))
	if got := who(t, port); got != "far" {
		t.Errorf("%q", got)
	}
}

func TestAPortThatIsTakenIsToldOnceAndTriedAgain(t *testing.T) {
	a := endpoint(t, "a")
	var failed []string
	listening := -1
	p := newPorts(t, Options{
		Failed: func(s types.NamespacedName, at netip.AddrPort, err error) {
			failed = append(failed, fmt.Sprint(s, " ", at, " ", errors.Is(err, unix.EADDRINUSE)))
		},
		Listening: func(_ model.Family, n int) { listening = n },
	})
	port := freePort(t)
	other, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	x := service("x", model.TCP, port, a)
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	apply(p, change(nil, x))
	p.Retry()
	if p.Listens(model.TCP, at) {
		t.Error("it says that it listens at a port that is taken")
	}
	if want := fmt.Sprintf("[default/x 127.0.0.1:%d true]", port); fmt.Sprint(failed) != want || listening != -1 {
		t.Errorf("%v, want %s; %d are listened at", failed, want, listening)
	}
	_ = other.Close()
	p.Retry()
	if got := who(t, port); got != "a" || len(failed) != 1 || listening != 1 {
		t.Errorf("%q, %v; %d are listened at", got, failed, listening)
	}
	if !p.Listens(model.TCP, at) || p.Listens(model.UDP, at) || p.Listens(model.TCP, netip.AddrPortFrom(at.Addr().Next(), port)) {
		t.Error("it does not say where it listens")
	}
	apply(p, change(x, nil))
	if listening != 0 || p.Listens(model.TCP, at) {
		t.Errorf("%d are listened at", listening)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	lost := make(chan model.Family, 1)
	p := newPorts(t, Options{Refused: func(f model.Family) { lost <- f }})
	p.slots[0] = make(chan struct{}, 2)
	port := freePort(t)
	apply(p, change(nil, service("x", model.TCP, port, endpoint(t, "a"))))
	var open []net.Conn
	for range 2 {
		c := dial(t, port)
		if s, err := bufio.NewReader(c).ReadString('\n'); s != "a\n" {
			t.Fatal(s, err)
		}
		open = append(open, c)
	}
	if err := end(port); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("one too many: %v", err)
	}
	<-lost
	_ = open[0].Close()
	for deadline := time.Now().Add(patience); len(p.slots[0]) > 1 && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if got := who(t, port); got != "a" {
		t.Errorf("%q after one has ended", got)
	}
}

// Close ends what is open, whatever it waits for.
func TestCloseLeavesNothing(t *testing.T) {
	dials := make(chan struct{})
	p := newPorts(t, Options{Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		if strings.HasPrefix(address, "192.0.2.") {
			dials <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}})
	open, hanging := freePort(t), freePort(t)
	apply(p, change(nil, service("x", model.TCP, open, endpoint(t, "a"))),
		change(nil, service("y", model.TCP, hanging, netip.MustParseAddrPort("192.0.2.1:80"))),
		change(nil, service("z", model.UDP, open, udpEndpoint(t, "u"))))
	c := dial(t, open)
	if s, err := bufio.NewReader(c).ReadString('\n'); s != "a\n" {
		t.Fatal(s, err)
	}
	h := dial(t, hanging)
	<-dials
	u := dialUDP(t, open)
	if got := askUDP(t, u); got != "u" {
		t.Fatal(got)
	}
	p.Close()
	for _, c := range []net.Conn{c, h} {
		if _, err := io.ReadAll(c); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%v", err)
		}
	}
	if !refused(open) {
		t.Error("it is still listened at")
	}
}

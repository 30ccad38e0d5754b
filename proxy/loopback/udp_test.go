package loopback

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// udpEndpoint answers each datagram with its name.
func udpEndpoint(t *testing.T, name string) netip.AddrPort {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 100)
		for {
			_, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(name), from)
		}
	}()
	t.Cleanup(func() { _ = c.Close(); <-done })
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

func dialUDP(t *testing.T, port uint16) net.Conn {
	t.Helper()
	c, err := net.Dial("udp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// askUDP asks until an answer comes: a socket that is full loses datagrams.
func askUDP(t *testing.T, c net.Conn) string {
	t.Helper()
	b := make([]byte, 100)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		_, _ = c.Write([]byte("who"))
		_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, err := c.Read(b); err == nil {
			return string(b[:n])
		}
	}
	t.Fatal("no answer")
	return ""
}

func TestUDP(t *testing.T) {
	a, b := udpEndpoint(t, "a"), udpEndpoint(t, "b")
	p, port := newPorts(t, Options{}), freePort(t)
	x := service("x", model.UDP, port, a)
	apply(p, change(nil, x))
	one, two := dialUDP(t, port), dialUDP(t, port)
	for _, c := range []net.Conn{one, two, one} {
		if got := askUDP(t, c); got != "a" {
			t.Errorf("%q", got)
		}
	}
	if n := len(p.slots[1]); n != 2 {
		t.Errorf("%d clients", n)
	}
	// A client whose endpoint stays keeps it; one whose endpoint goes has another at once.
	both := service("x", model.UDP, port, a, b)
	apply(p, change(x, both))
	for range 10 {
		if got := askUDP(t, one); got != "a" {
			t.Errorf("%q", got)
		}
	}
	y := service("x", model.UDP, port, b)
	apply(p, change(both, y))
	for range 10 { // an answer of before may still be under way
		if askUDP(t, one) == "b" {
			break
		}
	}
	for range 3 {
		if got := askUDP(t, one); got != "b" {
			t.Errorf("after its endpoint has gone: %q", got)
		}
	}
	apply(p, change(y, nil))
	for deadline := time.Now().Add(patience); len(p.slots[1]) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d clients are left", len(p.slots[1]))
		}
	}
}

func TestUDPClientsAreForgotten(t *testing.T) {
	old, answered := udpTimeout, udpAnswered
	udpTimeout, udpAnswered = 50*time.Millisecond, 50*time.Millisecond
	p, port := newPorts(t, Options{}), freePort(t)
	t.Cleanup(func() { p.Close(); udpTimeout, udpAnswered = old, answered })
	apply(p, change(nil, service("x", model.UDP, port, udpEndpoint(t, "a"))))
	for range 3 {
		if got := askUDP(t, dialUDP(t, port)); got != "a" {
			t.Fatal(got)
		}
	}
	for deadline := time.Now().Add(patience); len(p.slots[1]) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d clients are left", len(p.slots[1]))
		}
	}
}

func TestUDPClientsAreBounded(t *testing.T) {
	lost := make(chan model.Family, 10000)
	p := newPorts(t, Options{Refused: func(f model.Family) { lost <- f }})
	p.slots[1] = make(chan struct{}, 1)
	port := freePort(t)
	apply(p, change(nil, service("x", model.UDP, port, udpEndpoint(t, "a"))))
	if got := askUDP(t, dialUDP(t, port)); got != "a" {
		t.Fatal(got)
	}
	_, _ = dialUDP(t, port).Write([]byte("who"))
	select {
	case <-lost:
	case <-time.After(patience):
		t.Error("one too many is served")
	}
}

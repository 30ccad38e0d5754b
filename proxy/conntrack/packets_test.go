package conntrack

import (
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
	"github.com/berth-run/berth/proxy/nodetest"
)

// proxied is a lab whose node has a proxy's rules, and a Cleaner.
type proxied struct {
	*nodetest.Lab
	*cluster
	family nodetest.Family
}

// eachFamily runs a test on a lab with pods, for both families.
func eachFamily(t *testing.T, test func(*testing.T, *proxied)) {
	for _, f := range nodetest.Families {
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			l := nodetest.New(t, 3)
			p := &proxied{Lab: l, family: f}
			var programmer *nft.Programmer
			if err := l.Node.Do(func() (err error) {
				programmer, err = nft.Open(nft.Options{Log: slog.New(slog.NewTextHandler(io.Discard, nil))})
				return err
			}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { programmer.Close() })
			p.cluster = newCluster(t, p.starts())
			p.port = nodetest.PodPort
			k := p.cluster
			k.Commit()
			k.c.WillAll(k.State())
			if _, err := programmer.Sync(k.State()); err != nil {
				t.Fatal(err)
			}
			k.c.Done()
			k.program = func(d *model.Delta) {
				if _, err := programmer.Apply(d); err != nil {
					t.Fatal(err)
				}
			}
			test(t, p)
		})
	}
}

// starts starts a Cleaner of the node.
func (p *proxied) starts() *Cleaner {
	c := New(Options{Log: slog.New(slog.DiscardHandler), Swept: func(model.Family, time.Duration, int) {}})
	runIn(p.Node.T, p.Node.NS, c)
	return c
}

// dns is a Service at the family's cluster IP, and a node port.
func (p *proxied) dns() {
	p.service("dns", nodePort(30053), p.family.Cluster)
	p.commit()
}

// pods are the Service's endpoints.
func (p *proxied) pods(n ...int) {
	var ips []string
	for _, i := range n {
		ips = append(ips, p.family.PodIP(i))
	}
	p.slice("dns", p.family.Name, ips...)
	p.commit()
}

// client is a socket with a port of its own, as long as the test.
func (p *proxied) client(to string) net.Conn {
	p.T.Helper()
	c, err := p.Client.Dial(p.family.UDP, to)
	if err != nil {
		p.T.Fatal(err)
	}
	p.T.Cleanup(func() { c.Close() })
	return c
}

// answers sends from a socket until somebody answers who is wanted ("" is nobody at all), as a client would that goes on.
func (p *proxied) answers(c net.Conn, want string) {
	p.T.Helper()
	var got string
	for deadline := time.Now().Add(nodetest.Patience); time.Now().Before(deadline); {
		got = strings.Fields(nodetest.AgainFor(200*time.Millisecond, c) + " -")[0]
		if got == want || want == "" && (got == nodetest.Silence || got == nodetest.Refused) {
			return
		}
	}
	p.T.Errorf("%s answers, want %q", got, want)
}

func (p *proxied) frontends() []string {
	return []string{nodetest.At(p.family.Cluster, 53), nodetest.At(p.family.Node, 30053)}
}

// A client with one socket for all its life goes to the endpoint that there is, and the one that has gone gets nothing more.
func TestConntrack_UDPEntryOutlivesEndpoint(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		p.dns()
		p.pods(1)
		for _, at := range p.frontends() {
			c := p.client(at)
			p.pods(1)
			p.answers(c, "pod1")
			p.pods(2)
			p.answers(c, "pod2")
			p.pods(2, 3)
			p.answers(c, "pod2")
			p.pods(3)
			p.answers(c, "pod3")
		}
	})
}

// One who only sends (statsd) never lets an entry time out: hours of a black hole with zero endpoints, and with a deleted Service.
func TestK8s139628_OneWaySenderAndNoEndpoints(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		p.dns()
		for _, at := range p.frontends() {
			p.pods(1)
			c := p.client(at)
			p.answers(c, "pod1")
			p.pods()
			p.answers(c, "")
			p.pods(2)
			p.answers(c, "pod2")
		}
	})
}

func TestK8s135323_OneWaySenderAndADeletedService(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		for _, at := range p.frontends() {
			p.dns()
			p.pods(1)
			c := p.client(at)
			p.answers(c, "pod1")
			p.delete("dns")
			p.commit()
			p.answers(c, "")
			p.dns() // the slice is still there
			p.answers(c, "pod1")
		}
	})
}

// Packets that were sent before there was a Service went elsewhere, and would go on to.
func TestASenderThatWasThereBeforeTheService(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		for _, at := range p.frontends() {
			c := p.client(at)
			p.answers(c, "")
			p.dns()
			p.answers(c, "")
			p.pods(1)
			p.answers(c, "pod1")
			p.delete("dns")
			p.pods()
		}
	})
}

// What changed while no proxy ran is found by the next one.
func TestK8s135323_EndpointReplacedWhileTheProxyWasAway(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		p.dns()
		p.pods(1)
		var clients []net.Conn
		for _, at := range p.frontends() {
			c := p.client(at)
			p.answers(c, "pod1")
			clients = append(clients, c)
		}
		// The one before is told of nothing.
		p.c = New(Options{Log: slog.New(slog.DiscardHandler), Swept: func(model.Family, time.Duration, int) {}})
		p.pods(2)
		for _, c := range clients {
			p.answers(c, "pod1")
		}
		p.c = p.starts()
		p.c.WillAll(p.State())
		p.c.Done()
		for _, c := range clients {
			p.answers(c, "pod2")
		}
	})
}

// Clients of endpoints that stay keep them, whatever happens to others, and those who talk to pods or the node are left alone.
func TestOthersKeepTheirConnections(t *testing.T) {
	eachFamily(t, func(t *testing.T, p *proxied) {
		p.dns()
		p.service("other", func(s *corev1.Service) { s.Spec.Ports[0].Port = 54 }, map[model.Family]string{model.IPv4: "10.96.0.2", model.IPv6: "fd96::2"}[p.family.Of])
		p.Node.ServeUDP(30054)
		p.pods(1)
		pod, node := p.client(nodetest.At(p.family.PodIP(1), nodetest.PodPort)), p.client(nodetest.At(p.family.Node, 30054))
		service := p.client(p.frontends()[0])
		for _, c := range []net.Conn{pod, service} {
			p.answers(c, "pod1")
		}
		p.answers(node, "node")
		keys := func() (all []string) {
			if err := p.Node.Do(func() error {
				b := &table{t: t}
				for _, f := range b.flows() {
					_, client, sent, _ := f.ends(t)
					if strings.HasPrefix(string(f), "udp") && client.Addr() == netip.MustParseAddr(p.family.Client) && sent.Port() != 53 {
						all = append(all, string(f))
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			return all
		}
		before := keys()
		if len(before) != 2 {
			t.Fatalf("%q", before)
		}
		p.pods(2)
		p.answers(service, "pod2")
		if after := keys(); strings.Join(after, " ") != strings.Join(before, " ") {
			t.Errorf("%q, there were %q", after, before)
		}
	})
}

package loopback

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// Bounds of what programs of the node can have a proxy hold open, and for how long.
const (
	maxConnections = 8192 // of TCP, and as many clients of UDP
	dialWithin     = 5 * time.Second
	dialAttempts   = 3 // endpoints that are tried for a connection
	maxClients     = 256
)

// Options are what to serve.
type Options struct {
	// IPv4 and IPv6 are whether there are node ports at 127.0.0.1 and ::1.
	IPv4, IPv6 bool
	// Failed, if it is not nil, is told of a node port that cannot be listened at; once, until it could.
	Failed func(service types.NamespacedName, port netip.AddrPort, err error)
	// Listening, if it is not nil, is told how many ports of a family are listened at, when that changes.
	Listening func(f model.Family, n int)
	// Refused, if it is not nil, is called for a connection or client that was one too many, or that no endpoint answered.
	Refused func(f model.Family)
	Log     *slog.Logger
	// Dial connects to endpoints; that of net.Dialer if it is nil.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Ports listens at node ports. But for what it is told by connections, and Listens, it belongs to one goroutine.
type Ports struct {
	o      Options
	wanted map[key]*target
	open   map[key]server // with mu changed, and read by others
	failed map[key]bool
	counts [model.Families]int
	mu     sync.Mutex

	ctx   context.Context
	stop  context.CancelFunc
	slots [2]chan struct{} // of TCP and UDP
	all   sync.WaitGroup
}

// key is one node port.
type key struct {
	family   model.Family
	protocol model.Protocol
	port     uint16
}

// target is whose port it is, and where it leads.
type target struct {
	service   types.NamespacedName
	endpoints []netip.AddrPort
	sums      []int // of the weights of endpoints up to each; nil where all have the same
	affinity  time.Duration
}

func newTarget(service types.NamespacedName, affinity time.Duration, list []model.Endpoint) *target {
	t := &target{service: service, affinity: affinity}
	sum := 0
	for _, e := range list {
		t.endpoints = append(t.endpoints, e.AddrPort())
		if sum += int(e.Weight); sum > 0 {
			t.sums = append(t.sums, sum)
		}
	}
	return t
}

// draw is the index of any endpoint, each as often as its weight says.
func (t *target) draw() int {
	if t.sums == nil {
		return rand.IntN(len(t.endpoints))
	}
	i, found := slices.BinarySearch(t.sums, rand.IntN(t.sums[len(t.sums)-1]))
	if found {
		i++ // the sum is the first number of the next one
	}
	return i
}

// server is what listens at a port.
type server interface {
	update(*target)
	close()
}

// New makes a Ports that serves nothing yet. Close has to be called.
func New(o Options) *Ports {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Dial == nil {
		o.Dial = (&net.Dialer{}).DialContext
	}
	p := &Ports{o: o, wanted: map[key]*target{}, open: map[key]server{}, failed: map[key]bool{}}
	p.ctx, p.stop = context.WithCancel(context.Background())
	for i := range p.slots {
		p.slots[i] = make(chan struct{}, maxConnections)
	}
	return p
}

// Apply follows a Delta. A nil Ports has none.
func (p *Ports) Apply(d *model.Delta) {
	if p == nil || !p.o.IPv4 && !p.o.IPv6 {
		return
	}
	touched := map[key]bool{}
	for i := range d.Services {
		p.each(d.Services[i].Old, func(k key, _ *target) {
			delete(p.wanted, k)
			touched[k] = true
		})
	}
	for i := range d.Services { // a port may have gone from one Service to another
		p.each(d.Services[i].New, func(k key, t *target) {
			p.wanted[k] = t
			touched[k] = true
		})
	}
	for k := range touched {
		if s := p.open[k]; s != nil && p.wanted[k] == nil {
			s.close()
			p.listening(k, nil)
		}
		if p.wanted[k] == nil {
			delete(p.failed, k)
		}
	}
	for k := range touched {
		p.settle(k)
	}
}

// Retry tries again what could not be listened at.
func (p *Ports) Retry() {
	if p == nil {
		return
	}
	for k := range p.failed {
		p.settle(k)
	}
}

// Close ends all, open connections included, and returns when nothing is left of it.
func (p *Ports) Close() {
	if p == nil {
		return
	}
	p.stop()
	for k, s := range p.open {
		s.close()
		p.listening(k, nil)
	}
	clear(p.wanted)
	clear(p.failed)
	p.all.Wait()
}

// each calls f for the node ports of a Service that lead somewhere.
func (p *Ports) each(s *model.Service, f func(key, *target)) {
	if s == nil {
		return
	}
	on := [model.Families]bool{p.o.IPv4, p.o.IPv6}
	for i := range s.Ports {
		port := &s.Ports[i]
		if !on[port.Family] || port.Protocol != model.TCP && port.Protocol != model.UDP {
			continue
		}
		for j := range port.Frontends {
			front := &port.Frontends[j]
			if front.Kind != model.NodePort {
				continue
			}
			if list := endpointsOf(port, front); len(list) > 0 {
				f(key{port.Family, port.Protocol, front.Addr.Port()}, newTarget(s.Name, port.Affinity, list))
			}
		}
	}
}

// endpointsOf are those that a program of the node is sent to: where the external traffic policy is Local those of the node, as
// kube-proxy has it; if there are none, all, as at the other addresses of the node.
func endpointsOf(port *model.Port, f *model.Frontend) []model.Endpoint {
	if list := port.Endpoints(f); len(list) > 0 {
		return list
	}
	if f.ShortCircuit {
		return port.Cluster
	}
	return nil
}

// settle has what listens at a port be as wanted.
func (p *Ports) settle(k key) {
	t := p.wanted[k]
	if t == nil {
		return
	}
	if s := p.open[k]; s != nil {
		s.update(t)
		return
	}
	s, err := p.listen(k, t)
	if err != nil {
		if !p.failed[k] {
			p.failed[k] = true
			p.o.Log.Warn("a node port cannot be listened at on loopback; it is tried again", "service", t.service.String(), "address", k.addr().String(), "protocol", k.protocol.String(), "error", err)
			if p.o.Failed != nil {
				p.o.Failed(t.service, k.addr(), err)
			}
		}
		return
	}
	delete(p.failed, k)
	p.listening(k, s)
}

// listening notes what listens at a port; nil is nothing.
func (p *Ports) listening(k key, s server) {
	p.mu.Lock()
	if s == nil {
		delete(p.open, k)
		p.counts[k.family]--
	} else {
		p.open[k] = s
		p.counts[k.family]++
	}
	p.mu.Unlock()
	if p.o.Listening != nil {
		p.o.Listening(k.family, p.counts[k.family])
	}
}

// Listens is whether it listens at a node port; any goroutine may ask.
func (p *Ports) Listens(protocol model.Protocol, at netip.AddrPort) bool {
	k := key{model.IPv4, protocol, at.Port()}
	if at.Addr().Is6() {
		k.family = model.IPv6
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open[k] != nil && k.addr() == at
}

func (p *Ports) listen(k key, t *target) (server, error) {
	b := &balancer{timeNow: time.Now}
	b.update(t)
	if k.protocol == model.UDP {
		return p.listenUDP(k, b)
	}
	return p.listenTCP(k, b)
}

// addr is where a port is listened at.
func (k key) addr() netip.AddrPort {
	if k.family == model.IPv6 {
		return netip.AddrPortFrom(netip.IPv6Loopback(), k.port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), k.port)
}

// network is that of package net.
func (k key) network() string {
	n := "tcp"
	if k.protocol == model.UDP {
		n = "udp"
	}
	if k.family == model.IPv6 {
		return n + "6"
	}
	return n + "4"
}

func (p *Ports) refused(k key) {
	if p.o.Refused != nil {
		p.o.Refused(k.family)
	}
}

// take takes a slot for a connection or a client; it says no where there are too many.
func (p *Ports) take(k key) (release func(), ok bool) {
	slots := p.slots[0]
	if k.protocol == model.UDP {
		slots = p.slots[1]
	}
	select {
	case slots <- struct{}{}:
		return func() { <-slots }, true
	default:
		p.refused(k)
		return nil, false
	}
}

// balancer chooses endpoints of a port.
type balancer struct {
	timeNow func() time.Time

	mu     sync.Mutex
	target *target
	pins   map[netip.Addr]pin // of session affinity, by client
}

// pin is where a client is sent again, until a time.
type pin struct {
	endpoint netip.AddrPort
	until    time.Time
}

func (b *balancer) update(t *target) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.target != nil && b.target.affinity != t.affinity {
		b.pins = nil
	}
	b.target = t
}

// has is whether an endpoint is one of the port's.
func (b *balancer) has(endpoint netip.AddrPort) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Contains(b.target.endpoints, endpoint)
}

// pick chooses an endpoint for a client: the one of before with session affinity, or any, those in tried last.
func (b *balancer) pick(client netip.Addr, tried []netip.AddrPort) netip.AddrPort {
	b.mu.Lock()
	defer b.mu.Unlock()
	t, now := b.target, b.timeNow()
	if last, ok := b.pins[client]; ok && now.Before(last.until) && slices.Contains(t.endpoints, last.endpoint) && !slices.Contains(tried, last.endpoint) {
		b.pins[client] = pin{last.endpoint, now.Add(t.affinity)}
		return last.endpoint
	}
	// Any, and from there on the first that was not tried.
	first := t.draw()
	chosen := t.endpoints[first]
	for i := range t.endpoints {
		if e := t.endpoints[(first+i)%len(t.endpoints)]; !slices.Contains(tried, e) {
			chosen = e
			break
		}
	}
	if t.affinity > 0 {
		b.pin(client, pin{chosen, now.Add(t.affinity)}, now)
	}
	return chosen
}

// pin remembers a client. Clients have addresses of this node, of which there are few.
func (b *balancer) pin(client netip.Addr, p pin, now time.Time) {
	if b.pins == nil {
		b.pins = map[netip.Addr]pin{}
	}
	if len(b.pins) >= maxClients {
		for c, p := range b.pins {
			if now.After(p.until) || len(b.pins) >= maxClients {
				delete(b.pins, c)
			}
		}
	}
	b.pins[client] = p
}

// dial connects to an endpoint of a port, and to others where one does not answer.
func (p *Ports) dial(k key, b *balancer, client netip.Addr) (net.Conn, netip.AddrPort, error) {
	ctx, stop := context.WithTimeout(p.ctx, dialWithin)
	defer stop()
	var tried []netip.AddrPort
	var errs []error
	for range dialAttempts {
		endpoint := b.pick(client, tried)
		if slices.Contains(tried, endpoint) || ctx.Err() != nil {
			break
		}
		c, err := p.o.Dial(ctx, k.network(), endpoint.String())
		if err == nil {
			return c, endpoint, nil
		}
		tried, errs = append(tried, endpoint), append(errs, err)
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

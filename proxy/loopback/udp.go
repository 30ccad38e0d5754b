package loopback

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// How long a client of UDP is remembered after its last datagram: as in conntrack, less where no answer has come yet.
var (
	udpTimeout  = 30 * time.Second
	udpAnswered = 120 * time.Second
)

const maxDatagram = 64 << 10

// udpServer listens at a node port of UDP. Each client has a socket of its own to its endpoint, by which answers find back.
type udpServer struct {
	ports    *Ports
	key      key
	balancer *balancer
	conn     *net.UDPConn

	mu      sync.Mutex
	closed  bool
	clients map[netip.AddrPort]*udpClient
}

// udpClient is a client with its endpoint.
type udpClient struct {
	endpoint netip.AddrPort
	conn     net.Conn
	answered bool
}

func (p *Ports) listenUDP(k key, b *balancer) (server, error) {
	c, err := (&net.ListenConfig{}).ListenPacket(p.ctx, k.network(), k.addr().String())
	if err != nil {
		return nil, err
	}
	s := &udpServer{ports: p, key: k, balancer: b, conn: c.(*net.UDPConn), clients: map[netip.AddrPort]*udpClient{}}
	stop := context.AfterFunc(p.ctx, s.close)
	p.all.Go(func() { defer stop(); s.receive() })
	return s, nil
}

// update has clients of endpoints that are gone be sent to others with their next datagram.
func (s *udpServer) update(t *target) {
	s.balancer.update(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	for from, c := range s.clients {
		if !s.balancer.has(c.endpoint) {
			s.forget(from, c)
		}
	}
}

// close ends listening and all clients: without a socket no answer could have the right source.
func (s *udpServer) close() {
	_ = s.conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for from, c := range s.clients {
		s.forget(from, c)
	}
}

// forget has the lock.
func (s *udpServer) forget(from netip.AddrPort, c *udpClient) {
	if s.clients[from] == c {
		delete(s.clients, from)
	}
	_ = c.conn.Close()
}

func (s *udpServer) receive() {
	b := make([]byte, maxDatagram)
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of an answer that did not arrive
		}
		c := s.client(from)
		if c == nil {
			continue
		}
		s.mu.Lock()
		_ = c.conn.SetReadDeadline(time.Now().Add(c.timeout()))
		s.mu.Unlock()
		if _, err := c.conn.Write(b[:n]); err != nil {
			s.mu.Lock()
			s.forget(from, c)
			s.mu.Unlock()
		}
	}
}

// timeout has the server's lock.
func (c *udpClient) timeout() time.Duration {
	if c.answered {
		return udpAnswered
	}
	return udpTimeout
}

// client is the one of an address; a new one if it is not known. Nil is one too many, or none that can be sent anywhere.
func (s *udpServer) client(from netip.AddrPort) *udpClient {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.clients[from]; c != nil || s.closed {
		return c
	}
	release, ok := s.ports.take(s.key)
	if !ok {
		return nil
	}
	conn, endpoint, err := s.ports.dial(s.key, s.balancer, from.Addr().Unmap()) // waits for nothing: it is UDP
	if err != nil {
		s.ports.refused(s.key)
		release()
		return nil
	}
	c := &udpClient{endpoint: endpoint, conn: conn}
	s.clients[from] = c
	s.ports.all.Go(func() {
		defer release()
		s.answer(from, c)
	})
	return c
}

// answer hands answers back until there are none for too long, or the endpoint says that nobody listens.
func (s *udpServer) answer(from netip.AddrPort, c *udpClient) {
	b := make([]byte, maxDatagram)
	for {
		n, err := c.conn.Read(b)
		s.mu.Lock()
		if err != nil {
			s.forget(from, c)
			s.mu.Unlock()
			return
		}
		c.answered = true
		_ = c.conn.SetReadDeadline(time.Now().Add(c.timeout()))
		s.mu.Unlock()
		_, _ = s.conn.WriteToUDPAddrPort(b[:n], from) // a client that has gone gets none
	}
}

package loopback

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// acceptAgain is how long after a failure, which is want of descriptors or memory, connections are accepted again.
const acceptAgain = 100 * time.Millisecond

// tcpServer listens at a node port of TCP.
type tcpServer struct {
	ports    *Ports
	key      key
	balancer *balancer
	listener net.Listener
}

func (p *Ports) listenTCP(k key, b *balancer) (server, error) {
	l, err := (&net.ListenConfig{}).Listen(p.ctx, k.network(), k.addr().String())
	if err != nil {
		return nil, err
	}
	s := &tcpServer{ports: p, key: k, balancer: b, listener: l}
	p.all.Go(s.accept)
	return s, nil
}

func (s *tcpServer) update(t *target) { s.balancer.update(t) }

// close ends listening. Connections go on.
func (s *tcpServer) close() { _ = s.listener.Close() }

func (s *tcpServer) accept() {
	for {
		c, err := s.listener.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			s.ports.o.Log.Debug("no connection could be accepted", "address", s.key.addr().String(), "error", err)
			select {
			case <-s.ports.ctx.Done():
			case <-time.After(acceptAgain):
			}
			continue
		}
		release, ok := s.ports.take(s.key)
		if !ok {
			reset(c)
			continue
		}
		s.ports.all.Go(func() {
			defer release()
			s.serve(c)
		})
	}
}

// serve leads a connection to an endpoint. The client sees a reset where none answers.
func (s *tcpServer) serve(c net.Conn) {
	from, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	to, _, err := s.ports.dial(s.key, s.balancer, from.Addr())
	if err != nil {
		s.ports.o.Log.Debug("no endpoint of a node port answers", "address", s.key.addr().String(), "error", err)
		s.ports.refused(s.key)
		reset(c)
		return
	}
	join(s.ports.ctx, c, to)
}

// join copies between two connections until both ways have ended, and closes them. What ends one way is told the other end: the
// end of what is sent by half a close, a failure by a reset. The end of the context resets both.
func join(ctx context.Context, a, b net.Conn) {
	var failed atomic.Bool
	abort := func() {
		failed.Store(true)
		reset(a)
		reset(b)
	}
	stop := context.AfterFunc(ctx, abort)
	defer stop()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			// In the kernel (splice), since both are of TCP.
			if _, err := io.Copy(way[1], way[0]); err != nil {
				abort()
				return
			}
			if half, ok := way[1].(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite() // it may be closed from the other side by now
			}
		})
	}
	both.Wait()
	if !failed.Load() {
		_, _ = a.Close(), b.Close()
	}
}

// reset closes a connection so that the other end sees that it has failed.
func reset(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = c.Close()
}

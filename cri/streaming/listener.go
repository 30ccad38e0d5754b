package streaming

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// listener counts connections, closes those beyond a limit at once, and remembers the others: http.Server forgets a
// connection when a session takes it over.
type listener struct {
	net.Listener
	max int

	mu    sync.Mutex
	conns map[*conn]struct{}
}

func newListener(l net.Listener, max int) *listener {
	return &listener{Listener: l, max: max, conns: map[*conn]struct{}{}}
}

// Accept returns the next connection within the limit. Those beyond are closed rather than left in the queue, where a
// client would hang without knowing why.
func (l *listener) Accept() (net.Conn, error) {
	for {
		inner, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.add(inner); c != nil {
			return c, nil
		}
		_ = inner.Close() // nothing was sent, nothing is lost
	}
}

func (l *listener) add(inner net.Conn) *conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.conns) >= l.max {
		return nil
	}
	c := &conn{Conn: inner, owner: l}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	l.conns[c] = struct{}{}
	return c
}

func (l *listener) closeConns() {
	l.mu.Lock()
	conns := make([]*conn, 0, len(l.conns))
	for c := range l.conns {
		conns = append(conns, c)
	}
	l.mu.Unlock()
	for _, c := range conns {
		_ = c.abort() // the sessions see it as a broken connection
	}
}

// conn is a connection with a context that ends when the connection does. Once a session has taken a connection over,
// net/http no longer tells whether the client is there; the first read that fails does.
type conn struct {
	net.Conn
	owner  *listener
	ctx    context.Context
	cancel context.CancelFunc
	taken  atomic.Bool // over by a session
	closed atomic.Bool
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	// A deadline is how net/http takes its own read back when a session takes over.
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.cancel()
	}
	return n, err
}

// Close ends the connection. One that a session has taken over is closed for writing first, and then read until its client
// has closed it as well: the kernel answers what comes later with a reset, and what we sent last, an exit code, could be
// lost with it.
func (c *conn) Close() error {
	c.cancel()
	tcp, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok || !c.taken.Load() || !c.closed.CompareAndSwap(false, true) || tcp.CloseWrite() != nil {
		return c.abort()
	}
	_ = c.SetDeadline(time.Now().Add(farewell))
	go func() { // for as long as that at most
		_, _ = io.Copy(io.Discard, c.Conn)
		_ = c.abort()
	}()
	return nil
}

// abort ends the connection at once.
func (c *conn) abort() error {
	c.cancel()
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// connContext makes the context of a connection that of its requests.
func connContext(ctx context.Context, nc net.Conn) context.Context {
	c, ok := nc.(*conn)
	if !ok {
		return ctx
	}
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(c.ctx, cancel)
	return ctx
}

package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

const (
	// maxForwards is how many connections a client may have forwarded at once. A page in a browser opens six.
	maxForwards = 256
	// pairWait is how long the second stream of a forwarded connection may be behind the first.
	pairWait = 30 * time.Second
)

// forwardSPDY serves PortForward: each forwarded connection is two streams, for data and for errors.
func (s *sessions) forwardSPDY(w http.ResponseWriter, r *http.Request, req request) {
	if _, err := httpstream.Handshake(r, w, portforward.SupportedProtocols); err != nil {
		return // the client has been told
	}
	f := newForwards(r.Context(), s, req.id)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(guardedWriter{w, -1, f.reset}, r, f.stream)
	if conn == nil {
		return
	}
	f.serve(conn)
}

// forwardTunnelled serves PortForward over WebSocket: the messages hold the bytes of a SPDY connection.
func (s *sessions) forwardTunnelled(w http.ResponseWriter, r *http.Request, req request) {
	ws := s.upgrade(w, r, forwardProtocols)
	if ws == nil {
		return
	}
	if ws.Subprotocol() != tunnelProtocol {
		s.forwardChannels(r, ws, req)
		return
	}
	f := newForwards(r.Context(), s, req.id)
	tunnel := &tunnel{Conn: ws.NetConn(), ws: ws}
	g := newGuard(tunnel, -1)
	g.reset = f.reset
	conn, err := spdy.NewServerConnection(guardedConn{tunnel, g}, f.stream)
	if err != nil {
		s.log.Debug("port-forward did not begin", "error", err)
		_ = ws.Close()
		return
	}
	f.serve(conn)
}

// forwards are the forwarded connections of one client.
type forwards struct {
	sessions *sessions
	sandbox  string
	ctx      context.Context
	cancel   context.CancelFunc
	ready    chan struct{} // conn is set
	conn     httpstream.Connection

	mu    sync.Mutex
	pairs map[string]*pair              // that are not complete
	whole map[uint32]context.CancelFunc // the others, by the numbers of their data streams
	live  int                           // all
	all   sync.WaitGroup
}

// pair is a forwarded connection: its streams come one after the other, in either order.
type pair struct {
	data, failure httpstream.Stream
	replied       [2]<-chan struct{}
	late          *time.Timer
}

func newForwards(ctx context.Context, s *sessions, sandbox string) *forwards {
	f := &forwards{sessions: s, sandbox: sandbox, ready: make(chan struct{}), pairs: map[string]*pair{}, whole: map[uint32]context.CancelFunc{}}
	f.ctx, f.cancel = context.WithCancel(ctx)
	return f
}

// serve returns when the client has gone, and all that it had forwarded has ended.
func (f *forwards) serve(conn httpstream.Connection) {
	f.conn = conn
	conn.SetIdleTimeout(f.sessions.idle)
	close(f.ready)
	select {
	case <-conn.CloseChan():
	case <-f.ctx.Done():
	}
	f.cancel()
	_ = conn.Close()
	f.mu.Lock()
	for _, p := range f.pairs {
		p.late.Stop()
	}
	f.mu.Unlock()
	f.all.Wait()
}

// stream takes a stream that a client opens; an error refuses it.
func (f *forwards) stream(stream httpstream.Stream, replied <-chan struct{}) error {
	h := stream.Headers()
	port, err := strconv.ParseUint(h.Get(portforward.PortHeader), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("header %s: %.20q is outside 1..65535", portforward.PortHeader, h.Get(portforward.PortHeader))
	}
	kind := h.Get(portforward.StreamType)
	if kind != portforward.StreamTypeData && kind != portforward.StreamTypeError {
		return fmt.Errorf("header %s: %.20q is neither %q nor %q", portforward.StreamType, kind, portforward.StreamTypeData, portforward.StreamTypeError)
	}
	id := h.Get(portforward.PortForwardRequestIDHeader)
	if id == "" { // an old client: its error streams have odd numbers, and their data streams the next
		number := int64(stream.Identifier())
		if kind == portforward.StreamTypeData {
			number -= 2
		}
		id = strconv.FormatInt(number, 10)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return f.ctx.Err()
	}
	p := f.pairs[id]
	if p == nil {
		if f.live >= maxForwards {
			return fmt.Errorf("%d connections are forwarded already", f.live)
		}
		f.live++
		p = &pair{}
		p.late = time.AfterFunc(pairWait, func() { f.timeout(id, p) })
		f.pairs[id] = p
	}
	slot, i := &p.data, 0
	if kind == portforward.StreamTypeError {
		slot, i = &p.failure, 1
	}
	if *slot != nil {
		return fmt.Errorf("header %s: %.40q has a stream of type %s already", portforward.PortForwardRequestIDHeader, id, kind)
	}
	*slot, p.replied[i] = stream, replied
	if p.data != nil && p.failure != nil {
		p.late.Stop()
		delete(f.pairs, id)
		ctx, cancel := context.WithCancel(f.ctx)
		f.whole[p.data.Identifier()] = cancel
		f.all.Go(func() {
			defer cancel()
			f.forward(ctx, p, int32(port))
		})
	}
	return nil
}

// timeout ends a pair that was never complete.
func (f *forwards) timeout(id string, p *pair) {
	f.mu.Lock()
	if f.pairs[id] != p {
		f.mu.Unlock()
		return
	}
	delete(f.pairs, id)
	f.live--
	f.mu.Unlock()
	if p.failure != nil {
		_, _ = io.WriteString(p.failure, fmt.Sprintf("no data stream came within %s", pairWait))
	}
	f.end(p)
}

// reset ends a connection whose client has given it up.
func (f *forwards) reset(stream uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if cancel := f.whole[stream]; cancel != nil {
		cancel()
	}
}

// forward serves one connection.
func (f *forwards) forward(ctx context.Context, p *pair, port int32) {
	defer func() {
		f.mu.Lock()
		f.live--
		delete(f.whole, p.data.Identifier())
		f.mu.Unlock()
	}()
	<-f.ready
	for _, replied := range p.replied { // what is sent before is lost
		select {
		case <-replied:
		case <-f.ctx.Done():
			return
		}
	}
	if err := f.sessions.forward(ctx, f.sandbox, port, p.data); err != nil && ctx.Err() == nil {
		_, _ = io.WriteString(p.failure, forwardFailed(port, err))
		_ = p.failure.Close()
		_ = p.data.Reset() // it did not just end
	}
	f.end(p)
}

// end closes both streams and forgets them: the client may leave its side open.
func (f *forwards) end(p *pair) {
	<-f.ready
	for _, s := range []httpstream.Stream{p.data, p.failure} {
		if s != nil {
			_ = s.Close()
			_ = s.Reset() // of a closed stream: only frees it here
			f.conn.RemoveStreams(s)
		}
	}
}

func forwardFailed(port int32, err error) string {
	return fmt.Sprintf("port %d cannot be forwarded: %v", port, err)
}

// tunnel is the byte stream in the messages of a WebSocket.
type tunnel struct {
	net.Conn
	ws *websocket.Conn
	r  io.Reader // the message under way

	mu sync.Mutex
}

func (t *tunnel) Read(p []byte) (int, error) {
	for {
		if t.r == nil {
			_, r, err := t.ws.NextReader()
			if websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived) {
				return 0, io.EOF
			}
			if err != nil {
				return 0, err
			}
			t.r = r
		}
		n, err := t.r.Read(p)
		if errors.Is(err, io.EOF) {
			t.r, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (t *tunnel) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (t *tunnel) Close() error {
	_ = t.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(time.Second))
	return t.ws.Close()
}

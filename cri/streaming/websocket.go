package streaming

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Protocols that crictl and critest offer over WebSocket, and no others; the library speaks neither. The kubelet speaks
// SPDY with us.
const (
	v5Protocol     = remotecommand.StreamProtocolV5Name // KEP-4006: v4 and a message that closes stdin
	tunnelProtocol = "SPDY/3.1+portforward.k8s.io"      // KEP-4006: SPDY in binary messages
	spdyProtocol   = "portforward.k8s.io"
)

// bridge serves these protocols by a session over SPDY with this server itself, the same way as the kubelet translates
// for its clients. Everything else goes to the library.
type bridge struct {
	library http.Handler
	tokens  *tokens
	addr    string // of this server
	log     *slog.Logger
}

func (b *bridge) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	kind, token := path.Split(r.URL.Path)
	if wsstream.IsWebSocketRequest(r) {
		switch {
		case kind == "/portforward/" && offers(r, tunnelProtocol):
			b.tunnel(w, r)
			return
		case kind != "/portforward/" && offers(r, v5Protocol):
			if a, ok := b.tokens.peek(token); ok { // the session over SPDY takes it
				b.translate(w, r, a)
				return
			}
			http.NotFound(w, r)
			return
		}
	}
	if a, ok := b.tokens.take(token); ok {
		r = r.WithContext(withAsked(r.Context(), a))
	}
	b.library.ServeHTTP(w, r)
}

// offers says whether a client would speak a protocol.
func offers(r *http.Request, protocol string) bool {
	for _, line := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(line, ",") {
			if strings.TrimSpace(p) == protocol {
				return true
			}
		}
	}
	return false
}

// own is a request to this server for the same session over SPDY.
func (b *bridge) own(ctx context.Context, r *http.Request, protocol string) (*http.Request, error) {
	u := url.URL{Scheme: "http", Host: b.addr, Path: r.URL.Path}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	return req, nil
}

// refuse answers what the own session answered instead of beginning.
func refuse(w http.ResponseWriter, r *http.Request, resp *http.Response) {
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		http.NotFound(w, r)
		return
	}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
	http.Error(w, string(text), resp.StatusCode)
}

// translate serves Exec or Attach over v5.
func (b *bridge) translate(w http.ResponseWriter, r *http.Request, a asked) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	rt, err := spdy.NewRoundTripperWithConfig(spdy.RoundTripperConfig{
		Proxier: func(*http.Request) (*url.URL, error) { return nil, nil },
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req, err := b.own(ctx, r, remotecommand.StreamProtocolV4Name)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		refuse(w, r, resp)
		return
	}
	inner, err := rt.NewConnection(resp)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer inner.Close()

	outer := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{v5Protocol: {Binary: true, Channels: channels(a)}})
	outer.SetIdleTimeout(idle)
	_, ws, err := outer.Open(w, r)
	if err != nil {
		b.log.Debug("websocket session did not begin", "err", err)
		return
	}
	defer outer.Close()
	// A client that has gone takes the own session with it, which knows what that means.
	stop := context.AfterFunc(r.Context(), func() { _ = inner.Close() })
	defer stop()
	if err := relay(inner, ws, a); err != nil {
		b.log.Debug("websocket session ended", "err", err)
	}
}

// idle is how long a connection may say nothing, as in the library.
const idle = 4 * time.Hour

// channels are those of a WebSocket by their numbers: stdin, stdout, stderr, error, resize.
func channels(a asked) []wsstream.ChannelType {
	pick := func(wanted bool, t wsstream.ChannelType) wsstream.ChannelType {
		if wanted {
			return t
		}
		return wsstream.IgnoreChannel
	}
	return []wsstream.ChannelType{
		remotecommand.StreamStdIn:  pick(a.stdin, wsstream.ReadChannel),
		remotecommand.StreamStdOut: pick(a.stdout, wsstream.WriteChannel),
		remotecommand.StreamStdErr: pick(a.stderr && !a.tty, wsstream.WriteChannel),
		remotecommand.StreamErr:    wsstream.WriteChannel,
		remotecommand.StreamResize: pick(a.tty, wsstream.ReadChannel),
	}
}

// relay opens the streams of the session and copies until its outputs end.
func relay(inner httpstream.Connection, ws []io.ReadWriteCloser, a asked) error {
	var outputs sync.WaitGroup
	for _, s := range []struct {
		wanted bool
		kind   string
		ws     io.ReadWriteCloser
		input  bool
	}{
		{true, remotecommand.StreamTypeError, ws[remotecommand.StreamErr], false},
		{a.stdin, remotecommand.StreamTypeStdin, ws[remotecommand.StreamStdIn], true},
		{a.stdout, remotecommand.StreamTypeStdout, ws[remotecommand.StreamStdOut], false},
		{a.stderr && !a.tty, remotecommand.StreamTypeStderr, ws[remotecommand.StreamStdErr], false},
		{a.tty, remotecommand.StreamTypeResize, ws[remotecommand.StreamResize], true},
	} {
		if !s.wanted {
			continue
		}
		stream, err := inner.CreateStream(http.Header{remotecommandHeader: {s.kind}})
		if err != nil {
			return fmt.Errorf("stream %s: %w", s.kind, err)
		}
		if s.input { // ends with the client, or when the session's connection is closed
			go func() {
				_, _ = io.Copy(stream, s.ws)
				_ = stream.Close()
			}()
			continue
		}
		_ = stream.Close() // nothing is sent there
		outputs.Go(func() { _, _ = io.Copy(s.ws, stream) })
	}
	outputs.Wait()
	return nil
}

// remotecommandHeader is StreamType as http.Header has it.
var remotecommandHeader = http.CanonicalHeaderKey(remotecommand.StreamType)

// tunnel serves PortForward: what the messages hold are the bytes of a session over SPDY.
func (b *bridge) tunnel(w http.ResponseWriter, r *http.Request) {
	req, err := b.own(r.Context(), r, spdyProtocol)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	req.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
	var d net.Dialer
	inner, err := d.DialContext(r.Context(), "tcp", b.addr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer inner.Close()
	from := bufio.NewReader(inner)
	err = req.Write(inner)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(from, req)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		refuse(w, r, resp)
		return
	}
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			if !slices.Contains(c.Protocol, tunnelProtocol) {
				return errors.New("protocol is not offered")
			}
			c.Protocol = []string{tunnelProtocol}
			return nil
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			var down sync.WaitGroup
			down.Go(func() { _, _ = io.Copy(ws, from); _ = ws.Close() })
			_, _ = io.Copy(inner, ws)
			_ = inner.Close()
			down.Wait()
		},
	}.ServeHTTP(w, r)
}

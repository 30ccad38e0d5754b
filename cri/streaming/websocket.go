package streaming

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/berth-run/berth/cri/pods"
)

// dialect is a way to speak of channels over WebSocket.
type dialect struct {
	base64     bool
	structured bool // the error stream has a Status of Kubernetes' API
	closes     bool // a channel can be closed by itself (KEP-4006)
}

// dialects by the names of their protocols; the last is that of a client that names none.
var dialects = map[string]dialect{
	remotecommand.StreamProtocolV5Name: {structured: true, closes: true},
	remotecommand.StreamProtocolV4Name: {structured: true},
	"v4.base64.channel.k8s.io":         {structured: true, base64: true},
	remotecommand.StreamProtocolV1Name: {},
	"base64.channel.k8s.io":            {base64: true},
	"":                                 {},
}

// remoteProtocols are what we offer for exec and attach, the best first.
var remoteProtocols = []string{
	remotecommand.StreamProtocolV5Name, remotecommand.StreamProtocolV4Name, "v4.base64.channel.k8s.io",
	remotecommand.StreamProtocolV1Name, "base64.channel.k8s.io",
}

// forwardProtocols are what we offer for port-forward: SPDY in binary messages (KEP-4006), and two channels for each port.
var forwardProtocols = []string{tunnelProtocol, remotecommand.StreamProtocolV4Name, "v4.base64.channel.k8s.io"}

const tunnelProtocol = "SPDY/3.1+portforward.k8s.io"

// upgrade answers a WebSocket's handshake. It returns nil where the client was told that it cannot be.
func (s *sessions) upgrade(w http.ResponseWriter, r *http.Request, offered []string) *websocket.Conn {
	if asked := websocket.Subprotocols(r); len(asked) > 0 && !slices.ContainsFunc(asked, func(p string) bool { return slices.Contains(offered, p) }) {
		http.Error(w, fmt.Sprintf("none of the protocols %q is spoken here, but %q", asked, offered), http.StatusBadRequest)
		return nil
	}
	up := websocket.Upgrader{
		HandshakeTimeout: readHeaderTimeout,
		ReadBufferSize:   4 << 10,
		WriteBufferSize:  4 << 10,
		Subprotocols:     offered,
		CheckOrigin:      func(*http.Request) bool { return true }, // the token says who may
	}
	ws, err := up.Upgrade(w, r, nil)
	if err != nil {
		s.log.Debug("websocket session did not begin", "error", err)
		return nil
	}
	return ws
}

// remoteWebSocket serves Exec and Attach.
func (s *sessions) remoteWebSocket(w http.ResponseWriter, r *http.Request, req request) {
	ws := s.upgrade(w, r, remoteProtocols)
	if ws == nil {
		return
	}
	defer ws.Close()
	speaks := dialects[ws.Subprotocol()]
	c := newChannels(ws, speaks.base64, speaks.closes, s.idle)
	defer c.idle.Stop()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()

	streams := pods.Streams{TTY: req.tty}
	inputs := map[byte]*io.PipeWriter{}
	var all sync.WaitGroup
	pipe := func(channel byte) *io.PipeReader {
		r, w := io.Pipe()
		inputs[channel] = w
		return r
	}
	if req.stdin {
		stdin := pipe(remotecommand.StreamStdIn)
		streams.Stdin = stdin
		defer stdin.Close()
	}
	if req.stdout {
		streams.Stdout = c.writer(remotecommand.StreamStdOut)
	}
	if req.stderr && !req.tty { // one terminal, one stream
		streams.Stderr = c.writer(remotecommand.StreamStdErr)
	}
	if req.tty {
		sizes := pipe(remotecommand.StreamResize)
		out := make(chan pods.TerminalSize)
		streams.Resize = out
		all.Go(func() { decodeSizes(ctx, sizes, out) })
	}
	c.input = func(channel byte) *io.PipeWriter { return inputs[channel] }
	// Before anything is written: clients wait for a sign that the session has begun.
	first := byte(remotecommand.StreamErr)
	switch {
	case streams.Stdout != nil:
		first = remotecommand.StreamStdOut
	case streams.Stderr != nil:
		first = remotecommand.StreamStdErr
	}
	_, _ = c.writer(first).Write(nil)

	all.Go(func() {
		err := c.read()
		s.log.Debug("websocket is read no more", "error", err)
		for _, in := range inputs {
			_ = in.Close()
		}
		cancel() // the client has gone
	})
	err := s.run(ctx, req, streams)
	_, _ = c.writer(remotecommand.StreamErr).Write(statusOf(err).text(speaks.structured))
	for _, in := range inputs { // what the client says now is not waited for
		_ = in.CloseWithError(io.ErrClosedPipe)
	}
	c.close()
	all.Wait()
}

// forwardChannels serves PortForward in the way of v4: for each port that was asked for there are two channels, for data
// and for errors. Each begins with the port's number.
func (s *sessions) forwardChannels(r *http.Request, ws *websocket.Conn, req request) {
	defer ws.Close()
	speaks := dialects[ws.Subprotocol()]
	c := newChannels(ws, speaks.base64, false, s.idle)
	defer c.idle.Stop()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	inputs := make([]*io.PipeWriter, len(req.ports))
	c.input = func(channel byte) *io.PipeWriter {
		if i := int(channel) / 2; channel%2 == 0 && i < len(inputs) {
			return inputs[i]
		}
		return nil
	}
	var all, forwards sync.WaitGroup
	for i, port := range req.ports {
		in, w := io.Pipe()
		inputs[i] = w
		data, failure := c.writer(byte(2*i)), c.writer(byte(2*i+1))
		number := binary.LittleEndian.AppendUint16(nil, uint16(port))
		_, _ = data.Write(number)
		_, _ = failure.Write(number)
		forwards.Go(func() {
			defer in.Close()
			if err := s.forward(ctx, req.id, port, struct {
				io.Reader
				io.WriteCloser
			}{in, data}); err != nil && ctx.Err() == nil {
				_, _ = io.WriteString(failure, forwardFailed(port, err))
			}
		})
	}
	all.Go(func() {
		_ = c.read()
		for _, in := range inputs {
			_ = in.Close()
		}
		cancel()
	})
	forwards.Wait()
	c.close()
	all.Wait()
}

package streaming

import (
	"encoding/base64"
	"io"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

const (
	// maxMessage bounds our messages, of which clients keep each whole. Theirs may have any length: they are not kept.
	maxMessage = 32 << 10
	// farewell is how long a client may take to read what we sent last, and to close its side.
	farewell = time.Minute
)

// channels are the streams of a WebSocket: the first byte of each message is the number of its channel.
type channels struct {
	ws     *websocket.Conn
	base64 bool // messages are text: a digit, and base64
	closes bool // v5: a message of 255 and a number closes that channel for reading

	// input is where what a client sends on a channel goes; nil drops it.
	input func(channel byte) *io.PipeWriter

	silence time.Duration // after which the connection is cut
	idle    *time.Timer

	mu  sync.Mutex
	out []byte
}

// newChannels serves a connection. The timer idle is the caller's to stop.
func newChannels(ws *websocket.Conn, base64, closes bool, silence time.Duration) *channels {
	c := &channels{ws: ws, base64: base64, closes: closes, silence: silence}
	c.idle = time.AfterFunc(silence, func() { _ = ws.NetConn().Close() })
	return c
}

// read takes messages until the connection ends, and says why it did.
func (c *channels) read() error {
	for {
		_, r, err := c.ws.NextReader() // skips what is left of the one before
		if err != nil {
			return err
		}
		c.idle.Reset(c.silence)
		c.message(r)
	}
}

// message takes one message. What is wrong with it, or nobody wants, is left where it is; a connection that broke is
// told by the next read.
func (c *channels) message(r io.Reader) {
	var head [1]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return
	}
	channel := head[0]
	if c.closes && channel == remotecommand.StreamClose {
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return
		}
		if w := c.input(head[0]); w != nil {
			_ = w.Close()
		}
		return
	}
	if c.base64 {
		channel -= '0'
		r = base64.NewDecoder(base64.StdEncoding, r)
	}
	if w := c.input(channel); w != nil {
		_, _ = io.Copy(w, r)
	}
}

// writer writes to one channel.
func (c *channels) writer(channel byte) io.WriteCloser { return channelWriter{c, channel} }

type channelWriter struct {
	*channels
	channel byte
}

func (w channelWriter) Write(p []byte) (n int, err error) {
	for first := true; first || len(p) > 0; first = false { // an empty write is an empty message: the session has begun
		piece := p[:min(len(p), maxMessage)]
		if err := w.send(piece); err != nil {
			return n, err
		}
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

func (w channelWriter) send(p []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.idle.Reset(w.silence)
	if w.base64 {
		w.out = base64.StdEncoding.AppendEncode(append(w.out[:0], '0'+w.channel), p)
		return w.ws.WriteMessage(websocket.TextMessage, w.out)
	}
	w.out = append(append(w.out[:0], w.channel), p...)
	return w.ws.WriteMessage(websocket.BinaryMessage, w.out)
}

// Close does nothing: a channel that is written to ends with its connection.
func (w channelWriter) Close() error { return nil }

// close says farewell, and has the reader end once the client has answered, or has not for too long. What the client sent
// meanwhile is read until then: the kernel would answer it with a reset, and our last messages could be lost.
func (c *channels) close() {
	deadline := time.Now().Add(farewell)
	_ = c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), deadline)
	_ = c.ws.SetReadDeadline(deadline)
}

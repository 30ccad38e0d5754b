package streaming

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// Bounds of a client's SPDY connection, which the library does not know: it reads a frame of up to 16 MiB into memory, and
// queues two hundred and fifty of a stream that nobody reads.
const (
	// maxData is how long frames of data are cut to.
	maxData = 64 << 10
	// maxControl is how long others may be.
	maxControl = 64 << 10
	// maxRemoteStreams is how often a client of an exec or attach, which has five streams at most, may try to open one.
	maxRemoteStreams = 16
)

// errFrame is why a connection ends whose frames are out of bounds.
var errFrame = errors.New("SPDY frame out of bounds")

// A frame begins with a bit that tells control frames from data. Control: version, type; data: number of the stream. Then
// flags, and the length of the payload in three bytes.
const (
	frameHead = 8
	synStream = 1
	rstStream = 3
	flagFin   = 1
)

// guard reads frames for the library. It cuts those of data into short ones, and ends the connection at a control frame
// that is too long, or that opens one stream too many.
type guard struct {
	r       *bufio.Reader
	streams int // that may still be opened; negative: any number
	// reset is told the number of a stream that the client gives up. The library makes it look like one that ended.
	reset func(stream uint32)

	head  [frameHead]byte
	emit  []byte // of head, that is still to be given out
	piece int    // bytes of the piece that follows it
	left  int    // bytes of the frame after that
	flags byte   // of the whole frame
}

func newGuard(r io.Reader, streams int) *guard {
	return &guard{r: bufio.NewReader(r), streams: streams, reset: func(uint32) {}}
}

func (g *guard) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(g.emit) == 0 && g.piece == 0 {
		if err := g.next(); err != nil {
			return 0, err
		}
	}
	if len(g.emit) > 0 {
		n := copy(p, g.emit)
		g.emit = g.emit[n:]
		return n, nil
	}
	n, err := g.r.Read(p[:min(len(p), g.piece)])
	g.piece -= n
	return n, err
}

// next begins the next frame, or the next piece of one.
func (g *guard) next() error {
	if g.left == 0 {
		if _, err := io.ReadFull(g.r, g.head[:]); err != nil {
			return err
		}
		g.left = int(binary.BigEndian.Uint32(g.head[4:]) & 0xffffff)
		g.flags = g.head[4]
		if g.head[0]&0x80 != 0 {
			return g.control()
		}
	}
	g.piece = min(g.left, maxData)
	g.left -= g.piece
	binary.BigEndian.PutUint32(g.head[4:], uint32(g.piece))
	g.head[4] = g.flags
	if g.left > 0 {
		g.head[4] &^= flagFin
	}
	g.emit = g.head[:]
	return nil
}

func (g *guard) control() error {
	if g.left > maxControl {
		return fmt.Errorf("%w: a control frame of %d bytes, more than %d", errFrame, g.left, maxControl)
	}
	switch binary.BigEndian.Uint16(g.head[2:]) {
	case synStream:
		if g.streams == 0 {
			return fmt.Errorf("%w: more than %d streams", errFrame, maxRemoteStreams)
		}
		g.streams--
	case rstStream:
		if number, err := g.r.Peek(4); err == nil && g.left >= 4 {
			g.reset(binary.BigEndian.Uint32(number))
		}
	}
	g.emit, g.piece, g.left = g.head[:], g.left, 0
	return nil
}

// guardedWriter gives the library a guarded connection.
type guardedWriter struct {
	http.ResponseWriter
	streams int
	reset   func(stream uint32) // may be nil
}

// Hijack takes the connection over.
func (w guardedWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	g := newGuard(rw.Reader, w.streams)
	if w.reset != nil {
		g.reset = w.reset
	}
	return conn, bufio.NewReadWriter(bufio.NewReader(g), rw.Writer), nil
}

// guardedConn is a connection that is guarded.
type guardedConn struct {
	net.Conn
	guard *guard
}

func (c guardedConn) Read(p []byte) (int, error) { return c.guard.Read(p) }

package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/network"
)

const (
	// linger is how long a client may go on sending when the pod has ended a forwarded connection.
	linger = time.Second
	// answer is how long the pod may say nothing when the client has ended its side.
	answer = time.Minute
)

// PortForward connects a stream with a port of the pod's loopback, until one side ends or ctx does.
func (m *Manager) PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	if port < 1 || port > 65535 {
		return fmt.Errorf("port: %d is outside 1..65535: %w", port, errdefs.ErrInvalidArgument)
	}
	p, err := m.pod(sandboxID)
	if err != nil {
		return err
	}
	if !p.view.Load().Ready {
		return failedPrecondition("pod sandbox %s is not ready", p.rec.ID)
	}
	done, err := p.session()
	if err != nil {
		return err
	}
	defer done()
	conn, err := p.dial(ctx, port)
	if err != nil {
		return err
	}
	var once sync.Once
	closeBoth := func() { once.Do(func() { _ = conn.Close(); _ = stream.Close() }) }
	defer closeBoth()
	stop := context.AfterFunc(ctx, closeBoth)
	defer stop()
	f := &forwarded{conn: conn, stream: stream}
	in, out := make(chan error, 1), make(chan error, 1)
	go func() { in <- f.fromClient() }() // ends when the stream's owner ends the stream
	go func() { out <- f.toClient() }()
	select {
	case err = <-out: // nothing more comes from the pod
		select {
		case <-in: //nolint:errcheck // only that it ended
		case <-time.After(linger):
		}
	case err = <-in:
		if oerr := <-out; err == nil {
			err = oerr
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// forwarded is a connection between a client's stream and a port.
type forwarded struct {
	conn   net.Conn
	stream io.ReadWriteCloser
	half   atomic.Bool // the client sends no more
}

// fromClient copies until the client sends no more, which the pod is told. What the pod then answers may take its time, but
// not for ever: clients of old do not say whether they have only stopped to send, or have gone.
func (f *forwarded) fromClient() error {
	_, err := io.Copy(f.conn, f.stream)
	f.half.Store(true)
	_ = f.conn.SetReadDeadline(time.Now().Add(answer))
	_ = f.conn.(*net.TCPConn).CloseWrite()
	return err
}

// toClient copies until the pod sends no more, which the client is told.
func (f *forwarded) toClient() error {
	defer f.stream.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := f.conn.Read(buf)
		if n > 0 {
			if _, werr := f.stream.Write(buf[:n]); werr != nil {
				return werr
			}
			if f.half.Load() {
				_ = f.conn.SetReadDeadline(time.Now().Add(answer))
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// dial connects to the port inside the pod's network namespace: IPv4 and then IPv6, on one thread. A dialler of the
// standard library with two addresses starts goroutines, which would be on other threads, in the node's namespace.
func (p *pod) dial(ctx context.Context, port int32) (net.Conn, error) {
	dial := func() (conn net.Conn, err error) {
		d := net.Dialer{Timeout: 10 * time.Second, FallbackDelay: -1}
		for _, host := range []string{"127.0.0.1", "::1"} {
			c, derr := d.DialContext(ctx, "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
			if derr == nil {
				return c, nil
			}
			if err == nil {
				err = derr
			}
		}
		return nil, err
	}
	if spec.HostNetwork(p.config()) {
		return dial()
	}
	var conn net.Conn
	err := network.InNamespaces([]string{p.nsPath("net")}, func() (err error) {
		conn, err = dial()
		return err
	})
	return conn, err
}

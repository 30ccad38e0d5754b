package pods

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/network"
)

// linger is how long the other direction of a forwarded connection may go on when one has ended.
const linger = time.Second

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
	ended := make(chan error, 2)
	go func() {
		_, err := io.Copy(conn, stream)
		_ = conn.(*net.TCPConn).CloseWrite()
		ended <- err
	}()
	go func() {
		_, err := io.Copy(stream, conn)
		ended <- err
	}()
	err = <-ended
	select {
	case second := <-ended:
		if err == nil {
			err = second
		}
	case <-time.After(linger):
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
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
	err := network.InNamespace(p.nsPath("net"), func() (err error) {
		conn, err = dial()
		return err
	})
	return conn, err
}

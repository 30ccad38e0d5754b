//go:build integration

package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/berth-run/berth/integration/lab"
)

// tree sends 1,200 files as `kubectl cp` does, 120 MB of them, and has them sent back.
func (p *streamingPod) tree(t *testing.T, ctx context.Context) {
	const files, size = 1200, 100_000
	name := func(i int) string { return fmt.Sprintf("tree/%02d/file-%04d", i%40, i) }
	content := func(i int) io.Reader { return noise(byte(i%7), size) }
	sums := map[byte][32]byte{}
	for seed := range byte(7) {
		data, err := io.ReadAll(noise(seed, size))
		must(t, err)
		sums[seed] = sha256.Sum256(data)
	}
	there, home := transports[0], transports[2] // SPDY, WebSocket
	began := time.Now()
	r, w := io.Pipe()
	go func() {
		archive := tar.NewWriter(w)
		var err error
		for i := 0; i < files && err == nil; i++ {
			err = archive.WriteHeader(&tar.Header{Name: name(i), Mode: 0o644, Size: size, Typeflag: tar.TypeReg})
			if err == nil {
				_, err = io.Copy(archive, content(i))
			}
		}
		_ = w.CloseWithError(errors.Join(err, archive.Close()))
	}()
	var errs bytes.Buffer
	must(t, p.exec(ctx, there.executor, remotecommand.StreamOptions{Stdin: r, Stdout: io.Discard, Stderr: &errs}, "tar", "xmf", "-", "-C", "/tmp"))
	back, out := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := p.exec(ctx, home.executor, remotecommand.StreamOptions{Stdout: out, Stderr: &errs}, "tar", "cf", "-", "-C", "/tmp", "tree")
		_ = out.CloseWithError(err)
		done <- err
	}()
	found := 0
	archive := tar.NewReader(back)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		var i int
		_, err = fmt.Sscanf(path.Base(h.Name), "file-%d", &i)
		must(t, err)
		sum := sha256.New()
		_, err = io.Copy(sum, archive)
		must(t, err)
		if want := sums[byte(i%7)]; h.Name != name(i) || !bytes.Equal(sum.Sum(nil), want[:]) {
			t.Fatalf("%s has another content", h.Name)
		}
		found++
	}
	_, err := io.Copy(io.Discard, back)
	must(t, err)
	must(t, <-done)
	if found != files || errs.Len() > 0 {
		t.Errorf("%d files of %d came back; %s", found, files, errs.String())
	}
	t.Logf("%d files, %d MB each way in %s", files, files*size/1_000_000, time.Since(began).Round(time.Millisecond))
}

// forwardDialers are the ways in which kubectl and crictl forward ports.
var forwardDialers = map[string]func(address string) (httpstream.Dialer, error){
	"SPDY": func(address string) (httpstream.Dialer, error) {
		u, err := url.Parse(address)
		if err != nil {
			return nil, err
		}
		transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: address})
		if err != nil {
			return nil, err
		}
		return spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, u), nil
	},
	"SPDY in WebSocket": func(address string) (httpstream.Dialer, error) {
		u, err := url.Parse(address)
		if err != nil {
			return nil, err
		}
		return portforward.NewSPDYOverWebsocketDialerForStreaming(u, &rest.Config{Host: address})
	},
}

func (p *streamingPod) forwardDialer(ctx context.Context, way func(string) (httpstream.Dialer, error)) (httpstream.Dialer, error) {
	resp, err := p.CRI.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: p.podID})
	if err != nil {
		return nil, err
	}
	return way(resp.Url)
}

// forward reaches listeners of the pod, on either kind of loopback address, and none of the machine.
func (p *streamingPod) forward(t *testing.T, ctx context.Context) {
	// What listens in the pod answers with its name, or echoes.
	p.start(t, lab.Sh("listeners", `
		nc -ll -p 8004 -s 127.0.0.1 -e cat &
		nc -ll -p 8006 -s ::1 -e cat &
		nc -ll -p 8010 -s 127.0.0.1 -e sh -c 'cat > /dev/null; sleep 3; echo answer' &
		trap 'exit 0' TERM; wait`))
	var hostHit atomic.Bool
	var hostPort int32
	for _, host := range []string{"127.0.0.1:0", "[::1]:0"} {
		if hostPort != 0 {
			host = fmt.Sprintf("[::1]:%d", hostPort)
		}
		l, err := net.Listen("tcp", host)
		if err != nil && hostPort != 0 {
			t.Logf("this machine has no IPv6 loopback, or another has the port: %v", err)
			break
		}
		must(t, err)
		defer l.Close()
		hostPort = int32(l.Addr().(*net.TCPAddr).Port)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				hostHit.Store(true)
				_ = c.Close()
			}
		}()
	}
	must(t, lab.Eventually(ctx, soon, "the pod listens", func(ctx context.Context) error {
		for _, address := range []string{"127.0.0.1 8004", "::1 8006", "127.0.0.1 8010"} {
			if _, err := p.CRI.Exec(ctx, p.sleeper, "sh", "-c", "nc -z "+address+" < /dev/null"); err != nil {
				return err
			}
		}
		return nil
	}))
	for name, way := range forwardDialers {
		t.Run(name, func(t *testing.T) {
			dialer, err := p.forwardDialer(ctx, way)
			must(t, err)
			stop, ready := make(chan struct{}), make(chan struct{})
			f, err := portforward.NewForStreaming(dialer, []string{"0:8004", "0:8006", "0:8010"}, stop, ready, io.Discard, io.Discard)
			must(t, err)
			done := make(chan error, 1)
			go func() { done <- f.ForwardPorts() }()
			select {
			case <-ready:
			case err := <-done:
				t.Fatal(err)
			}
			ports, err := f.GetPorts()
			must(t, err)
			for _, port := range ports {
				if port.Remote == 8010 {
					p.lateAnswer(t, port.Local)
					continue
				}
				p.forwardBothWays(t, port.Local)
			}
			close(stop)
			must(t, <-done)
			p.forwardRefused(t, ctx, way, hostPort)
		})
	}
	if hostHit.Load() {
		t.Error("a connection to the pod's port came to this machine's")
	}
}

func dialLocal(t *testing.T, port uint16) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	must(t, err)
	must(t, c.SetDeadline(time.Now().Add(streamingWait)))
	return c.(*net.TCPConn)
}

// forwardBothWays sends 32 MB through a forwarded port and back, closing its side as soon as all was sent.
func (p *streamingPod) forwardBothWays(t *testing.T, port uint16) {
	const size = 32 << 20
	c := dialLocal(t, port)
	defer c.Close()
	want := sha256.New()
	go func() {
		_, _ = io.Copy(io.MultiWriter(c, want), noise(3, size))
		_ = c.CloseWrite()
	}()
	got := sha256.New()
	n, err := io.Copy(got, c)
	if err != nil || n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("%d bytes of %d came back, %v", n, size, err)
	}
}

// lateAnswer closes its side, and is answered later than that.
func (p *streamingPod) lateAnswer(t *testing.T, port uint16) {
	c := dialLocal(t, port)
	defer c.Close()
	_, err := io.WriteString(c, "question\n")
	must(t, err)
	must(t, c.CloseWrite())
	if got, err := io.ReadAll(c); err != nil || string(got) != "answer\n" {
		t.Errorf("a late answer: %q %v", got, err)
	}
}

// forwardRefused forwards to ports that nobody in the pod listens on; on one of them this machine does. Each time that is
// told, and the connection with the client serves on.
func (p *streamingPod) forwardRefused(t *testing.T, ctx context.Context, way func(string) (httpstream.Dialer, error), hostPort int32) {
	dialer, err := p.forwardDialer(ctx, way)
	must(t, err)
	conn, _, err := dialer.Dial("portforward.k8s.io")
	must(t, err)
	defer conn.Close()
	for i := range 20 {
		h := http.Header{}
		h.Set("port", fmt.Sprint(hostPort))
		h.Set("requestID", fmt.Sprint(i))
		h.Set("streamType", "error")
		failure, err := conn.CreateStream(h)
		must(t, err)
		_ = failure.Close()
		h.Set("streamType", "data")
		data, err := conn.CreateStream(h)
		must(t, err)
		said, err := io.ReadAll(failure)
		if err != nil || !strings.Contains(string(said), fmt.Sprint(hostPort)) || !strings.Contains(string(said), "refused") {
			t.Fatalf("%d: the error stream says %q, %v", i, said, err)
		}
		if got, _ := io.ReadAll(data); len(got) > 0 {
			t.Fatalf("%d: data %q", i, got)
		}
	}
}

// TestStreamingTokens: what a call hands out is an address of the loopback interface, serves once and for one kind, and
// there is not an endless number of them.
func TestStreamingTokens(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	p := newStreamingPod(t, n)
	ctx := t.Context()
	o := remotecommand.StreamOptions{Stdout: io.Discard}
	address, err := p.execURL(ctx, o, "true")
	must(t, err)
	u, err := url.Parse(address)
	must(t, err)
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() || u.Scheme != "http" {
		t.Errorf("the URL is %s", address)
	}

	t.Run("used once", func(t *testing.T) {
		var won atomic.Int32
		results := make(chan error, 20)
		for i := range cap(results) {
			go func() {
				e, err := transports[i%len(transports)].executor(address)
				if err == nil {
					err = e.StreamWithContext(ctx, o)
				}
				if err == nil {
					won.Add(1)
				}
				results <- err
			}()
		}
		for range cap(results) {
			<-results //nolint:errcheck // only that it ended
		}
		if won.Load() != 1 {
			t.Errorf("%d clients of one URL had a session", won.Load())
		}
	})
	t.Run("for one kind", func(t *testing.T) {
		address, err := p.execURL(ctx, o, "true")
		must(t, err)
		e, err := transports[0].executor(strings.Replace(address, "/exec/", "/attach/", 1))
		must(t, err)
		if err := e.StreamWithContext(ctx, o); err == nil {
			t.Error("an exec's URL served an attach")
		}
	})
	t.Run("a thousand", func(t *testing.T) {
		var err error
		for i := 0; i <= 1100 && err == nil; i++ {
			if _, err = p.execURL(ctx, o, "true"); err != nil && i < 900 {
				t.Fatalf("after %d: %v", i, err)
			}
		}
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("after eleven hundred: %v, want ResourceExhausted", err)
		}
		if _, err := p.CRI.Exec(ctx, p.sleeper, "true"); err != nil {
			t.Errorf("ExecSync needs no URL: %v", err)
		}
	})
}

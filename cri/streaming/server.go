package streaming

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
)

// Bounds of the HTTP server. The library's own server has none.
const (
	readHeaderTimeout = 10 * time.Second
	maxHeaderBytes    = 16 << 10
	maxConnections    = 1000
)

// Options of a [Server].
type Options struct {
	// Runtime runs the sessions.
	Runtime Runtime
	// Addr is where to listen: a loopback address, since nothing but the URL's token protects a session. Empty means a
	// free port of 127.0.0.1.
	Addr string
	Log  *slog.Logger
}

// Server hands out URLs and serves them.
type Server struct {
	library  streaming.Server
	tokens   *tokens
	http     *http.Server
	listener *listener
	served   chan error
	end      context.CancelFunc // of sessions without a client
}

// Listen starts a server, which runs until Close.
func Listen(ctx context.Context, o Options) (*Server, error) {
	addr := o.Addr
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	if err := loopback(addr); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	inner, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("streaming server: %w", err)
	}
	return serve(inner, o)
}

func serve(inner net.Listener, o Options) (*Server, error) {
	config := streaming.DefaultConfig
	config.BaseURL = &url.URL{Scheme: "http", Host: inner.Addr().String()}
	life, end := context.WithCancel(context.Background())
	library, err := streaming.NewServer(config, &sessions{life: life, runtime: o.Runtime, log: o.Log})
	if err != nil {
		end()
		return nil, errors.Join(fmt.Errorf("streaming server: %w", err), inner.Close())
	}
	tokens := newTokens()
	s := &Server{
		library:  library,
		tokens:   tokens,
		listener: newListener(inner, maxConnections),
		served:   make(chan error, 1),
		end:      end,
		http: &http.Server{
			Handler:           newGate(&bridge{library: library, tokens: tokens, addr: inner.Addr().String(), log: o.Log}),
			ReadHeaderTimeout: readHeaderTimeout,
			MaxHeaderBytes:    maxHeaderBytes,
			ConnContext:       connContext,
			ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
		},
	}
	s.http.SetKeepAlivesEnabled(false) // a connection is one session
	go func() { s.served <- s.http.Serve(s.listener) }()
	return s, nil
}

// Exec returns a URL at which a command can be run once.
func (s *Server) Exec(req *cri.ExecRequest) (*cri.ExecResponse, error) {
	resp, err := s.library.GetExec(req)
	if err == nil {
		s.tokens.put(path.Base(resp.GetUrl()), asked{req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()})
	}
	return resp, err
}

// Attach returns a URL at which a container's streams can be reached once.
func (s *Server) Attach(req *cri.AttachRequest) (*cri.AttachResponse, error) {
	resp, err := s.library.GetAttach(req)
	if err == nil {
		s.tokens.put(path.Base(resp.GetUrl()), asked{req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()})
	}
	return resp, err
}

// PortForward returns a URL at which ports of a pod can be reached once.
func (s *Server) PortForward(req *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	return s.library.GetPortForward(req)
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Close stops listening and cuts all sessions.
func (s *Server) Close() error {
	err := s.http.Close()
	s.end()
	s.listener.closeConns() // those that http.Server has handed over
	if e := <-s.served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// loopback refuses an address that others can reach.
func loopback(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("streaming address %q: %w", addr, err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("streaming address %q: not a loopback address", addr)
	}
	return nil
}

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
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Bounds of the HTTP server.
const (
	readHeaderTimeout = 10 * time.Second
	maxHeaderBytes    = 16 << 10
	maxConnections    = 1000
)

// DefaultIdle is how long a session may say nothing: what kubelets have, too.
const DefaultIdle = 4 * time.Hour

// Options of a [Server].
type Options struct {
	// Runtime runs the sessions.
	Runtime Runtime
	// Addr is where to listen: a loopback address, since nothing but the URL's token protects a session. Empty means a
	// free port of 127.0.0.1.
	Addr string
	// Idle is after how long without a byte in either direction a session is cut; 0 means DefaultIdle.
	Idle time.Duration
	Log  *slog.Logger
}

// Server hands out URLs and serves them.
type Server struct {
	tokens   *tokens
	sessions *sessions
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
	return serve(inner, o), nil
}

func serve(inner net.Listener, o Options) *Server {
	if o.Idle == 0 {
		o.Idle = DefaultIdle
	}
	life, end := context.WithCancel(context.Background())
	s := &Server{
		tokens:   newTokens(),
		sessions: &sessions{life: life, runtime: o.Runtime, idle: o.Idle, log: o.Log},
		listener: newListener(inner, maxConnections),
		served:   make(chan error, 1),
		end:      end,
	}
	s.http = &http.Server{
		Handler:           newGate(http.HandlerFunc(s.begin)),
		ReadHeaderTimeout: readHeaderTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnContext:       connContext,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	s.http.SetKeepAlivesEnabled(false) // a connection is one session
	go func() { s.served <- s.http.Serve(s.listener) }()
	return s
}

// begin runs the session that a URL was handed out for. The URL is used up, also where the client then turns out to speak
// nothing that we do.
func (s *Server) begin(w http.ResponseWriter, r *http.Request) {
	kind, token := path.Split(r.URL.Path)
	req, ok := s.tokens.take(token)
	if !ok || kind != "/"+req.kind+"/" {
		http.NotFound(w, r)
		return
	}
	switch ws := wsstream.IsWebSocketRequest(r); {
	case req.kind == forwardKind && ws:
		s.sessions.forwardTunnelled(w, r, req)
	case req.kind == forwardKind:
		s.sessions.forwardSPDY(w, r, req)
	case ws:
		s.sessions.remoteWebSocket(w, r, req)
	default:
		s.sessions.remoteSPDY(w, r, req)
	}
}

// Exec returns a URL at which a command can be run once.
func (s *Server) Exec(req *cri.ExecRequest) (*cri.ExecResponse, error) {
	at, err := s.url(request{kind: execKind, id: req.GetContainerId(), cmd: req.GetCmd(), asked: asked{req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()}})
	if err != nil {
		return nil, err
	}
	return &cri.ExecResponse{Url: at}, nil
}

// Attach returns a URL at which a container's streams can be reached once.
func (s *Server) Attach(req *cri.AttachRequest) (*cri.AttachResponse, error) {
	at, err := s.url(request{kind: attachKind, id: req.GetContainerId(), asked: asked{req.GetStdin(), req.GetStdout(), req.GetStderr(), req.GetTty()}})
	if err != nil {
		return nil, err
	}
	return &cri.AttachResponse{Url: at}, nil
}

// PortForward returns a URL at which ports of a pod can be reached once. Which ports, each stream says.
func (s *Server) PortForward(req *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	at, err := s.url(request{kind: forwardKind, id: req.GetPodSandboxId(), ports: req.GetPort()})
	if err != nil {
		return nil, err
	}
	return &cri.PortForwardResponse{Url: at}, nil
}

func (s *Server) url(r request) (string, error) {
	token, err := s.tokens.put(r)
	if err != nil {
		return "", err
	}
	u := url.URL{Scheme: "http", Host: s.Addr().String(), Path: "/" + r.kind + "/" + token}
	return u.String(), nil
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

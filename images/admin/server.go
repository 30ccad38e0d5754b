package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/berth-run/berth/images"
)

// Options of a [Server].
type Options struct {
	Store *images.Store
	Log   *slog.Logger
}

// Server answers tools on the daemon's admin socket.
type Server struct {
	store *images.Store
	log   *slog.Logger
	mux   *http.ServeMux

	mu    sync.Mutex
	ended bool // no call begins any more
	calls sync.WaitGroup
}

const (
	maxHeader  = 64 << 10
	maxRequest = 1 << 20 // of the JSON of a request
	// slowest is how long a client may take to say what it wants.
	slowest = 10 * time.Second
)

// New makes a server.
func New(o Options) *Server {
	s := &Server{store: o.Store, log: o.Log, mux: http.NewServeMux()}
	for pattern, answer := range map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /v1/images":          s.images,
		"POST /v1/images/inspect": s.inspect,
		"POST /v1/images/remove":  s.remove,
		"POST /v1/images/pin":     s.pin,
		"GET /v1/images/du":       s.du,
		"POST /v1/images/import":  s.importArchive,
		"POST /v1/images/export":  s.exportArchive,
		"POST /v1/images/verify":  s.verify,
		"POST /v1/registry":       s.explain,
		"POST /v1/images/pull":    s.pull,
		"GET /v1/pulls":           s.pulls,
	} {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := answer(w, r); err != nil {
				refuse(w, r, err)
			}
		})
	}
	s.mux.Handle("GET /metrics", metrics(s.store))
	return s
}

// Serve answers on l until ctx ends, closes l, and returns when all calls have ended.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	hs := &http.Server{
		Handler: s, ReadHeaderTimeout: slowest, IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader,
		ErrorLog:    slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // what clients send is no error of the daemon
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = hs.Close() })
	defer stop()
	err := hs.Serve(ownUser{l, s.log})
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.calls.Wait()
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	}
	return nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		http.Error(w, "the daemon ends", http.StatusServiceUnavailable)
		return
	}
	defer s.calls.Done()
	s.mux.ServeHTTP(w, r)
}

// begin notes a call that begins. One whose request was read while Serve ended must not: who has called Serve may close the store.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.calls.Add(1)
	}
	return !s.ended
}

// ask reads the JSON of a request.
func ask[T any](w http.ResponseWriter, r *http.Request) (req T, err error) {
	// A client that sends nothing must not hold up anything but itself, and not for long.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(slowest))
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest))
	dec.DisallowUnknownFields()
	err = dec.Decode(&req)
	if err == nil {
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more than one value")
		}
	}
	if err != nil {
		return req, invalid("request %s: %v", r.URL.Path, err)
	}
	// From here on only whether the client is still there matters.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return req, nil
}

// refuse answers with an error, perhaps while the client is still sending: it is told at once, and has a while to hang up. To
// close the connection on it would have it see a reset, perhaps before the answer.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	c := http.NewResponseController(w)
	// All connections here are of HTTP/1 and can do these.
	_ = c.EnableFullDuplex()
	e, status := wire(err)
	reply(w, status, e)
	_ = c.Flush()
	_ = c.SetReadDeadline(time.Now().Add(slowest))
	_, _ = io.Copy(io.Discard, r.Body)
}

// reply writes an answer. That the client has gone is no matter.
func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

package explain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/internal/socket"
)

// Socket is where a proxy is asked, unless it is told otherwise.
const Socket = "/run/berth-proxy/proxy.sock"

const (
	path = "/v1/explain"
	// slowest is how long a client may take to ask, and patience how long an answer is waited for.
	slowest  = 10 * time.Second
	patience = time.Minute
	// largest is an answer's size.
	largest = 64 << 20
)

// Serve answers at a socket that root alone may connect to, until the context ends.
func (s *Server) Serve(ctx context.Context, at string, log *slog.Logger) error {
	l, err := socket.Listen(ctx, at)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+path, s.answer)
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: slowest, ReadTimeout: slowest, WriteTimeout: patience, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", at, err)
	}
	return nil
}

// answer answers a request by an Answer, or by an error's text.
func (s *Server) answer(w http.ResponseWriter, r *http.Request) {
	a, err := s.Answer(Question{Target: r.FormValue("target"), From: r.FormValue("from")})
	switch {
	case errors.Is(err, ErrQuestion):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a)
	}
}

// Ask asks the proxy that listens at a socket. An error that is ErrQuestion is about the question.
func Ask(ctx context.Context, at string, q Question) (*Answer, error) {
	ctx, stop := context.WithTimeout(ctx, patience)
	defer stop()
	var d net.Dialer
	client := http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", at) },
		DisableKeepAlives: true,
	}}
	ask := url.Values{"target": {q.Target}, "from": {q.From}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://berth"+path+"?"+ask.Encode(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, unreachable(at, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, largest))
	if err != nil {
		return nil, unreachable(at, err)
	}
	a := &Answer{}
	switch resp.StatusCode {
	case http.StatusOK:
		if err := json.Unmarshal(body, a); err != nil {
			return nil, fmt.Errorf("the proxy at %s has answered something else: %w", at, err)
		}
		return a, nil
	case http.StatusBadRequest:
		return nil, &questionError{string(body)}
	}
	return nil, fmt.Errorf("the proxy at %s: %s: %s", at, resp.Status, body)
}

// questionError is ErrQuestion in the proxy's words.
type questionError struct{ text string }

func (e *questionError) Error() string { return trimmed(e.text) }

// Is is for errors.Is.
func (e *questionError) Is(err error) bool { return err == ErrQuestion }

func trimmed(s string) string {
	for len(s) > 0 && s[len(s)-1] == '\n' {
		s = s[:len(s)-1]
	}
	return s
}

// unreachable adds a remedy.
func unreachable(at string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no berth proxy answers at %s: start it, or say --socket as its --socket is; of one in a pod, ask in the pod: kubectl -n kube-system exec POD -- berth explain (%w)", at, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("root alone may ask the proxy at %s: try sudo (%w)", at, err)
	}
	return fmt.Errorf("ask the proxy at %s: %w", at, err)
}

// Node is the Host of the network namespace of the process.
type Node struct{}

// Local is whether the node has an address.
func (Node) Local(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	all, _ := net.InterfaceAddrs()
	for _, have := range all {
		if p, err := netip.ParsePrefix(have.String()); err == nil && p.Addr().Unmap().WithZone("") == a {
			return true
		}
	}
	return false
}

// Interface is the one that packets to an address go out by, which those from it come in by unless routes are asymmetric.
func (Node) Interface(from netip.Addr) string {
	routes, err := netlink.RouteGet(from.AsSlice())
	if err != nil || len(routes) == 0 {
		return ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return ""
	}
	return link.Attrs().Name
}

package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// pace is how slow a registry may be, and how long it may make us wait.
type pace struct {
	// Window and Floor: less than Floor bytes in Window spent waiting for data means that the connection is stuck,
	// even when a byte trickles in now and then (containerd#11650). Window also bounds the wait for one piece.
	Window time.Duration
	Floor  int64
	// RetryAfter bounds how long a 429 is waited for.
	RetryAfter time.Duration
}

var defaultPace = pace{Window: 30 * time.Second, Floor: 32 << 10, RetryAfter: time.Minute}

var (
	errTooSlow  = errors.New("the registry sends too slowly")
	errTooLong  = errors.New("the registry's answer is too long")
	errRedirect = errors.New("redirect refused")
	errRateless = errors.New("the registry asks to try again later (429)")
)

const (
	maxRedirects = 5
	maxToken     = 1 << 20
	tries429     = 3
)

// Values that a request's context carries through the libraries to the transport.
type (
	limitKey  struct{} // int64: the most bytes its answer may have
	servedKey struct{} // *served: who answered
)

type served struct {
	mu   sync.Mutex
	host string
}

func (s *served) set(host string) {
	s.mu.Lock()
	s.host = host
	s.mu.Unlock()
}

func (s *served) get() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.host
}

// guard puts berth's rules between containerd's registry code and one host.
func (src *source) guard(h *docker.RegistryHost, all []docker.RegistryHost, file hostsFile, bound map[string]bool, cred credentials) {
	plain := map[string]bool{}
	for _, other := range all {
		if other.Scheme == "http" {
			plain[withPort(strings.ToLower(other.Host), "http")] = true
		}
	}
	base := *h.Client
	token := base
	client := base
	client.Transport = &guardedTransport{next: base.Transport, src: src, host: h.Host}
	client.CheckRedirect = checkRedirect(plain)
	h.Client = &client

	self := withPort(strings.ToLower(h.Host), h.Scheme)
	token.Transport = &guardedTransport{next: base.Transport, src: src, limit: maxToken}
	token.CheckRedirect = func(req *http.Request, via []*http.Request) error {
		// A 307 would carry the password of a token request's body along.
		if urlHost(req.URL) != urlHost(via[0].URL) || req.URL.Scheme != via[0].URL.Scheme {
			return fmt.Errorf("token server redirects to %s: %w", quote(req.URL.Host), errRedirect)
		}
		if len(via) >= maxRedirects {
			return fmt.Errorf("more than %d: %w", maxRedirects, errRedirect)
		}
		return nil
	}
	a := &authorizer{host: h.Host, note: src.note, plain: plain, client: &token, header: h.Header, realms: map[string]bool{self: true}}
	for _, r := range append(knownTokenHosts[h.Host], file.TokenHosts...) {
		a.realms[canonicalHost(r)] = true
	}
	if bound[self] {
		a.cred = cred
	}
	h.Authorizer = a
}

// checkRedirect follows a few redirects. What goes to another host goes without any header that could be a secret: Go
// itself drops Authorization only, and not for subdomains.
func checkRedirect(plain map[string]bool) func(*http.Request, []*http.Request) error {
	return func(req *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d: %w", maxRedirects, errRedirect)
		}
		first := via[0]
		// Whether it is TLS is told by the answer: the URL of a loopback registry may say https and mean either.
		if req.Response != nil && req.Response.TLS != nil && req.URL.Scheme != "https" && !plain[urlHost(req.URL)] {
			return fmt.Errorf("from https to %s://%s: %w", req.URL.Scheme, req.URL.Host, errRedirect)
		}
		foreign := urlHost(req.URL) != urlHost(first.URL)
		for _, r := range via {
			foreign = foreign || urlHost(r.URL) != urlHost(first.URL)
		}
		if foreign {
			for name := range req.Header {
				switch http.CanonicalHeaderKey(name) {
				case "Accept", "Accept-Encoding", "Range", "User-Agent":
				default:
					delete(req.Header, name)
				}
			}
		}
		return nil
	}
}

// guardedTransport bounds answers in length and slowness, asks for them as they are, and waits when it is told to.
type guardedTransport struct {
	next  http.RoundTripper
	src   *source
	host  string // "" for a token server
	limit int64
}

// RoundTrip implements http.RoundTripper.
func (t *guardedTransport) RoundTrip(in *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(in.Context())
	req := in.Clone(ctx)
	// Identity: a compressed answer could be of any length, and the digest is that of the stored form anyway.
	req.Header.Set("Accept-Encoding", "identity")
	var resp *http.Response
	for try := 1; ; try++ {
		var err error
		resp, err = t.next.RoundTrip(req)
		if err != nil {
			if in.Context().Err() == nil && t.host != "" {
				t.src.leaveOut(t.host)
			}
			cancel(nil)
			return nil, err
		}
		if resp.StatusCode != http.StatusTooManyRequests || t.host == "" {
			break
		}
		resp.Body.Close()
		// Another mirror is better than waiting; and containerd would ask again five times at once.
		if t.src.leaveOut(t.host) || try == tries429 {
			cancel(nil)
			return nil, errRateless
		}
		if err := sleep(ctx, retryAfter(resp.Header, try, t.src.pace.RetryAfter)); err != nil {
			cancel(nil)
			return nil, err
		}
	}
	if resp.StatusCode >= 500 && t.host != "" {
		t.src.leaveOut(t.host)
	}
	// Some stores label a blob that is gzip with Content-Encoding: gzip. The bytes are taken as they are; the digest decides.
	resp.Header.Del("Content-Encoding")
	limit := t.limit
	if v, ok := ctx.Value(limitKey{}).(int64); ok && limit == 0 {
		limit = v
	}
	if resp.StatusCode >= 300 {
		limit = maxToken
	}
	if s, ok := ctx.Value(servedKey{}).(*served); ok && t.host != "" {
		s.set(t.host)
	}
	body := &boundedBody{body: resp.Body, ctx: ctx, cancel: cancel, pace: t.src.pace, left: limit, bounded: limit > 0}
	body.stuck = time.AfterFunc(time.Hour, func() { cancel(errTooSlow) })
	body.stuck.Stop()
	resp.Body = body
	return resp, nil
}

// retryAfter reads how long to wait before the next try.
func retryAfter(h http.Header, try int, most time.Duration) time.Duration {
	d := time.Second << (try - 1)
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		d = most
		if n < int(most/time.Second) {
			d = time.Duration(n) * time.Second
		}
	} else if at, err := http.ParseTime(v); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), most)
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// boundedBody is an answer's body that may be so long, and must keep so much pace.
type boundedBody struct {
	body    io.ReadCloser
	ctx     context.Context
	cancel  context.CancelCauseFunc
	stuck   *time.Timer
	pace    pace
	bounded bool
	left    int64
	waited  time.Duration // in this window
	got     int64
}

// Read implements io.Reader.
func (b *boundedBody) Read(p []byte) (int, error) {
	if b.bounded {
		if b.left < 0 {
			return 0, errTooLong
		}
		// One byte more than allowed is read, to tell an answer of just that length from a longer one.
		if int64(len(p)) > b.left+1 {
			p = p[:b.left+1]
		}
	}
	start := time.Now()
	b.stuck.Reset(b.pace.Window)
	n, err := b.body.Read(p)
	b.stuck.Stop()
	b.waited += time.Since(start)
	b.got += int64(n)
	if b.bounded {
		if b.left -= int64(n); b.left < 0 {
			return n - 1, errTooLong
		}
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errTooSlow) {
		return n, errTooSlow
	}
	// Only time spent waiting counts: a slow disk must not make a registry look slow.
	if b.waited >= b.pace.Window {
		if b.got < b.pace.Floor && err == nil {
			return n, errTooSlow
		}
		b.waited, b.got = 0, 0
	}
	return n, err
}

// Close implements io.Closer.
func (b *boundedBody) Close() error {
	b.stuck.Stop()
	err := b.body.Close()
	b.cancel(nil)
	return err
}

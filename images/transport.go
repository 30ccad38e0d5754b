package images

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
)

// pace is how slow a registry may be, and how long it may make us wait.
type pace struct {
	// Window and Floor: less than Floor bytes in Window spent waiting for data means that the connection is stuck,
	// even when a byte trickles in now and then (containerd#11650). Window also bounds the wait for one piece.
	Window time.Duration
	Floor  int64
	// RetryAfter bounds how long a registry that is busy is waited for.
	RetryAfter time.Duration
	// BackOff is waited before the first try after a failure, and twice as long before each one more.
	BackOff time.Duration
}

// paceOf is the pace of pulls whose connections bring so many bytes a second.
func paceOf(rate int64) pace {
	const window = 30 * time.Second
	return pace{Window: window, Floor: rate * int64(window/time.Second), RetryAfter: time.Minute, BackOff: 500 * time.Millisecond}
}

// slow is the error about a connection that brought less than Floor.
func (p pace) slow() error {
	return fmt.Errorf("%w: less than %d bytes in %v (minPullRate)", errTooSlow, p.Floor, p.Window)
}

// backOff returns how long to wait before the nth try more: not all nodes of a cluster at once.
func (p pace) backOff(n int) time.Duration {
	d := p.BackOff << (n - 1)
	return d + rand.N(d/4+1)
}

var (
	errTooSlow  = errors.New("the registry sends too slowly")
	errCut      = errors.New("the connection broke off")
	errTooLong  = errors.New("the registry's answer is too long")
	errRedirect = errors.New("redirect refused")
	errRange    = errors.New("the registry answers with another range than it was asked for")
)

// busyError is the answer of a registry that cannot answer now.
type busyError struct {
	host   string
	status string
}

func (e *busyError) Error() string { return e.host + " answers " + quote(e.status) }

const (
	maxRedirects = 5
	maxToken     = 1 << 20
	tries        = 4 // of what fails without anything to show for it
)

// Values that a request's context carries through the libraries to the transport.
type (
	limitKey  struct{} // int64: the most bytes its answer may have
	servedKey struct{} // *served: who answered
	meterKey  struct{} // *meter: its pace, over several answers
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
	for _, values := range h.Header {
		src.secrets.addHeaders(values...)
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
	switch {
	case bound[self]:
		a.cred = cred
	case !cred.empty():
		a.withheld = src.whyWithheld(cred)
	}
	h.Authorizer = a
}

// whyWithheld says why a host does not get the credentials.
func (src *source) whyWithheld(cred credentials) string {
	domain := reference.Domain(src.named)
	switch {
	case cred.server != "":
		return "they are for " + quote(cred.server)
	case src.fallen:
		return fmt.Sprintf("they are for %s, and %s/hosts.toml names this host for every registry; if it is to have them, make it the server of %s/hosts.toml",
			domain, defaultHosts, domain)
	}
	return "they are for the registry itself, and this is a mirror"
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
	t.src.secrets.addHeaders(req.Header.Values("Authorization")...) // also the tokens that a token server gave
	var resp *http.Response
	for try := 1; ; try++ {
		if try > 1 && in.GetBody != nil {
			body, err := in.GetBody()
			if err != nil {
				cancel(nil)
				return nil, err
			}
			req.Body = body
		}
		// Not for tokens: the answer that asks for one still has its connection.
		if t.host != "" {
			if err := t.src.connections.take(ctx); err != nil {
				cancel(nil)
				return nil, err
			}
		}
		var err error
		resp, err = t.next.RoundTrip(req)
		if err != nil {
			t.hungUp()
			if in.Context().Err() == nil && t.host != "" {
				t.src.fault(t.host, err.Error())
				t.src.leaveOut(t.host)
			}
			cancel(nil)
			return nil, err
		}
		t.src.secrets.redactAnswer(resp)
		if !isBusy(resp.StatusCode) {
			break
		}
		busy := &busyError{host: cmp.Or(t.host, in.URL.Host), status: resp.Status}
		resp.Body.Close()
		t.hungUp()
		t.src.fault(busy.host, quote(resp.Status))
		// Another mirror is better than waiting; and containerd would ask again at once, five times.
		if t.host != "" && t.src.leaveOut(t.host) || try == tries {
			cancel(nil)
			return nil, busy
		}
		wait := t.src.pace.retryAfter(resp.Header, try)
		t.src.log.Info("registry is busy", "host", busy.host, "status", resp.StatusCode, "waiting", wait)
		if err := sleep(ctx, wait); err != nil {
			cancel(nil)
			return nil, err
		}
	}
	if err := checkRange(in, resp); err != nil {
		t.src.fault(t.host, err.Error())
		resp.Body.Close()
		t.hungUp()
		cancel(nil)
		return nil, err
	}
	// Some stores label a blob that is gzip with Content-Encoding: gzip. The bytes are taken as they are; the digest decides.
	resp.Header.Del("Content-Encoding")
	limit := t.limit
	if v, ok := ctx.Value(limitKey{}).(int64); ok && limit == 0 {
		limit = v
	}
	switch {
	case resp.StatusCode == http.StatusUnauthorized:
		t.src.fault(t.host, unauthorized)
	case resp.StatusCode >= 400:
		t.src.fault(t.host, quote(resp.Status))
	default:
		t.src.answered(t.host)
	}
	if resp.StatusCode >= 300 {
		limit = maxToken
	} else if limit > 0 && resp.ContentLength > limit {
		resp.Body.Close()
		t.hungUp()
		cancel(nil)
		return nil, fmt.Errorf("%w: %d bytes, not more than %d are allowed", errTooLong, resp.ContentLength, limit)
	}
	if s, ok := ctx.Value(servedKey{}).(*served); ok && t.host != "" {
		s.set(t.host)
	}
	body := &boundedBody{body: resp.Body, ctx: ctx, cancel: cancel, pace: t.src.pace, left: limit, bounded: limit > 0, meter: &meter{}, closed: sync.OnceFunc(t.hungUp)}
	if m, ok := ctx.Value(meterKey{}).(*meter); ok {
		body.meter = m
	}
	body.stuck = time.AfterFunc(time.Hour, func() { cancel(errTooSlow) })
	body.stuck.Stop()
	resp.Body = body
	return resp, nil
}

func (t *guardedTransport) hungUp() {
	if t.host != "" {
		t.src.connections.give()
	}
}

// isBusy knows the answers that another try may better.
func isBusy(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// checkRange refuses an answer that is not the part that was asked for; containerd takes any for it. An answer that is
// the whole, since ranges are not known to the registry, is fine.
func checkRange(req *http.Request, resp *http.Response) error {
	if resp.StatusCode != http.StatusPartialContent {
		resp.Header.Del("Content-Range")
		return nil
	}
	var asked, from, to int64
	if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &asked); err != nil {
		return fmt.Errorf("%w: %s to a request for all", errRange, quote(resp.Header.Get("Content-Range")))
	}
	if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/", &from, &to); err != nil || from != asked || to < from {
		return fmt.Errorf("%w: %s to %s", errRange, quote(resp.Header.Get("Content-Range")), quote(req.Header.Get("Range")))
	}
	return nil
}

// retryAfter reads how long to wait before the next try.
func (p pace) retryAfter(h http.Header, try int) time.Duration {
	d := p.backOff(try)
	v := h.Get("Retry-After")
	if n, err := strconv.Atoi(v); err == nil && n >= 0 {
		d = p.RetryAfter
		if n < int(p.RetryAfter/time.Second) {
			d = time.Duration(n) * time.Second
		}
	} else if at, err := http.ParseTime(v); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), p.RetryAfter)
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
	meter   *meter
	closed  func()
}

// meter is what came in the window that has begun. One of a download goes on with its next connection, so that many
// short answers are not faster than one slow one.
type meter struct {
	waited time.Duration
	got    int64
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
	b.meter.waited += time.Since(start)
	b.meter.got += int64(n)
	if b.bounded {
		if b.left -= int64(n); b.left < 0 {
			return n - 1, errTooLong
		}
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errTooSlow) {
		*b.meter = meter{}
		return n, b.pace.slow()
	}
	if err == io.ErrUnexpectedEOF {
		err = errCut // containerd's reader would go on by itself, without an end and without asking whether the range is right
	}
	// Only time spent waiting counts: a slow disk must not make a registry look slow.
	if b.meter.waited >= b.pace.Window {
		slow := b.meter.got < b.pace.Floor
		*b.meter = meter{}
		if slow && err == nil {
			return n, b.pace.slow()
		}
	}
	return n, err
}

// Close implements io.Closer.
func (b *boundedBody) Close() error {
	b.stuck.Stop()
	err := b.body.Close()
	b.cancel(nil)
	b.closed()
	return err
}

package streaming

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"regexp"
	"sync"
	"time"
)

// session is the only form of path that there is.
var session = regexp.MustCompile(`^/(exec|attach|portforward)/[A-Za-z0-9_-]{1,64}$`)

// Guesses that miss. A token has 128 bits and needs no such limit; what tries them would keep a processor busy.
const (
	missRate  = 100 // a second
	missBurst = 200
	// maxDelay is how long a request waits for its turn while misses are too many; then it is a miss itself.
	maxDelay = 2 * time.Second
)

// gate lets requests through that can be sessions.
type gate struct {
	next   http.Handler
	misses *bucket
}

func newGate(next http.Handler) *gate {
	return &gate{next: next, misses: &bucket{rate: missRate, burst: missBurst, level: missBurst, now: time.Now}}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost || !session.MatchString(r.URL.EscapedPath()) {
		g.misses.take()
		http.NotFound(w, r)
		return
	}
	if !g.misses.wait(r.Context(), maxDelay) {
		http.NotFound(w, r) // unseen, so that the answer tells nothing about the token
		return
	}
	rec := &recorder{ResponseWriter: w}
	g.next.ServeHTTP(rec, r)
	if rec.code == http.StatusNotFound {
		g.misses.take()
	}
}

// bucket is a token bucket that may fall below zero: what is taken is known only afterwards.
type bucket struct {
	rate, burst float64
	now         func() time.Time

	mu    sync.Mutex
	level float64
	last  time.Time
}

// take takes one token.
func (b *bucket) take() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fill()
	b.level--
}

// wait returns at once while there are tokens; else when there will be one. It is false where that is later than max, or
// where ctx ends.
func (b *bucket) wait(ctx context.Context, max time.Duration) bool {
	b.mu.Lock()
	b.fill()
	lack := 1 - b.level
	b.mu.Unlock()
	if lack <= 0 {
		return true
	}
	delay := time.Duration(lack / b.rate * float64(time.Second))
	if delay > max {
		return false
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (b *bucket) fill() {
	now := b.now()
	if !b.last.IsZero() {
		b.level = min(b.burst, b.level+now.Sub(b.last).Seconds()*b.rate)
	}
	b.last = now
}

// recorder remembers the status of an answer. Hijack is how a session takes the connection over.
type recorder struct {
	http.ResponseWriter
	code int
}

func (r *recorder) WriteHeader(code int) {
	if r.code == 0 {
		r.code = code
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, rw, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if c, ok := nc.(*conn); ok {
		c.taken.Store(true)
	}
	return nc, rw, err
}

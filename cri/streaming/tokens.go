package streaming

import (
	"context"
	"sync"
	"time"

	"k8s.io/utils/clock"
)

// asked is which streams a request asked for. The library knows it, but does not say it: over WebSocket it passes a stream
// for each channel, and the stdin that nobody asked for reads as an end of input, which would close that of a container
// with stdin_once. So it is remembered by token, and travels with the context.
type asked struct{ stdin, stdout, stderr, tty bool }

// The library keeps a thousand tokens for a minute. Ours live a little longer, so that none is missed.
const (
	tokenTTL  = 90 * time.Second
	maxTokens = 2000
)

// tokens remembers what was asked for until the session begins.
type tokens struct {
	clock clock.PassiveClock

	mu   sync.Mutex
	live map[string]pending
}

type pending struct {
	asked
	until time.Time
}

func newTokens() *tokens { return &tokens{clock: clock.RealClock{}, live: map[string]pending{}} }

func (t *tokens) put(token string, a asked) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.clock.Now()
	if len(t.live) >= maxTokens {
		for k, p := range t.live {
			if now.After(p.until) {
				delete(t.live, k)
			}
		}
	}
	if len(t.live) < maxTokens {
		t.live[token] = pending{a, now.Add(tokenTTL)}
	}
}

// take returns what was asked for, once.
func (t *tokens) take(token string) (asked, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.live[token]
	delete(t.live, token)
	return p.asked, ok && !t.clock.Now().After(p.until)
}

// peek returns what was asked for and leaves it there.
func (t *tokens) peek(token string) (asked, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.live[token]
	return p.asked, ok && !t.clock.Now().After(p.until)
}

type askedKey struct{}

func withAsked(ctx context.Context, a asked) context.Context {
	return context.WithValue(ctx, askedKey{}, a)
}

func askedOf(ctx context.Context) asked {
	a, _ := ctx.Value(askedKey{}).(asked)
	return a
}

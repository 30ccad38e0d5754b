package streaming

import (
	"crypto/rand"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/utils/clock"
)

// Kinds of sessions; each is the first part of a path.
const (
	execKind    = "exec"
	attachKind  = "attach"
	forwardKind = "portforward"
)

// request is what a URL was handed out for.
type request struct {
	kind string
	id   string // of the container, or of the pod
	cmd  []string
	asked
	ports []int32 // of a port-forward, where its streams do not say
}

// asked is which streams a request asked for.
type asked struct{ stdin, stdout, stderr, tty bool }

// A client connects right after the call that gave it the URL. More than so many that wait are a client that never does.
const (
	tokenTTL  = time.Minute
	maxTokens = 1000
)

// tokens remembers requests until their sessions begin.
type tokens struct {
	clock clock.PassiveClock

	mu   sync.Mutex
	live map[string]pending
}

type pending struct {
	request
	until time.Time
}

func newTokens() *tokens { return &tokens{clock: clock.RealClock{}, live: map[string]pending{}} }

// put returns a token for a request.
func (t *tokens) put(r request) (string, error) {
	token := rand.Text() // 128 bits
	now := t.clock.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.live) >= maxTokens {
		for k, p := range t.live {
			if now.After(p.until) {
				delete(t.live, k)
			}
		}
	}
	if len(t.live) >= maxTokens {
		return "", fmt.Errorf("%d streaming sessions were asked for within %s and have not begun: %w", maxTokens, tokenTTL, errdefs.ErrResourceExhausted)
	}
	t.live[token] = pending{r, now.Add(tokenTTL)}
	return token, nil
}

// take returns the request of a token, once.
func (t *tokens) take(token string) (request, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.live[token]
	delete(t.live, token)
	return p.request, ok && !t.clock.Now().After(p.until)
}

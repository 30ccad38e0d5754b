package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// toBeDeleted is the taint by which the cluster autoscaler says that it is about to delete a node.
const toBeDeleted = "ToBeDeletedByClusterAutoscaler"

// Health is whether the proxy keeps up with changes.
type Health struct {
	limit    time.Duration
	families []string
	now      func() time.Time

	mu      sync.Mutex
	updated time.Time // when the kernel last had all that was known; zero before the first time
	waiting time.Time // since when the oldest change waits that is not being programmed; zero if none does
	working time.Time // the same for those that are, or that failed
	node    *corev1.Node
}

// New makes a Health that is bad when a change is not in the kernel after the limit. Families are those that are served.
func New(limit time.Duration, families ...string) *Health {
	return &Health{limit: limit, families: families, now: time.Now}
}

// Queued says that there is a change.
func (h *Health) Queued() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.waiting.IsZero() {
		h.waiting = h.now()
	}
}

// Begin says that all there is so far is being programmed. What it returns is called with whether the kernel has it.
func (h *Health) Begin() func(done bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.working.IsZero() {
		h.working = h.waiting
	}
	h.waiting = time.Time{}
	return func(done bool) {
		h.mu.Lock()
		defer h.mu.Unlock()
		if done {
			h.working, h.updated = time.Time{}, h.now()
		} else if h.working.IsZero() {
			h.working = h.now() // what was to be mended is late from now on
		}
	}
}

// SetNode tells of the node's own Node; nil if it has none.
func (h *Health) SetNode(n *corev1.Node) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.node = n
}

// Healthy is whether no change is late. A proxy that starts is healthy.
func (h *Health) Healthy() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.healthy(h.now())
}

func (h *Health) healthy(now time.Time) bool {
	late := func(since time.Time) bool { return !since.IsZero() && now.Sub(since) >= h.limit }
	return h.updated.IsZero() || !late(h.waiting) && !late(h.working)
}

// eligible is whether load balancers should send to this node: it is there, and not about to be deleted (KEP-3836).
func (h *Health) eligible() bool {
	if h.node == nil || !h.node.DeletionTimestamp.IsZero() {
		return false
	}
	for _, t := range h.node.Spec.Taints {
		if t.Key == toBeDeleted {
			return false
		}
	}
	return true
}

// answer is the body of /healthz and /livez.
type answer struct {
	LastUpdated  time.Time               `json:"lastUpdated"`
	CurrentTime  time.Time               `json:"currentTime"`
	NodeEligible *bool                   `json:"nodeEligible,omitempty"`
	Healthy      bool                    `json:"healthy"`
	Status       map[string]familyAnswer `json:"status,omitempty"`
}

type familyAnswer struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// answer is what is told, with the node's eligibility or without, and whether it is good.
func (h *Health) answer(node bool) (answer, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	a := answer{LastUpdated: h.updated, CurrentTime: now, Healthy: h.healthy(now), Status: map[string]familyAnswer{}}
	if !h.updated.IsZero() {
		for _, f := range h.families {
			a.Status[f] = familyAnswer{LastUpdated: h.updated, Healthy: a.Healthy}
		}
	}
	good := a.Healthy
	if node {
		eligible := h.eligible()
		a.NodeEligible, good = &eligible, good && eligible
	}
	if good {
		a.LastUpdated = now // nothing has changed since: what is there is of now
	}
	return a, good
}

// Handler serves /healthz, which is bad for a node that is about to go as well, and /livez, which is not.
func (h *Health) Handler(m *Metrics) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		a, good := h.answer(true)
		m.healthz.WithLabelValues(reply(w, good, a)).Inc()
		observe("proxy", "healthz", good)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		a, good := h.answer(false)
		m.livez.WithLabelValues(reply(w, good, a)).Inc()
		observe("proxy", "livez", good)
	})
	return mux
}

// reply writes 200 or 503 with a body, and says which.
func reply(w http.ResponseWriter, good bool, body any) string {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	code, text := http.StatusOK, "200"
	if !good {
		code, text = http.StatusServiceUnavailable, "503"
	}
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
	return text
}

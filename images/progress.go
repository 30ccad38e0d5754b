package images

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// PullStatus is how far a pull had come when it was asked for. The caller owns it.
type PullStatus struct {
	// Reference is normalised.
	Reference string
	Started   time.Time
	State     PullState
	// Layers, bottom first; none before the manifest is known, and none where the image is here already.
	Layers []LayerStatus
}

// Bytes returns how many bytes of compressed layers were fetched, of how many that have to be. Both grow while a manifest
// is read; layers that are here already count in neither.
func (p *PullStatus) Bytes() (fetched, total int64) {
	for _, l := range p.Layers {
		if l.State != LayerPresent {
			fetched += l.Fetched
			total += l.Size
		}
	}
	return fetched, total
}

// PullState is what a pull is at.
type PullState string

// States of a pull, in their order.
const (
	PullResolving PullState = "resolving" // the reference, manifests and configuration
	PullUnpacking PullState = "unpacking" // layers are fetched and unpacked
	PullFinishing PullState = "finishing" // what was unpacked is made durable and visible
)

// LayerStatus is how far a layer of a pull has come.
type LayerStatus struct {
	// Digest is that of the compressed blob.
	Digest digest.Digest
	// Size and Fetched are bytes of the compressed blob. Fetched falls to nothing when a layer begins anew.
	Size, Fetched int64
	// Unpacked is how many bytes of the archive came out so far.
	Unpacked int64
	State    LayerState
}

// LayerState is what a layer of a pull is at.
type LayerState string

// States of a layer.
const (
	LayerWaiting  LayerState = "waiting"  // for its turn
	LayerFetching LayerState = "fetching" // and unpacking, which is the same moment
	LayerUnpacked LayerState = "unpacked"
	LayerPresent  LayerState = "present" // was here before this pull
)

// Here tells whether the layer is on this node.
func (s LayerState) Here() bool { return s == LayerUnpacked || s == LayerPresent }

// PullCounts are what all pulls came to since the store was opened.
type PullCounts struct {
	Pulled, Failed uint64
	// Local of those pulled were images of this node, since their registry did not answer (Options.LocalWhenUnavailable).
	Local uint64
	// Bytes of layers, manifests and configurations that were fetched, those of failed tries included.
	Bytes uint64
	// Resumed downloads went on where a connection broke off.
	Resumed uint64
}

// tracker knows how far every pull has come.
type tracker struct {
	mu    sync.Mutex
	pulls map[*pullProgress]struct{}
	// layers are those under way, which several pulls may wait for.
	layers map[ChainID]*layerProgress

	pulled, failed, local, bytes, resumed atomic.Uint64
}

type pullProgress struct {
	ref     string
	started time.Time

	mu     sync.Mutex
	state  PullState
	chains []ChainID
	layers []LayerStatus // Fetched and Unpacked of those that are fetching are in tracker.layers
}

// layerProgress may be nil, where nobody wants to know.
type layerProgress struct{ fetched, unpacked atomic.Int64 }

func (l *layerProgress) countFetched(n int) {
	if l != nil {
		l.fetched.Add(int64(n))
	}
}

func (l *layerProgress) countUnpacked(n int) {
	if l != nil {
		l.unpacked.Add(int64(n))
	}
}

// Pulls returns the pulls under way, oldest first. Callers who share one pull see one.
func (s *Store) Pulls() []PullStatus {
	t := &s.track
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]PullStatus, 0, len(t.pulls))
	for p := range t.pulls {
		all = append(all, p.status(t.layers))
	}
	slices.SortFunc(all, func(a, b PullStatus) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Reference, b.Reference))
	})
	return all
}

// PullCounts returns what the pulls so far came to.
func (s *Store) PullCounts() PullCounts {
	t := &s.track
	return PullCounts{
		Pulled: t.pulled.Load(), Failed: t.failed.Load(), Local: t.local.Load(), Bytes: t.bytes.Load(), Resumed: t.resumed.Load(),
	}
}

func (t *tracker) begin(ref string) *pullProgress {
	p := &pullProgress{ref: ref, started: time.Now(), state: PullResolving}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pulls == nil {
		t.pulls = map[*pullProgress]struct{}{}
	}
	t.pulls[p] = struct{}{}
	return p
}

func (t *tracker) end(p *pullProgress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.pulls, p)
}

// layer follows a layer that begins; ended forgets it.
func (t *tracker) layer(chain ChainID) (l *layerProgress, ended func()) {
	l = &layerProgress{}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.layers == nil {
		t.layers = map[ChainID]*layerProgress{}
	}
	t.layers[chain] = l
	return l, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.layers[chain] == l {
			delete(t.layers, chain)
		}
	}
}

func (p *pullProgress) set(state PullState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = state
}

func (p *pullProgress) setLayers(chains []ChainID, layers []LayerStatus) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state, p.chains, p.layers = PullUnpacking, chains, layers
}

func (p *pullProgress) setLayer(i int, state LayerState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.layers[i].State = state
	if state == LayerUnpacked {
		p.layers[i].Fetched = p.layers[i].Size
	}
}

func (p *pullProgress) status(running map[ChainID]*layerProgress) PullStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := PullStatus{Reference: p.ref, Started: p.started, State: p.state, Layers: slices.Clone(p.layers)}
	for i := range out.Layers {
		l := &out.Layers[i]
		if now := running[p.chains[i]]; now != nil && l.State == LayerWaiting {
			l.State, l.Fetched, l.Unpacked = LayerFetching, now.fetched.Load(), now.unpacked.Load()
		}
	}
	return out
}

package pods

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Bounds on what events take. An event is a few pointers to what is in memory anyway, as long as what it tells of is.
const (
	maxReaders = 64
	maxQueued  = 4096 // of one reader, of events that it has not taken yet
	maxUnread  = 1024 // of events that came while there was no reader
	// keepUnread is how long they are kept for: a kubelet that is restarted, or whose connection a killed daemon has cut,
	// is back by then.
	keepUnread = 5 * time.Minute
)

// ErrFellBehind is the error of a reader of events that took them too slowly. It has got all up to there, in order, and
// none after it: it has to list what there is, and may subscribe anew.
var ErrFellBehind = fmt.Errorf("reader of events fell more than %d behind: list what is there, then subscribe anew: %w", maxQueued, errdefs.ErrResourceExhausted)

// Event tells that something happened to a container or to a pod sandbox, and what the pod was right after it. Nobody
// changes it once it is handed out.
type Event struct {
	ID         string // of the container, or of the sandbox
	Type       cri.ContainerEventType
	At         time.Time
	Sandbox    *Sandbox
	Containers []*Container // all that the sandbox has, newest first
}

// events hands every event to every reader, in one order. What comes while there is no reader is kept for the next one,
// within bounds.
type events struct {
	mu      sync.Mutex
	now     func() time.Time
	readers map[*EventReader]struct{}
	unread  []*Event
	alone   time.Time // since when there is no reader
	gap     bool      // more came than is kept: nothing is, until there is a reader
}

func newEvents(now func() time.Time) *events {
	return &events{now: now, readers: map[*EventReader]struct{}{}, alone: now()}
}

// publish hands out an event, which is made meanwhile, so that what it shows of a pod is never older than what the event
// before it showed. It never waits for a reader.
func (b *events) publish(event func(at time.Time) *Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := event(b.now())
	for r := range b.readers {
		select {
		case r.queue <- e:
		default:
			b.drop(r)
		}
	}
	if len(b.readers) == 0 {
		b.keep(e)
	}
}

// drop ends a reader that is too slow.
func (b *events) drop(r *EventReader) {
	delete(b.readers, r)
	close(r.queue)
	b.alone = b.now()
}

// keep keeps an event that nobody has been given.
func (b *events) keep(e *Event) {
	if b.gap || len(b.unread) == maxUnread || b.now().Sub(b.alone) > keepUnread {
		// With some missing the others are worth nothing: whoever comes lists what there is.
		b.unread, b.gap = nil, true
		return
	}
	b.unread = append(b.unread, e)
}

// EventReader gets every event from its subscription on. One goroutine may use it.
type EventReader struct {
	bus   *events
	queue chan *Event // closed when the reader is too slow
	given *Event      // by the last Next
}

func (b *events) subscribe() (*EventReader, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.readers) == maxReaders {
		return nil, fmt.Errorf("events have %d readers already: %w", maxReaders, errdefs.ErrResourceExhausted)
	}
	r := &EventReader{bus: b, queue: make(chan *Event, maxQueued)}
	if len(b.readers) == 0 && b.now().Sub(b.alone) <= keepUnread {
		for _, e := range b.unread {
			r.queue <- e // they fit
		}
	}
	b.unread, b.gap = nil, false
	b.readers[r] = struct{}{}
	return r, nil
}

// Next waits for the next event. That it is called again says that the one before has reached its reader.
func (r *EventReader) Next(ctx context.Context) (*Event, error) {
	r.given = nil
	if ctx.Err() != nil { // what is there already stays there for the next reader
		return nil, context.Cause(ctx)
	}
	select {
	case e, ok := <-r.queue:
		if !ok {
			return nil, ErrFellBehind
		}
		r.given = e
		return e, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close ends the subscription. What the last of all readers was not given, or did not come back from, the next one gets.
func (r *EventReader) Close() {
	b := r.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	_, keptUp := b.readers[r]
	delete(b.readers, r)
	if len(b.readers) > 0 {
		return
	}
	if !keptUp {
		if r.given != nil || len(r.queue) > 0 {
			b.unread, b.gap = nil, true
		}
		return // else it knows all up to what has been kept since
	}
	b.alone = b.now()
	if r.given != nil {
		b.keep(r.given)
	}
	for len(r.queue) > 0 {
		b.keep(<-r.queue)
	}
}

// Events subscribes to what happens to pods and containers. The reader has to be closed.
func (m *Manager) Events() (*EventReader, error) { return m.events.subscribe() }

// announce publishes events of a container or of a sandbox, whose id is id, in the pod p.
func (m *Manager) announce(p *pod, id string, types ...cri.ContainerEventType) {
	for _, t := range types {
		m.events.publish(func(at time.Time) *Event {
			return &Event{ID: id, Type: t, At: at, Sandbox: p.view.Load(), Containers: m.viewsOf(p.rec.ID)}
		})
	}
}

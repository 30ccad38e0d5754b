package pods

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// clock is a time that a test sets.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time       { c.mu.Lock(); defer c.mu.Unlock(); return c.t }
func (c *clock) pass(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.t = c.t.Add(d) }

func publishN(b *events, from, to int) {
	for i := from; i < to; i++ {
		b.publish(func(at time.Time) *Event { return &Event{ID: fmt.Sprint(i), At: at} })
	}
}

// wantEvents wants the events from one number up to another, and then no more.
func wantEvents(t *testing.T, r *EventReader, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		e, err := r.Next(t.Context())
		if err != nil || e.ID != fmt.Sprint(i) {
			t.Fatalf("event %v (%v), want %d", e, err, i)
		}
	}
	none, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if e, err := r.Next(none); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("after %d: %v, %v", to, e, err)
	}
}

func newBus(t *testing.T) (*events, *clock) {
	t.Helper()
	c := &clock{t: time.Unix(1700000000, 0)}
	return newEvents(c.now), c
}

func subscribe(t *testing.T, b *events) *EventReader {
	t.Helper()
	r, err := b.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEachReaderGetsEachEventOnceInOrder(t *testing.T) {
	b, _ := newBus(t)
	const readers, many, writers = 20, 500, 4
	var wg sync.WaitGroup
	for range readers {
		r := subscribe(t, b)
		wg.Go(func() {
			defer r.Close()
			last := map[string]int{}
			for range many * writers {
				e, err := r.Next(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if e.At.Nanosecond() != last[e.ID] {
					t.Errorf("event %d of %s comes as its %dth", e.At.Nanosecond(), e.ID, last[e.ID])
					return
				}
				last[e.ID]++
			}
		})
	}
	for w := range writers {
		wg.Go(func() {
			for i := range many {
				b.publish(func(time.Time) *Event { return &Event{ID: fmt.Sprint(w), At: time.Unix(0, int64(i))} })
			}
		})
	}
	wg.Wait()
}

func TestReaderThatFallsBehindIsToldSo(t *testing.T) {
	b, _ := newBus(t)
	slow, other := subscribe(t, b), subscribe(t, b)
	for i := range maxQueued + 10 { // nothing here waits for slow
		publishN(b, i, i+1)
		if e, err := other.Next(t.Context()); err != nil || e.ID != fmt.Sprint(i) {
			t.Fatal(e, err)
		}
	}
	for i := range maxQueued {
		if e, err := slow.Next(t.Context()); err != nil || e.ID != fmt.Sprint(i) {
			t.Fatalf("%v, %v: want %d", e, err, i)
		}
	}
	if e, err := slow.Next(t.Context()); !errors.Is(err, ErrFellBehind) || !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("after the last: %v, %v", e, err)
	}
	slow.Close()
	publishN(b, maxQueued+10, maxQueued+11)
	wantEvents(t, other, maxQueued+10, maxQueued+11)
}

// One that alone fell behind goes on, with its next subscription, where it was ended.
func TestReaderThatFellBehindCatchesUp(t *testing.T) {
	b, _ := newBus(t)
	r := subscribe(t, b)
	publishN(b, 0, maxQueued+7)
	for range maxQueued {
		if _, err := r.Next(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Next(t.Context()); !errors.Is(err, ErrFellBehind) {
		t.Fatal(err)
	}
	r.Close()
	wantEvents(t, subscribe(t, b), maxQueued, maxQueued+7)

	b, _ = newBus(t)
	r = subscribe(t, b)
	publishN(b, 0, maxQueued+7)
	r.Close() // with most not taken: what follows them is not given to anybody as if it followed what he knows
	wantEvents(t, subscribe(t, b), 0, 0)
}

func TestEventsWithoutAReaderAreKeptForTheNext(t *testing.T) {
	b, c := newBus(t)
	publishN(b, 0, 3)
	c.pass(keepUnread)
	r := subscribe(t, b)
	late := subscribe(t, b)
	wantEvents(t, r, 0, 3)
	wantEvents(t, late, 0, 0)
	publishN(b, 3, 4)
	late.Close() // there is another: what it has not taken is not kept
	wantEvents(t, r, 3, 4)

	publishN(b, 4, 7)
	if _, err := r.Next(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.Close() // while it sends event 4
	publishN(b, 7, 8)
	r = subscribe(t, b)
	wantEvents(t, r, 4, 8)
	r.Close()

	publishN(b, 8, 9)
	c.pass(keepUnread + 1)
	wantEvents(t, subscribe(t, b), 0, 0)
}

func TestUnreadEventsAreBounded(t *testing.T) {
	b, _ := newBus(t)
	publishN(b, 0, maxUnread+1)
	if len(b.unread) != 0 {
		t.Errorf("%d are kept", len(b.unread))
	}
	publishN(b, maxUnread+1, maxUnread+10)
	r := subscribe(t, b)
	wantEvents(t, r, 0, 0) // not some of them without the others
	r.Close()
	publishN(b, 0, maxUnread)
	wantEvents(t, subscribe(t, b), 0, maxUnread)
}

func TestReadersOfEventsAreBounded(t *testing.T) {
	b, _ := newBus(t)
	var all []*EventReader
	for range maxReaders {
		all = append(all, subscribe(t, b))
	}
	if _, err := b.subscribe(); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("one too many: %v", err)
	}
	all[0].Close()
	all[0].Close() // once is enough
	subscribe(t, b)
}

// What an event shows is what was when it happened, and events of one pod never go back in time.
func TestEventsShowThePodAsItWas(t *testing.T) {
	m := bare(t)
	p := &pod{m: m, rec: *somePod(podA)}
	p.publish()
	r := subscribe(t, m.events)
	c := m.newContainer(p, *someContainer(ctrA, podA))
	m.containers[ctrA] = c
	c.life.isCreated()
	c.lost(reasonShim, "gone")
	delete(m.containers, ctrA)
	c.life.isDeleted()
	for i, want := range []struct {
		n      int
		reason string
	}{{1, ""}, {1, reasonShim}, {0, ""}} {
		e, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.ID != ctrA || e.Sandbox.ID != podA || len(e.Containers) != want.n || want.n > 0 && e.Containers[0].Reason != want.reason {
			t.Errorf("event %d: %+v", i, e)
		}
	}
}

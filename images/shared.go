package images

import (
	"context"
	"sync"
	"time"
)

// shared makes callers who want the same thing at the same time wait for one piece of work. Each may give up alone; the
// work is cancelled when nobody waits for it any more. Its result is kept, and found by newcomers, until the last caller
// has released it, and for a while after that, if linger says so. The zero value needs only destroy.
type shared[K comparable, V any] struct {
	// destroy is called with a result that nobody needs any more.
	destroy func(V)
	// linger, if not nil, tells how long a result that nobody needs waits for the next who does, beside others that do. It is
	// called with mu held.
	linger func(v V, others []V) time.Duration

	mu      sync.Mutex
	works   map[K]*work[V]
	running sync.WaitGroup
	waiting sync.WaitGroup // of results that linger
}

type work[V any] struct {
	done   chan struct{}
	cancel context.CancelFunc
	quit   <-chan struct{}    // ends all work
	wanted context.CancelFunc // while it lingers: ends that
	refs   int
	v      V
	err    error
}

// acquire returns the result of do for key, and what to call when it is not needed any more. own tells whether this
// call started the work. do runs with a context of its own, below base.
func (s *shared[K, V]) acquire(ctx, base context.Context, key K, do func(context.Context) (V, error)) (v V, release func(), own bool, err error) {
	s.mu.Lock()
	w := s.works[key]
	if w == nil {
		own = true
		w = &work[V]{done: make(chan struct{}), quit: base.Done()}
		if s.works == nil {
			s.works = map[K]*work[V]{}
		}
		s.works[key] = w
		var wctx context.Context
		wctx, w.cancel = context.WithCancel(base)
		s.running.Go(func() {
			v, err := do(wctx)
			w.cancel()
			s.mu.Lock()
			w.v, w.err = v, err
			close(w.done)
			orphan := w.refs == 0 && err == nil
			if w.refs == 0 || err != nil {
				s.forget(key, w)
			}
			s.mu.Unlock()
			if orphan {
				s.destroy(v)
			}
		})
	}
	if w.wanted != nil {
		w.wanted()
		w.wanted = nil
	}
	w.refs++
	s.mu.Unlock()

	select {
	case <-w.done:
	case <-ctx.Done():
		s.release(key, w)
		return v, nil, own, ctx.Err()
	}
	if w.err != nil {
		s.release(key, w)
		return v, nil, own, w.err
	}
	return w.v, sync.OnceFunc(func() { s.release(key, w) }), own, nil
}

func (s *shared[K, V]) release(key K, w *work[V]) {
	s.mu.Lock()
	w.refs--
	ended := false
	if w.refs == 0 {
		select {
		case <-w.done:
			ended = w.err == nil
		default:
			w.cancel()
		}
		if ended && s.works[key] == w && s.keep(w) {
			ended = false
		} else {
			// Whoever comes now starts afresh, instead of joining work that is being cancelled.
			s.forget(key, w)
		}
	}
	s.mu.Unlock()
	if ended {
		s.destroy(w.v)
	}
}

// keep has a result linger, if it is to. The caller holds s.mu.
func (s *shared[K, V]) keep(w *work[V]) bool {
	if s.linger == nil {
		return false
	}
	stay := s.linger(w.v, s.idle())
	if stay <= 0 {
		return false
	}
	ctx, wanted := context.WithTimeout(context.Background(), stay)
	w.wanted = wanted
	s.waiting.Go(func() {
		select {
		case <-ctx.Done():
			if ctx.Err() == context.Canceled {
				return
			}
		case <-w.quit:
		}
		s.drop(func(of *work[V]) bool { return of == w })
	})
	return true
}

// idle are the results that linger. The caller holds s.mu.
func (s *shared[K, V]) idle() []V {
	var all []V
	for _, w := range s.works {
		if w.wanted != nil {
			all = append(all, w.v)
		}
	}
	return all
}

// lingering sums the results that linger up.
func (s *shared[K, V]) lingering(sum func([]V) int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sum(s.idle())
}

// dropIdle destroys the results that linger.
func (s *shared[K, V]) dropIdle() { s.drop(func(*work[V]) bool { return true }) }

func (s *shared[K, V]) drop(which func(*work[V]) bool) {
	s.mu.Lock()
	var gone []V
	for key, w := range s.works {
		if w.wanted != nil && which(w) {
			w.wanted()
			w.wanted = nil
			delete(s.works, key)
			gone = append(gone, w.v)
		}
	}
	s.mu.Unlock()
	for _, v := range gone {
		s.destroy(v)
	}
}

func (s *shared[K, V]) forget(key K, w *work[V]) {
	if s.works[key] == w {
		delete(s.works, key)
	}
}

// wait returns when no work is running.
func (s *shared[K, V]) wait() { s.running.Wait() }

// end is wait for the end of all work, whose base has ended, and of what lingers.
func (s *shared[K, V]) end() {
	s.wait()
	s.waiting.Wait()
}

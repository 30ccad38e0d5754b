package images

import (
	"context"
	"sync"
)

// shared makes callers who want the same thing at the same time wait for one piece of work. Each may give up alone; the
// work is cancelled when nobody waits for it any more. Its result is kept, and found by newcomers, until the last caller
// has released it. The zero value needs only destroy.
type shared[K comparable, V any] struct {
	// destroy is called with a result that nobody needs any more.
	destroy func(V)

	mu      sync.Mutex
	works   map[K]*work[V]
	running sync.WaitGroup
}

type work[V any] struct {
	done   chan struct{}
	cancel context.CancelFunc
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
		w = &work[V]{done: make(chan struct{})}
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
	last := w.refs == 0
	ended := false
	if last {
		select {
		case <-w.done:
			ended = w.err == nil
		default:
			w.cancel()
		}
		// Whoever comes now starts afresh, instead of joining work that is being cancelled.
		s.forget(key, w)
	}
	s.mu.Unlock()
	if ended {
		s.destroy(w.v)
	}
}

func (s *shared[K, V]) forget(key K, w *work[V]) {
	if s.works[key] == w {
		delete(s.works, key)
	}
}

// wait returns when no work is running.
func (s *shared[K, V]) wait() { s.running.Wait() }

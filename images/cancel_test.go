package images

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// TestNothingIsLeftOfACancelledPull: whatever a pull is waiting for, a second after its caller has gone there is no request, no
// goroutine and no staged file of it.
func TestNothingIsLeftOfACancelledPull(t *testing.T) {
	img := imagestest.NewImage(imagestest.ZstdLayer(noise(1, 2<<20)))
	blob := img.Layers[0].Blob
	built := img.Build()
	isLayer := func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, digest.FromBytes(blob).String()) }
	hang := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	hasLayers := func(s *Store) bool { p := s.Pulls(); return len(p) == 1 && len(p[0].Layers) == 1 }
	fill := func(s slots) func() {
		for range cap(s) {
			s <- struct{}{}
		}
		return func() {
			for range cap(s) {
				s.give()
			}
		}
	}
	for name, c := range map[string]struct {
		// setup may hold up something of the store, until the returned function is called.
		setup func(s *Store, reg *imagestest.Registry) func()
		of    func(r *http.Request) bool // requests that are answered by
		how   http.HandlerFunc
		asked int // how often, until the pull is where it should be, which
		there func(s *Store) bool
	}{
		"reference": {of: func(r *http.Request) bool { return r.Method == http.MethodHead }, how: hang, asked: 1},
		"manifest": {of: func(r *http.Request) bool {
			return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/manifests/")
		}, how: hang, asked: 1},
		"configuration": {of: func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, built.ConfigID.String()) }, how: hang, asked: 1},
		"token": {of: func(r *http.Request) bool { return r.URL.Path == "/token" }, how: hang, asked: 1, setup: func(_ *Store, reg *imagestest.Registry) func() {
			reg.RequireToken("", user, secret)
			return func() {}
		}},
		"layer, of which nothing has come": {of: isLayer, how: hang, asked: 1},
		"layer, of which half has come": {of: isLayer, asked: 1, how: func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write(blob[:len(blob)/2])
			_ = http.NewResponseController(w).Flush()
			hang(w, r)
		}, there: func(s *Store) bool { return hasLayers(s) && s.Pulls()[0].Layers[0].Unpacked > 0 }},
		"busy registry": {of: func(*http.Request) bool { return true }, asked: 1, how: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "30")
			w.WriteHeader(http.StatusServiceUnavailable)
		}},
		"pause after broken connections": {of: isLayer, asked: 2, how: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }},
		"turn to unpack":                 {setup: func(s *Store, _ *imagestest.Registry) func() { return fill(s.layersAtOnce) }, there: hasLayers},
		"connection": {setup: func(s *Store, _ *imagestest.Registry) func() { return fill(s.connections) }, there: func(s *Store) bool {
			return len(s.Pulls()) == 1
		}},
		"memory": {of: isLayer, asked: 1, how: func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(blob) }, setup: func(*Store, *imagestest.Registry) func() {
			_ = zstdWindows.Acquire(context.Background(), 2*maxZstdWindow)
			return func() { zstdWindows.Release(2 * maxZstdWindow) }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			s.pace = pace{Window: time.Minute, RetryAfter: time.Minute, BackOff: 30 * time.Second}
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", img)
			if c.setup != nil {
				defer c.setup(s, reg)()
			}
			var requests load
			asked := make(chan struct{}, 100)
			reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
				if c.of == nil || !c.of(r) {
					return false
				}
				defer requests.begin()()
				asked <- struct{}{}
				c.how(w, r)
				return true
			})
			goroutines := runtime.NumGoroutine()
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			ended := make(chan error, 1)
			go func() {
				_, err := s.Pull(ctx, reg.Host()+"/a:b", &Auth{Username: user, Password: secret})
				ended <- err
			}()
			for range c.asked {
				<-asked
			}
			until(t, func() bool { return c.there == nil || c.there(s) })
			time.Sleep(20 * time.Millisecond) // and now it waits
			start := time.Now()
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			gone := func() bool {
				requests.mu.Lock()
				defer requests.mu.Unlock()
				return requests.now == 0 && len(s.Pulls()) == 0 && runtime.NumGoroutine() <= goroutines
			}
			for !gone() && time.Since(start) < time.Second {
				time.Sleep(5 * time.Millisecond)
			}
			if left := leftovers(t, s); !gone() || len(left) != 0 {
				t.Errorf("after %v: %d requests, %d pulls, %d goroutines, were %d, %v", time.Since(start), requests.now, len(s.Pulls()), runtime.NumGoroutine(), goroutines, left)
			}
		})
	}
}

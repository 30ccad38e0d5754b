package images

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
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

// TestInheritingIsCutShort: and taken up again, by whoever has the layer, too.
func TestInheritingIsCutShort(t *testing.T) {
	needRoot(t)
	layer := func(modes ...os.FileMode) *os.File {
		root := t.TempDir()
		for i, mode := range modes {
			dir := filepath.Join(root, fmt.Sprint(i))
			if err := errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, mode)); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	l := &stagedLayer{root: layer(0o755, 0o755), implicit: []string{"0", "1"}, finishing: newSlots(1)}
	below := []*os.File{layer(0o751, 0o711)}
	modes := func() (modes []os.FileMode) {
		for i := range 2 {
			st, err := os.Stat(filepath.Join(l.root.Name(), fmt.Sprint(i)))
			if err != nil {
				t.Fatal(err)
			}
			modes = append(modes, st.Mode().Perm())
		}
		return modes
	}
	for _, c := range []struct {
		checks int
		want   []os.FileMode
	}{{0, []os.FileMode{0o755, 0o755}}, {2, []os.FileMode{0o751, 0o755}}} {
		if err := l.inherit(endsAfter(c.checks), below); !errors.Is(err, context.Canceled) || !slices.Equal(modes(), c.want) {
			t.Errorf("cut short after %d looks: %v, %o; want %o", c.checks, err, modes(), c.want)
		}
	}
	for range 2 {
		if err := l.inherit(context.Background(), below); err != nil || !slices.Equal(modes(), []os.FileMode{0o751, 0o711}) {
			t.Errorf("taken up again: %v, %o", err, modes())
		}
		below = []*os.File{layer(0o700, 0o700)} // once is enough
	}
}

// endsAfter is a context that ends when it has been looked at so often.
func endsAfter(looks int) context.Context {
	c := &ending{Context: context.Background()}
	c.left.Store(int64(looks))
	return c
}

type ending struct {
	context.Context
	left atomic.Int64
}

// Err implements context.Context.
func (c *ending) Err() error {
	if c.left.Add(-1) < 0 {
		return context.Canceled
	}
	return nil
}

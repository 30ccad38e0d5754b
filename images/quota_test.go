package images

import (
	"context"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/berth-run/berth/images/imagestest"
)

// TestK8s103643_RestartsAskAsLittleAsTheyCan: pods that crash and pull again and again must not use up what a registry
// allows. Fifty pulls of what is here are one question each for what the tag means, or one for all where they meet, and fetch
// nothing. No token outlives its pull (awslabs/soci-snapshotter#1084).
func TestK8s103643_RestartsAskAsLittleAsTheyCan(t *testing.T) {
	const pulls = 50
	for name, c := range map[string]struct {
		require func(*imagestest.Registry)
		auth    *Auth
		each    map[string]int // requests of a pull
	}{
		"anonymous": {func(*imagestest.Registry) {}, nil, map[string]int{"HEAD /v2/a/manifests/b": 1}},
		"token": {
			func(r *imagestest.Registry) { r.RequireToken("", user, secret) }, &Auth{Username: user, Password: secret},
			map[string]int{"HEAD /v2/a/manifests/b": 2, "POST /token": 1}, // the first is told to get a token
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := quick(t)
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", smallImage("x"))
			c.require(reg)
			pull := func() {
				if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", c.auth); err != nil {
					t.Error(err)
				}
			}
			pull()
			before := len(reg.Requests())
			counted := func() map[string]int {
				n := map[string]int{}
				for _, r := range reg.Requests()[before:] {
					n[r.Method+" "+r.Path]++
				}
				before = len(reg.Requests())
				return n
			}
			for range pulls {
				pull()
			}
			want := map[string]int{}
			for request, n := range c.each {
				want[request] = n * pulls
			}
			if got := counted(); !maps.Equal(got, want) {
				t.Errorf("one after the other: %v, want %v", got, want)
			}
			gate := make(chan struct{})
			reg.Hook(func(_ http.ResponseWriter, r *http.Request) bool {
				if strings.Contains(r.URL.Path, "/manifests/") {
					<-gate
				}
				return false
			})
			var wg sync.WaitGroup
			for range pulls {
				wg.Go(pull)
			}
			until(t, func() bool { return waiting(s) == pulls })
			close(gate)
			wg.Wait()
			if got := counted(); !maps.Equal(got, c.each) {
				t.Errorf("%d at a time: %v, want %v", pulls, got, c.each)
			}
		})
	}
}

// waiting is how many calls wait for the pulls under way.
func waiting(s *Store) (n int) {
	s.pulls.mu.Lock()
	defer s.pulls.mu.Unlock()
	for _, w := range s.pulls.works {
		n += w.refs
	}
	return n
}

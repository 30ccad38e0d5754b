package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// bigLayer is a layer of 300 KB that no compression makes smaller, and its image.
func bigLayer() (blob []byte, img *imagestest.Image) {
	img = imagestest.NewImage(imagestest.PlainLayer(imagestest.Tar(imagestest.File("f", strings.Repeat("0123456789", 30_000)))))
	return img.Layers[0].Blob, img
}

// quick is a store that does not make tests wait.
func quick(t *testing.T, change ...func(*Options)) *Store {
	s := openStore(t, change...)
	s.pace = pace{Window: 5 * time.Second, Floor: 1000, RetryAfter: 2 * time.Second, BackOff: time.Millisecond}
	return s
}

// ranges notes which ranges of a blob a registry is asked for.
type ranges struct {
	mu   sync.Mutex
	seen []string
}

func (r *ranges) add(req *http.Request) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, req.Header.Get("Range"))
	return len(r.seen)
}

func (r *ranges) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.seen, " ")
}

// onBlob hooks the requests for one blob. n counts them.
func onBlob(reg *imagestest.Registry, blob []byte, answer func(n int, w http.ResponseWriter, r *http.Request) bool) *ranges {
	asked := &ranges{}
	d := digest.FromBytes(blob).String()
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+d) {
			return false
		}
		return answer(asked.add(r), w, r)
	})
	return asked
}

// cutOff sends a part of a body and breaks the connection off.
func cutOff(w http.ResponseWriter, whole, part []byte) {
	w.Header().Set("Content-Length", fmt.Sprint(len(whole)))
	_, _ = w.Write(part)
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// TestPullGoesOnAtTheNextMirror: what one mirror has sent is not fetched again from the next.
func TestPullGoesOnAtTheNextMirror(t *testing.T) {
	blob, img := bigLayer()
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	mirror.Push("a", "b", img)
	built := upstream.Push("a", "b", img)
	onBlob(mirror, blob, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		cutOff(w, blob, blob[:100_000])
		return true
	})
	asked := onBlob(upstream, blob, func(int, http.ResponseWriter, *http.Request) bool { return false })
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)}))
	mustPull(t, s, "registry.example/a:b")
	if asked.String() != "bytes=100000-" {
		t.Errorf("upstream was asked for %q", asked)
	}
	want := PullCounts{Pulled: 1, Resumed: 1, Bytes: uint64(len(blob) + len(built.Manifest) + len(built.Blobs[built.ConfigID]))}
	if got := s.PullCounts(); got != want {
		t.Errorf("counts %+v, want %+v", got, want)
	}
}

// TestRanges: what registries do with the range that a download is taken up by.
func TestRanges(t *testing.T) {
	blob, img := bigLayer()
	const cut = 100_000
	partial := func(w http.ResponseWriter, contentRange string, body []byte) bool {
		w.Header().Set("Content-Range", contentRange)
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(body)
		return true
	}
	other := bytes.Repeat([]byte("x"), cut)
	for name, c := range map[string]struct {
		first  []byte
		answer func(n int, w http.ResponseWriter, r *http.Request) bool // n from 2 on
		asked  string
		err    string
	}{
		"kept": {
			answer: func(int, http.ResponseWriter, *http.Request) bool { return false },
			asked:  " bytes=100000-",
		},
		"ignored": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) bool { r.Header.Del("Range"); return false },
			asked:  " bytes=100000-",
		},
		"ignored, but said to be heeded": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Range", "bytes 100000-299999/300000")
				r.Header.Del("Range")
				return false
			},
			asked: " bytes=100000-",
		},
		"another one, then all": {
			answer: func(n int, w http.ResponseWriter, _ *http.Request) bool {
				return n == 2 && partial(w, fmt.Sprintf("bytes 0-%d/%d", len(blob)-1, len(blob)), blob)
			},
			asked: " bytes=100000- ",
		},
		"always another one": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) bool {
				if r.Header.Get("Range") == "" {
					cutOff(w, blob, blob[:cut])
				}
				return partial(w, "bytes 99999-200000/300000", blob[99999:])
			},
			err: "another range",
		},
		"nonsense": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) bool {
				return partial(w, "bytes all", blob[cut:])
			},
			err: "another range",
		},
		"not satisfiable": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return true
			},
			err: "too short",
		},
		"of other bytes, then all": {
			first:  other,
			answer: func(int, http.ResponseWriter, *http.Request) bool { return false },
			asked:  " bytes=100000- ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			reg := imagestest.NewRegistry(t)
			reg.Push("a", "b", img)
			asked := onBlob(reg, blob, func(n int, w http.ResponseWriter, r *http.Request) bool {
				if n > 1 {
					return c.answer(n, w, r)
				}
				first := blob[:cut]
				if c.first != nil {
					first = c.first
				}
				cutOff(w, blob, first)
				return true
			})
			s := quick(t)
			if c.err != "" {
				if err := pullErr(t, s, reg.Host()+"/a:b", nil); !strings.Contains(err.Error(), c.err) {
					t.Errorf("got %v, want %q", err, c.err)
				}
				if left := leftovers(t, s); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				return
			}
			mustPull(t, s, reg.Host()+"/a:b")
			if asked.String() != c.asked {
				t.Errorf("asked for %q, want %q", asked, c.asked)
			}
		})
	}
}

// TestRangeToARequestForAll: a part is not taken for the whole.
func TestRangeToARequestForAll(t *testing.T) {
	blob, img := bigLayer()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", img)
	onBlob(reg, blob, func(_ int, w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(blob)-1, len(blob)))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(blob)
		return true
	})
	if err := pullErr(t, quick(t), reg.Host()+"/a:b", nil); !strings.Contains(err.Error(), "another range") {
		t.Error(err)
	}
}

// TestEndlesslyCutDownloadEnds: a registry that sends next to nothing each time is not asked for ever.
func TestEndlesslyCutDownloadEnds(t *testing.T) {
	blob, img := bigLayer()
	reg := imagestest.NewRegistry(t)
	reg.Push("a", "b", img)
	asked := onBlob(reg, blob, func(_ int, w http.ResponseWriter, r *http.Request) bool {
		from := 0
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(blob)-1, len(blob)))
			w.Header().Set("Content-Length", fmt.Sprint(len(blob)-from))
			w.WriteHeader(http.StatusPartialContent)
		}
		cutOff(w, blob[from:], blob[from:from+10])
		return true
	})
	err := pullErr(t, quick(t), reg.Host()+"/a:b", nil)
	if !errors.Is(err, ErrRegistryUnavailable) || !strings.Contains(err.Error(), "broke off") {
		t.Error(err)
	}
	if n := len(strings.Split(asked.String(), " ")); n != tries {
		t.Errorf("asked %d times: %s", n, asked)
	}
}

// TestBusyRegistryIsAskedAgain: 5xx and 429 with back-off, and not for ever; what it says about when is heeded.
func TestBusyRegistryIsAskedAgain(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, http.StatusRequestTimeout} {
		for _, what := range []string{"/manifests/", "/blobs/", "/token"} {
			t.Run(fmt.Sprint(status, what), func(t *testing.T) {
				_, img := bigLayer()
				reg := imagestest.NewRegistry(t)
				reg.Push("a", "b", img)
				reg.RequireToken("", user, secret)
				var mu sync.Mutex
				refused := map[string]int{}
				limit := 2
				reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
					mu.Lock()
					defer mu.Unlock()
					if key := r.Method + r.URL.Path; strings.Contains(key, what) && refused[key] < limit {
						refused[key]++
						w.Header().Set("Retry-After", "0")
						w.WriteHeader(status)
						return true
					}
					return false
				})
				s := quick(t)
				if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", &Auth{Username: user, Password: secret}); err != nil {
					t.Fatal(err)
				}
				mu.Lock()
				refused, limit = map[string]int{}, 1000
				mu.Unlock()
				reg.Push("a", "c", smallImage("other"))
				_, err := s.Pull(context.Background(), reg.Host()+"/a:c", &Auth{Username: user, Password: secret})
				if !errors.Is(err, ErrRegistryUnavailable) || !strings.Contains(err.Error(), fmt.Sprint(status)) {
					t.Errorf("got %v", err)
				}
				mu.Lock()
				defer mu.Unlock()
				for key, n := range refused {
					if n > tries {
						t.Errorf("%s was asked %d times", key, n)
					}
				}
			})
		}
	}
}

// TestBusyRegistryBehindAMirrorIsWaitedFor: that the mirror has nothing does not make the registry's 503 final.
func TestBusyRegistryBehindAMirrorIsWaitedFor(t *testing.T) {
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	upstream.Push("a", "b", smallImage("x"))
	busy := 2
	upstream.Hook(func(w http.ResponseWriter, _ *http.Request) bool {
		if busy > 0 {
			busy--
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)}))
	mustPull(t, s, "registry.example/a:b")
}

// TestBitFlipIsNotBlamedOnTheImage: a damaged gzip stream is the registry's, and another mirror is asked; one whose digest is right is the image's.
func TestBitFlipIsNotBlamedOnTheImage(t *testing.T) {
	img := smallImage(strings.Repeat("some text that is packed. ", 1000))
	good := img.Layers[0].Blob
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 0x10
	mirror, upstream := imagestest.NewRegistry(t), imagestest.NewRegistry(t)
	for _, r := range []*imagestest.Registry{mirror, upstream} {
		r.Push("a", "b", img)
	}
	mirror.PutBlob(digest.FromBytes(good), bad)
	if err := pullErr(t, quick(t), mirror.Host()+"/a:b", nil); !errdefs.IsDataLoss(err) {
		t.Errorf("got %v, want ErrDataLoss", err)
	}
	s := quick(t, certs(t, map[string]string{"registry.example": fmt.Sprintf("server = %q\n[host.%q]\n", upstream.URL, mirror.URL)}))
	mustPull(t, s, "registry.example/a:b")

	broken := imagestest.NewImage(imagestest.LayerBlob{Blob: bad, MediaType: img.Layers[0].MediaType, DiffID: img.Layers[0].DiffID})
	upstream.Push("a", "broken", broken)
	if err := pullErr(t, quick(t), upstream.Host()+"/a:broken", nil); !errors.Is(err, errImage) {
		t.Errorf("got %v, want the image to be blamed", err)
	}
}

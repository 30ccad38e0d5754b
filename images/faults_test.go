package images

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// faultyHandler stands before a registry and has some of its answers go wrong. What happens to a request is told by the seed,
// its path, and how often that was asked for.
type faultyHandler struct {
	next http.Handler
	seed uint64
	stop chan struct{}

	mu    sync.Mutex
	asked map[string]uint64
	did   map[string]int
	calm  bool
}

// faults and how often each happens, in a hundred requests.
var faults = []struct {
	name  string
	often int
}{
	{"cut", 8}, {"stall", 3}, {"corrupt", 5}, {"delay", 8}, {"500", 5}, {"503", 3}, {"429", 4}, {"hang up", 4}, {"shorter", 3}, {"longer", 2}, {"trickle", 2}, {"never begins", 1}, {"page", 2},
}

func (f *faultyHandler) pick(r *http.Request) (string, *rand.Rand) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := r.Method + " " + r.URL.Path
	f.asked[key]++
	h := fnv.New64a()
	fmt.Fprintf(h, "%d %s %d", f.seed, key, f.asked[key])
	random := rand.New(rand.NewPCG(h.Sum64(), 1))
	n := random.IntN(100)
	for _, fault := range faults {
		if n -= fault.often; n < 0 && !f.calm {
			f.did[fault.name]++
			return fault.name, random
		}
	}
	return "", random
}

// ServeHTTP implements http.Handler.
func (f *faultyHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault, random := f.pick(r)
	switch fault {
	case "delay":
		select {
		case <-time.After(time.Duration(random.IntN(50)) * time.Millisecond):
		case <-f.stop:
		}
	case "500", "503", "429":
		status, _ := strconv.Atoi(fault)
		w.Header().Set("Retry-After", strconv.Itoa(random.IntN(2)))
		http.Error(w, "not now", status)
		return
	case "hang up":
		panic(http.ErrAbortHandler)
	case "never begins":
		f.wait(r)
		return
	case "page":
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html>please log in</html>")
		return
	}
	f.next.ServeHTTP(&faultyWriter{ResponseWriter: w, f: f, r: r, fault: fault, random: random, left: random.IntN(200_000)}, r)
}

func (f *faultyHandler) wait(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-f.stop:
	}
}

// faultyWriter passes an answer on until its fault comes.
type faultyWriter struct {
	http.ResponseWriter
	f      *faultyHandler
	r      *http.Request
	fault  string
	random *rand.Rand
	left   int // bytes until then
}

func (w *faultyWriter) Write(p []byte) (int, error) {
	// Documents are small: what happens, happens to their first half.
	w.left = min(w.left, len(p)/2)
	flush := func() { _ = http.NewResponseController(w.ResponseWriter).Flush() }
	switch w.fault {
	case "cut":
		_, _ = w.ResponseWriter.Write(p[:w.left])
		flush()
		panic(http.ErrAbortHandler)
	case "stall":
		_, _ = w.ResponseWriter.Write(p[:w.left])
		flush()
		w.f.wait(w.r)
		return len(p), nil
	case "trickle":
		for i := range p {
			if _, err := w.ResponseWriter.Write(p[i : i+1]); err != nil {
				return i, err
			}
			flush()
			select {
			case <-time.After(20 * time.Millisecond):
			case <-w.r.Context().Done():
				return i, w.r.Context().Err()
			}
		}
		return len(p), nil
	case "corrupt":
		bad := append([]byte(nil), p...)
		bad[w.random.IntN(len(bad))] ^= 1 << w.random.IntN(8)
		p = bad
	case "shorter":
		_, _ = w.ResponseWriter.Write(p[:w.left])
		return len(p), nil
	case "longer":
		w.Header().Del("Content-Length")
		n, err := w.ResponseWriter.Write(p)
		_, _ = io.WriteString(w.ResponseWriter, "and more")
		return n, err
	}
	return w.ResponseWriter.Write(p)
}

// WriteHeader has no length where the length will be another.
func (w *faultyWriter) WriteHeader(status int) {
	if w.fault == "shorter" || w.fault == "longer" {
		w.Header().Del("Content-Length")
	}
	w.ResponseWriter.WriteHeader(status)
}

// TestPullsThroughFaults: BERTH_FAULTS pulls (40 if it is not set) from a registry of which a third of the answers goes
// wrong. Each ends with the right image or an error that says what was wrong, none hangs, and the store stays whole.
func TestPullsThroughFaults(t *testing.T) {
	count, seed := 40, uint64(1)
	if v := os.Getenv("BERTH_FAULTS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("BERTH_FAULTS: %v", err)
		}
		count = n
	}
	if v := os.Getenv("BERTH_FAULTS_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("BERTH_FAULTS_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("%d pulls, seed %d", count, seed)
	reg := imagestest.NewRegistry(t)
	f := &faultyHandler{next: reg, seed: seed, stop: make(chan struct{}), asked: map[string]uint64{}, did: map[string]int{}}
	server := httptest.NewUnstartedServer(f)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Start()
	defer server.Close()
	defer close(f.stop)
	host := server.Listener.Addr().String()

	// Eight images of up to five layers out of nine, so that pulls side by side share some.
	random := rand.New(rand.NewPCG(seed, 2))
	var layers []imagestest.LayerBlob
	for i := range 9 {
		content := make([]byte, random.IntN(600_000))
		for j := range content {
			content[j] = byte(random.Uint32())
		}
		tar := imagestest.Tar(imagestest.File(fmt.Sprintf("layer%d", i), string(content)))
		layers = append(layers, []func([]byte) imagestest.LayerBlob{imagestest.GzipLayer, imagestest.ZstdLayer, imagestest.PlainLayer}[i%3](tar))
	}
	var built []*imagestest.Built
	for i := range 8 {
		var some []imagestest.LayerBlob
		for _, j := range random.Perm(len(layers))[:1+random.IntN(5)] {
			some = append(some, layers[j])
		}
		built = append(built, reg.Push("team/app", fmt.Sprint(i), imagestest.NewImage(some...)))
	}
	s := openStore(t, func(o *Options) { o.Log = nil })
	fast(s)
	goroutines, files := runtime.NumGoroutine(), openFiles(t)

	var right, wrong, sum int
	var mu sync.Mutex
	classes := map[string]int{}
	one := func(i int) {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		ref := fmt.Sprintf("%s/team/app:%d", host, i)
		img, err := s.Pull(ctx, ref, nil)
		mu.Lock()
		defer mu.Unlock()
		sum++
		if err == nil {
			right++
			if img.ID != built[i].ConfigID {
				t.Errorf("pull %d: got the image %s, want %s", sum, img.ID, built[i].ConfigID)
			}
			return
		}
		wrong++
		class := ""
		for name, is := range map[string]func(error) bool{
			"unavailable": isUnavailable, "other content": errdefs.IsDataLoss, "not valid": errdefs.IsFailedPrecondition, "not found": errdefs.IsNotFound,
		} {
			if is(err) {
				class += name
			}
		}
		classes[class]++
		if class == "" || errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), ref) || strings.Contains(err.Error(), "not valid") {
			t.Errorf("pull %d: unclear, or too late: %v", sum, err)
		}
	}
	for sum < count {
		a, b := random.IntN(len(built)), random.IntN(len(built))
		var both sync.WaitGroup
		both.Go(func() { one(a) })
		both.Go(func() { one(b) })
		both.Wait()
		if random.IntN(2) == 0 {
			if err := s.Remove(context.Background(), string(built[random.IntN(len(built))].ConfigID)); err != nil {
				t.Error(err)
			}
		}
		if sum%50 == 0 || sum >= count {
			verified(t, s)
			t.Logf("%d pulls: %d images, %d errors %v", sum, right, wrong, classes)
		}
	}
	f.mu.Lock()
	t.Logf("faults: %v", f.did)
	f.calm = true
	f.mu.Unlock()
	if right == 0 || wrong == 0 {
		t.Errorf("%d pulls ended well, %d did not: this is no test", right, wrong)
	}
	s.unpacks.dropIdle() // what waits for the next pull
	if left, err := os.ReadDir(s.path(tmpDir)); err != nil || len(left) != 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
	for i := range built {
		one(i)
	}
	if len(s.Images()) != len(built) {
		t.Errorf("%d images, want %d", len(s.Images()), len(built))
	}
	for i, l := range layers {
		checkLayerFile(t, s, l.DiffID, fmt.Sprintf("layer%d", i))
	}
	verified(t, s)
	waitFor(t, "goroutines and files are as they were", func() bool {
		return runtime.NumGoroutine() <= goroutines+10 && openFiles(t) <= files+10
	})
}

// checkLayerFile looks at the content of the file of every unpacked layer of that diff ID.
func checkLayerFile(t *testing.T, s *Store, diffID digest.Digest, name string) {
	t.Helper()
	s.mu.RLock()
	defer s.mu.RUnlock()
	for chain, rec := range s.layers {
		if rec.DiffID != diffID {
			continue
		}
		data, err := os.ReadFile(filepath.Join(s.layerDir(chain, rec), name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := digest.FromBytes(imagestest.Tar(imagestest.File(name, string(data)))); got != diffID {
			t.Errorf("%s of layer %s is not what was pushed", name, chain)
		}
	}
}

// verified has the store read all that it holds.
func verified(t *testing.T, s *Store) {
	t.Helper()
	report, err := s.Verify(context.Background(), VerifyOptions{Deep: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, finding := range report.Findings {
		t.Errorf("verify: %s", finding)
	}
}

// waitFor waits for up to half a minute.
func waitFor(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not yet: %s", what)
		}
	}
}

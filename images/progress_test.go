package images

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/berth-run/berth/images/imagestest"
)

// TestKEP3542_ProgressOfPulls: what a pull is at, as data, for whoever shares it and for layers that another pull fetches.
func TestKEP3542_ProgressOfPulls(t *testing.T) {
	s := openStore(t)
	reg := imagestest.NewRegistry(t)
	big := imagestest.PlainLayer(imagestest.Tar(imagestest.File("big", strings.Repeat("x", 300_000))))
	base := imagestest.Layer(imagestest.File("base", "x"))
	reg.Push("a", "base", imagestest.NewImage(base))
	reg.Push("a", "b", imagestest.NewImage(base, big))
	mustPull(t, s, reg.Host()+"/a:base")
	if got := s.Pulls(); len(got) != 0 {
		t.Errorf("with none under way: %+v", got)
	}

	const half = 100_000
	gate := make(chan struct{})
	reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Method != http.MethodGet {
			return false
		}
		if d := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]; d != digest.FromBytes(big.Blob).String() {
			return false
		}
		_, _ = w.Write(big.Blob[:half])
		_ = http.NewResponseController(w).Flush()
		<-gate
		_, _ = w.Write(big.Blob[half:])
		return true
	})
	ended := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
			ended <- err
		}()
	}
	var got PullStatus
	until(t, func() bool {
		all := s.Pulls()
		if len(all) != 1 || len(all[0].Layers) != 2 {
			return false
		}
		got = all[0]
		return got.Layers[0].State == LayerPresent && got.Layers[1].Fetched == half
	})
	if l := got.Layers[1]; got.Reference != reg.Host()+"/a:b" || got.State != PullUnpacking || l.State != LayerFetching || l.Size != int64(len(big.Blob)) {
		t.Errorf("half way: %+v", got)
	}
	if fetched, total := got.Bytes(); fetched != half || total != int64(len(big.Blob)) {
		t.Errorf("%d of %d bytes: want what is here already left out", fetched, total)
	}
	close(gate)
	for range 2 {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	if got := s.Pulls(); len(got) != 0 {
		t.Errorf("after the end: %+v", got)
	}
	want := PullCounts{Pulled: 2, Bytes: s.PullCounts().Bytes}
	if counts := s.PullCounts(); counts != want || counts.Bytes < uint64(len(base.Blob)+len(big.Blob)) {
		t.Errorf("counts %+v, want %+v", counts, want)
	}
}

// TestK8s111822_LocalImageWhenTheRegistryIsDown: only where it is asked for, and only for what the reference means here.
func TestK8s111822_LocalImageWhenTheRegistryIsDown(t *testing.T) {
	for _, local := range []bool{false, true} {
		s := openStore(t, func(o *Options) { o.LocalWhenUnavailable = local })
		reg := imagestest.NewRegistry(t)
		reg.Push("a", "b", smallImage("x"))
		img := mustPull(t, s, reg.Host()+"/a:b")
		reg.Hook(func(w http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/denied/") {
				w.WriteHeader(http.StatusForbidden)
			} else {
				w.WriteHeader(http.StatusBadGateway)
			}
			return true
		})
		got, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil)
		if local && (err != nil || got.ID != img.ID || !slices.Equal(got.RepoTags, img.RepoTags)) {
			t.Errorf("asked for: %+v, %v", got, err)
		}
		if !local && err == nil {
			t.Error("not asked for: the pull succeeded")
		}
		for _, ref := range []string{"/a:other", "/denied/a:b"} {
			if _, err := s.Pull(context.Background(), reg.Host()+ref, nil); err == nil {
				t.Errorf("%s: the pull succeeded", ref)
			}
		}
		reg.Hook(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusForbidden); return true })
		if _, err := s.Pull(context.Background(), reg.Host()+"/a:b", nil); err == nil {
			t.Error("a registry that denies is not down: the pull succeeded")
		}
		want := PullCounts{Pulled: 1, Failed: 4, Bytes: s.PullCounts().Bytes}
		if local {
			want = PullCounts{Pulled: 2, Failed: 3, Local: 1, Bytes: want.Bytes}
		}
		if counts := s.PullCounts(); counts != want {
			t.Errorf("counts %+v, want %+v", counts, want)
		}
	}
}

// until waits for a condition.
func until(t *testing.T, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("it did not come to be")
}

package cri

import (
	"errors"
	"fmt"
	"iter"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
)

// sent is the other end of a stream.
type sent struct {
	grpc.ServerStream
	each func(*cri.StreamPodSandboxesResponse) error
}

func (s sent) Send(m *cri.StreamPodSandboxesResponse) error { return s.each(m) }

func sandboxMessage(batch []*cri.PodSandbox) *cri.StreamPodSandboxesResponse {
	return &cri.StreamPodSandboxesResponse{PodSandboxes: batch}
}

// podsOf yields pods of those sizes, named by their number. None is kept.
func podsOf(sizes ...int) iter.Seq[*cri.PodSandbox] {
	return func(yield func(*cri.PodSandbox) bool) {
		for i, n := range sizes {
			if !yield(&cri.PodSandbox{Id: fmt.Sprint(i), Annotations: map[string]string{"a": strings.Repeat("x", n)}}) {
				return
			}
		}
	}
}

func TestStreamedListsHaveEachItemOnceInBoundedMessages(t *testing.T) {
	many := make([]int, 5000)
	for i := range many {
		many[i] = i * 7 % 3000
	}
	for _, tc := range []struct {
		name        string
		sizes       []int
		least, most int // messages
	}{
		{"nothing is no message", nil, 0, 0},
		{"one", []int{10}, 1, 1},
		{"what fits goes together", []int{maxBatch / 3, maxBatch / 3}, 1, 1},
		{"what does not fit does not", []int{maxBatch / 2, maxBatch / 2}, 2, 2},
		{"one that is too large goes alone", []int{1, 2 * maxBatch, 1}, 3, 3},
		{"many", many, 10, 30},
	} {
		next, messages := 0, 0
		err := streamLists(podsOf(tc.sizes...), sandboxMessage, sent{each: func(m *cri.StreamPodSandboxesResponse) error {
			messages++
			if len(m.GetPodSandboxes()) == 0 {
				t.Errorf("%s: an empty message", tc.name)
			}
			if n := proto.Size(m); n > maxBatch && len(m.GetPodSandboxes()) > 1 {
				t.Errorf("%s: a message of %d bytes", tc.name, n)
			}
			for _, p := range m.GetPodSandboxes() {
				if p.GetId() != fmt.Sprint(next) {
					t.Fatalf("%s: %s where %d is due", tc.name, p.GetId(), next)
				}
				next++
			}
			return nil
		}})
		if err != nil || next != len(tc.sizes) || messages < tc.least || messages > tc.most {
			t.Errorf("%s: %d of %d items in %d messages, %v", tc.name, next, len(tc.sizes), messages, err)
		}
	}
}

func TestStreamedListEndsWithItsReader(t *testing.T) {
	gone, made, calls := errors.New("gone"), 0, 0
	items := func(yield func(*cri.PodSandbox) bool) {
		for range 1000 {
			made++
			if !yield(&cri.PodSandbox{Annotations: map[string]string{"a": strings.Repeat("x", maxBatch/4)}}) {
				return
			}
		}
	}
	err := streamLists(items, sandboxMessage, sent{each: func(*cri.StreamPodSandboxesResponse) error {
		calls++
		return gone
	}})
	if !errors.Is(err, gone) || calls != 1 || made > 10 {
		t.Errorf("%v after %d messages, %d items made", err, calls, made)
	}
}

// A thousand pods of 64 KiB of annotations, the most that Kubernetes lets a kubelet hand on in practice, are 64 MiB.
func TestStreamOfAThousandPodsIsBoundedInMemory(t *testing.T) {
	sizes := make([]int, 1000)
	for i := range sizes {
		sizes[i] = 64 << 10
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, most, items := heap(), uint64(0), 0
	err := streamLists(podsOf(sizes...), sandboxMessage, sent{each: func(m *cri.StreamPodSandboxesResponse) error {
		items += len(m.GetPodSandboxes())
		most = max(most, heap())
		return nil
	}})
	if err != nil || items != 1000 {
		t.Fatal(items, err)
	}
	if grown := int64(most) - int64(before); grown > 4<<20 {
		t.Errorf("the heap grows by %d KiB", grown>>10)
	} else {
		t.Logf("the heap grows by %d KiB", grown>>10)
	}
}

func TestStreamsPickAsListsDo(t *testing.T) {
	a := &pods.Sandbox{ID: idA, Config: &cri.PodSandboxConfig{Labels: map[string]string{"app": "web"}}}
	b := &pods.Sandbox{ID: idB, Config: &cri.PodSandboxConfig{}}
	f := &cri.PodSandboxFilter{LabelSelector: map[string]string{"app": "web"}}
	var got []*cri.PodSandbox
	for item := range chosen([]*pods.Sandbox{b, a, b}, func(sb *pods.Sandbox) bool { return sandboxMatches(f, sb) }, sandboxItem) {
		got = append(got, item)
	}
	if len(got) != 1 || !proto.Equal(got[0], sandboxItem(a)) {
		t.Errorf("%v", got)
	}
}

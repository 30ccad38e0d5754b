//go:build integration

package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// collect reads a stream to its end. Each message must have items, and no more than a megabyte.
func collect[M any, T proto.Message](t *testing.T, stream grpc.ServerStreamingClient[M], err error, items func(*M) []T) []T {
	t.Helper()
	must(t, err)
	var all []T
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return all
		}
		must(t, err)
		batch := items(m)
		size := 0
		for _, item := range batch {
			size += proto.Size(item)
		}
		if len(batch) == 0 || size > 1<<20 {
			t.Errorf("a message of %d items in %d bytes", len(batch), size)
		}
		all = append(all, batch...)
	}
}

// sameItems wants both to have the same items; what is measured differs from one call to the next and is compared by name.
func sameItems[T any](t *testing.T, what string, streamed, listed []T, key func(T) string, least int) {
	t.Helper()
	var a, b []string
	for _, v := range streamed {
		a = append(a, key(v))
	}
	for _, v := range listed {
		b = append(b, key(v))
	}
	slices.Sort(a)
	slices.Sort(b)
	if !slices.Equal(a, b) || len(a) < least {
		t.Errorf("%s: the stream has %d items, the list %d, expected are %d:\n%.2000q\n%.2000q", what, len(a), len(b), least, a, b)
	}
}

func wire[T proto.Message](m T) string {
	data, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return string(data)
}

// TestStreamedLists compares every Stream* call with the list that it stands for.
func TestStreamedLists(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("not every runtime has them")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	_, err = n.CRI.Pull(ctx, testimages.Pause)
	must(t, err)
	ledger(t, n)
	var podID, id string
	for i := range 3 {
		var pod *runtimeapi.PodSandboxConfig
		pod, podID, _ = runTrap(t, n, fmt.Sprint("pod-", i), nil)
		for j := range 2 {
			cfg := lab.Sleeper(fmt.Sprint("c", j))
			cfg.Labels["number"] = fmt.Sprint(j)
			id, err = n.CRI.Start(ctx, podID, pod, cfg)
			must(t, err)
		}
	}
	label := map[string]string{"number": "1"}
	for _, tc := range []struct {
		name       string
		id, podID  string
		labels     map[string]string
		pods, ctrs int // at least
	}{
		{"all", "", "", nil, 3, 6},
		{"one pod", "", podID, nil, 1, 2},
		{"one container", id, "", nil, 0, 1},
		{"by label", "", "", label, 0, 3},
		{"nothing", "ffffffffffff", "ffffffffffff", nil, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pf := &runtimeapi.PodSandboxFilter{Id: tc.podID, LabelSelector: tc.labels}
			ps, err := n.CRI.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{Filter: pf})
			pods := collect(t, ps, err, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes)
			pl, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: pf})
			must(t, err)
			sameItems(t, "pods", pods, pl.Items, wire, tc.pods)

			cf := &runtimeapi.ContainerFilter{Id: tc.id, PodSandboxId: tc.podID, LabelSelector: tc.labels}
			cs, err := n.CRI.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{Filter: cf})
			ctrs := collect(t, cs, err, (*runtimeapi.StreamContainersResponse).GetContainers)
			cl, err := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: cf})
			must(t, err)
			sameItems(t, "containers", ctrs, cl.Containers, wire, tc.ctrs)

			sf := &runtimeapi.ContainerStatsFilter{Id: tc.id, PodSandboxId: tc.podID, LabelSelector: tc.labels}
			ss, err := n.CRI.StreamContainerStats(ctx, &runtimeapi.StreamContainerStatsRequest{Filter: sf})
			stats := collect(t, ss, err, (*runtimeapi.StreamContainerStatsResponse).GetContainerStats)
			sl, err := n.CRI.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{Filter: sf})
			must(t, err)
			sameItems(t, "container stats", stats, sl.Stats, func(s *runtimeapi.ContainerStats) string { return wire(s.Attributes) }, tc.ctrs)

			psf := &runtimeapi.PodSandboxStatsFilter{Id: tc.podID, LabelSelector: tc.labels}
			pss, err := n.CRI.StreamPodSandboxStats(ctx, &runtimeapi.StreamPodSandboxStatsRequest{Filter: psf})
			podStats := collect(t, pss, err, (*runtimeapi.StreamPodSandboxStatsResponse).GetPodSandboxStats)
			psl, err := n.CRI.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{Filter: psf})
			must(t, err)
			sameItems(t, "pod stats", podStats, psl.Stats, func(s *runtimeapi.PodSandboxStats) string {
				if s.Linux == nil || s.Linux.Cpu == nil {
					t.Errorf("pod %.12s has no numbers", s.GetAttributes().GetId())
				}
				return wire(s.Attributes)
			}, tc.pods)
		})
	}
	t.Run("metrics", func(t *testing.T) {
		ms, err := n.CRI.StreamPodSandboxMetrics(ctx, &runtimeapi.StreamPodSandboxMetricsRequest{})
		metrics := collect(t, ms, err, (*runtimeapi.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)
		ml, err := n.CRI.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
		must(t, err)
		sameItems(t, "metrics", metrics, ml.PodMetrics, func(m *runtimeapi.PodSandboxMetrics) string {
			return fmt.Sprint(m.PodSandboxId, len(m.ContainerMetrics))
		}, 3)
	})
	t.Run("images", func(t *testing.T) {
		for filter, least := range map[string]int{"": 2, testimages.Busybox: 1, "example.com/none:1": 0} {
			f := &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: filter}}
			is, err := n.CRI.StreamImages(ctx, &runtimeapi.StreamImagesRequest{Filter: f})
			images := collect(t, is, err, (*runtimeapi.StreamImagesResponse).GetImages)
			il, err := n.CRI.ListImages(ctx, &runtimeapi.ListImagesRequest{Filter: f})
			must(t, err)
			sameItems(t, "images "+filter, images, il.Images, wire, least)
		}
	})
}

// many is how many pods TestThousandPods has, each with as much annotation as the kubelet of a busy node hands on.
const (
	many   = 1000
	filler = 16 << 10
)

// TestThousandPods has the daemon find the records of a thousand pods, which a reboot has ended, and lists them as streams.
func TestThousandPods(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("the records are berth's")
	}
	ctx := t.Context()
	must(t, n.Berth.Stop())
	for i := range many {
		id := fmt.Sprintf("%064x", i+1)
		cfg := n.Pod("old")
		cfg.Metadata.Name, cfg.Annotations = fmt.Sprint("old-", i), map[string]string{"note": strings.Repeat("x", filler)}
		config, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(cfg)
		must(t, err)
		record := fmt.Sprintf(`{"Version":1,"ID":%q,"Boot":"00000000-0000-0000-0000-000000000000","Phase":"stopped","Steps":[],`+
			`"CreatedAt":"2026-01-02T03:04:05Z","Cgroup":"%s/%s","Config":%s}`, id, n.Cgroup(), id, config)
		must(t, os.WriteFile(filepath.Join(n.Root(), "pods", id+".json"), []byte(record), 0o600))
	}
	must(t, n.StartBerth(ctx))
	stream := func() int {
		s, err := n.CRI.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
		ids := map[string]bool{}
		for _, p := range collect(t, s, err, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes) {
			if ids[p.Id] || len(p.Annotations["note"]) != filler {
				t.Errorf("pod %s is there twice, or not whole", p.Id)
			}
			ids[p.Id] = true
		}
		return len(ids)
	}
	if got := stream(); got != many {
		t.Fatalf("%d pods are listed", got)
	}
	// What the records take is there already; the stream of 16 MiB adds its messages, and what the collector has not got to.
	before := memory(t, n)
	for range 20 {
		stream()
	}
	grown := memory(t, n) - before
	t.Logf("memory is %d MiB, and grew by %d MiB while 20 times %d MiB were listed", before, grown, many*filler>>20)
	if grown > 128 { // a collector lets the heap double before it runs
		t.Errorf("memory grew by %d MiB", grown)
	}
	must(t, n.CRI.RemovePods(ctx, func(*runtimeapi.PodSandbox) bool { return true }))
}

// memory is what the daemon holds, in MiB.
func memory(t *testing.T, n *lab.Node) int {
	t.Helper()
	kib, err := pss(n.Berth.PID())
	must(t, err)
	return kib >> 10
}

// TestLabelsAndAnnotationsSurviveRestarts asks everything that tells labels, annotations and metadata, before and after the
// daemon was killed: the kubelet rebuilds restart counts and hashes from them.
func TestLabelsAndAnnotationsSurviveRestarts(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("another runtime cannot be killed here")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)
	odd := map[string]string{
		"empty": "", "a/very.long-name": strings.Repeat("é", 4000), "json": `{"a":["b\\c",null,1e3]}`, "lines": "one\ntwo\r\n\ttab",
		"html": "<&>\u2028\u2029", "io.kubernetes.container.restartCount": "7",
	}
	pod, cfg := n.Pod("kept"), lab.Sleeper("main")
	pod.Metadata.Attempt, cfg.Metadata.Attempt = 3, 7
	pod.Labels, pod.Annotations, cfg.Labels, cfg.Annotations = odd, odd, odd, odd
	events := readEvents(t, n)
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	id, err := n.CRI.Start(ctx, podID, pod, cfg)
	must(t, err)
	must(t, events.wants(ctx, map[string]string{id: "main"}, "main created, main started"))

	type told interface {
		GetLabels() map[string]string
		GetAnnotations() map[string]string
	}
	same := func(where string, got told, meta, want proto.Message) {
		t.Helper()
		equal := func(m map[string]string) bool {
			return proto.Equal(&runtimeapi.PodSandbox{Labels: m}, &runtimeapi.PodSandbox{Labels: odd})
		}
		if !equal(got.GetLabels()) || !equal(got.GetAnnotations()) || !proto.Equal(meta, want) {
			t.Errorf("%s: labels %v, annotations %v, metadata %v", where, got.GetLabels(), got.GetAnnotations(), meta)
		}
	}
	event := func(where string, e *runtimeapi.ContainerEventResponse) {
		t.Helper()
		same(where+": the pod in an event", e.PodSandboxStatus, e.PodSandboxStatus.GetMetadata(), pod.Metadata)
		s := statusIn(e, id)
		same(where+": the container in an event", s, s.GetMetadata(), cfg.Metadata)
	}
	look := func(where string) {
		t.Helper()
		ps, err := n.CRI.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: podID})
		must(t, err)
		same(where+": PodSandboxStatus", ps.Status, ps.Status.Metadata, pod.Metadata)
		pl, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		must(t, err)
		same(where+": ListPodSandbox", pl.Items[0], pl.Items[0].Metadata, pod.Metadata)
		s, err := n.CRI.StreamPodSandboxes(ctx, &runtimeapi.StreamPodSandboxesRequest{})
		sp := collect(t, s, err, (*runtimeapi.StreamPodSandboxesResponse).GetPodSandboxes)
		same(where+": StreamPodSandboxes", sp[0], sp[0].Metadata, pod.Metadata)
		pst, err := n.CRI.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID})
		must(t, err)
		same(where+": PodSandboxStats", pst.Stats.Attributes, pst.Stats.Attributes.Metadata, pod.Metadata)

		cs, err := n.CRI.ContainerState(ctx, id)
		must(t, err)
		same(where+": ContainerStatus", cs, cs.Metadata, cfg.Metadata)
		cl, err := n.CRI.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
		must(t, err)
		same(where+": ListContainers", cl.Containers[0], cl.Containers[0].Metadata, cfg.Metadata)
		sc, err := n.CRI.StreamContainers(ctx, &runtimeapi.StreamContainersRequest{})
		scs := collect(t, sc, err, (*runtimeapi.StreamContainersResponse).GetContainers)
		same(where+": StreamContainers", scs[0], scs[0].Metadata, cfg.Metadata)
		cst, err := n.CRI.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
		must(t, err)
		same(where+": ContainerStats", cst.Stats.Attributes, cst.Stats.Attributes.Metadata, cfg.Metadata)
	}
	look("before")
	event("before", events.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT))
	for range 2 { // what the first restart writes anew, the second reads
		must(t, n.KillBerth())
		must(t, n.StartBerth(ctx))
		look("after a restart")
	}
	events = readEvents(t, n)
	_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30})
	must(t, err)
	must(t, events.wants(ctx, map[string]string{id: "main"}, "main stopped"))
	event("after the restarts", events.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT))
	must(t, n.CRI.RemovePod(ctx, podID))
}

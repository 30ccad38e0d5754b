//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// eventLog is what one reader of GetContainerEvents was told.
type eventLog struct {
	stop context.CancelFunc
	done chan struct{}

	mu  sync.Mutex
	all []*runtimeapi.ContainerEventResponse
	err error
}

// readEvents subscribes, and returns once nothing is missed any more.
func readEvents(t *testing.T, n *lab.Node) *eventLog {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := n.CRI.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	must(t, err)
	_, err = stream.Header()
	must(t, err)
	l := &eventLog{stop: cancel, done: make(chan struct{})}
	t.Cleanup(func() { cancel(); <-l.done })
	go func() {
		defer close(l.done)
		for {
			e, err := stream.Recv()
			l.mu.Lock()
			if err != nil {
				l.err = err
				l.mu.Unlock()
				return
			}
			l.all = append(l.all, e)
			l.mu.Unlock()
		}
	}()
	return l
}

func (l *eventLog) events() []*runtimeapi.ContainerEventResponse {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*runtimeapi.ContainerEventResponse(nil), l.all...)
}

// of tells the events of the named ids as words, in their order.
func of(events []*runtimeapi.ContainerEventResponse, names map[string]string) string {
	var words []string
	for _, e := range events {
		if name := names[e.ContainerId]; name != "" {
			word, _ := strings.CutSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT")
			words = append(words, name+" "+strings.ToLower(word))
		}
	}
	return strings.Join(words, ", ")
}

// wants waits for exactly these events of the named ids.
func (l *eventLog) wants(ctx context.Context, names map[string]string, want string) error {
	return lab.Eventually(ctx, time.Minute, "events", func(context.Context) error {
		if got := of(l.events(), names); got != want {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
}

// find returns the one event of that type of an id.
func (l *eventLog) find(t *testing.T, id string, typ runtimeapi.ContainerEventType) *runtimeapi.ContainerEventResponse {
	t.Helper()
	var found *runtimeapi.ContainerEventResponse
	for _, e := range l.events() {
		if e.ContainerId == id && e.ContainerEventType == typ {
			if found != nil {
				t.Errorf("%v of %.12s is told twice", typ, id)
			}
			found = e
		}
	}
	if found == nil {
		t.Fatalf("%v of %.12s is not told", typ, id)
	}
	return found
}

// statusIn is the status of a container in an event.
func statusIn(e *runtimeapi.ContainerEventResponse, id string) *runtimeapi.ContainerStatus {
	for _, s := range e.ContainersStatuses {
		if s.Id == id {
			return s
		}
	}
	return nil
}

// TestEvents follows lives through GetContainerEvents. The order is that of containerd 2.4.2 (internal/cri/server): the
// sandbox is created and started, the containers within, and the sandbox stops after the last of them.
func TestEvents(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("what other runtimes tell is theirs")
	}
	ctx := t.Context()
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	ledger(t, n)

	t.Run("a life in its order, with what the pod was", func(t *testing.T) { eventsOfALife(t, n) })
	t.Run("the end carries its reason", func(t *testing.T) { eventsOfAnOOM(t, n) })
	t.Run("no end before its start", func(t *testing.T) { eventsOfShortLives(t, n) })
	t.Run("what is refused is not told", func(t *testing.T) { eventsOfRefused(t, n) })
	t.Run("many readers, of which some stall", func(t *testing.T) { eventsForMany(t, n) })
	t.Run("a reader that falls behind is told so", func(t *testing.T) { eventsOfAStalledReader(t, n) })
	t.Run("the shim dies", func(t *testing.T) { eventsOfADeadShim(t, n) })
	t.Run("the daemon is killed", func(t *testing.T) { eventsOverAKill(t, n) })
	t.Run("the daemon stops although readers are there", func(t *testing.T) {
		l := readEvents(t, n)
		must(t, n.Berth.Stop())
		<-l.done
		if l.err == nil || !isGone(l.err) {
			t.Errorf("the stream ends with %v", l.err)
		}
		must(t, n.StartBerth(ctx))
	})
}

func eventsOfALife(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	l := readEvents(t, n)
	pod, cfg := n.Pod("life"), lab.Sleeper("main")
	pod.Annotations = map[string]string{"note": "kept as it is"}
	cfg.Annotations = map[string]string{"hash": "abc"}
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	id, err := n.CRI.Start(ctx, podID, pod, cfg)
	must(t, err)
	other, err := n.CRI.Create(ctx, podID, pod, lab.Sleeper("other"))
	must(t, err)
	for range 2 { // the second does nothing, and tells nothing
		_, err = n.CRI.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: 30})
		must(t, err)
	}
	for range 2 {
		_, err = n.CRI.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		must(t, err)
	}
	must(t, n.CRI.RemovePod(ctx, podID))
	names := map[string]string{podID: "pod", id: "main", other: "other"}
	must(t, l.wants(ctx, names, "pod created, pod started, main created, main started, other created, main stopped, main deleted, "+
		"other stopped, pod stopped, other deleted, pod deleted"))

	last := int64(0)
	for _, e := range l.events() {
		s := e.PodSandboxStatus
		if !proto.Equal(s.GetMetadata(), pod.Metadata) || s.GetId() != podID || s.GetAnnotations()["note"] != "kept as it is" {
			t.Errorf("%v: sandbox %v", e.ContainerEventType, s)
		}
		if e.CreatedAt < last {
			t.Errorf("%v is older than the event before it", e.ContainerEventType)
		}
		last = e.CreatedAt
	}
	started := l.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	if s := statusIn(started, id); s.GetState() != runtimeapi.ContainerState_CONTAINER_RUNNING || s.GetStartedAt() == 0 ||
		s.GetAnnotations()["hash"] != "abc" || started.PodSandboxStatus.GetNetwork().GetIp() == "" {
		t.Errorf("started: %v", started)
	}
	stopped := l.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	if s := statusIn(stopped, id); s.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED || s.GetExitCode() != 0 || s.GetReason() != "Completed" || s.GetFinishedAt() == 0 {
		t.Errorf("stopped: %v", s)
	}
	if len(stopped.ContainersStatuses) != 2 {
		t.Errorf("stopped: %d containers", len(stopped.ContainersStatuses))
	}
	if deleted := l.find(t, id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT); statusIn(deleted, id) != nil || statusIn(deleted, other) == nil {
		t.Errorf("deleted: %v", deleted)
	}
	gone := l.find(t, podID, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	if gone.PodSandboxStatus.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || len(gone.ContainersStatuses) != 0 {
		t.Errorf("pod deleted: %v", gone)
	}
}

func eventsOfAnOOM(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	l := readEvents(t, n)
	pod := n.Pod("oom")
	cfg := lab.Container("eater", "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1")
	cfg.Linux.Resources.MemoryLimitInBytes = 16 << 20
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	id, err := n.CRI.Start(ctx, podID, pod, cfg)
	must(t, err)
	must(t, l.wants(ctx, map[string]string{id: "eater"}, "eater created, eater started, eater stopped"))
	stopped := l.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	if s := statusIn(stopped, id); s.GetReason() != "OOMKilled" || s.GetExitCode() != 137 {
		t.Errorf("%v", s)
	}
	must(t, n.CRI.RemovePod(ctx, podID))
}

func eventsOfShortLives(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	l := readEvents(t, n)
	pod := n.Pod("short")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	names, wants := map[string]string{}, map[string]string{}
	for i := range 10 {
		id, err := n.CRI.Start(ctx, podID, pod, lab.Container(fmt.Sprint("c", i), "true"))
		must(t, err)
		name := fmt.Sprint(i)
		names[id] = name
		wants[id] = fmt.Sprintf("%s created, %s started, %s stopped, %s deleted", name, name, name, name)
	}
	must(t, n.CRI.RemovePod(ctx, podID))
	for id, want := range wants {
		must(t, l.wants(ctx, map[string]string{id: names[id]}, want))
	}
}

// eventsOfRefused wants no event of what never was there for anybody.
func eventsOfRefused(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	l := readEvents(t, n)
	bad := n.Pod("bad")
	bad.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "much"}
	if _, err := n.CRI.RunPod(ctx, bad); err == nil {
		t.Fatal("a pod that cannot be is made")
	}
	pod := n.Pod("good")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	if _, err := n.CRI.Create(ctx, podID, pod, lab.Container("refused", "/no/such/program")); err == nil {
		t.Fatal("a container that cannot be is made")
	}
	must(t, n.CRI.RemovePod(ctx, podID))
	must(t, l.wants(ctx, map[string]string{podID: "pod"}, "pod created, pod started, pod stopped, pod deleted"))
	if got := l.events(); len(got) != 4 {
		t.Errorf("%d events: %v", len(got), got)
	}
}

// eventsForMany has readers that take what they are told, and others that never do.
func eventsForMany(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	for range 5 {
		stalled, err := n.CRI.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		must(t, err)
		_, err = stalled.Header()
		must(t, err)
	}
	var readers []*eventLog
	for range 20 {
		readers = append(readers, readEvents(t, n))
	}
	const pods, each = 2, 6
	// Much in each message, so that more is sent than the stalled ones' connections take.
	big := map[string]string{"filler": strings.Repeat("x", 64<<10)}
	var wg sync.WaitGroup
	errs := make([]error, pods)
	for i := range pods {
		wg.Go(func() {
			errs[i] = func() error {
				pod := n.Pod(fmt.Sprint("many-", i))
				pod.Annotations = big
				podID, err := n.CRI.RunPod(ctx, pod)
				if err != nil {
					return err
				}
				for j := range each {
					if _, err := n.CRI.Start(ctx, podID, pod, lab.Container(fmt.Sprint("c", j), "true")); err != nil {
						return err
					}
				}
				return n.CRI.RemovePod(ctx, podID)
			}()
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	want := pods * (4 + 4*each)
	for _, r := range readers {
		must(t, lab.Eventually(ctx, time.Minute, "all events", func(context.Context) error {
			if got := len(r.events()); got != want {
				return fmt.Errorf("%d events, want %d", got, want)
			}
			return nil
		}))
	}
	first := readers[0].events()
	for i, r := range readers[1:] {
		for j, e := range r.events() {
			if !proto.Equal(e, first[j]) {
				t.Fatalf("event %d of reader %d is %v of %.12s, the first one's is %v of %.12s",
					j, i+1, e.ContainerEventType, e.ContainerId, first[j].ContainerEventType, first[j].ContainerId)
			}
		}
	}
}

// eventsOfAStalledReader has pods come and go until a reader that takes nothing is further behind than is kept for it. Once it
// reads, it gets what was kept, in order, and then an error that says that there was more.
func eventsOfAStalledReader(t *testing.T, n *lab.Node) {
	const kept, each, workers = 4096, 4, 4
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// A connection of its own, whose window does not grow: what lies there is as good as read.
	conn, err := grpc.NewClient(n.Endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStaticStreamWindowSize(64<<10), grpc.WithStaticConnWindowSize(64<<10))
	must(t, err)
	t.Cleanup(func() { must(t, conn.Close()) })
	stalled, err := runtimeapi.NewRuntimeServiceClient(conn).GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
	must(t, err)
	_, err = stalled.Header()
	must(t, err)
	var wg sync.WaitGroup
	errs, ids := make([]error, workers), make([][]string, workers)
	for w := range workers {
		wg.Go(func() {
			for i := 0; i < kept/each/workers+50 && errs[w] == nil; i++ { // and as many as its connection takes
				pod := n.Pod(fmt.Sprintf("behind-%d-%d", w, i))
				pod.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE // the fastest there is
				var id string
				if id, errs[w] = n.CRI.RunPod(ctx, pod); errs[w] == nil {
					ids[w] = append(ids[w], id)
					errs[w] = n.CRI.RemovePod(ctx, id)
				}
			}
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	own, lives := slices.Concat(ids...), map[string][]string{}
	got := 0
	for {
		e, err := stalled.Recv()
		if err != nil {
			if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "list what is there") {
				t.Errorf("the stream ends with %v", err)
			}
			break
		}
		if !slices.Contains(own, e.ContainerId) {
			continue // what the last of the readers before has not taken is given to the next one
		}
		got++
		lives[e.ContainerId] = append(lives[e.ContainerId], strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"))
	}
	if got < kept || got > kept+workers*50*each {
		t.Errorf("it got %d events, of the %d that are kept for it", got, kept)
	}
	whole := []string{"CREATED_EVENT", "STARTED_EVENT", "STOPPED_EVENT", "DELETED_EVENT"}
	for id, life := range lives {
		if !slices.Equal(life, whole[:min(len(life), len(whole))]) {
			t.Errorf("%.12s: %v", id, life)
		}
	}
}

func eventsOfADeadShim(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	l := readEvents(t, n)
	pod := n.Pod("orphan")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	id, err := n.CRI.Start(ctx, podID, pod, lab.Sleeper("main"))
	must(t, err)
	pid, err := shimPID(ctx, n, podID)
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	names := map[string]string{podID: "pod", id: "main"}
	lived := "pod created, pod started, main created, main started, main stopped, pod stopped"
	must(t, l.wants(ctx, names, lived))
	must(t, n.CRI.RemovePod(ctx, podID))
	must(t, l.wants(ctx, names, lived+", main deleted, pod deleted"))
	if s := statusIn(l.find(t, id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT), id); s.GetExitCode() != 137 {
		t.Errorf("%v", s)
	}
}

// eventsOverAKill ends containers before, while and after the daemon is away. What a reader was told before, and the next
// reader after, are together what happened, each once.
func eventsOverAKill(t *testing.T, n *lab.Node) {
	ctx := t.Context()
	before := readEvents(t, n)
	pod, dying := n.Pod("over"), n.Pod("dying")
	podID, err := n.CRI.RunPod(ctx, pod)
	must(t, err)
	dyingID, err := n.CRI.RunPod(ctx, dying)
	must(t, err)
	names := map[string]string{podID: "pod", dyingID: "dying"}
	ids, pids := map[string]string{}, map[string]int{}
	for _, name := range []string{"early", "while", "late", "created"} {
		id, err := n.CRI.Create(ctx, podID, pod, lab.Sleeper(name))
		must(t, err)
		ids[name], names[id] = id, name
		if name == "created" {
			continue
		}
		_, err = n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		must(t, err)
		pids[name], err = containerPID(ctx, n, id)
		must(t, err)
	}
	shim, err := shimPID(ctx, n, dyingID)
	must(t, err)
	must(t, syscall.Kill(pids["early"], syscall.SIGKILL))
	told := "pod created, pod started, dying created, dying started, early created, early started, while created, while started, " +
		"late created, late started, created created, early stopped"
	must(t, before.wants(ctx, names, told))

	must(t, n.KillBerth())
	<-before.done
	must(t, syscall.Kill(pids["while"], syscall.SIGKILL))
	must(t, syscall.Kill(shim, syscall.SIGKILL))
	must(t, awaitEnd(ctx, pids["while"]))
	must(t, awaitEnd(ctx, shim))
	must(t, n.StartBerth(ctx))
	after := readEvents(t, n)
	must(t, after.wants(ctx, map[string]string{ids["while"]: "while"}, "while stopped"))
	must(t, after.wants(ctx, map[string]string{dyingID: "dying"}, "dying stopped"))
	if s := statusIn(after.find(t, ids["while"], runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT), ids["while"]); s.GetExitCode() != 137 || s.GetMetadata().GetName() != "while" {
		t.Errorf("%v", s)
	}
	_, err = n.CRI.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: ids["created"]})
	must(t, err)
	must(t, syscall.Kill(pids["late"], syscall.SIGKILL))
	must(t, after.wants(ctx, map[string]string{ids["late"]: "late"}, "late stopped"))
	must(t, n.CRI.RemovePod(ctx, podID))
	must(t, n.CRI.RemovePod(ctx, dyingID))
	all := func(name string) string {
		id := ids[name]
		return of(append(before.events(), after.events()...), map[string]string{id: "it"})
	}
	must(t, after.wants(ctx, map[string]string{dyingID: "dying", podID: "pod"}, "dying stopped, pod stopped, pod deleted, dying deleted"))
	for _, name := range []string{"early", "while", "late", "created"} {
		if got := all(name); got != "it created, it started, it stopped, it deleted" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"

	"github.com/berth-run/berth/proxy/config"
	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
	"github.com/berth-run/berth/proxy/watch"
)

// recorder is a kernel that writes down what it is told; the real one is in proxy/nft and integration/.
type recorder struct {
	mu      sync.Mutex
	calls   []string
	fail    error
	hold    chan struct{} // closed lets calls go on
	changed chan string
	// entries is what connections' keeper is told, and what the kernel is.
	entries []string
}

func (r *recorder) Will(*model.Delta)    { r.set(func() { r.entries = append(r.entries, "will") }) }
func (r *recorder) WillAll(*model.State) { r.set(func() { r.entries = append(r.entries, "will all") }) }
func (r *recorder) Done()                { r.set(func() { r.entries = append(r.entries, "done") }) }

func (r *recorder) call(what string) (program.Report, error) {
	r.mu.Lock()
	r.calls = append(r.calls, what)
	r.entries = append(r.entries, what)
	hold, err := r.hold, r.fail
	r.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return program.Report{}, err
}

func (r *recorder) Sync(s program.State) (program.Report, error) {
	what := "sync"
	for svc := range s.Services() {
		what += " " + svc.Name.Name
	}
	return r.call(what)
}

func (r *recorder) Apply(d *model.Delta) (program.Report, error) {
	what := "apply"
	for _, c := range d.Services {
		what += " " + c.Name.Name
	}
	return r.call(what)
}

func (r *recorder) Verify() (program.Report, error) { return r.call("verify") }
func (r *recorder) Changed() <-chan string          { return r.changed }

func (r *recorder) set(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
}

// wait waits until the calls are these.
func (r *recorder) wait(t *testing.T, want ...string) {
	t.Helper()
	var got string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		r.set(func() { got = strings.Join(r.calls, "; ") })
		if got == strings.Join(want, "; ") {
			return
		}
	}
	t.Fatalf("got  %s\nwant %s", got, strings.Join(want, "; "))
}

// source hands on batches that a test puts in.
type source struct {
	wake    chan struct{}
	mu      sync.Mutex
	batches []*watch.Batch
}

func (s *source) Wake() <-chan struct{} { return s.wake }

func (s *source) Take() *watch.Batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.batches) == 0 {
		return nil
	}
	b := s.batches[0]
	s.batches = s.batches[1:]
	return b
}

func (s *source) put(first bool, objects ...metav1.Object) {
	s.mu.Lock()
	s.batches = append(s.batches, watch.NewBatch(first, objects...))
	s.mu.Unlock()
	s.wake <- struct{}{}
}

func service(name, ip string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec:       corev1.ServiceSpec{ClusterIP: ip, ClusterIPs: []string{ip}, Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}}},
	}
}

func newProxy(t *testing.T) (*recorder, *source, Options, chan *eventsv1.Event) {
	t.Helper()
	return newProxyThatLogs(t, slog.DiscardHandler, 0)
}

// eventsTo writes Events down for a test.
type eventsTo chan *eventsv1.Event

func (c eventsTo) CreateEvent(ctx context.Context, e *eventsv1.Event) error {
	select {
	case c <- e:
	case <-ctx.Done(): // nobody reads any more
	}
	return nil
}

func (c eventsTo) RenewEvent(context.Context, *eventsv1.Event) error { return nil }

func newProxyThatLogs(t *testing.T, to slog.Handler, remind time.Duration) (*recorder, *source, Options, chan *eventsv1.Event) {
	t.Helper()
	m, err := model.New(model.Config{NodeName: "n", IPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	log, events := slog.New(to), make(chan *eventsv1.Event, 10)
	rec, src := &recorder{changed: make(chan string, 1)}, &source{wake: make(chan struct{}, 10)}
	o := Options{
		Model: m, Source: src, Programmer: rec, Conntrack: rec, Period: time.Hour, Log: log, remind: remind,
		Health: health.New(time.Minute, "IPv4"), Metrics: health.NewMetrics("IPv4"),
		Events: health.NewEvents("n", eventsTo(events), log),
	}
	o.NodePorts = &health.NodePorts{Healthy: o.Health.Healthy}
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { Run(ctx, o) })
	all.Go(func() { o.Events.Run(ctx) })
	t.Cleanup(func() { stop(); all.Wait() })
	return rec, src, o, events
}

func TestNothingIsProgrammedBeforeAllIsKnown(t *testing.T) {
	rec, src, _, _ := newProxy(t)
	rec.changed <- "nft"
	src.wake <- struct{}{} // and there is no batch
	time.Sleep(20 * time.Millisecond)
	rec.wait(t)
	src.put(true, service("a", "10.0.0.1"), service("b", "10.0.0.2"))
	rec.wait(t, "sync a b", "verify")
}

func TestAnEmptyClusterIsProgrammedToo(t *testing.T) {
	rec, src, _, _ := newProxy(t)
	src.put(true)
	rec.wait(t, "sync")
	src.put(false) // what changes nothing is not programmed
	src.put(false, service("a", "10.0.0.1"))
	src.put(false, service("a", "10.0.0.1"))
	src.put(false, service("b", "10.0.0.2"))
	rec.wait(t, "sync", "apply a", "apply b")
}

func TestFailuresAreTriedAgain(t *testing.T) {
	rec, src, o, _ := newProxy(t)
	rec.set(func() { rec.fail = errors.New("no") })
	o.Health.Queued()
	src.put(true, service("a", "10.0.0.1"))
	rec.wait(t, "sync a", "verify")
	src.put(false, service("b", "10.0.0.2"))
	rec.wait(t, "sync a", "verify", "apply b")
	rec.set(func() { rec.fail = nil })
	rec.wait(t, "sync a", "verify", "apply b", "verify")
	rec.changed <- "somebody"
	rec.wait(t, "sync a", "verify", "apply b", "verify", "verify")
	// Connections are looked at when the kernel has what was to be, and not before.
	var entries string
	rec.set(func() { entries = strings.Join(rec.entries, "; ") })
	if want := "will all; sync a; verify; will; apply b; verify; done; verify"; !strings.HasPrefix(entries, want) {
		t.Errorf("got  %s\nwant %s", entries, want)
	}
}

// lines is a log.
type lines chan string

func (l lines) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

func TestANameThatNoNodeHasIsToldOnce(t *testing.T) {
	t.Parallel()
	log := make(lines, 10)
	_, src, _, _ := newProxyThatLogs(t, slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn}), 0)
	src.put(true, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
	select {
	case line := <-log:
		t.Fatalf("with a Node: %s", line)
	case <-time.After(nodeWithin + time.Second):
	}
	_, src, _, _ = newProxyThatLogs(t, slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn}), 0)
	src.put(true, service("a", "10.0.0.1"))
	select {
	case line := <-log:
		if !strings.Contains(line, "no Node has this name") || !strings.Contains(line, "node=n") {
			t.Error(line)
		}
	case <-time.After(6 * nodeWithin):
		t.Fatal("nobody says it")
	}
	src.put(false, service("b", "10.0.0.2"))
	select {
	case line := <-log:
		t.Errorf("again: %s", line)
	case <-time.After(nodeWithin + time.Second):
	}
}

// They are told again for as long as they last: the API server forgets Events.
func TestProblemsAreEvents(t *testing.T) {
	_, src, _, events := newProxyThatLogs(t, slog.DiscardHandler, 10*time.Millisecond)
	bad := service("a", "10.0.0.1")
	bad.Spec.ExternalIPs = []string{"127.0.0.1"}
	src.put(true, bad)
	first := ""
	for range 3 {
		select {
		case e := <-events:
			if first == "" {
				first = e.Name
			}
			if e.Name != first || e.Regarding.Name != "a" || e.Regarding.Kind != "Service" || !strings.Contains(e.Note, "externalIPs") {
				t.Errorf("%+v", e)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no Event")
		}
	}
}

func TestSlicesAndTheNodeReachTheModel(t *testing.T) {
	rec, src, o, _ := newProxy(t)
	name, port, ready := "", int32(8080), true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "a-1", Labels: map[string]string{discoveryv1.LabelServiceName: "a"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.1.0.1"}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
	}
	src.put(true, service("a", "10.0.0.1"), slice, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
	rec.wait(t, "sync a")
	var text string
	for deadline := time.Now().Add(5 * time.Second); !strings.Contains(text, "berth_proxy_endpoints 1") && time.Now().Before(deadline); {
		w := httptest.NewRecorder()
		o.Metrics.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		text = w.Body.String()
	}
	if !strings.Contains(text, "berth_proxy_endpoints 1") {
		t.Error(text)
	}
}

func TestSetConntrack(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"proc/sys/net/netfilter", "sys/module/nf_conntrack/parameters", "sys/devices/system/cpu"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const hashsize, online = "../../../../sys/module/nf_conntrack/parameters/hashsize", "../../../../sys/devices/system/cpu/online"
	file := func(name string) string { return filepath.Join(root, "proc/sys/net/netfilter", name) }
	write := func(name, text string) {
		if err := os.WriteFile(file(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := func(name, text string) {
		t.Helper()
		if got, _ := os.ReadFile(file(name)); strings.TrimSpace(string(got)) != text {
			t.Errorf("%s: %q, want %q", name, got, text)
		}
	}
	c := config.Default().Conntrack
	set := func() {
		t.Helper()
		if err := SetConntrack(root, &c, slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
	}
	write(online, "0-3,8-11\n")
	write("nf_conntrack_max", "1\n")
	write(hashsize, "1\n")
	set()
	want("nf_conntrack_max", "262144")
	want(hashsize, "65536")
	want("nf_conntrack_tcp_timeout_established", "86400")
	want("nf_conntrack_tcp_timeout_close_wait", "3600")
	want("nf_conntrack_udp_timeout", "")
	want("nf_conntrack_tcp_be_liberal", "")

	// What is large stays, and so does a table that has room.
	write("nf_conntrack_max", "999999999\n")
	write(hashsize, "99999\n")
	set()
	want("nf_conntrack_max", "999999999")
	want(hashsize, "99999")

	// A machine with many processors tracks a million, one with few the minimum.
	write("nf_conntrack_max", "1\n")
	write(online, "0-255\n")
	set()
	want("nf_conntrack_max", "1048576")
	want(hashsize, "262144")
	write("nf_conntrack_max", "1\n")
	write(online, "0\n")
	set()
	want("nf_conntrack_max", "131072")

	zero := int32(0)
	write("nf_conntrack_max", "5\n")
	write("nf_conntrack_tcp_timeout_established", "7\n")
	c = v1alpha1.KubeProxyConntrackConfiguration{
		MaxPerCore: &zero, Min: &zero, TCPEstablishedTimeout: &metav1.Duration{}, TCPCloseWaitTimeout: &metav1.Duration{},
		TCPBeLiberal: true, UDPTimeout: metav1.Duration{Duration: 30 * time.Second}, UDPStreamTimeout: metav1.Duration{Duration: 2 * time.Minute},
	}
	set()
	want("nf_conntrack_max", "5")
	want("nf_conntrack_tcp_timeout_established", "7")
	want("nf_conntrack_tcp_be_liberal", "1")
	want("nf_conntrack_udp_timeout", "30")
	want("nf_conntrack_udp_timeout_stream", "120")

	// One that is refused does not keep the rest from being set.
	if err := os.Remove(file("nf_conntrack_udp_timeout")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file("nf_conntrack_udp_timeout"), 0o755); err != nil {
		t.Fatal(err)
	}
	c.UDPStreamTimeout.Duration = time.Minute
	if err := SetConntrack(root, &c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "nf_conntrack_udp_timeout to 30") {
		t.Error(err)
	}
	want("nf_conntrack_udp_timeout_stream", "60")
}

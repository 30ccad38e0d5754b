package health

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// get asks a handler.
func get(t *testing.T, h http.Handler, path string) (int, map[string]any) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	var body map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("%s: %v: %s", path, err, w.Body)
	}
	if w.Header().Get("X-Content-Type-Options") != "nosniff" || w.Header().Get("Content-Type") != "application/json" {
		t.Errorf("%s: header %v", path, w.Header())
	}
	return w.Code, body
}

func node(change func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	if change != nil {
		change(n)
	}
	return n
}

func TestHealthzAndLivez(t *testing.T) {
	now := time.Unix(1000, 0)
	h := New(time.Minute, "IPv4")
	h.now = func() time.Time { return now }
	m := NewMetrics("IPv4")
	pages := h.Handler(m)
	check := func(what string, healthz, livez int) {
		t.Helper()
		for path, want := range map[string]int{"/healthz": healthz, "/livez": livez} {
			code, body := get(t, pages, path)
			if code != want {
				t.Errorf("%s: %s: %d, want %d: %v", what, path, code, want, body)
			}
			if _, ok := body["nodeEligible"]; ok != (path == "/healthz") {
				t.Errorf("%s: %s: %v", what, path, body)
			}
		}
	}
	check("without a Node", 503, 200)
	h.SetNode(node(nil))
	h.Queued()
	now = now.Add(time.Hour)
	check("starting, however long", 200, 200)
	h.Begin()(true)
	check("programmed", 200, 200)
	now = now.Add(time.Hour)
	check("nothing has changed for an hour", 200, 200)

	h.Queued()
	now = now.Add(59 * time.Second)
	h.Queued() // the oldest counts
	check("a change waits", 200, 200)
	now = now.Add(time.Second)
	check("a change is late", 503, 503)
	done := h.Begin()
	check("a late change is being programmed", 503, 503)
	done(false)
	check("that failed", 503, 503)
	done = h.Begin()
	h.Queued() // while it is programmed
	done(true)
	check("it is in the kernel, a new one waits", 200, 200)
	now = now.Add(time.Minute)
	check("the new one is late", 503, 503)
	h.Begin()(true)
	h.Begin()(false)
	now = now.Add(time.Minute)
	check("what others changed cannot be mended", 503, 503)
	h.Begin()(true)

	h.SetNode(node(func(n *corev1.Node) { n.Spec.Taints = []corev1.Taint{{Key: toBeDeleted}} }))
	check("about to be deleted", 503, 200)
	h.SetNode(node(func(n *corev1.Node) { n.DeletionTimestamp = &metav1.Time{Time: now} }))
	check("being deleted", 503, 200)
	h.SetNode(nil)
	check("deleted", 503, 200)
}

// free is a port that nobody listens at.
func free(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}

func service(name string, port uint16, endpoints int) *model.Service {
	s := &model.Service{Name: types.NamespacedName{Namespace: "default", Name: name}, Ports: []model.Port{{Family: model.IPv4}}}
	s.HealthCheck.Port, s.HealthCheck.Endpoints[model.IPv4] = port, endpoints
	return s
}

func change(name string, s *model.Service) model.Delta {
	return model.Delta{Services: []model.Change{{Name: types.NamespacedName{Namespace: "default", Name: name}, Old: &model.Service{HealthCheck: model.HealthCheck{Port: 1}}, New: s}}}
}

func nodePorts(t *testing.T) (n *NodePorts, healthy *bool, failed map[string]int) {
	t.Helper()
	good, bad := true, map[string]int{}
	n = &NodePorts{Healthy: func() bool { return good }, Failed: func(s types.NamespacedName, _ uint16, _ error) { bad[s.Name]++ }}
	t.Cleanup(n.Close)
	g := &model.Globals{}
	g.Family[model.IPv4] = model.FamilyGlobals{Enabled: true, NodePorts: model.NodePortAddresses{Prefixes: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Loopback: true}}
	n.Apply(&model.Delta{Globals: g})
	return n, &good, bad
}

// ask asks a port; 0 is that nobody answers.
func ask(t *testing.T, port uint16) (code int, weight, body string) {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
	if err != nil {
		return 0, "", ""
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, r.Header.Get("X-Load-Balancing-Endpoint-Weight"), strings.TrimSpace(string(text))
}

func TestHealthCheckNodePorts(t *testing.T) {
	n, healthy, failed := nodePorts(t)
	a, b := free(t), free(t)
	apply := func(name string, s *model.Service) {
		d := change(name, s)
		n.Apply(&d)
	}
	want := func(what string, port uint16, code int, weight string) {
		t.Helper()
		got, w, body := ask(t, port)
		if got != code || w != weight {
			t.Errorf("%s: %d weight %q %s, want %d %q", what, got, w, body, code, weight)
		}
	}
	apply("web", service("web", a, 2))
	want("two endpoints", a, 200, "2")
	if _, _, body := ask(t, a); body != `{"service":{"namespace":"default","name":"web"},"localEndpoints":2,"serviceProxyHealthy":true}` {
		t.Error(body)
	}
	*healthy = false
	want("the proxy is late", a, 503, "2")
	*healthy = true
	apply("web", service("web", a, 0))
	want("no endpoint here", a, 503, "0")
	apply("web", service("web", b, 1))
	want("another port", b, 200, "1")
	want("the port before", a, 0, "")

	// A port goes from one Service to another in one Delta, in either order of names.
	d := change("web", nil)
	d.Services = append(d.Services, change("x", service("x", b, 3)).Services...)
	n.Apply(&d)
	want("handed over", b, 200, "3")
	apply("a", service("a", b, 1))
	if failed["a"] != 1 {
		t.Errorf("failures: %v", failed)
	}
	apply("x", nil)
	want("who was second, once it is tried again", b, 200, "1")
	apply("a", nil)
	want("nobody", b, 0, "")
}

func TestHealthCheckPortThatIsTakenIsTriedAgain(t *testing.T) {
	n, _, failed := nodePorts(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	d := change("web", service("web", port, 1))
	n.Apply(&d)
	if failed["web"] != 1 {
		t.Fatal(failed)
	}
	_ = l.Close()
	n.Retry()
	if code, _, _ := ask(t, port); code != 200 {
		t.Errorf("%d", code)
	}
}

func TestPages(t *testing.T) {
	m := NewMetrics("IPv4", "IPv6")
	m.NFTables()
	m.ServiceQueued()
	m.Taken()
	m.Synced(true, 3*time.Millisecond, []time.Time{time.Now().Add(-time.Second), time.Now().Add(time.Hour)}, 1, 7)
	m.Counts(model.Counts{Services: 5})
	h := New(time.Minute, "IPv4")
	get(t, h.Handler(m), "/livez")
	p := Pages{Metrics: m, Mode: "nftables", Config: map[string]string{"mode": "nftables"}}
	pages := p.Handler()
	text := func(path string) string {
		w := httptest.NewRecorder()
		pages.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Body.String()
	}
	if got := text("/healthz") + " " + text("/proxyMode"); got != "ok nftables" {
		t.Error(got)
	}
	if got := strings.TrimSpace(text("/configz")); got != `{"kubeproxy.config.k8s.io":{"mode":"nftables"}}` {
		t.Error(got)
	}
	metrics := text("/metrics")
	for _, want := range []string{
		`kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family="IPv6"} 1`,
		`kubeproxy_sync_full_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="0.004"} 1`,
		`kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family="IPv4"} 0`,
		`kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"} 2`,
		`kubeproxy_network_programming_duration_seconds_bucket{ip_family="IPv4",le="300"} 2`,
		`kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"}`,
		`kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"}`,
		`kubeproxy_sync_proxy_rules_service_changes_total 1`,
		`kubeproxy_sync_proxy_rules_service_changes_pending 0`,
		`kubeproxy_sync_proxy_rules_endpoint_changes_total 0`,
		`kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family="IPv4"} 0`,
		`kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total{ip_family="IPv4"} 0`,
		`kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="internal"} 0`,
		`kubeproxy_proxy_livez_total{code="200"} 1`,
		`berth_proxy_services 5`, `go_goroutines`, `process_resident_memory_bytes`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s", want)
		}
	}
	if strings.Contains(metrics, "kubeproxy_sync_proxy_rules_iptables") {
		t.Errorf("of mode iptables:\n%s", metrics)
	}
}

// Mode iptables has kube-proxy's names of that mode, and none of the other.
func TestMetricsOfModeIPTables(t *testing.T) {
	m := NewMetrics("IPv4")
	m.IPTables(func() (all [model.Families]program.Restores) {
		all[model.IPv4] = program.Restores{Failures: 3, Partial: 1, Rules: map[string]int{"nat": 20, "filter": 10}, Last: map[string]int{"nat": 2, "filter": 0}}
		return all
	})
	m.Failed()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for _, want := range []string{
		`kubeproxy_sync_proxy_rules_iptables_restore_failures_total{ip_family="IPv4"} 3`,
		`kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total{ip_family="IPv4"} 1`,
		`kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="nat"} 20`,
		`kubeproxy_sync_proxy_rules_iptables_total{ip_family="IPv4",table="filter"} 10`,
		`kubeproxy_sync_proxy_rules_iptables_last{ip_family="IPv4",table="nat"} 2`,
		`kubeproxy_sync_proxy_rules_iptables_last{ip_family="IPv4",table="filter"} 0`,
	} {
		if !strings.Contains(w.Body.String(), want+"\n") {
			t.Errorf("no %s in\n%s", want, w.Body)
		}
	}
	for _, not := range []string{"nftables_sync_failures", `iptables_total{ip_family="IPv6"`} {
		if strings.Contains(w.Body.String(), not) {
			t.Errorf("%s in\n%s", not, w.Body)
		}
	}
}

// The answers of both addresses are counted by the names of component-base, until somebody takes the counts away.
func TestHealthChecksAreSLIs(t *testing.T) {
	m, h := NewMetrics("IPv4"), New(time.Minute, "IPv4")
	pages, checks := (&Pages{Metrics: m}).Handler(), h.Handler(m)
	ask := func(h http.Handler, method, path string) string {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
		return w.Body.String()
	}
	ask(pages, http.MethodDelete, "/metrics/slis")
	ask(pages, http.MethodGet, "/healthz")
	ask(checks, http.MethodGet, "/livez")
	ask(checks, http.MethodGet, "/healthz") // there is no Node
	h.SetNode(node(nil))
	ask(checks, http.MethodGet, "/healthz")
	ask(checks, http.MethodGet, "/healthz")
	got := ask(pages, http.MethodGet, "/metrics/slis")
	for _, want := range []string{
		`kubernetes_healthcheck{name="ping",type="healthz"} 1`, `kubernetes_healthchecks_total{name="ping",status="success",type="healthz"} 1`,
		`kubernetes_healthcheck{name="proxy",type="livez"} 1`, `kubernetes_healthchecks_total{name="proxy",status="success",type="livez"} 1`,
		`kubernetes_healthcheck{name="proxy",type="healthz"} 1`, `kubernetes_healthchecks_total{name="proxy",status="success",type="healthz"} 2`,
		`kubernetes_healthchecks_total{name="proxy",status="error",type="healthz"} 1`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	ask(pages, http.MethodDelete, "/metrics/slis")
	if got := ask(pages, http.MethodGet, "/metrics/slis"); strings.Contains(got, "kubernetes_") {
		t.Errorf("after a reset:\n%s", got)
	}
	h.SetNode(nil)
	ask(checks, http.MethodGet, "/healthz")
	if got := ask(pages, http.MethodGet, "/metrics/slis"); !strings.Contains(got, `kubernetes_healthcheck{name="proxy",type="healthz"} 0`) {
		t.Errorf("a bad one:\n%s", got)
	}
}

// CVE-2019-11248: /debug/pprof was served at a port that the network reaches, without being asked for.
func TestCVE_2019_11248_NoProfilesUnlessAskedFor(t *testing.T) {
	m := NewMetrics("IPv4")
	for name, tc := range map[string]struct {
		handler http.Handler
		code    int
	}{
		"metrics":             {(&Pages{Metrics: m}).Handler(), http.StatusNotFound},
		"metrics, asked for":  {(&Pages{Metrics: m, Profiling: true}).Handler(), http.StatusOK},
		"health":              {New(time.Minute, "IPv4").Handler(m), http.StatusNotFound},
		"health check of one": {(&NodePorts{Healthy: func() bool { return true }}).handler(check{}), http.StatusServiceUnavailable},
	} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine", "/debug/pprof/symbol"} {
			w := httptest.NewRecorder()
			tc.handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			if w.Code != tc.code || tc.code != http.StatusOK && strings.Contains(w.Body.String(), "goroutine") {
				t.Errorf("%s: %s: %d", name, path, w.Code)
			}
		}
	}
}

// eventStore is an API server's.
type eventStore map[string]int

func (s eventStore) CreateEvent(_ context.Context, e *eventsv1.Event) error {
	if s[e.Name] > 0 {
		return apierrors.NewAlreadyExists(eventsv1.Resource("events"), e.Name)
	}
	s[e.Name] = 1
	return nil
}

func (s eventStore) RenewEvent(_ context.Context, e *eventsv1.Event) error {
	s[e.Name]++
	return nil
}

// A proxy that starts again finds the same mistakes: an Event that is there is not written once more, but seen again.
func TestEventsHaveNamesThatStay(t *testing.T) {
	there := eventStore{}
	var log bytes.Buffer
	object := Reference("Service", types.NamespacedName{Namespace: "default", Name: "web"})
	for _, node := range []string{"a", "a", "a", "b"} {
		e := NewEvents(node, there, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
		for _, note := range []string{"one", "two"} {
			e.Warn(object, "PartLeftOut", "Program", note)
			e.send(t.Context(), <-e.queue)
		}
	}
	seen := slices.Sorted(maps.Values(there))
	if !slices.Equal(seen, []int{1, 1, 3, 3}) || log.Len() > 0 {
		t.Errorf("%d Events of two mistakes on two nodes: %v; %s", len(there), there, log.String())
	}
}

// refusing is an API server that takes no Events.
type refusing func(*eventsv1.Event)

func (f refusing) CreateEvent(_ context.Context, e *eventsv1.Event) error {
	f(e)
	return errors.New("refused")
}

func (f refusing) RenewEvent(context.Context, *eventsv1.Event) error { return errors.New("refused") }

func TestEventsAreBounded(t *testing.T) {
	var mu sync.Mutex
	var sent []*eventsv1.Event
	e := NewEvents("n", refusing(func(ev *eventsv1.Event) {
		mu.Lock()
		defer mu.Unlock()
		sent = append(sent, ev)
	}), slog.New(slog.DiscardHandler))
	for range 10 * maxEvents { // nobody takes them: it does not wait
		e.Warn(Reference("Service", types.NamespacedName{Namespace: "ns", Name: "web"}), "Skipped", "Program", strings.Repeat("x", 5000))
	}
	e.Warn(Reference("Node", types.NamespacedName{Name: "n"}), "Skipped", "Program", "lost")
	ctx, stop := context.WithTimeout(t.Context(), 350*time.Millisecond)
	defer stop()
	e.Run(ctx)
	mu.Lock()
	defer mu.Unlock()
	if len(sent) < 2 || len(sent) > 5 {
		t.Errorf("%d Events", len(sent))
	}
	if ev := sent[0]; ev.Namespace != "ns" || ev.Regarding.Kind != "Service" || len(ev.Note) != maxNote || ev.EventTime.IsZero() || ev.Type != "Warning" {
		t.Errorf("%+v", ev)
	}
}

func TestServeTriesAgainOrFails(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := slog.New(slog.DiscardHandler)
	if err := Serve(t.Context(), "metrics", l.Addr().String(), http.NotFoundHandler(), true, log); err == nil || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Error(err)
	}
	ctx, stop := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer stop()
	if err := Serve(ctx, "metrics", l.Addr().String(), http.NotFoundHandler(), false, log); err != nil {
		t.Error(err)
	}
}

func TestMetricsOfCounters(t *testing.T) {
	m := NewMetrics("IPv4")
	web := program.Counted{Service: types.NamespacedName{Namespace: "default", Name: "web"}, Port: "http", Protocol: model.TCP}
	refused, restricted := web, web
	refused.Cause, restricted.Cause = program.NoEndpoints, program.SourceRanges
	var err error
	m.Counters(func() (map[program.Counted]program.Count, error) {
		return map[program.Counted]program.Count{
			web: {Packets: 12, Bytes: 720}, refused: {Packets: 3}, restricted: {Packets: 2}, {Family: model.IPv6, Cause: program.Unallocated}: {Packets: 1},
			{Family: model.IPv4, Cause: program.Invalid}: {Packets: 4}, {Family: model.IPv6, Cause: program.Invalid}: {Packets: 3},
			{Family: model.IPv4, Cause: program.AtLoopback}: {},
		}, err
	})
	labels := `ip_family="IPv4",namespace="default",port="http",protocol="tcp"`
	want := []string{
		`berth_proxy_service_connections_total{` + labels + `,service="web"} 12`,
		`berth_proxy_service_refused_packets_total{action="reject",` + labels + `,reason="no-endpoints",service="web"} 3`,
		`berth_proxy_service_refused_packets_total{action="drop",` + labels + `,reason="source-ranges",service="web"} 2`,
		`berth_proxy_unallocated_dropped_packets_total{ip_family="IPv6"} 1`,
		`kubeproxy_iptables_ct_state_invalid_dropped_packets_total 7`, // of both families, as kube-proxy has it
		`kubeproxy_iptables_localhost_nodeports_accepted_packets_total 0`,
	}
	// What cannot be read is no reason to have no metrics at all.
	for _, err = range []error{nil, errors.New("the kernel")} {
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		for _, line := range want {
			if !strings.Contains(w.Body.String(), line+"\n") {
				t.Errorf("no %s", line)
			}
		}
		if w.Code != http.StatusOK {
			t.Error(w.Code)
		}
	}
}

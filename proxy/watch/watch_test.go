package watch

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// api is an API server that can go wrong as a real one cannot be made to; integration/ has a real one.
type api struct {
	t      *testing.T
	server *httptest.Server

	mu       sync.Mutex
	revision int
	objects  map[string]map[string]any // by resource and name
	watchers map[string][]chan []byte
	queries  map[string]string
	// broken answers instead, if it says so.
	broken func(w http.ResponseWriter, r *http.Request, resource string) bool
	cut    chan struct{} // closed, it ends all watches
}

type event struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

var apiKinds = map[string][2]string{
	"services": {"v1", "Service"}, "nodes": {"v1", "Node"},
	"endpointslices": {"discovery.k8s.io/v1", "EndpointSlice"}, "servicecidrs": {"networking.k8s.io/v1", "ServiceCIDR"},
}

func newAPI(t *testing.T) (*api, *Client) {
	t.Helper()
	a := &api{t: t, revision: 100, objects: map[string]map[string]any{}, watchers: map[string][]chan []byte{}, queries: map[string]string{}, cut: make(chan struct{})}
	for resource := range apiKinds {
		a.objects[resource] = map[string]any{}
	}
	a.set("nodes", "node-1", map[string]any{"metadata": map[string]any{"name": "node-1"}})
	server := httptest.NewServer(a)
	a.server = server
	t.Cleanup(func() { a.cutAll(); server.CloseClientConnections(); server.Close() })
	return a, clientOf(t, fmt.Sprintf("server: %q", server.URL))
}

// clientOf is a client of a cluster, as kubeconfigs name one.
func clientOf(t *testing.T, cluster string) *Client {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\nclusters: [{name: a, cluster: {%s}}]\ncontexts: [{name: a, context: {cluster: a}}]\ncurrent-context: a\n", cluster)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := NewClient(ClientOptions{Kubeconfig: file, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// set puts an object in, or takes it away if it is nil, and tells those who watch.
func (a *api) set(resource, name string, object map[string]any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.revision++
	kind, before := "MODIFIED", a.objects[resource][name]
	switch {
	case object == nil:
		delete(a.objects[resource], name)
		kind, object = "DELETED", before.(map[string]any)
	case before == nil:
		kind = "ADDED"
	}
	object["apiVersion"], object["kind"] = apiKinds[resource][0], apiKinds[resource][1]
	m := object["metadata"].(map[string]any)
	m["resourceVersion"] = strconv.Itoa(a.revision)
	if kind != "DELETED" {
		a.objects[resource][name] = object
	}
	line, err := json.Marshal(event{kind, object})
	if err != nil {
		a.t.Error(err)
	}
	for _, w := range a.watchers[resource] {
		w <- line
	}
}

// service puts one in.
func (a *api) service(name, clusterIP string) {
	a.set("services", "default/"+name, map[string]any{
		"metadata": map[string]any{"name": name, "namespace": "default", "annotations": map[string]any{"large": "one"}},
		"spec":     map[string]any{"clusterIP": clusterIP, "clusterIPs": []any{clusterIP}, "ports": []any{map[string]any{"port": 80, "protocol": "TCP"}}},
	})
}

func (a *api) breakWith(f func(w http.ResponseWriter, r *http.Request, resource string) bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.broken = f
}

// cutAll ends all watches.
func (a *api) cutAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.cut)
	a.cut, a.watchers = make(chan struct{}), map[string][]chan []byte{}
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
	a.mu.Lock()
	q := r.URL.Query()
	a.queries[resource] = q.Get("labelSelector") + " " + q.Get("fieldSelector")
	broken := a.broken
	a.mu.Unlock()
	if broken != nil && broken(w, r, resource) {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if q.Get("watch") == "" {
		a.mu.Lock()
		defer a.mu.Unlock()
		var items []any
		for _, o := range a.objects[resource] {
			items = append(items, o)
		}
		_ = json.NewEncoder(w).Encode(list(resource, strconv.Itoa(a.revision), items))
		return
	}
	if q.Get("sendInitialEvents") != "" { // as servers before 1.32
		status(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "")
		return
	}
	since, _ := strconv.Atoi(q.Get("resourceVersion"))
	a.watch(w, r, resource, since)
}

func (a *api) watch(w http.ResponseWriter, r *http.Request, resource string, since int) {
	a.mu.Lock()
	if since < a.revision && since != 0 { // what was missed is not kept
		a.mu.Unlock()
		status(w, http.StatusGone, metav1.StatusReasonExpired, "")
		return
	}
	if since > a.revision {
		a.mu.Unlock()
		status(w, http.StatusGatewayTimeout, metav1.StatusReasonTimeout, metav1.CauseTypeResourceVersionTooLarge)
		return
	}
	events, cut := make(chan []byte, 100), a.cut
	a.watchers[resource] = append(a.watchers[resource], events)
	a.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case e := <-events:
			_, _ = w.Write(e)
			w.(http.Flusher).Flush()
		case <-cut:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// watched waits until somebody watches.
func (a *api) watched(resource string) {
	a.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		a.mu.Lock()
		n := len(a.watchers[resource])
		a.mu.Unlock()
		if n > 0 {
			return
		}
	}
	a.t.Fatal("nobody watches " + resource)
}

func list(resource, revision string, items []any) map[string]any {
	return map[string]any{"apiVersion": apiKinds[resource][0], "kind": apiKinds[resource][1] + "List", "metadata": map[string]any{"resourceVersion": revision}, "items": items}
}

func status(w http.ResponseWriter, code int, reason metav1.StatusReason, cause metav1.CauseType) {
	s := metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Code: int32(code), Reason: reason}
	if cause != "" {
		s.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: cause}}}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(s)
}

// run watches, with a model.
type run struct {
	*Watcher
	t     *testing.T
	model *model.Model
}

func start(t *testing.T, c *Client) *run {
	t.Helper()
	m, err := model.New(model.Config{NodeName: "node-1", IPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	w := New(c, Options{Node: "node-1"})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); w.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	return &run{w, t, m}
}

// next is the next batch, in the model.
func (r *run) next() *Batch {
	r.t.Helper()
	ctx, stop := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer stop()
	b, err := r.Next(ctx)
	if err != nil {
		r.t.Fatal("no batch came")
	}
	b.Apply(r.model)
	r.model.Commit()
	return b
}

// until reads batches until the model has these Services and no others.
func (r *run) until(want ...string) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); r.next() {
		if got := r.services(); slices.Equal(got, want) {
			return
		}
	}
	r.t.Fatalf("the model has %q, and not %q", r.services(), want)
}

func (r *run) services() []string {
	var out []string
	for s := range r.model.State().Services() {
		out = append(out, s.Name.Name)
	}
	return out
}

// silent fails if a batch comes meanwhile that has to do with Services. Other kinds may be listed again.
func (r *run) silent(d time.Duration) {
	r.t.Helper()
	ctx, stop := context.WithTimeout(r.t.Context(), d)
	defer stop()
	for {
		b, err := r.Next(ctx)
		if err != nil {
			return
		}
		if b.Len(Service) > 0 || b.First {
			r.t.Fatalf("a batch came: %v", b.changes)
		}
	}
}

func TestFirstBatchIsAllThereIs(t *testing.T) {
	a, c := newAPI(t)
	a.service("one", "10.0.0.1")
	release := make(chan struct{})
	a.breakWith(func(_ http.ResponseWriter, _ *http.Request, resource string) bool {
		if resource == "endpointslices" {
			<-release
		}
		return false
	})
	r := start(t, c)
	r.silent(300 * time.Millisecond)
	close(release)
	if b := r.next(); !b.First || b.Len(Service) != 1 || b.Len(Node) != 1 {
		t.Fatalf("%+v", b)
	}
	a.service("two", "10.0.0.2")
	if b := r.next(); b.First || b.Len(Service) != 1 {
		t.Fatalf("%+v", b)
	}
	if got := r.services(); !slices.Equal(got, []string{"one", "two"}) {
		t.Fatal(got)
	}
}

func TestAnEmptyClusterIsABatch(t *testing.T) {
	a, c := newAPI(t)
	a.set("nodes", "node-1", nil)
	if b := start(t, c).next(); !b.First || len(b.changes) != 0 {
		t.Fatalf("%+v", b)
	}
}

func TestSelectorsAreKubeProxys(t *testing.T) {
	a, c := newAPI(t)
	start(t, c).next()
	a.mu.Lock()
	defer a.mu.Unlock()
	for resource, want := range map[string]string{
		"services":       "!service.kubernetes.io/service-proxy-name spec.clusterIP!=None",
		"endpointslices": "!service.kubernetes.io/headless ",
		"servicecidrs":   " ",
		"nodes":          " metadata.name=node-1",
	} {
		if a.queries[resource] != want {
			t.Errorf("%s: %q, want %q", resource, a.queries[resource], want)
		}
	}
}

// What changes while nobody asks goes together, each object with its last word.
func TestChangesGoTogether(t *testing.T) {
	a, c := newAPI(t)
	r := start(t, c)
	r.next()
	for i := range 20 {
		a.service("one", fmt.Sprintf("10.0.0.%d", i+1))
	}
	a.service("gone", "10.0.1.1")
	r.waits("gone") // a watch that begins late does not tell of what came and went before it
	a.set("services", "default/gone", nil)
	a.service("last", "10.0.1.2")
	r.waits("last")
	if b := r.next(); len(b.changes) != 3 || b.Since.IsZero() {
		t.Fatalf("%+v", b)
	}
	if got := r.model.State().String(); !strings.Contains(got, "10.0.0.20") || strings.Contains(got, "10.0.1.1:") {
		t.Fatal(got)
	}
	if r.Take() != nil {
		t.Fatal("there is more")
	}
}

// waits returns when a change of that Service waits to be taken.
func (r *run) waits(service string) {
	r.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		r.queue.mu.Lock()
		_, ok := r.queue.pending[key{Service, types.NamespacedName{Namespace: "default", Name: service}}]
		r.queue.mu.Unlock()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("the change of %s did not come", service)
		}
	}
}

// Whatever a server sends that is not a whole list: Services stay as they were. What has gone meanwhile is deleted afterwards.
func TestPartialListsChangeNothing(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"500": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"forbidden": func(w http.ResponseWriter, _ *http.Request) {
			status(w, http.StatusForbidden, metav1.StatusReasonForbidden, "")
		},
		"no list":       func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) },
		"empty":         func(http.ResponseWriter, *http.Request) {},
		"nothing in it": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) },
		"no revision":   func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(list("services", "", nil)) },
		"another kind":  func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(list("nodes", "999", nil)) },
		"no names": func(w http.ResponseWriter, _ *http.Request) {
			_ = json.NewEncoder(w).Encode(list("services", "999", []any{map[string]any{"metadata": map[string]any{}}}))
		},
		"cut": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100000")
			_, _ = w.Write([]byte(`{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"999"},"items":[`))
		},
		"a page of two, and not the other": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Query().Get("continue") != "" {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			l := list("services", "999", nil)
			l["metadata"].(map[string]any)["continue"] = "more"
			_ = json.NewEncoder(w).Encode(l)
		},
		"nobody there": func(w http.ResponseWriter, _ *http.Request) {
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				_ = conn.Close()
			}
		},
		"silence": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, c := newAPI(t)
			a.service("one", "10.0.0.1")
			a.service("two", "10.0.0.2")
			r := start(t, c)
			r.next()
			a.watched("services")
			tries := make(chan struct{}, 1)
			a.breakWith(func(w http.ResponseWriter, req *http.Request, resource string) bool {
				if resource != "services" {
					return false
				}
				switch q := req.URL.Query(); {
				case q.Get("sendInitialEvents") != "" && name != "nobody there":
					return false // refused: it lists
				case q.Get("watch") != "" && name != "nobody there":
					status(w, http.StatusGone, metav1.StatusReasonExpired, "")
					return true
				}
				select {
				case tries <- struct{}{}:
				default:
				}
				w.Header().Set("Content-Type", "application/json")
				answer(w, req)
				return true
			})
			a.set("services", "default/two", nil)
			r.until("one") // by the watch, which is open still
			a.cutAll()
			<-tries
			a.set("services", "default/one", nil) // nobody is told
			a.service("three", "10.0.0.3")
			r.silent(1500 * time.Millisecond)
			if got := r.services(); !slices.Equal(got, []string{"one"}) {
				t.Fatal(got)
			}
			if name == "silence" {
				return // until the connection is given up, which is client-go's to find out
			}
			a.breakWith(nil)
			r.until("three")
		})
	}
}

// A server whose revision is older than what was seen: what it has counts, once it has listed it.
func TestOlderRevision(t *testing.T) {
	a, c := newAPI(t)
	a.service("one", "10.0.0.1")
	r := start(t, c)
	r.next()
	a.watched("services")
	a.mu.Lock()
	a.revision = 10
	a.objects["services"] = map[string]any{}
	a.mu.Unlock()
	a.cutAll()
	a.breakWith(func(w http.ResponseWriter, req *http.Request, _ string) bool {
		since, _ := strconv.Atoi(req.URL.Query().Get("resourceVersion"))
		if req.URL.Query().Get("watch") == "" && since > 50 {
			status(w, http.StatusGatewayTimeout, metav1.StatusReasonTimeout, metav1.CauseTypeResourceVersionTooLarge)
			return true
		}
		return false
	})
	a.service("two", "10.0.0.2")
	r.until("two")
}

func TestAServerWithoutServiceCIDRs(t *testing.T) {
	a, c := newAPI(t)
	a.breakWith(func(w http.ResponseWriter, _ *http.Request, resource string) bool {
		if resource == "servicecidrs" {
			status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "")
			return true
		}
		return false
	})
	a.service("one", "10.0.0.1")
	r := start(t, c)
	r.until("one")
}

func TestAnotherNodeIsNotOurs(t *testing.T) {
	a, c := newAPI(t)
	a.set("nodes", "node-2", map[string]any{"metadata": map[string]any{"name": "node-2"}})
	r := start(t, c)
	if node, ok := r.next().Node(); !ok || node == nil || node.Name != "node-1" {
		t.Fatalf("%v %v", node, ok)
	}
	a.set("nodes", "node-1", nil)
	if node, ok := r.next().Node(); !ok || node != nil {
		t.Fatalf("%v %v", node, ok)
	}
}

// A proxy ends at once, whatever it waits for: its successor waits for that.
func TestRunEndsWhileNobodyAnswers(t *testing.T) {
	a, c := newAPI(t)
	a.server.Close()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); New(c, Options{Node: "node-1"}).Run(ctx) }()
	time.Sleep(1500 * time.Millisecond) // the second or third try is waited for
	stop()
	select {
	case <-done:
	case <-time.After(500 * time.Millisecond):
		t.Fatal("it does not end")
	}
}

// logged is a log that a test waits for.
type logged chan string

func (l logged) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// A load balancer whose servers are gone takes connections and ends them: that is an outage like another, and told.
func TestABalancerWithoutServersIsTold(t *testing.T) {
	t.Parallel()
	a, c := newAPI(t)
	a.breakWith(func(w http.ResponseWriter, _ *http.Request, _ string) bool {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return false
		}
		_ = conn.Close()
		return true
	})
	log := make(logged, 100)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	begin, watcher := time.Now(), New(c, Options{Node: "node-1", Log: slog.New(slog.NewTextHandler(log, nil))})
	go func() {
		defer close(done)
		watcher.Run(ctx)
	}()
	defer func() { stop(); <-done }()
	for _, want := range []string{"Services stay as they are", "tells what has changed again"} {
		select {
		case line := <-log:
			if !strings.Contains(line, want) {
				t.Errorf("%s, want %s", line, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("nobody says %s", want)
		}
		since, err := watcher.Silent()
		if is := strings.HasPrefix(want, "Services"); (err != nil) != is || since.After(begin) != is {
			t.Errorf("%s: silent since %s, %v", want, since, err)
		}
		a.breakWith(nil)
	}
}

func TestHintsAreAboutTheError(t *testing.T) {
	t.Parallel()
	for code, want := range map[int]string{http.StatusUnauthorized: "does not take the proxy's token", http.StatusForbidden: "needs the rights list and watch"} {
		a, c := newAPI(t)
		a.breakWith(func(w http.ResponseWriter, _ *http.Request, _ string) bool {
			http.Error(w, "no", code)
			return true
		})
		if line := firstLine(t, c); !strings.Contains(line, want) {
			t.Errorf("%d: %s, want %s", code, line, want)
		}
	}
}

// A node whose clock is wrong takes no certificate of the API server's.
func TestAWrongClockIsNamed(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for what, until := range map[string]time.Duration{"is after ": -time.Hour, "is before ": 3 * time.Hour} {
		own := &x509.Certificate{
			SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(until - time.Hour), NotAfter: time.Now().Add(until), IsCA: true, BasicConstraintsValid: true,
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		cert, err := x509.CreateCertificate(rand.Reader, own, own, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		server := httptest.NewUnstartedServer(http.NotFoundHandler())
		server.Config.ErrorLog = log.New(io.Discard, "", 0)
		server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert}, PrivateKey: key}}}
		server.StartTLS()
		defer server.Close()
		ca := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))
		line := firstLine(t, clientOf(t, fmt.Sprintf("server: %q, certificate-authority-data: %q", server.URL, ca)))
		if !strings.Contains(line, what) || !strings.Contains(line, "hint=\"this node's clock is wrong") {
			t.Errorf("%s: %s", what, line)
		}
	}
}

// firstLine is what a Watcher logs first.
func firstLine(t *testing.T, c *Client) string {
	t.Helper()
	log := make(logged, 100)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		New(c, Options{Node: "node-1", Log: slog.New(slog.NewTextHandler(log, nil))}).Run(ctx)
	}()
	defer func() { stop(); <-done }()
	select {
	case line := <-log:
		return line
	case <-time.After(30 * time.Second):
		return "nobody says anything"
	}
}

func TestTrimKeepsWhatIsRead(t *testing.T) {
	host, node := "h", "n"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: "s", Labels: map[string]string{discoveryv1.LabelServiceName: "svc"}, ManagedFields: []metav1.ManagedFieldsEntry{{}},
			Annotations: map[string]string{"other": "x", corev1.EndpointsLastChangeTriggerTime: "2026-01-02T03:04:05Z", model.WeightAnnotation: "2"},
		},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}, NodeName: &node, Hostname: &host, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: "p", UID: "u"}}},
	}
	_, _ = trim(s)
	b := &Batch{changes: map[key]metav1.Object{{EndpointSlice, nameOf(s)}: s}}
	if e := s.Endpoints[0]; e.NodeName == nil || e.Hostname != nil || *e.TargetRef != (corev1.ObjectReference{Kind: "Pod", Name: "p"}) || len(s.ManagedFields) != 0 || len(s.Annotations) != 2 || s.Labels[discoveryv1.LabelServiceName] != "svc" {
		t.Errorf("%+v", s)
	}
	if got := b.Triggers(); len(got) != 1 || got[0].Year() != 2026 {
		t.Error(got)
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "svc", Annotations: map[string]string{
		"other": "x", model.WeightsAnnotation: "*=2", model.HashAnnotation: "source", model.PortRangesAnnotation: "1-2", model.ResetAnnotation: "true", model.AnnotationPrefix + "weihgts": "1",
	}}}
	if _, _ = trim(svc); len(svc.Annotations) != 5 || svc.Annotations["other"] != "" {
		t.Errorf("%+v", svc)
	}
}

func TestClientErrorsNameTheRemedy(t *testing.T) {
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	if _, err := NewClient(ClientOptions{}); err == nil || !strings.Contains(err.Error(), "--kubeconfig") {
		t.Error(err)
	}
	file := filepath.Join(t.TempDir(), "none")
	if _, err := NewClient(ClientOptions{Kubeconfig: file}); err == nil || !strings.Contains(err.Error(), file) {
		t.Error(err)
	}
}

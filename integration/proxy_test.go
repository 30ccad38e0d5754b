//go:build integration

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy"
	"github.com/berth-run/berth/proxy/conntrack"
	"github.com/berth-run/berth/proxy/explain"
	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
	"github.com/berth-run/berth/proxy/watch"
)

// TestProxyFollowsTheAPIServer has a proxy with the rights of examples/proxy, a real API server and the kernel's tables in a namespace of their own: what is created,
// changed and deleted there, also while the proxy cannot see it, is in the tables afterwards.
func TestProxyFollowsTheAPIServer(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools, "--authorization-mode=RBAC")
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	must(t, cp.Create(t.Context(), "/api/v1/nodes", "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n"))
	createService(t, cp, "before", "10.93.0.50", "")
	createSlice(t, cp, "before", "10.1.0.1")

	rights := proxyRights(t, cp)
	p := startProxy(t, rights)
	p.until("the first Service", has("10.93.0.50 . tcp . 80"), has("10.1.0.1"))
	createService(t, cp, "headless", "None", "")
	createService(t, cp, "others", "10.93.0.51", "labels: {service.kubernetes.io/service-proxy-name: other}")
	createService(t, cp, "later", "10.93.0.52", "")
	createSlice(t, cp, "later", "10.1.0.2")
	p.until("one that came later", has("10.93.0.52 . tcp . 80"), has("10.1.0.2"), hasNot("10.93.0.51"))
	// What is left out is told to those who can mend it.
	createService(t, cp, "claims-1", "10.93.0.60", "", "externalIPs: [192.0.2.1]")
	createService(t, cp, "claims-2", "10.93.0.61", "", "externalIPs: [192.0.2.1]")
	p.until("two that claim an address", has("10.93.0.60"), has("10.93.0.61"), has("192.0.2.1"))
	wantEvent(t, cp, "PartLeftOut", "claims-2")
	// What annotations ask for, and one that makes no sense.
	createService(t, cp, "annotated", "10.93.0.54", `annotations: {berth.run/weights: "10.1.0.4=3", berth.run/port-ranges: 10000-20000}`)
	createSlice(t, cp, "annotated", "10.1.0.4")
	createService(t, cp, "mistaken", "10.93.0.55", `annotations: {berth.run/weights: much}`)
	p.until("a range of ports", has("10.93.0.54 . tcp . 10000-20000"), has("10.1.0.4"), has("10.93.0.55 . tcp . 80"))
	renewed(t, cp, rights, wantEvent(t, cp, "PartLeftOut", "mistaken"))
	p.until("no rules for resets", hasNot("chain reset-peer"))
	createService(t, cp, "resets", "10.93.0.56", `annotations: {berth.run/reset-connections: "true"}`)
	p.until("rules for resets", has("10.93.0.56 . tcp . 80"), has("chain reset-peer"), has("set resets"))
	// Of another program.
	p.nft("flush", "table", "ip", nft.Table)
	p.until("what another program has flushed", has("10.93.0.52 . tcp . 80"), has("10.1.0.1"))

	before := p.nft("list", "table", "ip", nft.Table)
	must(t, cp.KillAPIServer())
	time.Sleep(3 * time.Second)
	if after := p.nft("list", "table", "ip", nft.Table); after != before {
		t.Errorf("rules have changed while the API server was away:\n%s\n%s", before, after)
	}
	must(t, cp.StartAPIServer(t.Context()))
	_, err = cp.Do(t.Context(), "DELETE", "/api/v1/namespaces/default/services/before", "", nil)
	must(t, err)
	createService(t, cp, "back", "10.93.0.53", "")
	createSlice(t, cp, "back", "10.1.0.3")
	p.until("what has changed since", has("10.93.0.53 . tcp . 80"), has("10.1.0.3"), hasNot("10.93.0.50"), has("10.93.0.52 . tcp . 80"))
}

// TestExplainAndCountersOfAProxy has a proxy beside a real API server asked what it does, while objects come and go, and counted for.
func TestExplainAndCountersOfAProxy(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools)
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	must(t, cp.Create(t.Context(), "/api/v1/nodes", "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n"))
	createService(t, cp, "web", "10.93.0.50", "")
	createSlice(t, cp, "web", "10.1.0.1")
	createService(t, cp, "empty", "10.93.0.51", "")
	p := startProxy(t, cp.Kubeconfig)
	p.until("the Services", has("10.93.0.50 . tcp . 80"), has("10.93.0.51 . tcp . 80"))
	p.explains("10.93.0.50:80", "ClusterIP of default/web", "forwarded", "10.1.0.1:8080", "100.0%", "kernel as it should be")
	p.explains("default/empty", "REJECTED: the Service has no endpoint anywhere", "none in any EndpointSlice", "kernel as it should be")
	p.explains("10.93.0.99:80", "no Service's", "DROPPED: no Service has the cluster IP")
	createService(t, cp, "annotated", "10.93.0.54", `annotations: {berth.run/consistent-hash: source, berth.run/port-ranges: 10000-20000}`)
	createSlice(t, cp, "annotated", "10.1.0.4")
	p.explains("10.93.0.54:15000", "default/annotated", "10.1.0.4", "kernel as it should be")
	p.explains("", "node node-1", "rejecting default/empty ClusterIP 10.93.0.51:80/tcp", "kernel as it should be")

	p.inside("ip", "link", "set", "lo", "up")
	p.inside("ip", "route", "add", "default", "dev", "lo")
	for range 2 {
		// What answers is the proxy's rule.
		p.inside("bash", "-c", "! (exec 3<>/dev/tcp/10.93.0.51/80) 2>/dev/null")
	}
	time.Sleep(2 * time.Second) // counters are read no more often
	p.explains("default/empty", "2 connections, 2 packets refused (no-endpoints)")
	createSlice(t, cp, "empty", "10.1.0.2")
	p.until("an endpoint", has("10.1.0.2 . 8080"))
	time.Sleep(2 * time.Second)
	p.explains("default/empty", "forwarded", "10.1.0.2:8080", "2 connections, 2 packets refused (no-endpoints)", "kernel as it should be")
	metrics := httptest.NewRecorder()
	p.metrics.Handler().ServeHTTP(metrics, httptest.NewRequest("GET", "/metrics", nil))
	want := `berth_proxy_service_refused_packets_total{action="reject",ip_family="IPv4",namespace="default",port="",protocol="tcp",reason="no-endpoints",service="empty"} 2`
	if !strings.Contains(metrics.Body.String(), want) {
		t.Errorf("no %s in %s", want, metrics.Body)
	}
}

// explains waits until the proxy says all of some words.
func (p *proxied) explains(target string, words ...string) {
	p.t.Helper()
	text := ""
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		a, err := explain.Ask(p.t.Context(), p.socket, explain.Question{Target: target})
		must(p.t, err)
		var b strings.Builder
		must(p.t, a.Text(&b))
		text = strings.Join(strings.Fields(b.String()), " ")
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(text, w) }) {
			return
		}
	}
	p.t.Errorf("%s: want %q in:\n%s", target, words, text)
}

// inside runs a program in the proxy's namespace.
func (p *proxied) inside(args ...string) {
	p.t.Helper()
	if out, err := exec.Command("nsenter", append([]string{"--net=" + p.namespace}, args...)...).CombinedOutput(); err != nil {
		p.t.Fatalf("%q: %v: %s", args, err, out)
	}
}

// proxyRights has the API server take the manifest of examples/proxy, and is a kubeconfig with its service account's rights.
func proxyRights(t *testing.T, cp *lab.ControlPlane) string {
	t.Helper()
	manifest, err := os.ReadFile("../examples/proxy/berth-proxy.yaml")
	must(t, err)
	paths := map[string]string{
		"ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts", "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
		"ClusterRole":        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
		"ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
	}
	for _, object := range strings.Split(string(manifest), "\n---\n") {
		var kind string
		for line := range strings.Lines(object) {
			if rest, ok := strings.CutPrefix(line, "kind: "); ok {
				kind = strings.TrimSpace(rest)
			}
		}
		must(t, cp.Create(t.Context(), paths[kind]+"?fieldValidation=Strict", object))
	}
	admin, err := os.ReadFile(cp.Kubeconfig)
	must(t, err)
	file := filepath.Join(t.TempDir(), "kubeconfig")
	as := strings.Replace(string(admin), "user: {token:", "user: {as: 'system:serviceaccount:kube-system:berth-proxy', token:", 1)
	if as == string(admin) {
		t.Fatal("the kubeconfig has another form")
	}
	must(t, os.WriteFile(file, []byte(as), 0o600))
	return file
}

// wantEvent waits for an Event with a reason about a Service.
func wantEvent(t *testing.T, cp *lab.ControlPlane, reason, service string) *eventsv1.Event {
	t.Helper()
	var events eventsv1.EventList
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		text, err := cp.Get(t.Context(), "/apis/events.k8s.io/v1/namespaces/default/events")
		must(t, err)
		must(t, json.Unmarshal(text, &events))
		for i := range events.Items {
			if e := &events.Items[i]; e.Reason == reason && e.Regarding.Name == service {
				return e
			}
		}
	}
	t.Fatalf("no Event %s of %s: %v", reason, service, events.Items)
	return nil
}

// renewed has an Event be told twice more, with a proxy's rights.
func renewed(t *testing.T, cp *lab.ControlPlane, kubeconfig string, e *eventsv1.Event) {
	t.Helper()
	client, err := watch.NewClient(watch.ClientOptions{Kubeconfig: kubeconfig})
	must(t, err)
	last := metav1.NewMicroTime(time.Now().Truncate(time.Microsecond))
	for range 2 {
		again := *e
		again.EventTime = last
		must(t, client.RenewEvent(t.Context(), &again))
	}
	text, err := cp.Get(t.Context(), "/apis/events.k8s.io/v1/namespaces/default/events/"+e.Name)
	must(t, err)
	var got eventsv1.Event
	must(t, json.Unmarshal(text, &got))
	if s := got.Series; s == nil || s.Count != 3 || !s.LastObservedTime.Equal(&last) || got.Note != e.Note {
		t.Errorf("told three times, the last time at %v: %+v", last, got)
	}
}

func createService(t *testing.T, cp *lab.ControlPlane, name, ip, meta string, spec ...string) {
	t.Helper()
	must(t, cp.Create(t.Context(), "/api/v1/namespaces/default/services", fmt.Sprintf(
		"apiVersion: v1\nkind: Service\nmetadata:\n  name: %s\n  %s\nspec:\n  clusterIP: %q\n  ports: [{port: 80, targetPort: 8080}]\n  %s\n",
		name, meta, ip, strings.Join(spec, "\n  "))))
}

func createSlice(t *testing.T, cp *lab.ControlPlane, service, ip string) {
	t.Helper()
	must(t, cp.Create(t.Context(), "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", fmt.Sprintf(
		"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: %s-1, labels: {kubernetes.io/service-name: %s}}\n"+
			"addressType: IPv4\nports: [{name: '', port: 8080, protocol: TCP}]\nendpoints: [{addresses: [%s], conditions: {ready: true}}]\n", service, service, ip)))
}

// proxied is a proxy that programs a namespace.
type proxied struct {
	t         *testing.T
	namespace string
	socket    string
	metrics   *health.Metrics
}

// startProxy runs the parts of `berth proxy` on a thread in a namespace of its own; the API server is reached from this one.
func startProxy(t *testing.T, kubeconfig string) *proxied {
	t.Helper()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	client, err := watch.NewClient(watch.ClientOptions{Kubeconfig: kubeconfig})
	must(t, err)
	m, err := model.New(model.Config{NodeName: "node-1", IPv4: true})
	must(t, err)
	o := proxy.Options{
		Model: m, Look: &sync.Mutex{}, Period: 30 * time.Second, Log: log,
		Conntrack: conntrack.New(conntrack.Options{Log: log}), // is told, and does not run: these tests open no connections of UDP
		Health:    health.New(time.Minute, "IPv4"), Metrics: health.NewMetrics("IPv4"), Events: health.NewEvents("node-1", client, log),
	}
	o.NodePorts = &health.NodePorts{Healthy: o.Health.Healthy, Failed: o.PortFailed}
	w := watch.New(client, watch.Options{Node: "node-1", Log: log, Queued: o.Queued})
	o.Source = w
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() { w.Run(ctx) })
	all.Go(func() { o.Events.Run(ctx) })
	ready := make(chan error, 2) // before and after it runs
	namespace := ""
	explains := &explain.Server{Model: m, Look: o.Look, Mode: "nftables", Healthy: o.Health.Healthy, Host: explain.Node{}}
	socket := filepath.Join(t.TempDir(), "s", "proxy.sock")
	run := func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		namespace = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		programmer, err := nft.Open(nft.Options{Log: log, Counters: true})
		if err != nil {
			return err
		}
		o.Programmer = programmer
		o.Metrics.Counters(programmer.Counters().Read)
		explains.Inspector, explains.Counters = programmer.Inspector(), programmer.Counters().Read
		ready <- nil
		proxy.Run(ctx, o)
		return programmer.Close()
	}
	all.Go(func() { ready <- thread.Throwaway(run) }) // with which the namespace ends
	t.Cleanup(func() { stop(); all.Wait() })
	must(t, <-ready)
	served := make(chan error, 1)
	all.Go(func() { served <- explains.Serve(ctx, socket, log) })
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		select {
		case err := <-served:
			t.Fatal(err)
		default:
		}
		if time.Since(begin) > 20*time.Second {
			t.Fatal("nobody can ask the proxy")
		}
	}
	return &proxied{t: t, namespace: namespace, socket: socket, metrics: o.Metrics}
}

// nft runs the program in the proxy's namespace.
func (p *proxied) nft(args ...string) string {
	p.t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + p.namespace, "nft"}, args...)...).CombinedOutput()
	if err != nil && !bytes.Contains(out, []byte("No such file")) { // before the first Service
		p.t.Fatalf("nft %q: %v: %s", args, err, out)
	}
	return string(out)
}

type tableCheck func(table string) bool

func has(text string) tableCheck {
	return func(table string) bool { return strings.Contains(table, text) }
}

func hasNot(text string) tableCheck {
	return func(table string) bool { return !strings.Contains(table, text) }
}

// until waits until the table is as it should be.
func (p *proxied) until(what string, checks ...tableCheck) {
	p.t.Helper()
	table := ""
	for deadline := time.Now().Add(40 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		table = p.nft("list", "table", "ip", nft.Table)
		good := true
		for _, check := range checks {
			good = good && check(table)
		}
		if good {
			return
		}
	}
	p.t.Fatalf("%s is not in the table:\n%s", what, table)
}

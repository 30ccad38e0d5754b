package proxy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
)

// real is a proxy that programs a network namespace of its own.
type real struct {
	t      *testing.T
	src    *source
	o      Options
	log    *safeBuffer
	events chan *eventsv1.Event
	netns  string // path
}

func newReal(t *testing.T) *real {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	m, err := model.New(model.Config{NodeName: "n", IPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	p := &real{t: t, src: &source{wake: make(chan struct{}, 10)}, log: &safeBuffer{}, events: make(chan *eventsv1.Event, 100)}
	p.o = Options{
		Model: m, Source: p.src, Period: time.Hour, Log: slog.New(slog.NewTextHandler(p.log, nil)),
		Health: health.New(time.Minute, "IPv4"), Metrics: health.NewMetrics("IPv4"),
	}
	p.o.Events = health.NewEvents("n", eventsTo(p.events), p.o.Log)
	p.o.NodePorts = &health.NodePorts{Healthy: p.o.Health.Healthy}
	ctx, stop := context.WithCancel(context.Background())
	var all sync.WaitGroup
	t.Cleanup(func() { stop(); all.Wait() })
	all.Go(func() { p.o.Events.Run(ctx) })
	entered := make(chan error, 1)
	all.Go(func() {
		_ = thread.Throwaway(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				entered <- err
				return err
			}
			n, err := nft.Open(nft.Options{Log: p.o.Log})
			if err != nil {
				entered <- err
				return err
			}
			defer n.Close()
			p.netns, p.o.Programmer, p.o.Conntrack = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()), n, &recorder{}
			o := p.o
			entered <- nil
			Run(ctx, o)
			return nil
		})
	})
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *real) nft(args ...string) string {
	p.t.Helper()
	out, err := exec.Command("nsenter", append([]string{"--net=" + p.netns, "nft"}, args...)...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("nft %q: %v: %s", args, err, out)
	}
	return string(out)
}

// until waits until all of the texts are in the rules, which it returns.
func (p *real) until(texts ...string) string {
	p.t.Helper()
	var rules string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		rules = p.nft("list", "ruleset")
		if !slices.ContainsFunc(texts, func(s string) bool { return !strings.Contains(rules, s) }) {
			return rules
		}
	}
	p.t.Fatalf("not all of %q are there:\n%s\n%s", texts, rules, p.log)
	return ""
}

// CVE-2025-54388: a reload of the firewall took rules away for good. The proxy's are back at once, with a warning.
func TestCVE_2025_54388_FlushedRulesAreBack(t *testing.T) {
	p := newReal(t)
	p.src.put(true, service("a", "10.0.0.1"))
	there := []string{"10.0.0.1 . tcp . 80", `comment "default/a"`, "jump services"}
	p.until(there...)
	for i, how := range [][]string{{"flush", "ruleset"}, {"delete", "table", "ip", nft.Table}, {"flush", "table", "ip", nft.Table}} {
		p.nft(how...)
		p.until(there...)
		const warning = "another program has changed the proxy's tables"
		for deadline := time.Now().Add(20 * time.Second); strings.Count(p.log.String(), warning) < i+1; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q: no warning:\n%s", how, p.log)
			}
		}
	}
}

// Objects that no API server of today would take: their bad parts are in no rule, each is told by an Event and counted, and what is
// beside them, and what follows, is programmed.
func TestBadObjectsLeaveOthersAlone(t *testing.T) {
	p := newReal(t)
	udp := corev1.Protocol("UDP\x00; flush ruleset")
	bad := map[string]func(*corev1.Service){
		"ip":       func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "10.0.0.999", []string{"10.0.0.999"} },
		"port":     func(s *corev1.Service) { s.Spec.Ports[0].Port = -1 },
		"protocol": func(s *corev1.Service) { s.Spec.Ports[0].Protocol = udp },
		"external": func(s *corev1.Service) { s.Spec.ExternalIPs = []string{"127.0.0.1"} },
		"nodeport": func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 70000 },
		"twice":    func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "10.0.0.1", []string{"10.0.0.1"} },
		"policy": func(s *corev1.Service) {
			s.Spec.ExternalTrafficPolicy, s.Spec.Type = "Anywhere", corev1.ServiceTypeNodePort
		},
	}
	objects := []metav1.Object{service("a", "10.0.0.1")}
	n := 100
	for name, change := range bad {
		n++
		s := service(name, fmt.Sprintf("10.0.1.%d", n))
		change(s)
		objects = append(objects, s)
	}
	p.src.put(true, objects...)
	rules := p.until("10.0.0.1 . tcp . 80", `comment "default/a"`)
	for _, wrong := range []string{"999", "127.0.0.1", "70000", ". udp .", "default/twice"} {
		if strings.Contains(rules, wrong) {
			t.Errorf("%s is in the rules:\n%s", wrong, rules)
		}
	}
	told := map[string]bool{}
	for len(told) < len(bad) {
		select {
		case e := <-p.events:
			if e.Reason != "PartLeftOut" || bad[e.Regarding.Name] == nil || e.Note == "" {
				t.Errorf("%+v", e)
			}
			told[e.Regarding.Name] = true
		case <-time.After(20 * time.Second):
			t.Fatalf("only %v are told", told)
		}
	}
	w := httptest.NewRecorder()
	p.o.Metrics.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if !regexp.MustCompile(`berth_proxy_problems_total\{kind="Service"\} ([7-9]|[1-9][0-9])\n`).MatchString(w.Body.String()) {
		t.Error(w.Body.String())
	}
	p.src.put(false, service("b", "10.0.0.2"))
	p.until("10.0.0.2 . tcp . 80", "10.0.0.1 . tcp . 80")
}

// safeBuffer is a log that is read while it is written.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/explain"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// inspector has a kernel with some differences.
type inspector struct {
	differences []program.Difference
	err         error
}

func (i *inspector) Inspect(program.Scope) (*program.Inspection, error) {
	return &program.Inspection{Elements: 7, Differences: i.differences}, i.err
}

func (i *inspector) Client(netip.Addr, types.NamespacedName, *model.Port, model.Policy) (to netip.AddrPort, left time.Duration, ok bool, err error) {
	return to, 0, false, nil
}

func TestExplainAndItsExitStatus(t *testing.T) {
	m, err := model.New(model.Config{NodeName: "node-1", IPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	m.SetService(&corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
		Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80}}},
	})
	kernel := &inspector{}
	s := &explain.Server{Model: m, Look: &sync.Mutex{}, Mode: "nftables", Inspector: kernel, Host: explain.Node{}}
	socket := filepath.Join(t.TempDir(), "s", "proxy.sock")
	if _, err := run(t, "explain", "--socket", socket); exitCode(err) != exitFailure || !strings.Contains(err.Error(), "no berth proxy answers") {
		t.Errorf("without a proxy: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, socket, slog.New(slog.DiscardHandler)) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := run(t, "explain", "--socket", socket); exitCode(err) != exitFailure {
			break // it listens
		}
	}
	kernel.differences = []program.Difference{{Where: "table ip berth-proxy", What: "is of a family that is off"}}
	for _, args := range [][]string{nil, {"default/web"}, {"10.96.0.1:80"}} {
		out, err := run(t, append([]string{"explain", "--socket", socket}, args...)...)
		if exitCode(err) != exitWaiting || !strings.Contains(out, "has not heard from the API server yet") || strings.Contains(out, "DIFFERS") {
			t.Errorf("before anything is listed: %v: %s", err, out)
		}
	}
	s.Look.Lock()
	m.Commit()
	s.Look.Unlock()
	kernel.err = program.ErrLoading
	if out, err := run(t, "explain", "--socket", socket, "default/web"); exitCode(err) != exitWaiting || !strings.Contains(out, "ClusterIP of default/web") || !strings.Contains(out, "for the first time") {
		t.Errorf("before it is programmed: %v: %s", err, out)
	}
	kernel.err = nil
	differs := []program.Difference{{Where: "table ip berth-proxy set frontends", What: "missing", Want: "10.96.0.1 . tcp . 80"}}
	for _, c := range []struct {
		args        string
		differences []program.Difference
		status      int
		want        string
	}{
		{"", nil, 0, "node-1"},
		{"default/web", nil, 0, "10.96.0.1:80/tcp  ClusterIP of default/web\n"},
		{"10.96.0.1:80", nil, 0, "as it should be"},
		{"10.96.0.1:80", differs, exitDiffers, "table ip berth-proxy set frontends: missing: should be 10.96.0.1 . tcp . 80"},
		{"", differs, exitDiffers, "DIFFERS"},
		{"10.96.0.2:80", nil, exitNobody, "no Service has the address"},
		{"default/none", nil, exitNobody, "default/none is no Service"},
		{"web", nil, exitUsage, ""},
		{"10.96.0.1:80 --from x", nil, exitUsage, ""},
		{"10.96.0.1:80 --from fd00::1", differs, exitUsage, ""},
		{"default/web --from fd00::1", differs, exitUsage, ""},
		{"10.96.0.1:80 -o yaml", nil, exitUsage, ""},
		{"--from 10.1.0.1", nil, exitUsage, ""},
		{"a/b c/d", nil, exitUsage, ""},
	} {
		kernel.differences = c.differences
		out, err := run(t, append([]string{"explain", "--socket", socket}, strings.Fields(c.args)...)...)
		status := 0
		if err != nil {
			status = exitCode(err)
		}
		if status != c.status || !strings.Contains(out, c.want) {
			t.Errorf("%s: %d (%v), want %d:\n%s", c.args, status, err, c.status, out)
		}
	}
	kernel.differences = nil
	out, err := run(t, "explain", "--socket", socket, "10.96.0.1:80", "-o", "json")
	a := explain.Answer{}
	if err != nil || json.Unmarshal([]byte(out), &a) != nil || a.Addresses[0].Service != "default/web" || a.Kernel.Elements != 7 {
		t.Errorf("%v: %s", err, out)
	}
}

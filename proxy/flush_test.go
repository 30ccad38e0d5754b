package proxy

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy/health"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
)

// CVE-2025-54388: a reload of the firewall took rules away for good. The proxy's are back at once, with a warning.
func TestCVE_2025_54388_FlushedRulesAreBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	var log safeBuffer
	m, err := model.New(model.Config{NodeName: "n", IPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	src := &source{wake: make(chan struct{}, 10)}
	o := Options{
		Model: m, Source: src, Period: time.Hour, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Health: health.New(time.Minute, "IPv4"), Metrics: health.NewMetrics("IPv4"),
	}
	o.Events = health.NewEvents("n", nil, o.Log)
	o.NodePorts = &health.NodePorts{Healthy: o.Health.Healthy}
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	entered := make(chan string, 1)
	all.Go(func() {
		err := thread.Throwaway(func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			p, err := nft.Open(nft.Options{Log: o.Log})
			if err != nil {
				return err
			}
			defer p.Close()
			entered <- fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
			o.Programmer, o.Conntrack = p, &recorder{}
			Run(ctx, o)
			return nil
		})
		if err != nil {
			t.Error(err)
			close(entered)
		}
	})
	netns, ok := <-entered
	if !ok {
		return
	}
	run := func(args ...string) string {
		out, err := exec.Command("nsenter", append([]string{"--net=" + netns, "nft"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %q: %v: %s", args, err, out)
		}
		return string(out)
	}
	there := func() {
		t.Helper()
		var rules string
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			if rules = run("list", "ruleset"); strings.Contains(rules, "10.0.0.1 . tcp . 80 comment \"default/a\"") && strings.Contains(rules, "jump services") {
				return
			}
		}
		t.Fatalf("the rules are not there:\n%s\n%s", rules, log.String())
	}
	src.put(true, service("a", "10.0.0.1"))
	there()
	for i, how := range [][]string{{"flush", "ruleset"}, {"delete", "table", "ip", nft.Table}, {"flush", "table", "ip", nft.Table}} {
		run(how...)
		there()
		const warning = "another program has changed the proxy's tables"
		for deadline := time.Now().Add(20 * time.Second); strings.Count(log.String(), warning) < i+1; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q: no warning:\n%s", how, log.String())
			}
		}
	}
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

//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
)

// entrance is a URL at which the page is, and the host that is asked for there.
type entrance struct{ url, host string }

// load asks for the page at its entrances in turn, each time over a new connection, until it is ended.
type load struct {
	once   sync.Once
	stop   chan struct{}
	done   chan struct{}
	asked  int
	failed []error
}

func startLoad(t *testing.T, entrances ...entrance) *load {
	t.Helper()
	return startPacedLoad(t, 20*time.Millisecond, entrances...)
}

func startPacedLoad(t *testing.T, every time.Duration, entrances ...entrance) *load {
	t.Helper()
	turn := 0
	return startAsking(t, every, func() error {
		at := entrances[turn%len(entrances)]
		turn++
		began := time.Now()
		_, err := pageAt(at.url, at.host)(context.Background())
		if err != nil {
			err = fmt.Errorf("%s at %s, after %v: %w", at.url, began.Format("15:04:05.000"), time.Since(began).Round(time.Millisecond), err)
		}
		return err
	})
}

// startAsking is a load of questions of any kind.
func startAsking(t *testing.T, every time.Duration, ask func() error) *load {
	t.Helper()
	l := &load{stop: make(chan struct{}), done: make(chan struct{})}
	t.Cleanup(l.wait)
	go func() {
		defer close(l.done)
		pace := time.NewTicker(every)
		defer pace.Stop()
		for {
			err := ask()
			l.asked++
			if err != nil {
				l.failed = append(l.failed, err)
			}
			select {
			case <-l.stop:
				return
			case <-pace.C:
			}
		}
	}()
	return l
}

func (l *load) wait() {
	l.once.Do(func() { close(l.stop) })
	<-l.done
}

// end is the judgement: each was answered, and they were enough to tell.
func (l *load) end(t *testing.T) {
	t.Helper()
	l.wait()
	if len(l.failed) > 0 {
		t.Errorf("%d of %d requests failed, the first: %v", len(l.failed), l.asked, errors.Join(l.failed[:min(3, len(l.failed))]...))
	}
	if l.asked < 30 {
		t.Errorf("%d requests are too few to tell", l.asked)
	}
	t.Logf("%d requests, %d failed", l.asked, len(l.failed))
}

// entrances are all that the page has for who is outside: those of its Service, and each node's ingress controller.
func (s story) entrances() []entrance {
	s.t.Helper()
	entrances := s.serviceEntrances()
	for _, n := range s.c.Nodes {
		entrances = append(entrances, ingress(n))
	}
	return entrances
}

// serviceEntrances are the cluster IP and each node's port.
func (s story) serviceEntrances() []entrance {
	s.t.Helper()
	entrances := []entrance{{"http://" + s.clusterIP("web") + "/", ""}}
	port := s.nodePort("default", "web")
	for _, n := range s.c.Nodes {
		entrances = append(entrances, entrance{"http://" + n.Address() + ":" + port + "/", ""})
	}
	return entrances
}

// ingress is the entrance by a node's ingress controller.
func ingress(n *cluster.Node) entrance { return entrance{"http://" + n.Address() + "/", "web.example"} }

func (s story) clusterIP(service string) string {
	s.t.Helper()
	return s.kubectl("get", "service", service, "-o", "jsonpath={.spec.clusterIP}")
}

// restarts are those of a pod's containers.
func (s story) restarts(pod string) string {
	s.t.Helper()
	return s.kubectl("get", "pod", pod, "-o", "jsonpath={range .status.containerStatuses[*]}{.name}={.restartCount} {end}")
}

// killWeb kills one container of three: it alone starts again, in the same pod, and goes on in the same file.
func (s story) killWeb() {
	pod := s.ready("web", 2, long, nil)[0]
	name := pod.Metadata.Name
	_, err := pageAt("http://"+pod.Status.PodIP+":8080/", "")(s.t.Context())
	must(s.t, err)
	killed := 0
	for _, pid := range cgroupProcesses(s.t, "pod"+pod.Metadata.UID) {
		if args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.HasPrefix(args, []byte("/bin/app\x00")) {
			must(s.t, syscall.Kill(pid, syscall.SIGKILL))
			killed++
		}
	}
	if killed != 1 {
		s.t.Fatalf("%d processes were killed", killed)
	}
	began := time.Now()
	s.eventually(long, "the container is restarted", func(context.Context) error {
		if got := s.restarts(name); got != "collector=0 exporter=0 web=1 " {
			return errors.New(got)
		}
		return nil
	})
	s.t.Logf("restarted in %.1f s", time.Since(began).Seconds())
	s.ready("web", 2, long, func(pods []clusterPodStatus) error {
		for _, p := range pods {
			if p.Metadata.UID == pod.Metadata.UID && p.Status.PodIP == pod.Status.PodIP {
				return nil
			}
		}
		return errors.New("the pod is another")
	})
	s.eventually(long, "the collector reads on", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "logs", name, "-c", "collector")
		if err == nil && strings.Count(out, "listening on") != 2 {
			err = fmt.Errorf("its log is %q", out)
		}
		return err
	})
	if out := s.kubectl("describe", "pod", name); !strings.Contains(out, "Exit Code:    137") {
		s.t.Errorf("kubectl describe does not say how it ended:\n%s", out)
	}
}

func (s story) scale() {
	s.kubectl("scale", "deployment", "web", "--replicas", "6")
	began := time.Now()
	web := s.ready("web", 6, long, nil)
	s.t.Logf("6 are ready after %.1f s", time.Since(began).Seconds())
	for _, at := range s.entrances() {
		s.answers("each of six at "+at.url, web, pageAt(at.url, at.host))
	}
	l := startLoad(s.t, s.entrances()...)
	s.kubectl("scale", "deployment", "web", "--replicas", "2")
	s.count("web", 2)
	l.end(s.t)
}

func (s story) update() {
	old := s.ready("web", 2, long, nil)
	// A cluster that is told the story again has the next edition already.
	edition, err := strconv.Atoi(strings.TrimSpace(s.kubectl("get", "deployment", "web", "-o", `jsonpath={.spec.template.spec.containers[?(@.name=="web")].env[?(@.name=="EDITION")].value}`)))
	must(s.t, err)
	l := startLoad(s.t, s.entrances()...)
	s.kubectl("set", "env", "deployment/web", "-c", "web", fmt.Sprintf("EDITION=%d", edition+1))
	s.kubectl("rollout", "status", "deployment/web", "--timeout", long.String())
	s.eventually(long, "the old pods are gone", func(ctx context.Context) error {
		pods, err := s.pods(ctx, "web")
		if err != nil {
			return err
		}
		for _, p := range pods {
			if slices.ContainsFunc(old, func(o clusterPodStatus) bool { return o.Metadata.UID == p.Metadata.UID }) {
				return fmt.Errorf("%s is there", p.Metadata.Name)
			}
		}
		return nil
	})
	l.end(s.t)
	s.ready("web", 2, long, nil)
}

// replaceBerth ends berth serve and berth proxy of each node, at their own pace and at once, under load.
func (s story) replaceBerth() {
	before := map[string]string{}
	web := s.ready("web", 2, long, nil)
	for _, p := range web {
		before[p.Metadata.UID] = s.restarts(p.Metadata.Name)
	}
	l := startLoad(s.t, s.entrances()...)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		for _, n := range s.c.Nodes {
			s.restartBerth(n, signal)
		}
	}
	for _, p := range web {
		s.eventually(long, "exec in a pod that lived through it", func(ctx context.Context) error {
			_, err := s.c.Kubectl(ctx, "exec", p.Metadata.Name, "-c", "web", "--", "/bin/app", "-help")
			return err
		})
	}
	for _, at := range s.entrances() {
		s.answers("each, after it, at "+at.url, s.ready("web", 2, long, nil), pageAt(at.url, at.host))
	}
	l.end(s.t)
	for _, p := range s.ready("web", 2, long, nil) {
		if restarts, ok := before[p.Metadata.UID]; !ok || s.restarts(p.Metadata.Name) != restarts {
			s.t.Errorf("%s has restarts %q; it had %q", p.Metadata.Name, s.restarts(p.Metadata.Name), restarts)
		}
	}
}

// restartBerth ends a node's proxy and runtime, one after the other, and starts those that are installed.
func (s story) restartBerth(n *cluster.Node, signal syscall.Signal) {
	s.t.Helper()
	began := time.Now()
	s.endProgram(n, "proxy.yaml", signal)
	must(s.t, n.StartProxy(s.t.Context()))
	proxy := time.Now()
	s.endProgram(n, "berth.yaml", signal)
	must(s.t, n.StartBerth(s.t.Context()))
	s.t.Logf("%v: %s's proxy is back after %.1f s, its runtime after %.1f s", signal, n.Name, proxy.Sub(began).Seconds(), time.Since(proxy).Seconds())
}

// endProgram signals the program of a node that has that configuration, and waits until it has ended.
func (s story) endProgram(n *cluster.Node, config string, signal syscall.Signal) {
	s.t.Helper()
	s.endProcess("\x00--config\x00"+filepath.Join(s.c.Dir, n.Name, config)+"\x00", signal)
}

// endProcess does that to the one process whose command line has these words.
func (s story) endProcess(words string, signal syscall.Signal) {
	s.t.Helper()
	runs := func() (pids []int) {
		all, err := filepath.Glob("/proc/[0-9]*/cmdline")
		must(s.t, err)
		for _, file := range all {
			args, err := os.ReadFile(file)
			if err != nil || !bytes.Contains(args, []byte(words)) {
				continue
			}
			pid, err := strconv.Atoi(strings.Split(file, "/")[2])
			must(s.t, err)
			pids = append(pids, pid)
		}
		return pids
	}
	pids := runs()
	if len(pids) != 1 {
		s.t.Fatalf("%d processes have %q", len(pids), words)
	}
	must(s.t, syscall.Kill(pids[0], signal))
	must(s.t, lab.Eventually(s.t.Context(), time.Minute, fmt.Sprintf("the process of %q ends", words), func(context.Context) error {
		if left := runs(); len(left) > 0 {
			return fmt.Errorf("%v is there", left)
		}
		return nil
	}))
}

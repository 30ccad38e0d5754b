//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestFiftyPods has fifty pods applied, and deleted when all are ready, ten times over on two nodes: of berth, and of containerd with
// kube-proxy, on one cluster after the other in the order that BERTH_BENCH_CLUSTER says. berth has to leave nothing, and to take no more memory
// after the last round than after the first. In the end the figures of all are printed.
//
// BERTH_BENCH_ROUNDS and BERTH_BENCH_PODS ask for other numbers of both.
func TestFiftyPods(t *testing.T) {
	order := strings.Fields(os.Getenv("BERTH_BENCH_CLUSTER"))
	if len(order) == 0 {
		t.Skip("make bench-cluster runs it")
	}
	rounds, pods := numberOr(t, "BERTH_BENCH_ROUNDS", 10), numberOr(t, "BERTH_BENCH_PODS", 50)
	var all []*fifty
	for i, parts := range order {
		f := &fifty{parts: cluster.Parts(parts), pods: pods}
		if !t.Run(fmt.Sprintf("%d %s", i+1, parts), func(t *testing.T) { f.measure(t, rounds) }) {
			return // figures of what failed are of no use
		}
		all = append(all, f)
	}
	fiftyTable(all).publish(t, "bench-cluster.md", fmt.Sprintf("make bench-cluster ORDER=%q", strings.Join(order, " ")))
}

const fiftyNodes = 2

// fifty is what was seen on one cluster.
type fifty struct {
	parts       cluster.Parts
	pods        int
	ready, gone []time.Duration // of each round: from before kubectl begins to apply or delete
	first, last nodeMemory      // when all of the first and of the last round was gone
	crowd       nodeMemory      // while the pods of the last round were there
	left        []string        // in the end
}

// nodeMemory are figures of all nodes together, by the part of the process.
type nodeMemory map[string]figure

// The parts of processes, by what comes first in their command line.
const (
	runtimeDaemon = "runtime" // with its exec server
	serviceProxy  = "proxy"
	podProcesses  = "pods' own" // shims, and containers that only hold a sandbox
)

func processPart(cmdline string) string {
	words := append(strings.Fields(cmdline), "", "")
	program := filepath.Base(words[0])
	switch {
	case program == "berth" && words[1] == "serve", program == "berth-shim" && words[1] == "exec", program == "containerd":
		return runtimeDaemon
	case program == "berth" && words[1] == "proxy", program == "kube-proxy":
		return serviceProxy
	case program == "berth-shim", program == "containerd-shim-runc-v2", program == "pause":
		return podProcesses
	}
	return ""
}

func memoryOf(t *testing.T, c *cluster.Cluster) nodeMemory {
	t.Helper()
	m := nodeMemory{}
	for _, n := range c.Nodes {
		processes, err := n.Processes()
		must(t, err)
		for pid, cmdline := range processes {
			if part := processPart(cmdline); part != "" {
				f, sum := figureOf(t, pid), m[part]
				m[part] = figure{anon: sum.anon + f.anon, pss: sum.pss + f.pss, rss: sum.rss + f.rss, threads: sum.threads + f.threads, fds: sum.fds + f.fds}
			}
		}
	}
	return m
}

func (f *fifty) measure(t *testing.T, rounds int) {
	dir := filepath.Join(t.TempDir(), "cluster")
	t.Cleanup(func() { must(t, cluster.Down(dir)) })
	c, err := cluster.Start(t.Context(), cluster.Options{
		Dir: dir, Index: 8, Nodes: fiftyNodes, Images: true, Tools: clusterTools(), Parts: f.parts, Log: timed(t),
	})
	must(t, err)
	s := story{t, c}
	var clients []*lab.Client
	for _, n := range c.Nodes {
		cri, err := n.CRI()
		must(t, err)
		t.Cleanup(func() { must(t, cri.Close()) })
		_, err = cri.Pull(t.Context(), testimages.Busybox)
		must(t, err)
		clients = append(clients, cri)
	}
	before := f.look(t, c)
	for i := range rounds {
		f.round(s, func() {
			if i == 0 {
				f.seen(t, c, before)
			}
			if i == rounds-1 {
				f.crowd = memoryOf(t, c)
			}
		})
		t.Logf("round %d: all ready after %.2f s, all gone after %.2f s", i+1, f.ready[i].Seconds(), f.gone[i].Seconds())
		if i == 0 {
			f.settle(t, c, clients, before)
			f.first = memoryOf(t, c)
		}
	}
	f.settle(t, c, clients, before)
	f.last = memoryOf(t, c)
	for part, was := range f.first {
		t.Logf("%-8s after the first round %s; after the last %s", part, was, f.last[part])
		if err := was.grown(f.last[part]); err != nil && f.parts == cluster.Berth {
			t.Errorf("%s: %v", part, err)
		}
	}
}

// round applies the pods and deletes them; between, something is done while they are there. kubectl waits by watching, so that nobody asks the
// API server over and over meanwhile.
func (f *fifty) round(s story, between func()) {
	began := time.Now()
	must(s.t, s.c.Apply(s.t.Context(), fmt.Sprintf(fiftyManifest, f.pods)))
	s.kubectl("wait", "deployment/fifty", fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", f.pods), "--timeout=10m")
	f.ready = append(f.ready, time.Since(began))
	address := s.kubectl("get", "service", "fifty", "-o", "jsonpath={.spec.clusterIP}")
	s.eventually(time.Minute, "the Service answers", func(ctx context.Context) error {
		name, err := fromHost(address)(ctx)
		if err == nil && !strings.HasPrefix(name, "fifty-") {
			err = fmt.Errorf("it says %q", name)
		}
		return err
	})
	between()
	began = time.Now()
	s.kubectl("delete", "deployment,service", "fifty", "--wait=false")
	s.kubectl("wait", "pod", "-l", "app=fifty", "--for=delete", "--timeout=10m")
	f.gone = append(f.gone, time.Since(began))
	if left := s.kubectl("get", "pods", "-A", "-o", "name"); left != "" {
		s.t.Fatalf("pods are left:\n%s", left)
	}
}

// A container ends at once when it is asked to, so that what is measured is not its grace.
const fiftyManifest = `apiVersion: apps/v1
kind: Deployment
metadata: {name: fifty}
spec:
  replicas: %d
  selector: {matchLabels: {app: fifty}}
  template:
    metadata: {labels: {app: fifty}}
    spec:
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: fifty}}}
      containers:
      - name: web
        image: ` + testimages.Busybox + `
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "trap 'exit 0' TERM; mkdir /www; hostname > /www/index.html; httpd -p 8080 -h /www; sleep 86400 & wait"]
        resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
---
apiVersion: v1
kind: Service
metadata: {name: fifty}
spec:
  selector: {app: fifty}
  ports: [{port: 80, targetPort: 8080}]
`

func (f *fifty) look(t *testing.T, c *cluster.Cluster) []lab.Snapshot {
	t.Helper()
	var all []lab.Snapshot
	for _, n := range c.Nodes {
		s, err := n.Snapshot(t.Context())
		must(t, err)
		all = append(all, s)
	}
	return all
}

// seen wants a look at nodes with pods to find something of each kind: one that sees nothing would prove nothing.
func (f *fifty) seen(t *testing.T, c *cluster.Cluster, before []lab.Snapshot) {
	t.Helper()
	for i, now := range f.look(t, c) {
		kinds := map[string]int{}
		for _, line := range before[i].Diff(now) {
			kinds[strings.Fields(line)[1]]++
		}
		for _, kind := range strings.Fields("process cgroup link mount rule sandbox container file") {
			if kinds[kind] == 0 {
				t.Errorf("%s has pods, and nothing that is a %s: %v", c.Nodes[i].Name, kind, kinds)
			}
		}
	}
}

// settle waits until nodes are as they were: kubelets have dead sandboxes removed once a minute. What containerd leaves is told, and is not
// ours to judge.
func (f *fifty) settle(t *testing.T, c *cluster.Cluster, clients []*lab.Client, before []lab.Snapshot) {
	t.Helper()
	err := lab.Eventually(t.Context(), 5*time.Minute, "the kubelets have all sandboxes removed", func(ctx context.Context) error {
		for i, cri := range clients {
			resp, err := cri.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			if err != nil {
				return err
			}
			if len(resp.Items) > 0 {
				return fmt.Errorf("%s: %d are there", c.Nodes[i].Name, len(resp.Items))
			}
		}
		return nil
	})
	if err == nil {
		err = lab.Eventually(t.Context(), soon, "everything is as it was before", func(context.Context) error {
			f.left = nil
			for i, after := range f.look(t, c) {
				for _, line := range before[i].Diff(after) {
					f.left = append(f.left, c.Nodes[i].Name+": "+line)
				}
			}
			if len(f.left) > 0 {
				return errors.New(strings.Join(f.left, "\n"))
			}
			return nil
		})
	}
	if err != nil && f.parts == cluster.Berth {
		t.Fatal(err)
	}
	if err != nil {
		t.Log(err)
	}
}

// fiftyTable has a column for each cluster. The ratio is berth's through containerd's, of all that is known of each.
func fiftyTable(all []*fifty) *benchTable {
	table := &benchTable{head: []string{fmt.Sprint(all[0].pods) + " pods on two nodes"}}
	of := map[cluster.Parts][]*fifty{}
	for _, f := range all {
		table.head = append(table.head, map[cluster.Parts]string{cluster.Berth: "berth", cluster.Containerd: "containerd and kube-proxy"}[f.parts])
		of[f.parts] = append(of[f.parts], f)
	}
	table.head = append(table.head, "ratio")
	row := func(name string, value func(all ...*fifty) float64, show func(float64) string) {
		cells := []string{name}
		for _, f := range all {
			cells = append(cells, show(value(f)))
		}
		ratio := ""
		if len(of) == 2 {
			ratio = fmt.Sprintf("%.2f", value(of[cluster.Berth]...)/value(of[cluster.Containerd]...))
		}
		table.add(append(cells, ratio)...)
	}
	times := func(name string, of func(f *fifty) []time.Duration) {
		together := func(all []*fifty) (d []time.Duration) {
			for _, f := range all {
				d = append(d, of(f)...)
			}
			return d
		}
		show := func(d float64) string { return showTime(time.Duration(d)) }
		row(fmt.Sprintf("%s, median of %d", name, len(of(all[0]))), func(all ...*fifty) float64 { return float64(median(together(all))) }, show)
		row("the slowest", func(all ...*fifty) float64 { return float64(slices.Max(together(all))) }, show)
	}
	memory := func(name string, kib func(f *fifty) int, through int) {
		row(name, func(all ...*fifty) float64 {
			sum := 0
			for _, f := range all {
				sum += kib(f)
			}
			return float64(sum) / float64(through*len(all))
		}, showMiB)
	}
	times("from `kubectl apply` to all ready", func(f *fifty) []time.Duration { return f.ready })
	times("from `kubectl delete` to all gone", func(f *fifty) []time.Duration { return f.gone })
	for _, part := range []string{runtimeDaemon, serviceProxy} {
		for _, kind := range []struct {
			name string
			of   func(figure) int
		}{{"anonymous memory", func(f figure) int { return f.anon }}, {"RSS", func(f figure) int { return f.rss }}} {
			memory(fmt.Sprintf("%s of a node's %s after the first round", kind.name, part), func(f *fifty) int { return kind.of(f.first[part]) }, fiftyNodes)
			memory("after the last", func(f *fifty) int { return kind.of(f.last[part]) }, fiftyNodes)
		}
	}
	memory("PSS of a pod's own processes while all are there", func(f *fifty) int { return f.crowd[podProcesses].pss }, all[0].pods)
	cells := []string{"links, mounts, cgroups, processes, rules and records left"}
	for _, f := range all {
		cells = append(cells, strconv.Itoa(len(f.left)))
	}
	table.add(append(cells, "")...)
	return table
}

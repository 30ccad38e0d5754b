//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestCluster makes a cluster of two nodes, has it do what one is for, kills a node, and takes all down. It is not among the tests of CI: two
// more programs of Kubernetes have to be built for it.
func TestCluster(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER") == "" {
		t.Skip("make test-cluster runs it")
	}
	c := newCluster(t, cluster.Start, cluster.Options{
		Index:             clusterIndex(t, 1),
		ControllerManager: []string{"--node-monitor-grace-period=20s", "--node-monitor-period=2s"},
	})
	inOrder(t, storyOf(c), []chapter[story]{
		{"rights are the least", story.rights},
		{"a deployment is spread over the nodes", story.deploy},
		{"a Service answers everywhere", story.service},
		{"pods reach pods of other nodes", story.podToPod},
		{"a killed container is restarted in place", story.killContainer},
		{"pods move from a node that is killed, which comes back", story.killNode},
		{"all is deleted", story.remove},
	})
}

// newCluster starts a cluster of the test's own, with the lab's images, that is taken down at its end and leaves nothing; where the test fails it
// is told what there was in it.
func newCluster(t *testing.T, start func(context.Context, cluster.Options) (*cluster.Cluster, error), o cluster.Options) *cluster.Cluster {
	t.Helper()
	o.Dir, o.Images, o.Log, o.Tools = filepath.Join(t.TempDir(), "cluster"), true, timed(t), clusterTools()
	leavesNothing(t, o.Index, o.Dir)
	c, err := start(t.Context(), o)
	if c != nil {
		t.Cleanup(func() {
			if t.Failed() {
				tellCluster(t, c)
			}
		})
	}
	must(t, err)
	return c
}

// timed is a log in which lines have the time since now.
func timed(t *testing.T) func(format string, args ...any) {
	began := time.Now()
	return func(format string, args ...any) {
		t.Helper()
		t.Logf("%6.2f s %s", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
}

// chapter is a part of what a cluster goes through, which S is told of.
type chapter[S any] struct {
	name string
	tell func(S)
}

// run tells it as a subtest, and how long it took.
func (c chapter[S]) run(t *testing.T, of func(*testing.T) S) bool {
	return t.Run(c.name, func(t *testing.T) {
		began := time.Now()
		c.tell(of(t))
		t.Logf("%.1f s", time.Since(began).Seconds())
	})
}

// inOrder tells chapters each of which goes on where the one before has ended.
func inOrder[S any](t *testing.T, of func(*testing.T) S, all []chapter[S]) {
	for _, c := range all {
		if !c.run(t, of) {
			return
		}
	}
}

// tellCluster has the log say what there is in a cluster, and how its programs ended.
func tellCluster(t *testing.T, c *cluster.Cluster) {
	s := story{t, c}
	t.Logf("pods:\n%s\nevents:\n%s", s.try("get", "pods", "-A", "-o", "wide"), s.try("get", "events", "-A"))
	logs, _ := filepath.Glob(filepath.Join(c.Dir, "logs", "*")) // for messages alone
	for _, log := range logs {
		if out, err := exec.Command("tail", "-n", "12", log).Output(); err == nil {
			t.Logf("%s:\n%s", filepath.Base(log), out)
		}
	}
}

func clusterTools() cluster.Tools {
	return cluster.Tools{
		Etcd: tools.Etcd, APIServer: tools.APIServer, Scheduler: tools.Scheduler, ControllerManager: tools.ControllerManager,
		Kubelet: tools.Kubelet, Kubectl: tools.Kubectl, Registry: tools.Registry, Busybox: tools.Busybox,
		Kubeadm:   tools.Kubeadm,
		KubeProxy: tools.KubeProxy, Containerd: tools.Containerd, CNI: tools.CNI,
	}
}

// story is a chapter of what a cluster goes through.
type story struct {
	t *testing.T
	c *cluster.Cluster
}

func storyOf(c *cluster.Cluster) func(*testing.T) story {
	return func(t *testing.T) story { return story{t, c} }
}

func (s story) kubectl(args ...string) string {
	s.t.Helper()
	out, err := s.c.Kubectl(s.t.Context(), args...)
	must(s.t, err)
	return out
}

// try is for messages.
func (s story) try(args ...string) string {
	out, err := s.c.Kubectl(context.Background(), args...)
	if err != nil {
		return err.Error()
	}
	return out
}

func (s story) eventually(within time.Duration, what string, try func(context.Context) error) {
	s.t.Helper()
	must(s.t, lab.Eventually(s.t.Context(), within, what, try))
}

// clusterPodStatus is what is asked of a pod.
type clusterPodStatus struct {
	Metadata struct {
		Name, UID         string
		DeletionTimestamp *time.Time
	}
	Spec   struct{ NodeName string }
	Status struct {
		PodIP             string
		Phase             string
		ContainerStatuses []struct {
			Ready        bool
			RestartCount int
			ContainerID  string
		}
	}
}

func (p clusterPodStatus) ready() bool {
	for _, c := range p.Status.ContainerStatuses {
		if !c.Ready {
			return false
		}
	}
	return p.Metadata.DeletionTimestamp == nil && len(p.Status.ContainerStatuses) > 0
}

func (s story) pods(ctx context.Context, app string) ([]clusterPodStatus, error) {
	out, err := s.c.Kubectl(ctx, "get", "pods", "-l", "app="+app, "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []clusterPodStatus }
	return list.Items, json.Unmarshal([]byte(out), &list)
}

// ready waits until that many pods of an application are, all others are gone, and no more than what is asked holds.
func (s story) ready(app string, n int, within time.Duration, want func([]clusterPodStatus) error) []clusterPodStatus {
	s.t.Helper()
	var pods []clusterPodStatus
	s.eventually(within, fmt.Sprintf("%d pods of %s are ready", n, app), func(ctx context.Context) (err error) {
		if pods, err = s.pods(ctx, app); err != nil {
			return err
		}
		var ready []clusterPodStatus
		for _, p := range pods {
			if p.ready() {
				ready = append(ready, p)
			}
		}
		if len(ready) != n {
			return fmt.Errorf("%d of %d are ready", len(ready), len(pods))
		}
		pods = ready
		if want != nil {
			return want(pods)
		}
		return nil
	})
	return pods
}

// rights asks the API server what berth may not do, with what it is given.
func (s story) rights() {
	for _, file := range []string{"node-routes.kubeconfig", "proxy.kubeconfig"} {
		config := filepath.Join(s.c.Dir, "node-1", file)
		for want, words := range map[string]string{"yes": "list nodes", "no": "list pods --all-namespaces"} {
			out, _ := s.c.Kubectl(s.t.Context(), append([]string{"--kubeconfig", config, "auth", "can-i"}, strings.Fields(words)...)...) // "no" is a failure
			if strings.TrimSpace(out) != want {
				s.t.Errorf("%s: may it %s? %q, want %s", file, words, out, want)
			}
		}
	}
	kubelet := filepath.Join(s.c.Dir, "node-1", "kubelet.kubeconfig")
	if _, err := s.c.Kubectl(s.t.Context(), "--kubeconfig", kubelet, "label", "node", "node-2", "of=another"); err == nil || !strings.Contains(err.Error(), "forbidden") {
		s.t.Errorf("the kubelet of node-1 labels node-2: %v", err)
	}
}

const clusterManifest = `apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: web}}}
      tolerations:
      - {key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      - {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 2}
      containers:
      - name: web
        image: ` + testimages.Busybox + `
        command: [sh, -c, "mkdir /www; hostname > /www/index.html; exec httpd -f -p 8080 -h /www"]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
        resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 64Mi}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: client}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: client, image: ` + testimages.Busybox + `, command: [sleep, "86400"]}]
`

func onNodes(want ...string) func([]clusterPodStatus) error {
	return func(pods []clusterPodStatus) error {
		var on []string
		for _, p := range pods {
			on = append(on, p.Spec.NodeName)
		}
		slices.Sort(on)
		if !slices.Equal(on, want) {
			return fmt.Errorf("they are on %v, want %v", on, want)
		}
		return nil
	}
}

func (s story) deploy() {
	must(s.t, s.c.Apply(s.t.Context(), clusterManifest))
	s.ready("web", 2, 2*time.Minute, onNodes("node-1", "node-2"))
	s.ready("client", 2, 2*time.Minute, onNodes("node-1", "node-2"))
}

// everywhere waits until the Service answers at an address with each of the pods.
func (s story) answers(what string, pods []clusterPodStatus, ask func(context.Context) (string, error)) {
	s.t.Helper()
	missing := map[string]bool{}
	for _, p := range pods {
		missing[p.Metadata.Name] = true
	}
	s.eventually(time.Minute, what, func(ctx context.Context) error {
		for range 10 {
			out, err := ask(ctx)
			if err != nil {
				return err
			}
			delete(missing, strings.TrimSpace(out))
		}
		if len(missing) > 0 {
			return fmt.Errorf("no answer of %v", missing)
		}
		return nil
	})
}

func fromHost(address string) func(context.Context) (string, error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	return func(ctx context.Context) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/", nil)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer func() { _ = resp.Body.Close() }()
		text, err := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return string(text), err
	}
}

func (s story) fromPod(pod clusterPodStatus, address string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		return s.c.Kubectl(ctx, "exec", pod.Metadata.Name, "--", "wget", "-q", "-T", "5", "-O", "-", "http://"+address+"/")
	}
}

func (s story) service() {
	web, clients := s.ready("web", 2, time.Minute, nil), s.ready("client", 2, time.Minute, nil)
	address, port, _ := strings.Cut(s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort}"), " ")
	s.answers("the cluster IP, from this machine", web, fromHost(address))
	for _, n := range s.c.Nodes {
		s.answers(n.Name+"'s node port", web, fromHost(n.Address()+":"+port))
	}
	for _, client := range clients {
		s.answers("the cluster IP, from a pod on "+client.Spec.NodeName, web, s.fromPod(client, address))
	}
	s.answers("the API server's cluster IP, from a pod", nil, func(ctx context.Context) (string, error) {
		return s.c.Kubectl(ctx, "exec", clients[0].Metadata.Name, "--", "nc", "-z", "-w", "5", strings.TrimSpace(s.kubectl("get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")), "443")
	})
}

func (s story) podToPod() {
	for _, client := range s.ready("client", 2, time.Minute, nil) {
		for _, p := range s.ready("web", 2, time.Minute, nil) {
			s.answers(fmt.Sprintf("%s's pod, from %s", p.Spec.NodeName, client.Spec.NodeName), []clusterPodStatus{p}, s.fromPod(client, p.Status.PodIP+":8080"))
		}
	}
}

func (s story) killContainer() {
	before := s.ready("web", 2, time.Minute, nil)[0]
	killed := 0
	for _, pid := range cgroupProcesses(s.t, "pod"+before.Metadata.UID) {
		if cmd, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.HasPrefix(string(cmd), "httpd\x00") {
			must(s.t, syscall.Kill(pid, syscall.SIGKILL))
			killed++
		}
	}
	if killed != 1 {
		s.t.Fatalf("%d processes of pod %s were killed", killed, before.Metadata.Name)
	}
	s.ready("web", 2, time.Minute, func(pods []clusterPodStatus) error {
		for _, p := range pods {
			if p.Metadata.UID != before.Metadata.UID {
				continue
			}
			was, is := before.Status.ContainerStatuses[0], p.Status.ContainerStatuses[0]
			if is.RestartCount != was.RestartCount+1 || is.ContainerID == was.ContainerID || p.Status.PodIP != before.Status.PodIP {
				return fmt.Errorf("before %+v, now %+v", before.Status, p.Status)
			}
			return nil
		}
		return errors.New("the pod was replaced")
	})
}

// cgroupProcesses are those in and below a cgroup of that name, anywhere.
func cgroupProcesses(t *testing.T, name string) []int {
	t.Helper()
	out, err := exec.Command("sh", "-c", `find /sys/fs/cgroup -type d -name "$0" | while read -r d; do find "$d" -name cgroup.procs -exec cat {} +; done | sort -un`, name).Output()
	must(t, err)
	var pids []int
	for _, word := range strings.Fields(string(out)) {
		pid, err := strconv.Atoi(word)
		must(t, err)
		pids = append(pids, pid)
	}
	return pids
}

// on is the one of pods that is on a node.
func (s story) on(node *cluster.Node, pods []clusterPodStatus) clusterPodStatus {
	s.t.Helper()
	i := slices.IndexFunc(pods, func(p clusterPodStatus) bool { return p.Spec.NodeName == node.Name })
	if i < 0 {
		s.t.Fatalf("no pod is on %s: %+v", node.Name, pods)
	}
	return pods[i]
}

func (s story) killNode() {
	node := s.c.Nodes[1]
	port := s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}")
	daemon := s.on(node, s.ready("client", 2, time.Minute, nil))
	left := fromHost(s.c.Nodes[0].Address() + ":" + port)
	endVisits := s.visits(left)
	must(s.t, node.Kill())
	must(s.t, node.WaitNotReady(s.t.Context(), time.Minute))
	web := s.ready("web", 2, 2*time.Minute, onNodes("node-1", "node-1"))
	s.answers("the node port of the node that is left", web, left)
	endVisits()

	must(s.t, node.Start(s.t.Context()))
	must(s.t, node.WaitReady(s.t.Context(), 2*time.Minute))
	s.eventually(2*time.Minute, "what was on the node is cleaned up", func(ctx context.Context) error {
		pods, err := s.pods(ctx, "web")
		if err == nil && len(pods) != 2 {
			err = fmt.Errorf("%d pods", len(pods))
		}
		return err
	})
	s.ready("client", 2, 2*time.Minute, func(pods []clusterPodStatus) error {
		if err := onNodes("node-1", "node-2")(pods); err != nil {
			return err
		}
		if is := s.on(node, pods).Status.ContainerStatuses[0].ContainerID; is == daemon.Status.ContainerStatuses[0].ContainerID {
			return fmt.Errorf("the DaemonSet's container is told to be %s, of before", is)
		}
		return nil
	})
	s.answers("the cluster IP, from the DaemonSet's pod on the node that came back", web, s.fromPod(s.on(node, s.ready("client", 2, time.Minute, nil)),
		s.kubectl("get", "service", "web", "-o", "jsonpath={.spec.clusterIP}")))
	s.kubectl("scale", "deployment", "web", "--replicas", "4")
	web = s.ready("web", 4, 2*time.Minute, func(pods []clusterPodStatus) error {
		for _, p := range pods {
			if p.Spec.NodeName == node.Name {
				return nil
			}
		}
		return errors.New("none is on " + node.Name)
	})
	s.answers(node.Name+"'s node port", web, fromHost(node.Address()+":"+port))
}

// visits ask for a page one after the other, each again until there is an answer, as people do whose page does not load: until the cluster knows that a
// node is dead, its pods are asked, too. What is returned ends them; a visit in vain for a quarter of a minute is an error.
func (s story) visits(ask func(context.Context) (string, error)) (end func()) {
	var again int
	var slowest time.Duration
	l := startAsking(s.t, 20*time.Millisecond, func() error {
		for began := time.Now(); ; again++ {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			_, err := ask(ctx)
			cancel()
			took := time.Since(began)
			slowest = max(slowest, took)
			if err == nil || took > 15*time.Second {
				return err
			}
		}
	})
	return func() {
		s.t.Helper()
		l.end(s.t)
		s.t.Logf("%d requests had to be made again; the slowest visit took %.1f s", again, slowest.Seconds())
	}
}

func (s story) remove() {
	s.kubectl("delete", "deployment,daemonset,service", "web", "client", "--ignore-not-found", "--wait=false")
	s.eventually(2*time.Minute, "no pod is left", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "get", "pods", "-A", "-o", "name")
		if err == nil && out != "" {
			err = errors.New(out)
		}
		return err
	})
}

// clusterIndex is which of ten clusters side by side a test makes: its own, or BERTH_CLUSTER_INDEX.
func clusterIndex(t *testing.T, own int) int {
	t.Helper()
	text := os.Getenv("BERTH_CLUSTER_INDEX")
	if text == "" {
		return own
	}
	index, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("BERTH_CLUSTER_INDEX=%q is no number", text)
	}
	return index // Options.Index has bounds
}

// leavesNothing takes the cluster down at the end of the test, and fails the test if this machine is not as it was.
func leavesNothing(t *testing.T, index int, dir string) {
	t.Helper()
	before := clusterTraces(t, index, dir)
	t.Cleanup(func() {
		must(t, cluster.Down(dir))
		must(t, cluster.Down(dir)) // again
		if left := slices.DeleteFunc(clusterTraces(t, index, dir), func(trace string) bool { return slices.Contains(before, trace) }); len(left) > 0 {
			t.Errorf("the cluster has left:\n%s", strings.Join(left, "\n"))
		}
	})
}

// clusterTraces are what a cluster could leave on this machine.
func clusterTraces(t *testing.T, index int, dir string) []string {
	t.Helper()
	look := exec.Command("sh", "-c", `
		ip -o link | awk '{ print "link", $2 }' | grep "berth-cl$INDEX"
		ip route | grep -E "10\.(101\.$INDEX|11$INDEX|12$INDEX)\."
		grep -F "$DIR" /proc/self/mountinfo /sys/block/loop*/loop/backing_file
		find /sys/fs/cgroup -type d -name "berth-cluster$INDEX*"
		[ -n "$BERTH_LAB_SHARED" ] || nft list tables
		[ -n "$BERTH_LAB_SHARED" ] || sysctl vm.overcommit_memory kernel.panic kernel.panic_on_oops
		ls -d "$DIR"
		echo "$DIR" | grep -lFf - /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo
		:`)
	look.Env = append(os.Environ(), "DIR="+dir, fmt.Sprintf("INDEX=%d", index)) // as an argument it would find itself
	out, err := look.Output()
	must(t, err)
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

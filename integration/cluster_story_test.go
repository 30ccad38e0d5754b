//go:build integration

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestClusterStory is what an engineer does with a cluster of two nodes: one YAML file is applied and a page answers, by each of its names; then
// things are changed and killed under it. BERTH_CLUSTER_DIR names a cluster that is up (with the test images), and is used instead of one
// of its own.
func TestClusterStory(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER") == "" {
		t.Skip("make test-cluster runs it")
	}
	s := story{t, storyCluster(t)}
	before := s.look()
	began := time.Now()
	must(t, s.c.PushExample(t.Context()))
	must(t, s.c.Apply(t.Context(), shellManifest))
	t.Logf("the example's image is pushed in %.1f s", time.Since(began).Seconds())
	for _, c := range []chapter[story]{
		{"one file is applied and pods are ready", story.applyWeb},
		{"pods have their configuration, secrets and logs", story.insideWeb},
		{"the page answers by addresses", story.addresses},
		{"the page answers by its name", story.names},
		{"the page answers through an ingress controller", story.ingress},
		{"the page opens in a browser", story.browser},
		{"a killed container is restarted in place", story.killWeb},
		{"scaled to six and back", story.scale},
		{"updated without a failed request", story.update},
		{"kubectl top knows what nodes and pods use", story.top},
		{"scaled by its load, up and down", story.autoscale},
		{"Jobs, a CronJob, a StatefulSet, init containers and a sidecar", story.workloads},
		{"attach, logs -f, exec, cp, port-forward, debug", story.verbs},
		{"berth is replaced and killed under load", story.replaceBerth},
		{"berth is upgraded to a build with other records and back", story.upgradeBerth},
		{"nodes are cordoned, drained and come back", story.drain},
		{"what cannot work is told, and the page goes on", story.faults},
		{"a pod of more weight takes the place of another", story.preempt},
		{"a registry that is down", story.registryDown},
		{"a full disk", story.fullDisk},
		{"an API server that is gone", story.serverGone},
		{"all of it is deleted", func(s story) { s.removeWeb(before) }},
	} {
		c.run(t, storyOf(s.c))
	}
}

// storyCluster is one with the controllers in a hurry, or the one that is named.
func storyCluster(t *testing.T) *cluster.Cluster {
	t.Helper()
	if dir := os.Getenv("BERTH_CLUSTER_DIR"); dir != "" {
		c, err := cluster.Open(dir, t.Logf)
		must(t, err)
		return c
	}
	return newCluster(t, cluster.Start, cluster.Options{
		Index: clusterIndex(t, 3), Disks: []int64{0, 4 << 30}, ControllerManager: []string{"--horizontal-pod-autoscaler-sync-period=5s"},
	})
}

// shellManifest is a pod on each node with all that a shell has.
const shellManifest = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: shell}
spec:
  selector: {matchLabels: {app: shell}}
  template:
    metadata: {labels: {app: shell}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: shell, image: ` + testimages.Busybox + `, command: [sleep, "86400"]}]
`

// long is what anything in a cluster may take on a machine that does much else.
const long = 4 * time.Minute

func (s story) applyWeb() {
	root, err := lab.RepoRoot()
	must(s.t, err)
	s.kubectl("apply", "-f", filepath.Join(root, "examples/web/web.yaml"))
	s.kubectl("rollout", "status", "deployment/web", "--timeout", long.String()) // of a story told again: back to the first edition
	for _, p := range s.ready("web", 2, long, onNodes("node-1", "node-2")) {
		if len(p.Status.ContainerStatuses) != 3 {
			s.t.Errorf("%s has %d containers", p.Metadata.Name, len(p.Status.ContainerStatuses))
		}
	}
	s.ready("shell", 2, long, onNodes("node-1", "node-2"))
}

// insideWeb looks at what the processes of a pod have, and at what one container leaves for another.
func (s story) insideWeb() {
	pod := s.ready("web", 2, long, nil)[0]
	var seen []string
	for _, pid := range cgroupProcesses(s.t, "pod"+pod.Metadata.UID) {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || !bytes.HasPrefix(args, []byte("/bin/app\x00")) {
			continue
		}
		token, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/etc/web/token", pid))
		must(s.t, err)
		seen = append(seen, strings.ReplaceAll(string(args), "\x00", " ")+string(token))
	}
	if want := "/bin/app -listen :8080 -access-log /var/log/web/access.log of nobody's business"; len(seen) != 1 || seen[0] != want {
		s.t.Errorf("of ConfigMap and Secret the pod has %q, want %q", seen, want)
	}
	ask := fromHost(pod.Status.PodIP + ":8080")
	s.eventually(long, "the collector has what the web server wrote", func(ctx context.Context) error {
		if _, err := ask(ctx); err != nil {
			return err
		}
		out, err := s.c.Kubectl(ctx, "logs", pod.Metadata.Name, "-c", "collector")
		if err == nil && !strings.Contains(out, "collected: ") {
			err = fmt.Errorf("its log is %q", out)
		}
		return err
	})
	s.eventually(long, "the exporter serves what it asked the web server", func(ctx context.Context) error {
		out, err := fetchPage(ctx, "http://"+pod.Status.PodIP+":9090/metrics", "")
		if err == nil && (!strings.Contains(out, "web_up 1\n") || !regexp.MustCompile(`(?m)^\S*requests\S* [1-9]`).MatchString(out)) {
			err = fmt.Errorf("its metrics are %q", out)
		}
		return err
	})
}

// fetchPage asks a URL, over a connection of its own; an answer that is not 200 is an error.
func fetchPage(ctx context.Context, url, host string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	req.Host, req.Close = host, true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, text)
	}
	return string(text), err
}

var ahoy = regexp.MustCompile(`<h1>Ahoy from (\S+)</h1>`)

// page is the name of the pod that has answered.
func page(text string, err error) (string, error) {
	if err != nil {
		return "", err
	}
	m := ahoy.FindStringSubmatch(text)
	if m == nil {
		return "", fmt.Errorf("it is another page: %q", text)
	}
	return m[1], nil
}

func pageAt(url, host string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) { return page(fetchPage(ctx, url, host)) }
}

// pageFrom asks from a pod.
func (s story) pageFrom(pod clusterPodStatus, url string) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		return page(s.c.Kubectl(ctx, "exec", pod.Metadata.Name, "--", "wget", "-q", "-T", "10", "-O", "-", url))
	}
}

func (s story) nodePort(namespace, service string) string {
	s.t.Helper()
	return s.kubectl("-n", namespace, "get", "service", service, "-o", "jsonpath={.spec.ports[0].nodePort}")
}

func (s story) addresses() {
	web := s.ready("web", 2, long, nil)
	for _, p := range web {
		s.answers("the pod on "+p.Spec.NodeName, []clusterPodStatus{p}, pageAt("http://"+p.Status.PodIP+":8080/", ""))
	}
	address := s.clusterIP("web")
	s.answers("the cluster IP", web, pageAt("http://"+address+"/", ""))
	for _, client := range s.ready("shell", 2, long, nil) {
		s.answers("the cluster IP, from a pod on "+client.Spec.NodeName, web, s.pageFrom(client, "http://"+address+"/"))
	}
	for _, n := range s.c.Nodes {
		s.answers(n.Name+"'s node port", web, pageAt("http://"+n.Address()+":"+s.nodePort("default", "web")+"/", ""))
	}
}

// names asks in the way of a pod that was given no more than the kubelet's resolv.conf.
func (s story) names() {
	if tools.DNS == "" {
		s.t.Fatal("BERTH_TOOLS does not have dns")
	}
	began := time.Now()
	must(s.t, s.c.StartDNS(s.t.Context(), tools.DNS))
	s.t.Logf("CoreDNS is pushed, pulled and ready in %.1f s", time.Since(began).Seconds())
	web := s.ready("web", 2, long, nil)
	for _, client := range s.ready("shell", 2, long, nil) {
		for _, name := range []string{"web", "web.default", "web.default.svc.cluster.local"} {
			s.answers(name+", from a pod on "+client.Spec.NodeName, web, s.pageFrom(client, "http://"+name+"/"))
		}
		out, err := s.c.Kubectl(s.t.Context(), "exec", client.Metadata.Name, "--", "nslookup", "absent.default.svc.cluster.local")
		if err == nil || !strings.Contains(out, "NXDOMAIN") {
			s.t.Errorf("a Service that is not there: %q, %v", out, err)
		}
	}
}

// removeWeb deletes all that the story has made: nodes are then as they were before.
func (s story) removeWeb(before []lab.Snapshot) {
	root, err := lab.RepoRoot()
	must(s.t, err)
	s.kubectl("delete", "-f", filepath.Join(root, "examples/web/web.yaml"), "--ignore-not-found", "--wait=false")
	s.kubectl("delete", "deployment,daemonset,statefulset,job,cronjob,pod", "--all", "--all-namespaces", "--wait=false")
	s.kubectl("delete", "service", "store", "--ignore-not-found")
	s.eventually(long, "no pod is left", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "get", "pods", "--all-namespaces", "-o", "name")
		if err == nil && out != "" {
			err = errors.New(out)
		}
		return err
	})
	given := os.Getenv("BERTH_CLUSTER_DIR") != ""
	s.eventually(long, "nodes are as they were before the first pod", func(context.Context) error {
		var left []string
		for i, after := range s.look() {
			for _, line := range before[i].Diff(after) {
				if given && strings.HasPrefix(line, "- ") {
					continue // add-ons of its own, which are deleted, too
				}
				left = append(left, s.c.Nodes[i].Name+": "+line)
			}
		}
		if len(left) > 0 {
			return errors.New(strings.Join(left, "\n"))
		}
		return nil
	})
}

// look tells what there is on the nodes, but for their daemons, which are others after an upgrade.
func (s story) look() []lab.Snapshot {
	s.t.Helper()
	var all []lab.Snapshot
	daemon := regexp.MustCompile(`^process \d+: (` + regexp.QuoteMeta(filepath.Join(s.c.Dir, "bin")) + `/|berth-shim exec( |$))`)
	for _, n := range s.c.Nodes {
		now, err := n.Snapshot(s.t.Context())
		must(s.t, err)
		maps.DeleteFunc(now, func(line string, _ bool) bool { return daemon.MatchString(line) })
		all = append(all, now)
	}
	return all
}

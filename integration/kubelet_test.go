//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// soon is how long a kubelet on a busy machine of two cores may take for one thing; it is a bound for hanging, not for speed.
const soon = 90 * time.Second

// kubeletNode is the node that all tests of this file share: a kubelet takes seconds to start, and runs many pods.
type kubeletNode struct {
	*lab.Node
	k *lab.Kubelet
}

// TestKubelet runs pods through a stock kubelet. The pods run side by side; when all are deleted, nothing is left.
func TestKubelet(t *testing.T) {
	n := newNode(t)
	ctx := t.Context()
	for _, image := range []string{testimages.Busybox, testimages.Httpd} {
		_, err := n.CRI.Pull(ctx, image)
		must(t, err)
	}
	must(t, n.StartKubelet(ctx))
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last errors of the kubelet:\n%s", n.Kubelet.Complaints(""))
		}
	})
	kn := kubeletNode{n, n.Kubelet}
	before, err := n.Snapshot()
	must(t, err)
	t.Run("pods", func(t *testing.T) {
		for _, test := range []struct {
			name string
			run  func(*testing.T, kubeletNode)
		}{
			{"three containers share volume and network", threeContainers},
			{"restart policies", restartPolicies},
			{"exec probes", func(t *testing.T, n kubeletNode) { probes(t, n, execProbe) }},
			{"HTTP probes", func(t *testing.T, n kubeletNode) { probes(t, n, httpProbe) }},
			{"TCP probes", func(t *testing.T, n kubeletNode) { probes(t, n, tcpProbe) }},
			{"init and sidecar containers", initAndSidecar},
			{"graceful deletion", gracefulDeletion},
			{"logs", logs},
			{"host port and host network", hostPorts},
			{"security context", securityContext},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				test.run(t, kn)
			})
		}
	})
	if n.Foreign() {
		return
	}
	// The kubelet removes dead sandboxes once a minute.
	if err := n.SettleWithin(ctx, before, 150*time.Second); err != nil {
		t.Error(err)
	}
}

// TestKubeletSeesNothingOfARestart kills `berth serve` while a kubelet runs a pod on it: the pod runs on, is not restarted,
// and is ready as before.
func TestKubeletSeesNothingOfARestart(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("only berth serve is ours to kill")
	}
	ctx := t.Context()
	must(t, n.StartKubelet(ctx))
	kn := kubeletNode{n, n.Kubelet}
	pod := kn.apply(t, "steady", `
  containers:
  - name: web
    image: `+testimages.Httpd+`
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
`, lab.Running)
	url := "http://" + pod.Status.PodIP + "/"
	for range 3 {
		must(t, n.KillBerth())
		must(t, get(ctx, url))
		must(t, n.StartBerth(ctx))
		must(t, get(ctx, url))
	}
	time.Sleep(5 * time.Second) // the kubelet relists once a second
	after, err := kn.k.WaitPod(ctx, "steady", soon, lab.Running)
	must(t, err)
	was, is := pod.Container("web"), after.Container("web")
	if is.RestartCount != 0 || is.ContainerID != was.ContainerID || after.Status.PodIP != pod.Status.PodIP {
		t.Errorf("container before: %+v, after: %+v; address %s, now %s", was, is, pod.Status.PodIP, after.Status.PodIP)
	}
}

// apply starts a pod with that spec (YAML, indented by two) and waits until it is as wanted. The pod is deleted with the test.
func (n kubeletNode) apply(t *testing.T, name, spec string, want func(*lab.Pod) error) *lab.Pod {
	t.Helper()
	manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s}\nspec:\n  terminationGracePeriodSeconds: 5\n%s",
		name, n.Network(), strings.TrimPrefix(spec, "\n"))
	must(t, n.k.Apply(name, []byte(manifest)))
	t.Cleanup(func() {
		if err := n.k.Delete(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if err := n.WaitEnded(context.Background(), name, soon); err != nil {
			t.Error(err)
		}
	})
	pod, err := n.k.WaitPod(t.Context(), name, soon, want)
	must(t, err)
	return pod
}

func threeContainers(t *testing.T, n kubeletNode) {
	const image = testimages.Busybox
	pod := n.apply(t, "three", `
  volumes:
  - {name: shared, emptyDir: {}}
  containers:
  - name: app
    image: `+image+`
    command: [sh, -c, "echo it works > /srv/index.html; echo served > /srv/access.log; exec httpd -f -p 8080 -h /srv"]
    volumeMounts: [{name: shared, mountPath: /srv}]
  - name: collector
    image: `+image+`
    command: [sh, -c, "until [ -f /logs/access.log ]; do sleep 0.2; done; exec tail -f /logs/access.log"]
    volumeMounts: [{name: shared, mountPath: /logs, readOnly: true}]
  - name: exporter
    image: `+image+`
    command: [sh, -c, "while ! wget -q -O - http://127.0.0.1:8080/; do sleep 0.2; done; exec sleep 86400"]
`, lab.Running)
	if got := len(pod.Status.ContainerStatuses); got != 3 {
		t.Errorf("%d containers", got)
	}
	must(t, get(t.Context(), "http://"+pod.Status.PodIP+":8080/"))
	n.wantLog(t, pod, "collector", "", "served\n")
	n.wantLog(t, pod, "exporter", "", "it works\n")
}

func restartPolicies(t *testing.T, n kubeletNode) {
	for _, test := range []struct {
		name, policy string
		exit         int
		phase        string
		restarts     int
	}{
		{"always", "Always", 0, "Running", 2},
		{"on-failure-1", "OnFailure", 1, "Running", 2},
		{"on-failure-0", "OnFailure", 0, "Succeeded", 0},
		{"never-0", "Never", 0, "Succeeded", 0},
		{"never-3", "Never", 3, "Failed", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			n.apply(t, test.name, fmt.Sprintf(`
  restartPolicy: %s
  containers:
  - {name: c, image: %q, command: [sh, -c, "exit %d"]}
`, test.policy, testimages.Busybox, test.exit), func(p *lab.Pod) error {
				c := p.Container("c")
				last := c.State.Terminated
				if last == nil {
					last = c.LastState.Terminated
				}
				if p.Status.Phase != test.phase || c.RestartCount < test.restarts || last == nil || last.ExitCode != test.exit {
					return fmt.Errorf("want phase %s, %d restarts, exit code %d", test.phase, test.restarts, test.exit)
				}
				if test.restarts == 0 && c.RestartCount != 0 {
					return fmt.Errorf("want no restart")
				}
				return nil
			})
		})
	}
}

// probe is one way to ask a container for its health: the probe's YAML, and shell commands that make it succeed and fail.
// %[1]d is a port of the container's own.
type probe struct{ name, yaml, pass, fail string }

var (
	execProbe = probe{"exec", "exec: {command: [cat, /tmp/ok]}", "touch /tmp/ok", "rm /tmp/ok"}
	httpProbe = probe{
		"http", "httpGet: {path: /ok, port: %[1]d}",
		"mkdir -p /tmp/www; touch /tmp/www/ok; httpd -p %[1]d -h /tmp/www", "rm /tmp/www/ok",
	}
	tcpProbe = probe{"tcp", "tcpSocket: {port: %[1]d}", "httpd -f -p %[1]d -h /tmp & server=$!", "kill $server"}
)

func (p probe) at(port int, text string) string {
	if !strings.Contains(text, "%") {
		return text
	}
	return fmt.Sprintf(text, port)
}

// probes has three pods: one that becomes ready and then unready, one that is restarted when it is no longer alive, and one
// that takes its time to start, which a liveness probe must bear.
func probes(t *testing.T, n kubeletNode, p probe) {
	t.Run("readiness", func(t *testing.T) {
		t.Parallel()
		gate := filepath.Join(n.Dir, "gate-"+p.name)
		must(t, os.Mkdir(gate, 0o755))
		name := p.name + "-ready"
		n.apply(t, name, fmt.Sprintf(`
  volumes: [{name: gate, hostPath: {path: %q}}]
  containers:
  - name: c
    image: %q
    command: [sh, -c, "wait_for() { until [ -f /gate/$1 ]; do sleep 0.2; done; }; wait_for up; %s; wait_for down; %s; sleep 86400"]
    volumeMounts: [{name: gate, mountPath: /gate}]
    readinessProbe: {%s, periodSeconds: 1, failureThreshold: 1}
`, gate, testimages.Busybox, p.at(8001, p.pass), p.at(8001, p.fail), p.at(8001, p.yaml)), func(pod *lab.Pod) error {
			if c := pod.Container("c"); c.State.Running == nil || c.Ready {
				return errors.New("want it running and not ready")
			}
			return nil
		})
		for _, step := range []struct {
			file string
			want bool
		}{{"up", true}, {"down", false}} {
			must(t, os.WriteFile(filepath.Join(gate, step.file), nil, 0o644))
			_, err := n.k.WaitPod(t.Context(), name, soon, func(pod *lab.Pod) error {
				if c := pod.Container("c"); c.Ready != step.want || pod.Condition("Ready") != step.want || c.RestartCount != 0 {
					return fmt.Errorf("want ready %t, no restart", step.want)
				}
				return nil
			})
			must(t, err)
		}
	})
	t.Run("liveness", func(t *testing.T) {
		t.Parallel()
		n.apply(t, p.name+"-live", fmt.Sprintf(`
  containers:
  - name: c
    image: %q
    command: [sh, -c, "%s; sleep 3; %s; sleep 86400"]
    livenessProbe: {%s, initialDelaySeconds: 1, periodSeconds: 1, failureThreshold: 2}
`, testimages.Busybox, p.at(8002, p.pass), p.at(8002, p.fail), p.at(8002, p.yaml)), func(pod *lab.Pod) error {
			c := pod.Container("c")
			if c.RestartCount < 1 || c.LastState.Terminated == nil || c.State.Running == nil {
				return errors.New("want it restarted")
			}
			return nil
		})
	})
	t.Run("startup", func(t *testing.T) {
		t.Parallel()
		name := p.name + "-start"
		n.apply(t, name, fmt.Sprintf(`
  containers:
  - name: c
    image: %q
    command: [sh, -c, "sleep 6; %s; sleep 86400"]
    startupProbe: {%[3]s, periodSeconds: 1, failureThreshold: 60}
    livenessProbe: {%[3]s, periodSeconds: 1, failureThreshold: 1}
`, testimages.Busybox, p.at(8003, p.pass), p.at(8003, p.yaml)), func(pod *lab.Pod) error {
			if c := pod.Container("c"); c.State.Running == nil || c.Started == nil || *c.Started {
				return errors.New("want it running and not started")
			}
			return nil
		})
		pod, err := n.k.WaitPod(t.Context(), name, soon, func(pod *lab.Pod) error {
			if c := pod.Container("c"); c.Started == nil || !*c.Started {
				return errors.New("want it started")
			}
			return nil
		})
		must(t, err)
		if c := pod.Container("c"); c.RestartCount != 0 {
			t.Errorf("%d restarts while it started", c.RestartCount)
		}
	})
}

func initAndSidecar(t *testing.T, n kubeletNode) {
	const image = testimages.Busybox
	t.Run("order", func(t *testing.T) {
		t.Parallel()
		pod := n.apply(t, "init", `
  volumes: [{name: work, emptyDir: {}}]
  initContainers:
  - {name: first, image: "`+image+`", command: [sh, -c, "sleep 1; echo first >> /w/order"], volumeMounts: [{name: work, mountPath: /w}]}
  - name: sidecar
    image: `+image+`
    restartPolicy: Always
    command: [sh, -c, "echo sidecar >> /w/order; trap 'exit 0' TERM; sleep 86400 & wait"]
    startupProbe: {exec: {command: [grep, sidecar, /w/order]}, periodSeconds: 1}
    volumeMounts: [{name: work, mountPath: /w}]
  - {name: second, image: "`+image+`", command: [sh, -c, "echo second >> /w/order"], volumeMounts: [{name: work, mountPath: /w}]}
  containers:
  - {name: main, image: "`+image+`", command: [sh, -c, "cat /w/order; exec sleep 86400"], volumeMounts: [{name: work, mountPath: /w}]}
`, lab.Running)
		n.wantLog(t, pod, "main", "", "first\nsidecar\nsecond\n")
		if c := pod.Container("sidecar"); c.State.Running == nil {
			t.Errorf("the sidecar is %s", c.State)
		}
	})
	t.Run("a job ends although its sidecar does not", func(t *testing.T) {
		t.Parallel()
		n.apply(t, "job", `
  restartPolicy: Never
  initContainers:
  - {name: sidecar, image: "`+image+`", restartPolicy: Always, command: [sh, -c, "trap 'exit 0' TERM; sleep 86400 & wait"]}
  containers:
  - {name: main, image: "`+image+`", command: [sh, -c, "sleep 1"]}
`, func(p *lab.Pod) error {
			if c := p.Container("sidecar"); p.Status.Phase != "Succeeded" || c.State.Terminated == nil || c.State.Terminated.ExitCode != 0 {
				return errors.New("want it to succeed and the sidecar to end")
			}
			return nil
		})
	})
	t.Run("a failing init container holds the pod back", func(t *testing.T) {
		t.Parallel()
		n.apply(t, "init-fails", `
  restartPolicy: Never
  initContainers: [{name: bad, image: "`+image+`", command: [sh, -c, "exit 9"]}]
  containers: [{name: main, image: "`+image+`", command: [sleep, "86400"]}]
`, func(p *lab.Pod) error {
			if c := p.Container("bad").State.Terminated; p.Status.Phase != "Failed" || c == nil || c.ExitCode != 9 {
				return errors.New("want it failed with exit code 9")
			}
			if p.Container("main").ContainerID != "" {
				return errors.New("the main container was started")
			}
			return nil
		})
	})
}

// gracefulDeletion deletes a pod of three: one with a preStop hook, one that takes its time after SIGTERM, and one that does
// not listen and is killed when the grace period is over.
func gracefulDeletion(t *testing.T, n kubeletNode) {
	const image = testimages.Busybox
	dir := filepath.Join(n.Dir, "graceful")
	must(t, os.Mkdir(dir, 0o755))
	n.apply(t, "graceful", `
  terminationGracePeriodSeconds: 6
  volumes: [{name: out, hostPath: {path: "`+dir+`"}}]
  containers:
  - name: hook
    image: `+image+`
    command: [sh, -c, "trap 'echo term >> /out/hook; exit 0' TERM; sleep 86400 & wait"]
    lifecycle: {preStop: {exec: {command: [sh, -c, "echo prestop >> /out/hook; sleep 1"]}}}
    volumeMounts: [{name: out, mountPath: /out}]
  - name: slow
    image: `+image+`
    command: [sh, -c, "trap 'sleep 2; echo done >> /out/slow; exit 0' TERM; sleep 86400 & wait"]
    volumeMounts: [{name: out, mountPath: /out}]
  - name: deaf
    image: `+image+`
    command: [sh, -c, "trap 'echo heard >> /out/deaf' TERM; while :; do sleep 1; done"]
    volumeMounts: [{name: out, mountPath: /out}]
`, lab.Running)
	time.Sleep(time.Second) // a shell just started may not have set its trap
	began := time.Now()
	must(t, n.k.Delete("graceful"))
	must(t, n.WaitEnded(t.Context(), "graceful", soon))
	if took := time.Since(began); took < 6*time.Second || took > 40*time.Second {
		t.Errorf("the pod took %v to end, its grace period is 6 s", took)
	}
	for file, want := range map[string]string{"hook": "prestop\nterm\n", "slow": "done\n", "deaf": "heard\n"} {
		got, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || string(got) != want {
			t.Errorf("%s: %q (%v), want %q", file, got, err, want)
		}
	}
}

func logs(t *testing.T, n kubeletNode) {
	const image = testimages.Busybox
	pod := n.apply(t, "logs", `
  containers:
  - name: lines
    image: `+image+`
    command: [sh, -c, "for i in $(seq 1 100); do echo line $i; done; sleep 0.5; echo to stderr >&2; exec sleep 86400"]
  - name: long
    image: `+image+`
    command: [sh, -c, "head -c 100000 /dev/zero | tr '\\0' x; echo; echo end; exec sleep 86400"]
  - name: crash
    image: `+image+`
    command: [sh, -c, "echo start; sleep 1; exit 1"]
`, func(p *lab.Pod) error {
		if p.Container("crash").RestartCount < 1 || p.Container("lines").State.Running == nil || p.Container("long").State.Running == nil {
			return errors.New("want the first two running and the third restarted")
		}
		return nil
	})
	var all strings.Builder
	for i := 1; i <= 100; i++ {
		fmt.Fprintf(&all, "line %d\n", i)
	}
	n.wantLog(t, pod, "lines", "", all.String()+"to stderr\n")
	n.wantLog(t, pod, "lines", "?tailLines=3", "line 99\nline 100\nto stderr\n")
	n.wantLog(t, pod, "long", "", strings.Repeat("x", 100000)+"\nend\n")
	n.wantLog(t, pod, "crash", "?previous=true", "start\n")
	text, err := n.k.Logs(t.Context(), pod, "lines", "?timestamps=true&tailLines=1")
	must(t, err)
	stamp, _, _ := strings.Cut(text, " ")
	if when, err := time.Parse(time.RFC3339Nano, stamp); err != nil || time.Since(when).Abs() > 10*time.Minute {
		t.Errorf("timestamp %q: %v", stamp, err)
	}
}

// wantLog wants the log of a container, as the kubelet hands it out, to be that text before long.
func (n kubeletNode) wantLog(t *testing.T, pod *lab.Pod, container, query, want string) {
	t.Helper()
	err := lab.Eventually(t.Context(), soon, "log of "+container+query, func(ctx context.Context) error {
		got, err := n.k.Logs(ctx, pod, container, query)
		if err == nil && got != want {
			err = fmt.Errorf("%d bytes %.300q, want %d bytes %.300q", len(got), got, len(want), want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func hostPorts(t *testing.T, n kubeletNode) {
	port, net := 21000+n.Index, 22000+n.Index
	pod := n.apply(t, "host-port", fmt.Sprintf(`
  containers:
  - {name: web, image: %q, ports: [{containerPort: 80, hostPort: %d}]}
`, testimages.Httpd, port), lab.Running)
	must(t, eventually(t, fmt.Sprintf("http://127.0.0.1:%d/", port)))
	must(t, eventually(t, "http://"+pod.Status.PodIP+"/"))

	n.apply(t, "host-network", fmt.Sprintf(`
  hostNetwork: true
  containers:
  - {name: web, image: %q, command: [httpd, -f, -p, "127.0.0.1:%d", -h, /srv]}
`, testimages.Httpd, net), lab.Running)
	must(t, eventually(t, fmt.Sprintf("http://127.0.0.1:%d/", net)))
}

func securityContext(t *testing.T, n kubeletNode) {
	pod := n.apply(t, "security", `
  securityContext: {runAsUser: 1000, runAsGroup: 2000, fsGroup: 3000, seccompProfile: {type: RuntimeDefault}}
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    env: [{name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    command: [sh, -c, "id -u; id -g; touch /x 2>&1 | grep -o 'Read-only file system'; touch /v/x && stat -c %g /v/x; grep -E 'NoNewPrivs|CapEff|Seccomp:' /proc/self/status | tr -d '\\t'; hostname; exec sleep 86400"]
    volumeMounts: [{name: v, mountPath: /v}]
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
`, lab.Running)
	n.wantLog(t, pod, "c", "", "1000\n2000\nRead-only file system\n3000\nCapEff:0000000000000000\nNoNewPrivs:1\nSeccomp:2\n"+pod.Metadata.Name+"\n")
}

// get wants an HTTP server to answer 200.
func get(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}

// eventually wants an HTTP server to answer 200 before long: a container runs before its server listens.
func eventually(t *testing.T, url string) error {
	return lab.Eventually(t.Context(), soon, url, func(ctx context.Context) error { return get(ctx, url) })
}

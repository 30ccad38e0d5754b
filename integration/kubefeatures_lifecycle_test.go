//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

var lifecycleFeatures = []kubeFeature{
	{"termination message", terminationMessage},
	{"out of memory", outOfMemory},
	{"lifecycle hooks", lifecycleHooks},
	{"sidecar with probes", probedSidecar},
	{"ephemeral container", ephemeralContainer},
	{"host port", kubeHostPort},
	{"unknown runtime class", unknownRuntimeClass},
}

func terminationMessage(t *testing.T, n kubeNode) {
	n.apply(t, "last-words", `
  restartPolicy: Never
  containers:
  - {name: file, image: "`+testimages.Busybox+`", command: [sh, -c, "printf 'the file' > /dev/termination-log; exit 3"]}
  - name: elsewhere
    image: `+testimages.Busybox+`
    command: [sh, -c, "printf 'another file' > /tmp/why; exit 4"]
    terminationMessagePath: /tmp/why
  - name: log
    image: `+testimages.Busybox+`
    command: [sh, -c, "echo the log; exit 5"]
    terminationMessagePolicy: FallbackToLogsOnError
`, func(p *lab.Pod) error {
		for container, want := range map[string]string{"file": "3 Error the file", "elsewhere": "4 Error another file", "log": "5 Error the log\n"} {
			end := p.Container(container).State.Terminated
			if end == nil {
				return fmt.Errorf("%s has not ended", container)
			}
			if got := fmt.Sprintf("%d %s %s", end.ExitCode, end.Reason, end.Message); got != want {
				return fmt.Errorf("%s ended with %q, want %q", container, got, want)
			}
		}
		return nil
	})
}

func outOfMemory(t *testing.T, n kubeNode) {
	n.apply(t, "oom", `
  restartPolicy: Never
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "exec dd if=/dev/zero of=/dev/null bs=200M count=1"]
    resources: {requests: {cpu: 10m}, limits: {memory: 24Mi}}
`, func(p *lab.Pod) error {
		end := p.Container("c").State.Terminated
		if p.Status.Phase != "Failed" || end == nil || end.Reason != "OOMKilled" || end.ExitCode != 137 {
			return errors.New("want it failed, OOMKilled, 137")
		}
		return nil
	})
}

// lifecycleHooks has a container tell what happens to it: its postStart hook before it is ready, its preStop hook before the
// signal; and one whose postStart hook fails, which is killed.
func lifecycleHooks(t *testing.T, n kubeNode) {
	dir := filepath.Join(n.Dir, "hooks")
	must(t, os.Mkdir(dir, 0o755))
	n.apply(t, "hooks", `
  volumes: [{name: out, hostPath: {path: "`+dir+`"}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "trap 'echo term >> /out/log; exit 0' TERM; touch /out/trapped; sleep 86400 & wait"]
    lifecycle:
      postStart: {exec: {command: [sh, -c, "until [ -f /out/trapped ]; do sleep 0.1; done; echo poststart >> /out/log"]}}
      preStop: {exec: {command: [sh, -c, "echo prestop >> /out/log"]}}
    volumeMounts: [{name: out, mountPath: /out}]
`, lab.Running)
	wantFile(t, filepath.Join(dir, "log"), "poststart\n")
	must(t, n.cp.DeletePod(t.Context(), "hooks", soon))
	wantFile(t, filepath.Join(dir, "log"), "poststart\nprestop\nterm\n")

	n.apply(t, "hook-fails", `
  restartPolicy: Never
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    lifecycle: {postStart: {exec: {command: [sh, -c, "echo no >&2; exit 7"]}}}
`, func(p *lab.Pod) error {
		if p.Status.Phase != "Failed" && p.Status.Phase != "Succeeded" {
			return errors.New("want it to end")
		}
		return nil
	})
	if events := n.cp.Events(t.Context(), "hook-fails"); !strings.Contains(events, "FailedPostStartHook") {
		t.Errorf("no event tells that the hook failed:\n%s", events)
	}
}

// probedSidecar starts the main container only when the sidecar's startup probe succeeds, and makes the pod ready only when
// its readiness probe does; with the pod it ends after the main container.
func probedSidecar(t *testing.T, n kubeNode) {
	dir := filepath.Join(n.Dir, "sidecar")
	must(t, os.Mkdir(dir, 0o755))
	const name = "sidecar"
	n.create(t, name, `
  volumes: [{name: s, hostPath: {path: "`+dir+`"}}]
  initContainers:
  - name: side
    image: `+testimages.Busybox+`
    restartPolicy: Always
    command: [sh, -c, "trap 'echo side >> /s/ends; exit 0' TERM; sleep 86400 & wait"]
    startupProbe: {exec: {command: [test, -f, /s/started]}, periodSeconds: 1, failureThreshold: 300}
    readinessProbe: {exec: {command: [test, -f, /s/ready]}, periodSeconds: 1}
    volumeMounts: [{name: s, mountPath: /s}]
  containers:
  - name: main
    image: `+testimages.Busybox+`
    command: [sh, -c, "trap 'echo main >> /s/ends; exit 0' TERM; sleep 86400 & wait"]
    volumeMounts: [{name: s, mountPath: /s}]
`)
	n.wait(t, name, func(p *lab.Pod) error {
		side, main := p.Container("side"), p.Container("main")
		if side.State.Running == nil || main.State.Running != nil || side.Started == nil || *side.Started {
			return errors.New("want the sidecar running and not started, the main container waiting")
		}
		return nil
	})
	must(t, os.WriteFile(filepath.Join(dir, "started"), nil, 0o644))
	n.wait(t, name, func(p *lab.Pod) error {
		if p.Container("main").State.Running == nil || p.Container("side").Ready || p.Condition("Ready") {
			return errors.New("want the main container running and the pod not ready")
		}
		return nil
	})
	must(t, os.WriteFile(filepath.Join(dir, "ready"), nil, 0o644))
	n.wait(t, name, lab.Running)
	must(t, n.cp.DeletePod(t.Context(), name, soon))
	wantFile(t, filepath.Join(dir, "ends"), "main\nside\n")
}

// ephemeralContainer debugs a running container with kubectl: the debugger sees its processes.
func ephemeralContainer(t *testing.T, n kubeNode) {
	const name = "debugged"
	pod := n.apply(t, name, `
  containers:
  - {name: app, image: "`+testimages.Httpd+`"}
`, lab.Running)
	_, err := n.cp.Kubectl(t.Context(), "debug", name, "--image", testimages.Busybox, "--image-pull-policy", "IfNotPresent",
		"--target", "app", "-c", "debugger", "--", "sh", "-c", `tr '\0' ' ' < /proc/1/cmdline; wget -q -O - http://127.0.0.1/`)
	must(t, err)
	after := n.wait(t, name, func(p *lab.Pod) error {
		if end := p.Container("debugger").State.Terminated; end == nil || end.ExitCode != 0 {
			return errors.New("want the debugger to have ended well")
		}
		return nil
	})
	n.wantLog(t, name, "debugger", "httpd -f -v -p 80 -h /srv <html><body><h1>It works!</h1></body></html>\n")
	if was, is := pod.Container("app"), after.Container("app"); was.ContainerID != is.ContainerID || is.State.Running == nil {
		t.Errorf("the debugged container was %+v, is %+v", was, is)
	}
}

func kubeHostPort(t *testing.T, n kubeNode) {
	port := 24000 + n.Index
	pod := n.apply(t, "host-port", fmt.Sprintf(`
  containers:
  - {name: web, image: %q, ports: [{containerPort: 80, hostPort: %d}]}
`, testimages.Httpd, port), lab.Running)
	must(t, eventually(t, fmt.Sprintf("http://127.0.0.1:%d/", port)))
	must(t, eventually(t, fmt.Sprintf("http://%s:%d/", n.Address(), port)))
	must(t, eventually(t, "http://"+pod.Status.PodIP+"/"))
	if pod.Status.HostIP != n.Address() {
		t.Errorf("the status has host address %s, want %s", pod.Status.HostIP, n.Address())
	}
}

// unknownRuntimeClass has a pod name a handler that is not there: the event tells which.
func unknownRuntimeClass(t *testing.T, n kubeNode) {
	const path = "/apis/node.k8s.io/v1/runtimeclasses"
	must(t, n.cp.Create(t.Context(), path, "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: odd}\nhandler: no-such-handler\n"))
	t.Cleanup(func() {
		if _, err := n.cp.Do(context.Background(), "DELETE", path+"/odd", "", nil); err != nil {
			t.Error(err)
		}
	})
	n.create(t, "odd-class", `
  runtimeClassName: odd
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`}
`)
	err := lab.Eventually(t.Context(), soon, "event", func(ctx context.Context) error {
		events := n.cp.Events(ctx, "odd-class")
		if !strings.Contains(events, "Warning FailedCreatePodSandBox") || !strings.Contains(events, "no-such-handler") {
			return fmt.Errorf("the events are %q", events)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

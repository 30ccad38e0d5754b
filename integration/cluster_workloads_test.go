//go:build integration

package integration

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/berth-run/berth/integration/testimages"
)

const workloadsManifest = `apiVersion: batch/v1
kind: CronJob
metadata: {name: minutely}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        metadata: {labels: {app: minutely}}
        spec:
          restartPolicy: Never
          containers: [{name: job, image: IMAGE, command: [echo, it is time]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: shares}
spec:
  completions: 3
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers: [{name: job, image: IMAGE, command: [sh, -c, "echo share $JOB_COMPLETION_INDEX"]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: fails}
spec:
  backoffLimit: 1
  template:
    spec:
      restartPolicy: Never
      containers: [{name: job, image: IMAGE, command: [sh, -c, "echo no; exit 4"]}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: store}
spec:
  serviceName: store
  replicas: 2
  selector: {matchLabels: {app: store}}
  template:
    metadata: {labels: {app: store}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: store
        image: IMAGE
        command: [sh, -c, "mkdir /www; hostname > /www/index.html; exec httpd -f -p 8080 -h /www"]
        readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 5}
---
apiVersion: v1
kind: Service
metadata: {name: store}
spec: {clusterIP: None, selector: {app: store}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: helped}
spec:
  restartPolicy: Never
  initContainers:
  - {name: first, image: IMAGE, command: [sh, -c, "echo first > /work/steps"], volumeMounts: [{name: work, mountPath: /work}]}
  - name: sidecar
    image: IMAGE
    restartPolicy: Always
    command: [sh, -c, "trap 'echo sidecar ends; exit 0' TERM; echo sidecar >> /work/steps; while :; do sleep 0.2; done"]
    startupProbe: {exec: {command: [grep, -q, sidecar, /work/steps]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 60}
    volumeMounts: [{name: work, mountPath: /work}]
  - {name: second, image: IMAGE, command: [sh, -c, "echo second >> /work/steps"], volumeMounts: [{name: work, mountPath: /work}]}
  containers: [{name: main, image: IMAGE, command: [cat, /work/steps], volumeMounts: [{name: work, mountPath: /work}]}]
  volumes: [{name: work, emptyDir: {}}]
`

// workloads are the other kinds of them.
func (s story) workloads() {
	must(s.t, s.c.Apply(s.t.Context(), strings.ReplaceAll(workloadsManifest, "IMAGE", testimages.Busybox)))
	timeout := "--timeout=" + long.String()
	s.kubectl("wait", "--for=condition=complete", "job/shares", timeout)
	for _, share := range []string{"share 0", "share 1", "share 2"} {
		if out := s.kubectl("logs", "-l", "batch.kubernetes.io/job-name=shares"); !strings.Contains(out, share) {
			s.t.Errorf("of the Job's shares there are %q, not %s", out, share)
		}
	}
	s.kubectl("wait", "--for=condition=failed", "job/fails", timeout)
	if out := s.kubectl("get", "pods", "-l", "batch.kubernetes.io/job-name=fails", "-o", "jsonpath={.items[*].status.containerStatuses[0].state.terminated.exitCode}"); out != "4 4" {
		s.t.Errorf("pods of the Job that fails ended with %q", out)
	}
	s.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/helped", timeout)
	if out := s.kubectl("logs", "helped", "-c", "main"); out != "first\nsidecar\nsecond\n" {
		s.t.Errorf("init containers and the sidecar have left %q", out)
	}
	if out := s.kubectl("logs", "helped", "-c", "sidecar"); out != "sidecar ends\n" {
		s.t.Errorf("the sidecar says %q", out)
	}
	s.statefulSet()
	s.eventually(long, "a Job of the CronJob is complete", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "logs", "-l", "app=minutely")
		if err == nil && !strings.Contains(out, "it is time") {
			err = fmt.Errorf("logs %q", out)
		}
		return err
	})
	s.kubectl("delete", "cronjob", "minutely")
}

// statefulSet has a pod replaced: its name stays, in the cluster's DNS as well.
func (s story) statefulSet() {
	names := func() map[string]clusterPodStatus {
		by := map[string]clusterPodStatus{}
		for _, p := range s.ready("store", 2, long, nil) {
			by[p.Metadata.Name] = p
			s.answers(p.Metadata.Name, []clusterPodStatus{p}, fromHost(p.Status.PodIP+":8080"))
		}
		return by
	}
	before := names()
	s.kubectl("delete", "pod", "store-0")
	after := names()
	for _, name := range []string{"store-0", "store-1"} {
		if before[name].Metadata.UID == "" || (before[name].Metadata.UID == after[name].Metadata.UID) != (name == "store-1") {
			s.t.Errorf("%s was %q and is %q", name, before[name].Metadata.UID, after[name].Metadata.UID)
		}
		for _, client := range s.ready("shell", 2, long, nil) {
			s.answers(name+".store, from a pod on "+client.Spec.NodeName, []clusterPodStatus{after[name]}, s.fromPod(client, name+".store.default.svc.cluster.local:8080"))
		}
	}
}

const verbsManifest = `apiVersion: v1
kind: Pod
metadata: {name: ticks}
spec:
  restartPolicy: Never
  containers: [{name: main, image: IMAGE, command: [sh, -c, "for i in 1 2 3 4 5 6; do echo tick $i; sleep 1; done"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: echo}
spec:
  restartPolicy: Never
  containers: [{name: main, image: IMAGE, stdin: true, stdinOnce: true, command: [sh, -c, "while read -r l; do echo got $l; done; echo bye"]}]
`

// kubectlWith is kubectl with a standard input.
func (s story) kubectlWith(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(s.c.Dir, "bin", "kubectl"), append([]string{"--kubeconfig", s.c.Kubeconfig()}, args...)...)
}

func (s story) piped(stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), long)
	defer cancel()
	cmd := s.kubectlWith(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// verbs are what kubectl does with a pod that runs.
func (s story) verbs() {
	must(s.t, s.c.Apply(s.t.Context(), strings.ReplaceAll(verbsManifest, "IMAGE", testimages.Busybox)))
	s.kubectl("wait", "--for=condition=Ready", "pod/echo", "--timeout="+long.String())

	if out, err := s.piped("hello\n", "attach", "-i", "echo"); err != nil || !strings.Contains(out, "got hello") || !strings.Contains(out, "bye") {
		s.t.Errorf("attach: %q, %v", out, err)
	}
	s.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/echo", "--timeout="+long.String())

	s.eventually(long, "the pod of ticks has begun", func(ctx context.Context) error {
		_, err := s.c.Kubectl(ctx, "logs", "ticks")
		return err
	})
	if out, err := s.piped("", "logs", "-f", "ticks"); err != nil || out != "tick 1\ntick 2\ntick 3\ntick 4\ntick 5\ntick 6\n" {
		s.t.Errorf("logs -f: %q, %v", out, err)
	}

	shell := s.ready("shell", 2, long, nil)[0].Metadata.Name
	if out, err := s.piped("over and over", "exec", "-i", shell, "--", "tr", "a-z", "A-Z"); err != nil || out != "OVER AND OVER" {
		s.t.Errorf("exec: %q, %v", out, err)
	}
	var exit *exec.ExitError
	if out, err := s.piped("", "exec", shell, "--", "sh", "-c", "exit 7"); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		s.t.Errorf("exec of what ends with 7: %q, %v", out, err)
	}
	s.copies(shell)
	s.forwards()
	s.debugs()
}

// copies has a file go to a pod and come back.
func (s story) copies(pod string) {
	dir := s.t.TempDir()
	want := make([]byte, 3<<20)
	_, err := rand.Read(want)
	must(s.t, err)
	must(s.t, os.WriteFile(filepath.Join(dir, "there"), want, 0o600))
	s.kubectl("cp", filepath.Join(dir, "there"), pod+":/tmp/copy")
	s.kubectl("cp", pod+":/tmp/copy", filepath.Join(dir, "back"))
	got, err := os.ReadFile(filepath.Join(dir, "back"))
	must(s.t, err)
	if !bytes.Equal(got, want) {
		s.t.Errorf("cp: %d bytes went, other %d came back", len(want), len(got))
	}
}

func (s story) forwards() {
	pod := s.ready("web", 2, long, nil)[1].Metadata.Name
	ctx, cancel := context.WithTimeout(s.t.Context(), long)
	defer cancel()
	cmd := s.kubectlWith(ctx, "port-forward", "--address", "127.0.0.1", "pod/"+pod, ":8080")
	out, err := cmd.StdoutPipe()
	must(s.t, err)
	must(s.t, cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait() // it was killed
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	must(s.t, err)
	m := regexp.MustCompile(`^Forwarding from (127\.0\.0\.1:\d+) -> 8080\n$`).FindStringSubmatch(line)
	if m == nil {
		s.t.Fatalf("port-forward says %q", line)
	}
	for range 20 {
		if got, err := pageAt("http://"+m[1]+"/", "")(ctx); err != nil || got != pod {
			s.t.Errorf("through port-forward: %q, %v", got, err)
		}
	}
}

// debugs looks into a container without a shell, from one beside it that sees its processes.
func (s story) debugs() {
	pod := s.ready("web", 2, long, nil)[0].Metadata.Name
	name := fmt.Sprintf("look-%d", time.Now().Unix())
	custom := filepath.Join(s.t.TempDir(), "container.json")
	must(s.t, os.WriteFile(custom, []byte(`{"securityContext": {"runAsUser": 1000}}`), 0o600)) // the pod wants nobody to be root
	s.kubectl("debug", pod, "--image", testimages.Busybox, "--target", "web", "--container", name, "--profile", "general", "--custom", custom, "--quiet", "--", "sh", "-c", "tr '\\000' ' ' < /proc/1/cmdline")
	s.eventually(long, "the ephemeral container sees the web server", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "logs", pod, "-c", name)
		if err == nil && !strings.HasPrefix(out, "/bin/app -listen :8080 ") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
}

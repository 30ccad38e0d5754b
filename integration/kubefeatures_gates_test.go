//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// gates are the features that are off by default and that a runtime has a part in.
var gates = []string{"EventedPLEG", "CRIListStreaming", "PodAndContainerStatsFromCRI", "ContainerStopSignals"}

// wholeStats has cAdvisor measure the machine's disks, which the kubelet's summary does not do without.
func wholeStats(config map[string]any) { config["localStorageCapacityIsolation"] = true }

var gatedFeatures = []kubeFeature{
	{"events", eventedPLEG},
	{"streaming lists", listStreaming},
	{"statistics of the CRI", statsFromCRI},
	{"stop signal", stopSignal},
}

// restartFeatures need the node for themselves.
var restartFeatures = []kubeFeature{{"the runtime is killed", killedUnderKubelet}}

// metric is the value of a metric of the kubelet's without labels, 0 when it has none.
func (n kubeNode) metric(t *testing.T, name string) float64 {
	t.Helper()
	text, err := n.Kubelet.Get(t.Context(), "/metrics")
	must(t, err)
	var value float64
	for _, line := range strings.Split(string(text), "\n") {
		if rest, ok := strings.CutPrefix(line, name+" "); ok {
			_, err := fmt.Sscan(rest, &value)
			must(t, err)
		}
	}
	return value
}

// eventedPLEG wants the kubelet to have been told by an event that a container ended, and the stream of events not to break.
func eventedPLEG(t *testing.T, n kubeNode) {
	pod := n.apply(t, "events", `
  restartPolicy: Never
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: [sh, -c, "sleep 1; exit 7"]}
`, func(p *lab.Pod) error {
		if end := p.Container("c").State.Terminated; p.Status.Phase != "Failed" || end == nil || end.ExitCode != 7 {
			return errors.New("want it failed with 7")
		}
		return nil
	})
	_, id, _ := strings.Cut(pod.Container("c").ContainerID, "://")
	told := regexp.MustCompile(`Evented PLEG: requested pod relist after container termination".*"` + pod.Metadata.UID + `".*"` + id + `"`)
	n.wantKubeletLog(t, told)
	if got := n.metric(t, "kubelet_evented_pleg_connection_success_count"); got < 1 {
		t.Errorf("the kubelet has connected to the events %v times", got)
	}
	if got := n.metric(t, "kubelet_evented_pleg_connection_error_count"); got != 0 {
		t.Errorf("%v connections to the events ended with an error", got)
	}
}

// wantKubeletLog wants the kubelet to say something before long.
func (n kubeNode) wantKubeletLog(t *testing.T, line *regexp.Regexp) {
	t.Helper()
	err := lab.Eventually(t.Context(), soon, "the kubelet's log", func(context.Context) error {
		text, err := os.ReadFile(n.Kubelet.Process.Log)
		if err == nil && !line.Match(text) {
			err = fmt.Errorf("no line matches %v", line)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// listStreaming has the kubelet want each of its six lists, and wants them to have come by the streaming calls, and none to have
// fallen back.
func listStreaming(t *testing.T, n kubeNode) {
	const name = "listed"
	n.apply(t, name, `
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 200m, memory: 96Mi}}
`, lab.Running)
	for _, path := range []string{"/stats/summary", "/metrics/cadvisor"} {
		_, err := n.Kubelet.Get(t.Context(), path)
		must(t, err)
	}
	must(t, n.cp.PatchPod(t.Context(), name, "resize", resizePatch("c", "200m", "80Mi"))) // it looks at what the container uses
	for _, call := range []string{"StreamPodSandboxes", "StreamContainers", "StreamPodSandboxStats", "StreamContainerStats", "StreamPodSandboxMetrics"} {
		n.wantKubeletLog(t, regexp.MustCompile(`\[RemoteRuntimeService\] `+call+` Response`))
	}
	// Of images it says nothing.
	must(t, lab.Eventually(t.Context(), soon, "images are listed", func(context.Context) error {
		text, err := os.ReadFile(n.Berth.Log)
		if err == nil && !strings.Contains(string(text), `msg="call ends" call=StreamImages`) {
			err = errors.New("the runtime has had no such call")
		}
		return err
	}))
	text, err := os.ReadFile(n.Kubelet.Process.Log)
	must(t, err)
	if line := regexp.MustCompile(`.*not implemented, falling back.*`).Find(text); line != nil {
		t.Errorf("the kubelet says: %s", line)
	}
}

// statsFromCRI wants the kubelet's summary and its metrics to have the pod, with what only the runtime can know.
func statsFromCRI(t *testing.T, n kubeNode) {
	const name = "measured"
	n.apply(t, name, `
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: [sh, -c, "trap 'exit 0' TERM; while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.2; done"]}
`, lab.Running)
	err := lab.Eventually(t.Context(), soon, "summary", func(ctx context.Context) error {
		text, err := n.Kubelet.Get(ctx, "/stats/summary")
		if err != nil {
			return err
		}
		var summary struct {
			Pods []struct {
				PodRef     struct{ Name string }
				CPU        struct{ UsageNanoCores, UsageCoreNanoSeconds uint64 }
				Memory     struct{ WorkingSetBytes uint64 }
				Network    struct{ RxBytes *uint64 }
				Containers []struct {
					Name   string
					CPU    struct{ UsageNanoCores, UsageCoreNanoSeconds uint64 }
					Memory struct{ WorkingSetBytes uint64 }
				}
				ProcessStats struct {
					ProcessCount uint64 `json:"process_count"`
				} `json:"process_stats"`
			}
		}
		if err := json.Unmarshal(text, &summary); err != nil {
			return err
		}
		for _, pod := range summary.Pods {
			if pod.PodRef.Name != name {
				continue
			}
			if pod.CPU.UsageCoreNanoSeconds == 0 || pod.Memory.WorkingSetBytes == 0 || pod.Network.RxBytes == nil || pod.ProcessStats.ProcessCount == 0 {
				return fmt.Errorf("the pod has %+v", pod)
			}
			if len(pod.Containers) != 1 || pod.Containers[0].CPU.UsageCoreNanoSeconds == 0 || pod.Containers[0].Memory.WorkingSetBytes == 0 {
				return fmt.Errorf("its containers have %+v", pod.Containers)
			}
			return nil
		}
		return errors.New("the summary does not have the pod")
	})
	if err != nil {
		t.Error(err)
	}
	err = lab.Eventually(t.Context(), soon, "metrics", func(ctx context.Context) error {
		text, err := n.Kubelet.Get(ctx, "/metrics/cadvisor")
		if err != nil {
			return err
		}
		for _, metric := range []string{"container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_network_receive_bytes_total"} {
			if !regexp.MustCompile(`(?m)^` + metric + `\{[^}]*pod="` + name + `"`).Match(text) {
				return fmt.Errorf("no %s of the pod", metric)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// stopSignal ends a pod by the signal that it asks for.
func stopSignal(t *testing.T, n kubeNode) {
	dir := filepath.Join(n.Dir, "signal")
	must(t, os.Mkdir(dir, 0o755))
	pod := n.apply(t, "signal", `
  os: {name: linux}
  volumes: [{name: out, hostPath: {path: "`+dir+`"}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "trap 'echo term >> /out/got; exit 0' TERM; trap 'echo usr1 >> /out/got; exit 0' USR1; touch /out/trapped; sleep 86400 & wait"]
    lifecycle: {stopSignal: SIGUSR1}
    volumeMounts: [{name: out, mountPath: /out}]
`, lab.Running)
	wantFile(t, filepath.Join(dir, "trapped"), "")
	if got := pod.Container("c").StopSignal; got != "SIGUSR1" {
		t.Errorf("the status has stop signal %q", got)
	}
	must(t, n.cp.DeletePod(t.Context(), "signal", soon))
	wantFile(t, filepath.Join(dir, "got"), "usr1\n")
}

// killedUnderKubelet kills `berth serve` under a kubelet that listens to its events: its pods run on, and the end of one that
// comes meanwhile is seen.
func killedUnderKubelet(t *testing.T, n kubeNode) {
	if n.Foreign() {
		t.Skip("only berth serve is ours to kill")
	}
	dir := filepath.Join(n.Dir, "killed")
	must(t, os.Mkdir(dir, 0o755))
	steady := n.apply(t, "steady", `
  containers:
  - {name: web, image: "`+testimages.Httpd+`", readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}}
`, lab.Running)
	n.apply(t, "ends", `
  restartPolicy: Never
  volumes: [{name: v, hostPath: {path: "`+dir+`"}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "until [ -f /v/go ]; do sleep 0.1; done; exit 8"]
    volumeMounts: [{name: v, mountPath: /v}]
`, lab.Running)
	must(t, n.KillBerth())
	must(t, get(t.Context(), "http://"+steady.Status.PodIP+"/"))
	must(t, os.WriteFile(filepath.Join(dir, "go"), nil, 0o644)) // this end comes while nobody watches
	must(t, n.StartBerth(t.Context()))
	n.wait(t, "ends", func(p *lab.Pod) error {
		if end := p.Container("c").State.Terminated; p.Status.Phase != "Failed" || end == nil || end.ExitCode != 8 {
			return errors.New("want it failed with 8")
		}
		return nil
	})
	time.Sleep(brief)
	after := n.wait(t, "steady", lab.Running)
	was, is := steady.Container("web"), after.Container("web")
	if is.RestartCount != 0 || is.ContainerID != was.ContainerID || after.Status.PodIP != steady.Status.PodIP {
		t.Errorf("container before: %+v, after: %+v; address %s, now %s", was, is, steady.Status.PodIP, after.Status.PodIP)
	}
}

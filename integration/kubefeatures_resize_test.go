//go:build integration

package integration

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

var resizeFeatures = []kubeFeature{
	{"in-place resize", resizeContainer},
	{"in-place resize of a pod", resizePod},
	{"downward API and limits", downwardAPI},
	{"no swap", noSwap},
}

// limitFiles are shell commands that print the limits of the cgroup the shell is in: memory, and CPU quota in microseconds.
func limitFiles() (memory, quota string) {
	if cgroupV2() {
		return "cat /sys/fs/cgroup/memory.max", "cut -d ' ' -f 1 /sys/fs/cgroup/cpu.max"
	}
	return "cat /sys/fs/cgroup/memory/memory.limit_in_bytes", "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us"
}

// resizeContainer takes a container's limits up, down, and then below what it uses, which the kubelet refuses. The container
// is not restarted.
func resizeContainer(t *testing.T, n kubeNode) {
	const name = "resize"
	pod := n.apply(t, name, `
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "dd if=/dev/zero of=/dev/shm/held bs=1M count=40 2>/dev/null; echo held; trap 'exit 0' TERM; sleep 86400 & wait"]
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 200m, memory: 96Mi}}
`, lab.Running)
	n.wantLog(t, name, "c", "held\n")
	memory, quota := limitFiles()
	first := pod.Container("c").ContainerID
	for _, step := range []struct{ cpu, memory, bytes, quota string }{
		{"300m", "128Mi", "134217728", "30000"},
		{"150m", "80Mi", "83886080", "15000"},
	} {
		must(t, n.cp.PatchPod(t.Context(), name, "resize", resizePatch("c", step.cpu, step.memory)))
		n.wait(t, name, func(p *lab.Pod) error {
			r := p.Container("c").Resources
			if r == nil || r.Limits["cpu"] != step.cpu || r.Limits["memory"] != step.memory {
				return fmt.Errorf("the status has %v, want %s and %s", r, step.cpu, step.memory)
			}
			return nil
		})
		n.becomes(t, pod, "c", memory, step.bytes)
		n.becomes(t, pod, "c", quota, step.quota)
	}
	must(t, n.cp.PatchPod(t.Context(), name, "resize", resizePatch("c", "150m", "24Mi")))
	pod = n.wait(t, name, func(p *lab.Pod) error {
		for _, c := range p.Status.Conditions {
			if c.Type == "PodResizeInProgress" && c.Reason == "Error" && strings.Contains(c.Message, "below current usage") {
				return nil
			}
		}
		return errors.New("want the resize refused")
	})
	n.becomes(t, pod, "c", memory, "83886080")
	if c := pod.Container("c"); c.RestartCount != 0 || c.ContainerID != first {
		t.Errorf("the container was restarted: %s", pod)
	}
}

func resizePatch(container, cpu, memory string) string {
	return fmt.Sprintf(`{"spec":{"containers":[{"name":%q,"resources":{"limits":{"cpu":%q,"memory":%q}}}]}}`, container, cpu, memory)
}

// resizePod changes the limits of a pod that has its own, as its cgroup shows.
func resizePod(t *testing.T, n kubeNode) {
	const name = "resize-pod"
	pod := n.apply(t, name, `
  resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 200m, memory: 96Mi}}
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`}
`, lab.Running)
	first := pod.Container("c").ContainerID
	for _, step := range []struct{ cpu, memory, bytes, quota string }{
		{"300m", "128Mi", "134217728", "30000"},
		{"150m", "80Mi", "83886080", "15000"},
	} {
		patch := fmt.Sprintf(`{"spec":{"resources":{"limits":{"cpu":%q,"memory":%q}}}}`, step.cpu, step.memory)
		must(t, n.cp.PatchPod(t.Context(), name, "resize", patch))
		n.wait(t, name, func(p *lab.Pod) error {
			r := p.Status.Resources
			if r == nil || r.Limits["cpu"] != step.cpu || r.Limits["memory"] != step.memory {
				return fmt.Errorf("the status has %v, want %s and %s", r, step.cpu, step.memory)
			}
			return nil
		})
		limits, err := n.PodLimits(pod.Metadata.UID)
		must(t, err)
		if limits.Memory != step.bytes || limits.Quota != step.quota {
			t.Errorf("the pod's cgroup has %+v, want %s and %s", limits, step.bytes, step.quota)
		}
	}
	if c := n.wait(t, name, lab.Running).Container("c"); c.RestartCount != 0 || c.ContainerID != first {
		t.Errorf("the container was restarted: %+v", c)
	}
}

// downwardAPI has a container read its own limits, name and labels, which are also what its cgroup has.
func downwardAPI(t *testing.T, n kubeNode) {
	pod := n.apply(t, "downward", `
  volumes: [{name: info, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 250m, memory: 48Mi}}
    env:
    - {name: MEM, valueFrom: {resourceFieldRef: {resource: limits.memory}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: HOST, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    volumeMounts: [{name: info, mountPath: /info}]
`, lab.Running)
	memory, quota := limitFiles()
	got := n.sh(t, pod, "c", "echo $MEM $CPU $NODE $HOST $IP; cat /info/labels; echo; "+memory+"; "+quota)
	want := fmt.Sprintf("50331648 250 %s %s %s\napp=\"downward\"\n50331648\n25000", n.Network(), n.Address(), pod.Status.PodIP)
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// noSwap wants a container with a memory limit to have no swap beside it, which is the kubelet's default.
func noSwap(t *testing.T, n kubeNode) {
	file, want := "/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "33554432" // memory and swap together
	if cgroupV2() {
		file, want = "/sys/fs/cgroup/memory.swap.max", "0"
	}
	pod := n.apply(t, "no-swap", `
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`, resources: {requests: {cpu: 10m}, limits: {memory: 32Mi}}}
`, lab.Running)
	got := n.sh(t, pod, "c", "[ ! -e "+file+" ] || cat "+file)
	if got == "" {
		t.Skipf("the kernel does not account swap: no %s", file)
	}
	if got != want {
		t.Errorf("%s is %s, want %s", file, got, want)
	}
}

//go:build integration

package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// staticCPUs keeps CPU 0 for the machine; the rest may be given to containers for themselves.
func staticCPUs(config map[string]any) {
	config["cpuManagerPolicy"], config["reservedSystemCPUs"], config["cpuManagerReconcilePeriod"] = "static", "0", "1s"
}

var cpuManagerFeatures = []kubeFeature{{"a CPU of its own", exclusiveCPU}}

// needCPUs skips the test where there is no CPU to give away.
func needCPUs(t *testing.T) {
	t.Helper()
	if online := onlineCPUs(t); !strings.HasPrefix(online, "0-") {
		t.Skipf("the CPU manager needs CPU 0 and another one, the machine has %s", online)
	}
}

func onlineCPUs(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/sys/devices/system/cpu/online")
	must(t, err)
	return strings.TrimSpace(string(text))
}

// exclusiveCPU gives a guaranteed container one CPU; containers that share run on the others, and get it back when it ends.
func exclusiveCPU(t *testing.T, n kubeNode) {
	const cpus = "sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status"
	shared := n.apply(t, "shares", `
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: `+sleeper+`}
`, lab.Running)
	all := onlineCPUs(t)
	n.becomes(t, shared, "c", cpus, all)
	exclusive := n.apply(t, "alone", `
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    resources: {requests: {cpu: 1, memory: 32Mi}, limits: {cpu: 1, memory: 32Mi}}
`, lab.Running)
	own := n.sh(t, exclusive, "c", cpus)
	var number int
	if _, err := fmt.Sscanf(own, "%d", &number); err != nil || own != fmt.Sprint(number) || number == 0 {
		t.Fatalf("the exclusive CPU is %q, want one that is not CPU 0", own)
	}
	rest := n.cpusWithout(t, number)
	n.becomes(t, shared, "c", cpus, rest)
	// A CPU manager's update names the CPUs alone: everything else stays.
	memory, quota := limitFiles()
	n.becomes(t, exclusive, "c", memory, "33554432")
	n.becomes(t, exclusive, "c", quota, "-1")
	for _, pod := range []*lab.Pod{shared, exclusive} {
		if c := n.wait(t, pod.Metadata.Name, lab.Running).Container("c"); c.RestartCount != 0 {
			t.Errorf("%s was restarted", pod.Metadata.Name)
		}
	}
	must(t, n.cp.DeletePod(t.Context(), "alone", soon))
	n.becomes(t, shared, "c", cpus, all)
}

// cpusWithout is the kernel's list of the machine's CPUs but one.
func (n kubeNode) cpusWithout(t *testing.T, gone int) string {
	t.Helper()
	var last int
	_, err := fmt.Sscanf(onlineCPUs(t), "0-%d", &last)
	must(t, err)
	span := func(from, to int) string {
		switch {
		case from > to:
			return ""
		case from == to:
			return fmt.Sprint(from)
		}
		return fmt.Sprintf("%d-%d", from, to)
	}
	return strings.Trim(span(0, gone-1)+","+span(gone+1, last), ",")
}

//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// measured is how long a kubelet on a busy machine may take until it shows all of a pod: its cAdvisor looks every 15 seconds.
const measured = 150 * time.Second

// statsPod has something of everything that is measured: memory, CPU under a quota, a file in the root file system, traffic.
const statsPod = `
  containers:
  - name: busy
    image: ` + testimages.Busybox + `
    command: [sh, -c, "x=$(head -c 16777216 /dev/zero | tr '\\0' x); head -c 8388608 /dev/zero > /big; while :; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.3; done"]
    resources: {requests: {cpu: 10m, memory: 32Mi}, limits: {cpu: 200m, memory: 128Mi}}
  - name: web
    image: ` + testimages.Httpd + `
    resources: {requests: {memory: 16Mi}}
`

// explained are differences that are right: a key of a comparison, or the beginning of some, and the reason.
type explained map[string]string

// With default gates a kubelet shows the same of a pod on berth as on containerd.
var berthFromContainerd = explained{}

// With PodAndContainerStatsFromCRI it shows what the CRI can tell.
func criFromCadvisor() explained {
	e := explained{
		"- series container_health_state{": "-1 for every container of Kubernetes', which is no number of the CRI's",
		"- summary.swap.":                  "the CRI has no swap of a pod",
		"- summary.network.interfaces[":    "the CRI's list of interfaces is without the default one",
	}
	if cgroups.Version() == 1 {
		for _, of := range []string{"", "containers[busy].", "containers[web]."} {
			for _, resource := range []string{"cpu", "memory", "io"} {
				e["- summary."+of+resource+".psi."] = "on cgroup v1, where there is no pressure to tell, cAdvisor tells zeros"
			}
		}
	}
	return e
}

// TestKubeletStats asks a stock kubelet for /stats/summary and /metrics/cadvisor: on containerd and on berth by default
// gates, and on berth with the statistics of the CRI. What it has of a pod must be there each time, and be what the kernel
// says.
func TestKubeletStats(t *testing.T) {
	peer := statsNode(t, lab.Options{Containerd: true})
	ours := statsNode(t, lab.Options{})
	if ours.Foreign() {
		t.Skip("berth is compared with containerd")
	}
	wantSame(t, "on berth, as on containerd", berthFromContainerd, peer, ours)
	t.Run("values on containerd", func(t *testing.T) { statsAreTheKernels(t, peer) })
	t.Run("values by default gates", func(t *testing.T) { statsAreTheKernels(t, ours) })

	cadvisor := ours.view(t)
	must(t, ours.k.Stop())
	must(t, ours.StartKubelet(t.Context(), diskMetrics, lab.FeatureGates("PodAndContainerStatsFromCRI")))
	ours.k = ours.Kubelet
	wantSame(t, "from the CRI, as from cAdvisor", criFromCadvisor(), cadvisor, ours)
	t.Run("values from the CRI", func(t *testing.T) { statsAreTheKernels(t, ours) })
}

// diskMetrics is a kubelet's default that the lab takes out: without it cAdvisor does not look at disks at all.
func diskMetrics(config map[string]any) { config["localStorageCapacityIsolation"] = true }

// statsNode starts a node with a kubelet that runs the pod.
func statsNode(t *testing.T, o lab.Options) kubeletNode {
	t.Helper()
	o.Tools, o.Log = tools, t.Logf
	n := startNode(t, o)
	ctx := t.Context()
	for _, image := range []string{testimages.Busybox, testimages.Httpd} {
		_, err := n.CRI.Pull(ctx, image)
		must(t, err)
	}
	must(t, n.StartKubelet(ctx, diskMetrics))
	kn := kubeletNode{n, n.Kubelet}
	manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: stats, namespace: %s}\nspec:\n  terminationGracePeriodSeconds: 1\n%s",
		n.Network(), strings.TrimPrefix(statsPod, "\n"))
	must(t, n.Kubelet.Apply("stats", []byte(manifest)))
	_, err := n.Kubelet.WaitPod(ctx, "stats", soon, lab.Running)
	must(t, err)
	return kn
}

// view is what a kubelet shows of the pod: paths of the summary, and series by their names and labels.
type view map[string]bool

func (v view) of(context.Context) (view, error) { return v, nil }

// viewer has a view, or makes one.
type viewer interface {
	of(ctx context.Context) (view, error)
}

func (n kubeletNode) view(t *testing.T) view {
	t.Helper()
	v, err := n.of(t.Context())
	must(t, err)
	return v
}

func (n kubeletNode) of(ctx context.Context) (view, error) {
	v := view{}
	summary, err := n.summary(ctx)
	if err != nil {
		return nil, err
	}
	v.addPaths("summary", summary)
	series, err := n.series(ctx)
	if err != nil {
		return nil, err
	}
	for _, s := range series {
		if key := s.key(); key != "" {
			v["series "+key] = true
		}
	}
	return v, nil
}

// wantSame waits until two views differ by what is explained and nothing else; an explanation of what does not differ is
// refused, too.
func wantSame(t *testing.T, what string, known explained, want, got viewer) {
	t.Helper()
	err := lab.Eventually(t.Context(), measured, what, func(ctx context.Context) error {
		a, err := want.of(ctx)
		if err != nil {
			return err
		}
		b, err := got.of(ctx)
		if err != nil {
			return err
		}
		if len(a) < 100 {
			return fmt.Errorf("only %d things are shown to compare with", len(a))
		}
		return known.check(diff(a, b))
	})
	if err != nil {
		t.Error(err)
	}
}

func diff(want, got view) []string {
	var lines []string
	for key := range want {
		if !got[key] {
			lines = append(lines, "- "+key)
		}
	}
	for key := range got {
		if !want[key] {
			lines = append(lines, "+ "+key)
		}
	}
	slices.Sort(lines)
	return lines
}

func (e explained) check(lines []string) error {
	used := map[string]bool{}
	var unknown []string
	for _, line := range lines {
		found := false
		for prefix := range e {
			if strings.HasPrefix(line, prefix) {
				used[prefix], found = true, true
			}
		}
		if !found {
			unknown = append(unknown, line)
		}
	}
	for _, prefix := range slices.Sorted(maps.Keys(e)) {
		if !used[prefix] {
			unknown = append(unknown, "explained, but there is no such difference: "+prefix)
		}
	}
	if unknown == nil {
		return nil
	}
	return errors.New(strings.Join(unknown, "\n"))
}

// podSummary is the pod in /stats/summary, as far as values are looked at.
type podSummary struct {
	CPU struct{ UsageCoreNanoSeconds uint64 }

	Memory  struct{ WorkingSetBytes uint64 }
	Network struct {
		Name             string
		RxBytes, TxBytes uint64
	}
	ProcessStats struct {
		Count uint64 `json:"process_count"`
	} `json:"process_stats"`
	Containers []containerSummary
}

type containerSummary struct {
	Name string
	CPU  struct{ UsageCoreNanoSeconds, UsageNanoCores uint64 }

	Memory struct{ WorkingSetBytes, RSSBytes, AvailableBytes uint64 }
	Rootfs struct{ UsedBytes, InodesUsed uint64 }
}

func (n kubeletNode) summary(ctx context.Context) (map[string]any, error) {
	body, err := n.k.Get(ctx, "/stats/summary")
	if err != nil {
		return nil, err
	}
	var all struct{ Pods []map[string]any }
	if err := json.Unmarshal(body, &all); err != nil {
		return nil, fmt.Errorf("/stats/summary: %w", err)
	}
	for _, pod := range all.Pods {
		if ref, _ := pod["podRef"].(map[string]any); ref["name"] == "stats-"+n.Network() {
			return pod, nil
		}
	}
	return nil, errors.New("/stats/summary does not have the pod")
}

// addPaths adds the paths of all values; elements of lists go by their names. Volumes are left out: the kubelet measures
// them itself, once a minute.
func (v view) addPaths(path string, at any) {
	switch at := at.(type) {
	case map[string]any:
		for key, value := range at {
			if key != "volume" {
				v.addPaths(path+"."+key, value)
			}
		}
	case []any:
		for _, value := range at {
			element, _ := value.(map[string]any)
			v.addPaths(fmt.Sprintf("%s[%v]", path, element["name"]), value)
		}
	default:
		v[path] = true
	}
}

// sample is one of /metrics/cadvisor.
type sample struct {
	name   string
	labels map[string]string
	value  float64
}

// series are the samples of the pod.
func (n kubeletNode) series(ctx context.Context) ([]sample, error) {
	body, err := n.k.Get(ctx, "/metrics/cadvisor")
	if err != nil {
		return nil, err
	}
	var list []sample
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "#") || !strings.Contains(line, `pod="stats-`+n.Network()+`"`) {
			continue
		}
		s, err := parseSample(line)
		if err != nil {
			return nil, fmt.Errorf("/metrics/cadvisor: %q: %w", line, err)
		}
		list = append(list, s)
	}
	return list, nil
}

// parseSample reads a line of the text format of Prometheus.
func parseSample(line string) (sample, error) {
	name, rest, ok := strings.Cut(line, "{")
	s := sample{name: name, labels: map[string]string{}}
	for ok && !strings.HasPrefix(rest, "}") {
		var key, quoted string
		key, rest, _ = strings.Cut(rest, "=")
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return s, err
		}
		if s.labels[key], err = strconv.Unquote(quoted); err != nil {
			return s, err
		}
		rest = strings.TrimPrefix(rest[len(quoted):], ",")
	}
	fields := strings.Fields(strings.TrimPrefix(rest, "}"))
	if len(fields) == 0 {
		return s, errors.New("no value")
	}
	var err error
	s.value, err = strconv.ParseFloat(fields[0], 64)
	return s, err
}

// key is the name with the labels: those that have a value, and the values that do not differ from node to node. It is ""
// for what is there only for devices that a container happens to have used.
func (s sample) key() string {
	if s.labels["device"] != "" || s.labels["major"] != "" || strings.HasPrefix(s.name, "container_blkio_") || strings.HasPrefix(s.name, "container_fs_") {
		return ""
	}
	var labels []string
	for _, name := range slices.Sorted(maps.Keys(s.labels)) {
		value := s.labels[name]
		switch name {
		case "id", "name", "namespace", "pod":
			if value != "" {
				value = "…"
			}
		case "image":
			if s.labels["container"] == "" && value != "" { // the sandbox's, which berth has none of
				value = "…"
			}
		}
		if value != "" {
			labels = append(labels, name+"="+value)
		}
	}
	return s.name + "{" + strings.Join(labels, ",") + "}"
}

// statsAreTheKernels holds what the kubelet shows against the files of the kernel, read before and after.
func statsAreTheKernels(t *testing.T, n kubeletNode) {
	ctx := t.Context()
	busy, web := n.running(t, "busy"), n.running(t, "web")
	pod, err := n.CRI.PodIP(ctx, busy.PodSandboxId)
	must(t, err)
	for range 20 {
		must(t, get(ctx, "http://"+pod+"/"))
	}
	cpuBefore, podBefore, rxBefore := n.cpu(t, busy.Id), n.cpu(t, ""), n.received(t, web.Id)
	const mib = 1 << 20
	var last podSummary
	err = lab.Eventually(ctx, measured, "the kubelet shows it", func(ctx context.Context) error {
		summary, err := n.summary(ctx)
		if err != nil {
			return err
		}
		text, err := json.Marshal(summary)
		if err != nil {
			return err
		}
		last = podSummary{}
		if err := json.Unmarshal(text, &last); err != nil {
			return err
		}
		c := last.container("busy")
		switch {
		case c.CPU.UsageCoreNanoSeconds < cpuBefore || last.CPU.UsageCoreNanoSeconds < podBefore:
			return fmt.Errorf("CPU time %d ns of the container, %d ns of the pod, was %d and %d", c.CPU.UsageCoreNanoSeconds, last.CPU.UsageCoreNanoSeconds, cpuBefore, podBefore)
		case last.Network.Name != "eth0" || last.Network.RxBytes < rxBefore:
			return fmt.Errorf("%d bytes received on %q, were %d", last.Network.RxBytes, last.Network.Name, rxBefore)
		case c.Rootfs.UsedBytes < 8*mib || c.Rootfs.UsedBytes > 10*mib || c.Rootfs.InodesUsed == 0:
			return fmt.Errorf("%d bytes and %d inodes in the writable layer, want 8 MiB", c.Rootfs.UsedBytes, c.Rootfs.InodesUsed)
		case c.CPU.UsageNanoCores == 0 || c.CPU.UsageNanoCores > 1e9:
			return fmt.Errorf("%d nano cores under a quota of 2e8", c.CPU.UsageNanoCores)
		case last.ProcessStats.Count < 2 || last.ProcessStats.Count > 6:
			return fmt.Errorf("%d processes of two shells and what they start", last.ProcessStats.Count)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	c := last.container("busy")
	if after := n.cpu(t, busy.Id); c.CPU.UsageCoreNanoSeconds > after {
		t.Errorf("CPU time of the container: %d ns, the kernel has %d later", c.CPU.UsageCoreNanoSeconds, after)
	}
	if after := n.cpu(t, ""); last.CPU.UsageCoreNanoSeconds > after {
		t.Errorf("CPU time of the pod: %d ns, the kernel has %d later", last.CPU.UsageCoreNanoSeconds, after)
	}
	if after := n.received(t, web.Id); last.Network.RxBytes > after {
		t.Errorf("%d bytes received, the kernel has %d later", last.Network.RxBytes, after)
	}
	if rss := n.rss(t, busy.Id); c.Memory.RSSBytes < 16*mib || c.Memory.RSSBytes+16*mib < rss || c.Memory.RSSBytes > rss+16*mib {
		t.Errorf("%d bytes of anonymous memory, the kernel has %d", c.Memory.RSSBytes, rss)
	}
	if limit := uint64(128 * mib); c.Memory.AvailableBytes != limit-c.Memory.WorkingSetBytes || c.Memory.WorkingSetBytes < c.Memory.RSSBytes/2 {
		t.Errorf("%d bytes are available, %d in use, the limit is %d", c.Memory.AvailableBytes, c.Memory.WorkingSetBytes, limit)
	}
	seriesAreTheKernels(t, n, busy.Id, web.Id)
}

// seriesAreTheKernels holds series of the metrics against two reads of the kernel's files: one from before, and one from after
// they were told. What is told may be as old as cAdvisor's last look, so that the first answers can be from before both.
func seriesAreTheKernels(t *testing.T, n kubeletNode, busy, web string) {
	before := n.kernelSeries(t, busy, web)
	err := lab.Eventually(t.Context(), measured, "the series", func(ctx context.Context) error {
		series, err := n.series(ctx)
		if err != nil {
			return err
		}
		after := n.kernelSeries(t, busy, web)
		var wrong []string
		for name, from := range before {
			to, told := after[name], 0
			for _, s := range series {
				if s.name != name.series || s.labels["container"] != name.container && s.labels["interface"] != name.container {
					continue
				}
				told++
				if s.value < min(from.value, to.value)-from.slack || s.value > max(from.value, to.value)+from.slack {
					wrong = append(wrong, fmt.Sprintf("%s of %q is %v, the kernel had %v and has %v", s.name, name.container, s.value, from.value, to.value))
				}
			}
			if told == 0 {
				wrong = append(wrong, fmt.Sprintf("there is no %s of %q", name.series, name.container))
			}
		}
		if wrong != nil {
			slices.Sort(wrong)
			return errors.New(strings.Join(wrong, "\n"))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// seriesOf is a series of a container, or of an interface of the pod.
type seriesOf struct{ series, container string }

// kernelValue is what the kernel has for a series, and how far what is told may be beside two of them.
type kernelValue struct{ value, slack float64 }

// kernelSeries are values of the kernel's now. What only grows has no slack but that of the unit: the CRI's numbers are whole.
func (n kubeletNode) kernelSeries(t *testing.T, busy, web string) map[seriesOf]kernelValue {
	t.Helper()
	const (
		second = 1
		shell  = 4 << 20 // what its programs come and go with
	)
	v1 := cgroups.Version() == 1
	memory := func(on1, on2 string) float64 {
		key, text := on2, n.kernel(t, busy, "memory", "memory.stat", "memory.stat")
		if v1 {
			key = on1
		}
		return float64(keyedNumber(t, text, key+" "))
	}
	usage := float64(keyedNumber(t, n.kernel(t, busy, "memory", "memory.usage_in_bytes", "memory.current"), ""))
	cpuOf := func(what string) float64 {
		if v1 { // in hundredths of a second
			return float64(keyedNumber(t, n.kernel(t, busy, "cpuacct", "cpuacct.stat", ""), what+" ")) / 100
		}
		return float64(keyedNumber(t, n.kernel(t, busy, "", "", "cpu.stat"), what+"_usec ")) / 1e6
	}
	received, sent := n.traffic(t, web)
	processes := strings.Count(n.kernel(t, web, "pids", "cgroup.procs", "cgroup.procs"), "\n")
	return map[seriesOf]kernelValue{
		{"container_cpu_usage_seconds_total", "busy"}:      {float64(n.cpu(t, busy)) / 1e9, second},
		{"container_cpu_user_seconds_total", "busy"}:       {cpuOf("user"), second},
		{"container_cpu_system_seconds_total", "busy"}:     {cpuOf("system"), second},
		{"container_memory_usage_bytes", "busy"}:           {usage, shell},
		{"container_memory_working_set_bytes", "busy"}:     {usage - memory("total_inactive_file", "inactive_file"), shell},
		{"container_memory_rss", "busy"}:                   {float64(n.rss(t, busy)), shell},
		{"container_memory_cache", "busy"}:                 {memory("total_cache", "file"), shell},
		{"container_spec_memory_limit_bytes", "busy"}:      {128 << 20, 0},
		{"container_spec_cpu_quota", "busy"}:               {20_000, 0},
		{"container_spec_cpu_period", "busy"}:              {100_000, 0},
		{"container_oom_events_total", "busy"}:             {0, 0},
		{"container_processes", "web"}:                     {float64(processes), 0},
		{"container_threads", "web"}:                       {float64(keyedNumber(t, n.kernel(t, web, "pids", "pids.current", "pids.current"), "")), 0},
		{"container_network_receive_bytes_total", "eth0"}:  {float64(received), 0},
		{"container_network_transmit_bytes_total", "eth0"}: {float64(sent), 0},
	}
}

func (p *podSummary) container(name string) containerSummary {
	for _, c := range p.Containers {
		if c.Name == name {
			return c
		}
	}
	return containerSummary{}
}

func (n kubeletNode) running(t *testing.T, name string) *runtimeapi.Container {
	t.Helper()
	list, err := n.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{"io.kubernetes.container.name": name},
	}})
	must(t, err)
	if len(list.Containers) != 1 {
		t.Fatalf("%d containers %s run", len(list.Containers), name)
	}
	return list.Containers[0]
}

// kernel reads a file of the cgroup of a container, or of the pod where id is "".
func (n kubeletNode) kernel(t *testing.T, id, controller, v1, v2 string) string {
	t.Helper()
	root, file := "/sys/fs/cgroup", v2
	if cgroups.Version() == 1 {
		root, file = filepath.Join(root, controller), v1
	}
	pattern := filepath.Join(root, n.Cgroup(), "kubepods/burstable/pod*", id, file)
	found, err := filepath.Glob(pattern)
	must(t, err)
	if len(found) != 1 {
		t.Fatalf("%d files are %s", len(found), pattern)
	}
	text, err := os.ReadFile(found[0])
	must(t, err)
	return string(text)
}

// keyedNumber is the number behind a key, or the whole text where the key is "".
func keyedNumber(t *testing.T, text, key string) uint64 {
	t.Helper()
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			v, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 64)
			must(t, err)
			return v
		}
	}
	t.Fatalf("no %q in %q", key, text)
	return 0
}

func (n kubeletNode) cpu(t *testing.T, id string) uint64 {
	t.Helper()
	text := n.kernel(t, id, "cpuacct", "cpuacct.usage", "cpu.stat")
	if cgroups.Version() == 1 {
		return keyedNumber(t, text, "")
	}
	return 1000 * keyedNumber(t, text, "usage_usec ")
}

func (n kubeletNode) rss(t *testing.T, id string) uint64 {
	t.Helper()
	text := n.kernel(t, id, "memory", "memory.stat", "memory.stat")
	if cgroups.Version() == 1 {
		return keyedNumber(t, text, "total_rss ")
	}
	return keyedNumber(t, text, "anon ")
}

// received are the bytes that a container sees its pod's interface have received.
func (n kubeletNode) received(t *testing.T, id string) uint64 {
	t.Helper()
	in, _ := n.traffic(t, id)
	return in
}

// traffic is the bytes that a container sees its pod's interface have received and sent.
func (n kubeletNode) traffic(t *testing.T, id string) (received, sent uint64) {
	t.Helper()
	text, err := n.CRI.Exec(t.Context(), id, "sh", "-c", "grep eth0: /proc/net/dev | sed 's/.*: *//'")
	must(t, err)
	fields := strings.Fields(text)
	if len(fields) < 16 {
		t.Fatalf("/proc/net/dev: %q", text)
	}
	received, err = strconv.ParseUint(fields[0], 10, 64)
	must(t, err)
	sent, err = strconv.ParseUint(fields[8], 10, 64)
	must(t, err)
	return received, sent
}

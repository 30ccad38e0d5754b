//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

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
var criFromCadvisor = explained{
	"- series container_health_state{": "-1 for every container of Kubernetes', which is no number of the CRI's",
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
	t.Run("values by default gates", func(t *testing.T) { statsAreTheKernels(t, ours) })

	cadvisor := ours.view(t)
	must(t, ours.k.Stop())
	must(t, ours.StartKubelet(t.Context(), diskMetrics, lab.FeatureGates("PodAndContainerStatsFromCRI")))
	ours.k = ours.Kubelet
	wantSame(t, "from the CRI, as from cAdvisor", criFromCadvisor, cadvisor, ours)
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
	Containers []struct {
		Name string
		CPU  struct{ UsageCoreNanoSeconds, UsageNanoCores uint64 }

		Memory struct{ WorkingSetBytes, RSSBytes, AvailableBytes uint64 }
		Rootfs struct{ UsedBytes, InodesUsed uint64 }
	}
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

func statsAreTheKernels(t *testing.T, n kubeletNode) {}

//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berth-run/berth/images/admin"
	"github.com/berth-run/berth/integration/cluster"
)

// What the kubelet of the small node gives its pods of memory, and what it keeps free of that and of its disk.
const (
	podsMemory = 1 << 30
	memoryKept = 256 << 20
	diskKept   = 256 << 20
)

// TestClusterEviction has a node whose kubelet looks after disk and memory as kubelets do elsewhere: the pod that takes most has to go, an image
// that nobody uses goes before any pod, and the page of the others is not missed once.
func TestClusterEviction(t *testing.T) {
	if os.Getenv("BERTH_CLUSTER") == "" {
		t.Skip("make test-cluster runs it")
	}
	c := newCluster(t, cluster.Start, cluster.Options{Index: 5, Disks: []int64{0, 4 << 30}, Kubelets: []map[string]any{nil, evictingKubelet(t)}})
	t.Cleanup(func() {
		if t.Failed() {
			tellEvictions(t, c)
		}
	})
	s := story{t, c}
	before := s.look()
	must(t, c.PushExample(t.Context()))
	must(t, c.Apply(t.Context(), shellManifest))
	inOrder(t, storyOf(c), []chapter[story]{
		{"one file is applied and pods are ready", story.applyWeb},
		{"a pod that takes the memory of all pods is evicted", story.memoryPressure},
		{"a pod that fills the disk is evicted", story.diskPressure},
		{"an image that nobody uses goes before any pod", story.imagePressure},
		{"all of it is deleted", func(s story) { s.removeWeb(before) }},
	})
}

// evictingKubelet is how an operator sets up a kubelet that is to keep some of everything free. Of memory it is the pods' own, since this
// machine's is used by others as well.
func evictingKubelet(t *testing.T) map[string]any {
	t.Helper()
	var info syscall.Sysinfo_t
	must(t, syscall.Sysinfo(&info))
	reserved := uint64(info.Totalram)*uint64(info.Unit) - podsMemory
	return map[string]any{
		"enforceNodeAllocatable": []string{"pods"}, "kubeReserved": map[string]string{"memory": strconv.FormatUint(reserved, 10)},
		"evictionHard": map[string]string{
			"memory.available": strconv.Itoa(memoryKept), "nodefs.available": strconv.Itoa(diskKept), "imagefs.available": strconv.Itoa(diskKept),
			"nodefs.inodesFree": "1%", "imagefs.inodesFree": "1%",
		},
		// Its default is five minutes. Conditions last that long after their cause, so that they can be seen.
		"evictionPressureTransitionPeriod": "30s",
		"imageMinimumGCAge":                "1s",
	}
}

func tellEvictions(t *testing.T, c *cluster.Cluster) {
	for _, n := range c.Nodes {
		out, _ := exec.Command("grep", "-iE", "evict|reclaim|image to free", filepath.Join(c.Dir, "logs", n.Name+".kubelet.log")).Output() // for messages alone
		t.Logf("what %s's kubelet says of evictions:\n%s", n.Name, out)
	}
}

// memoryPressure: dd holds a block, since the pipe that it writes to is never read to its end. The pod takes some at first, of which the kubelet is
// to know: it looks at the memory of all pods at once, and at that of each every ten seconds.
func (s story) memoryPressure() {
	const some = 300 << 20
	h := s.startHog(`
		hold() { dd if=/dev/zero bs=$1 count=1 | sleep 86400; }
		mkfifo /more; hold 300M & read go < /more; hold 500M`)
	s.eventually(long, "the kubelet knows what the pod uses", func(ctx context.Context) error {
		used, err := s.workingSet(ctx, s.small(), "hog")
		if err == nil && used < some {
			err = fmt.Errorf("it says %d bytes of %d", used, some)
		}
		return err
	})
	s.kubectl("exec", "hog", "--", "sh", "-c", "echo go > /more")
	s.hogEvicted(h, "MemoryPressure", "memory", `\d+[KM]i`)
}

// diskPressure: who has written so much is known at once.
func (s story) diskPressure() {
	node := s.small()
	s.fillDisk(node, diskKept+200<<20)
	h := s.startHog("sleep 86400")
	s.kubectl("exec", "hog", "--", "fallocate", "-l", "256M", "/bulk")
	s.hogEvicted(h, "DiskPressure", "ephemeral-storage", `262\d{3}Ki`)
	s.emptyDisk(node)
}

// hog is what must live on beside a pod that takes too much.
type hog struct {
	lives map[string]string
	load  *load
}

// startHog has such a pod on the small node, and the page asked for from then on.
func (s story) startHog(script string) hog {
	s.t.Helper()
	h := hog{s.lives("web", "shell"), startLoad(s.t, s.serviceEntrances()...)}
	quoted, err := json.Marshal(script)
	must(s.t, err)
	must(s.t, s.c.Apply(s.t.Context(), onNode(s.small(), "hog", fmt.Sprintf("containers: [{name: main, image: IMAGE, command: [sh, -c, %s]}]", quoted))))
	s.ready("hog", 1, long, nil)
	return h
}

// hogEvicted waits until the pod has had to go for what it used.
func (s story) hogEvicted(h hog, condition, resource, used string) {
	s.t.Helper()
	s.pressure(s.small(), condition)
	s.says("the pod that had to go", []string{
		`^Failed Evicted The node was low on resource: ` + resource + `\. Threshold quantity: \d+, available: \d+[KM]i\. ` +
			`Container main was using ` + used + `, request is 0, has larger consumption of ` + resource + `\. $`,
	}, "get", "pod", "hog", "-o", "jsonpath={.status.phase} {.status.reason} {.status.message}")
	s.noPressure(s.small(), condition)
	h.load.end(s.t)
	s.evicted("hog")
	s.liveOn(h.lives)
	s.kubectl("delete", "pod", "hog")
}

// workingSet is what the kubelet says that a pod has of memory.
func (s story) workingSet(ctx context.Context, node *cluster.Node, pod string) (uint64, error) {
	out, err := s.c.Kubectl(ctx, "get", "--raw", "/api/v1/nodes/"+node.Name+"/proxy/stats/summary")
	if err != nil {
		return 0, err
	}
	var all struct {
		Pods []struct {
			PodRef struct{ Name string }
			Memory struct{ WorkingSetBytes uint64 }
		}
	}
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return 0, err
	}
	for _, p := range all.Pods {
		if p.PodRef.Name == pod {
			return p.Memory.WorkingSetBytes, nil
		}
	}
	return 0, fmt.Errorf("the kubelet does not know %s", pod)
}

// pressure waits until the node says so, and gets no new pods.
func (s story) pressure(node *cluster.Node, condition string) {
	s.t.Helper()
	taint := map[string]string{"MemoryPressure": "memory-pressure", "DiskPressure": "disk-pressure"}[condition]
	s.says(condition, []string{condition + ` +True .* KubeletHas(InsufficientMemory|DiskPressure) `, `Taints: +node\.kubernetes\.io/` + taint + `:NoSchedule`}, "describe", "node", node.Name)
}

func (s story) noPressure(node *cluster.Node, condition string) {
	s.t.Helper()
	s.says("the end of "+condition, []string{condition + ` +False .* KubeletHas(SufficientMemory|NoDiskPressure) `, `Taints: +<none>`}, "describe", "node", node.Name)
}

// evicted are all pods that were.
func (s story) evicted(want ...string) {
	s.t.Helper()
	var got []string
	for line := range strings.Lines(s.kubectl("get", "pods", "-A", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.reason}{"\n"}{end}`)) {
		if name, ok := strings.CutSuffix(line, " Evicted\n"); ok {
			got = append(got, name)
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		s.t.Errorf("evicted were %q, want %q", got, want)
	}
}

// imagePressure fills the disk so that without an image that nobody uses there is enough.
func (s story) imagePressure() {
	node := s.small()
	s.pushBulky()
	must(s.t, s.c.Apply(s.t.Context(), onNode(node, "bulky", `restartPolicy: Never, containers: [{name: main, image: "`+bulkyImage+`"}]`)))
	s.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/bulky", "--timeout", long.String())
	s.kubectl("delete", "pod", "bulky")
	s.eventually(long, "no container has the image", func(ctx context.Context) error {
		images, err := s.images(ctx, node, bulkyImage)
		if err == nil && (len(images) != 1 || len(images[0].Containers) > 0) {
			err = fmt.Errorf("%+v", images)
		}
		return err
	})
	// A kubelet looks for new images when it starts, every five minutes, and when it wants room; one that it sees then for the first time is
	// too new to go.
	s.restartKubelet(node)
	lives := s.lives("web", "shell")
	l := startLoad(s.t, s.serviceEntrances()...)
	s.fillDisk(node, diskKept-16<<20)
	s.eventually(long, "the image is removed", func(ctx context.Context) error {
		images, err := s.images(ctx, node, bulkyImage)
		if err == nil && len(images) > 0 {
			err = fmt.Errorf("%+v", images)
		}
		return err
	})
	s.pressure(node, "DiskPressure")
	s.noPressure(node, "DiskPressure")
	free, err := s.free(s.t.Context(), node)
	must(s.t, err)
	if free < diskKept {
		s.t.Errorf("%d bytes are free, of which %d are to be", free, diskKept)
	}
	l.end(s.t)
	s.evicted()
	s.liveOn(lives)
	s.emptyDisk(node)
}

// images are those on the node of which a name contains that.
func (s story) images(ctx context.Context, node *cluster.Node, name string) ([]admin.Image, error) {
	out, err := node.Command(ctx, s.c.Program("berth"), "images", "list", "--output", "json", name).Output()
	if err != nil {
		return nil, err
	}
	var list struct{ Images []admin.Image }
	return list.Images, json.Unmarshal(out, &list)
}

// restartKubelet waits until the new one has told the API server of its node.
func (s story) restartKubelet(node *cluster.Node) {
	s.t.Helper()
	began := time.Now()
	s.endProgram(node, "kubelet.yaml", syscall.SIGTERM)
	must(s.t, node.StartKubelet(s.t.Context()))
	s.eventually(long, node.Name+" is Ready again", func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, "get", "node", node.Name, "-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.lastHeartbeatTime}{end}`)
		if err != nil {
			return err
		}
		status, heartbeat, _ := strings.Cut(out, " ")
		at, err := time.Parse(time.RFC3339, heartbeat)
		if err == nil && (status != "True" || at.Before(began)) {
			err = errors.New(out)
		}
		return err
	})
}

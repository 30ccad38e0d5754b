//go:build integration

package integration

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/berth-run/berth/integration/cluster"
	"github.com/berth-run/berth/integration/testimages"
)

const preemptManifest = `apiVersion: scheduling.k8s.io/v1
kind: PriorityClass
metadata: {name: weighty}
value: 1000
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: filler}
spec:
  replicas: 2
  selector: {matchLabels: {app: filler}}
  template:
    metadata: {labels: {app: filler}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: IMAGE, command: [sleep, "86400"], resources: {requests: {cpu: CPU}}}]
`

const weightyManifest = `apiVersion: v1
kind: Pod
metadata: {name: weighty, labels: {app: weighty}}
spec:
  priorityClassName: weighty
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: IMAGE, command: [sleep, "86400"], resources: {requests: {cpu: CPU}}}]
`

// preempt has the scheduler make room for a pod of a higher priority, and give it back.
func (s story) preempt() {
	cpu, err := resource.ParseQuantity(s.kubectl("get", "node", "node-1", "-o", "jsonpath={.status.allocatable.cpu}"))
	must(s.t, err)
	fill := strings.NewReplacer("IMAGE", testimages.Busybox, "CPU", fmt.Sprintf("%dm", cpu.MilliValue()*6/10)) // one to a node
	l := s.underLoad()
	must(s.t, s.c.Apply(s.t.Context(), fill.Replace(preemptManifest)))
	s.ready("filler", 2, long, onNodes("node-1", "node-2"))
	must(s.t, s.c.Apply(s.t.Context(), fill.Replace(weightyManifest)))
	s.ready("weighty", 1, long, nil)
	s.ready("filler", 1, long, nil)
	s.says("the pod that has no room", []string{`FailedScheduling`, `0/2 nodes are available: 2 Insufficient cpu`},
		"describe", "pod", s.kubectl("get", "pods", "-l", "app=filler", "--field-selector", "status.phase=Pending", "-o", "jsonpath={.items[*].metadata.name}"))
	s.says("the pod that had to go", []string{`Preempted +pod/filler-\S+ +Preempted by pod \S+ on node node-\d`}, "get", "events")
	s.kubectl("delete", "pod", "weighty")
	s.ready("filler", 2, long, onNodes("node-1", "node-2"))
	s.kubectl("delete", "deployment/filler", "priorityclass/weighty")
	l.end(s.t)
}

// says waits until kubectl says all that.
func (s story) says(what string, want []string, args ...string) {
	s.t.Helper()
	s.eventually(long, "kubectl "+strings.Join(args, " ")+" tells of "+what, func(ctx context.Context) error {
		out, err := s.c.Kubectl(ctx, args...)
		if err != nil {
			return err
		}
		for _, w := range want {
			if !regexp.MustCompile(w).MatchString(out) {
				return fmt.Errorf("it does not say %s:\n%s", w, out)
			}
		}
		return nil
	})
}

const bulkyImage = "registry.example/story/bulky:1"

// pushBulky makes an image that takes room, of a program that says so.
func (s story) pushBulky() {
	s.t.Helper()
	b, err := s.c.Builder()
	must(s.t, err)
	defer os.RemoveAll(b.Work)
	program, err := os.ReadFile(s.c.Program("busybox"))
	must(s.t, err)
	bulk, err := io.ReadAll(noise(8, 48<<20))
	must(s.t, err)
	layer, err := testimages.Layer(testimages.Program("busybox", program), testimages.File("bulk", string(bulk)))
	must(s.t, err)
	_, err = b.Push(s.t.Context(), testimages.Image{Repo: "story/bulky", Tags: []string{"1"}, Layers: [][]byte{layer}, Config: ocispec.ImageConfig{Cmd: []string{"/busybox", "echo", "I am bulky"}}})
	must(s.t, err)
}

// small is the node that has a disk of its own.
func (s story) small() *cluster.Node {
	s.t.Helper()
	node := s.c.Nodes[len(s.c.Nodes)-1]
	if node.Disk() == 0 {
		s.t.Skip("the disk of the nodes of this cluster is this machine's")
	}
	return node
}

// free is what the node's disk has, in bytes.
func (s story) free(ctx context.Context, node *cluster.Node) (int64, error) {
	out, err := node.Command(ctx, "stat", "-f", "-c", "%a %S", "/var/lib").Output()
	if err != nil {
		return 0, err
	}
	var blocks, size int64
	_, err = fmt.Sscan(string(out), &blocks, &size)
	return blocks * size, err
}

// fillDisk has another file take all but so many bytes of the node's disk.
func (s story) fillDisk(node *cluster.Node, leave int64) {
	s.t.Helper()
	free, err := s.free(s.t.Context(), node)
	must(s.t, err)
	out, err := node.Command(s.t.Context(), "fallocate", "-l", strconv.FormatInt(free-leave, 10), ballast).CombinedOutput()
	if err != nil {
		s.t.Fatalf("fallocate: %v: %s", err, out)
	}
}

const ballast = "/var/lib/ballast"

func (s story) emptyDisk(node *cluster.Node) {
	s.t.Helper()
	if out, err := node.Command(s.t.Context(), "rm", "-f", ballast, ballast+".rest").CombinedOutput(); err != nil {
		s.t.Fatalf("rm: %v: %s", err, out)
	}
}

// onNode is the manifest of a pod that goes to that node and no other.
func onNode(node *cluster.Node, name, spec string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec: {terminationGracePeriodSeconds: 1, nodeSelector: {kubernetes.io/hostname: %s}, %s}\n",
		name, name, node.Name, strings.ReplaceAll(spec, "IMAGE", testimages.Busybox))
}

//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestK8s81756_KubeletCollectsImages: a kubelet that is short of space for images removes those that nothing uses, and finds the space
// free when the removals have returned, so that it evicts no pod. The disk of the images is one of its own. Images that are
// used, and pinned ones, stay (k8s#81756, #106037), and what was imported runs without a registry (k3s#9188).
func TestK8s81756_KubeletCollectsImages(t *testing.T) {
	ctx := t.Context()
	n := idleNode(t, lab.Options{})
	if n.Foreign() {
		t.Skip("where other runtimes keep their images is theirs")
	}
	store := filepath.Join(n.Root(), "images")
	mountDisk(t, store, 512<<20)
	must(t, n.StartRegistry(ctx))
	must(t, n.StartBerth(ctx))

	reg := imagestest.NewRegistry(t)
	shared := noiseLayer("shared", 20)
	for i := range 5 {
		name := fmt.Sprintf("unused%d", i)
		reg.Push(name, "1", imagestest.NewImage(shared, noiseLayer(name, 40)))
		_, err := n.CRI.Pull(ctx, reg.Host()+"/"+name+":1")
		must(t, err)
	}
	reg.Push("pause", "1", imagestest.NewImage(shared, noiseLayer("pause", 1)))
	_, err := n.CRI.Pull(ctx, reg.Host()+"/pause:1")
	must(t, err)
	_, err = n.CRI.Pull(ctx, testimages.Httpd)
	must(t, err)
	// One that no registry has.
	const offline = "registry.invalid/offline:1"
	tool, archive := toolNode{n}, filepath.Join(n.Dir, "offline.tar")
	tool.run(t, "images", "pull", testimages.Busybox)
	tool.run(t, "images", "export", "--file", archive, testimages.Busybox)
	tool.run(t, "images", "remove", testimages.Busybox)
	tool.run(t, "images", "import", "--name", offline, archive)

	list := func() (unused, others map[string]uint64) {
		t.Helper()
		r, err := n.CRI.ListImages(ctx, &runtimeapi.ListImagesRequest{})
		must(t, err)
		unused, others = map[string]uint64{}, map[string]uint64{}
		for _, img := range r.GetImages() {
			into := others
			if strings.Contains(img.GetRepoTags()[0], "/unused") {
				into = unused
			}
			into[img.GetRepoTags()[0]] = img.GetSize()
		}
		return unused, others
	}
	before, _ := list()
	var promised uint64
	for _, size := range before {
		promised += size
	}
	free := func() uint64 {
		t.Helper()
		var fs unix.Statfs_t
		must(t, unix.Statfs(store, &fs))
		return fs.Bavail * uint64(fs.Bsize)
	}
	had := free()

	must(t, n.StartKubelet(ctx, func(config map[string]any) {
		config["evictionHard"] = map[string]string{"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "70%", "imagefs.inodesFree": "0%"}
		config["imageMinimumGCAge"] = "0s"
		config["localStorageCapacityIsolation"] = true // otherwise its cAdvisor knows no file systems
	}))
	kn := kubeletNode{n, n.Kubelet}
	pod := kn.apply(t, "user", `
  containers:
  - {name: web, image: "`+testimages.Httpd+`"}
`, lab.Running)
	deadline := time.Now().Add(3 * time.Minute)
	for {
		// An image is not listed any more when its removal begins; what counts is what the kubelet sees when it has returned.
		log, err := os.ReadFile(filepath.Join(n.Dir, "kubelet.log"))
		must(t, err)
		unused, _ := list()
		if len(unused) == 0 && strings.Contains(string(log), "able to reduce resource pressure without evicting pods") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the kubelet did not find the space free; left are %v, its log has\n%s", unused, n.Kubelet.Complaints(""))
		}
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(time.Second):
		}
	}
	// To a percent: the pod's own root file system, which is new, lies there, too.
	if back := free() - had; back < promised-promised/100 || promised < 5*40<<20 {
		t.Errorf("removals of %d images promised %d bytes and gave back %d", len(before), promised, back)
	}
	_, others := list()
	if len(others) != 3 {
		t.Errorf("left are %v, want the pinned, the imported and the used image", others)
	}
	kn.apply(t, "offline", `
  containers:
  - {name: c, image: `+offline+`, imagePullPolicy: IfNotPresent, command: [sleep, "1000"]}
`, lab.Running)
	again, err := kn.k.WaitPod(ctx, "user", soon, lab.Running)
	must(t, err)
	if was, is := pod.Container("web").ContainerID, again.Container("web").ContainerID; was != is {
		t.Errorf("the pod's container is %s, was %s", is, was)
	}
}

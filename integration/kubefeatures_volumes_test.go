//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

var volumeFeatures = []kubeFeature{
	{"image volumes", imageVolumes},
	{"recursive read-only mounts", recursiveReadOnly},
}

// markedImage has a file test-image-1 with the content "1" beside busybox's.
const markedImage = "gcr.io/k8s-staging-cri-tools/test-image-1:latest"

func imageVolumes(t *testing.T, n kubeNode) {
	pod := n.apply(t, "image-volume", `
  volumes: [{name: data, image: {reference: "`+markedImage+`", pullPolicy: IfNotPresent}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    volumeMounts:
    - {name: data, mountPath: /data}
    - {name: data, mountPath: /etc-of-it, subPath: etc}
`, lab.Running)
	if got := n.sh(t, pod, "c", "cat /data/test-image-1; echo; head -n 1 /etc-of-it/passwd; touch /data/x 2>&1 || true"); got !=
		"1\nroot:x:0:0:root:/root:/bin/sh\ntouch: /data/x: Read-only file system" {
		t.Errorf("in the container: %q", got)
	}
	n.apply(t, "image-volume-sub", `
  volumes: [{name: data, image: {reference: "`+markedImage+`"}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: `+sleeper+`
    volumeMounts: [{name: data, mountPath: /data, subPath: nowhere}]
`, func(p *lab.Pod) error {
		if w := p.Container("c").State.Waiting; w == nil || !strings.Contains(w.Message, "nowhere") {
			return errors.New("want it to wait, and the message to name the sub path that is not there")
		}
		return nil
	})
}

// recursiveReadOnly mounts a directory that has another file system below it, twice: only the recursive mount keeps the
// container from writing there.
func recursiveReadOnly(t *testing.T, n kubeNode) {
	dir := filepath.Join(n.Dir, "rro")
	below := filepath.Join(dir, "below")
	must(t, os.MkdirAll(below, 0o755))
	must(t, unix.Mount("tmpfs", below, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() {
		if err := unix.Unmount(below, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	pod := n.apply(t, "read-only", fmt.Sprintf(`
  volumes: [{name: v, hostPath: {path: %q}}]
  containers:
  - name: c
    image: %q
    command: %s
    volumeMounts:
    - {name: v, mountPath: /all, readOnly: true, recursiveReadOnly: Enabled}
    - {name: v, mountPath: /top, readOnly: true}
`, dir, testimages.Busybox, sleeper), lab.Running)
	got := n.sh(t, pod, "c", "for f in /all/x /all/below/x /top/x /top/below/x; do touch $f 2>/dev/null && echo $f; done; true")
	if got != "/top/below/x" {
		t.Errorf("the container could write %q", got)
	}
	for _, m := range pod.Container("c").VolumeMounts {
		if want := map[string]string{"/all": "Enabled", "/top": "Disabled"}[m.MountPath]; m.RecursiveReadOnly != want && want+m.RecursiveReadOnly != "Disabled" {
			t.Errorf("the status has %q for %s", m.RecursiveReadOnly, m.MountPath)
		}
	}
}

//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestOthersReadExports: what berth exports is the same image to containerd, which runs it, and, where it is installed, to
// skopeo, whose readers of archives are podman's, too.
func TestOthersReadExports(t *testing.T) {
	from := toolNode{newNode(t)}
	if from.Foreign() {
		t.Skip("about what berth exports")
	}
	id := from.run(t, "images", "pull", testimages.Busybox)
	file := filepath.Join(from.Dir, "busybox.tar")
	from.run(t, "images", "export", "--file", file, testimages.Busybox)

	t.Run("containerd", func(t *testing.T) {
		ctx := t.Context()
		built, err := lab.BuildTools(ctx, os.Stderr, "ctr")
		must(t, err)
		n := startNode(t, lab.Options{Tools: tools, Log: t.Logf, Containerd: true})
		cmd := exec.CommandContext(ctx, built.Ctr, "--address", n.ContainerdSocket(), "--namespace", "k8s.io", "images", "import", file)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ctr images import: %v: %s", err, out)
		}
		must(t, lab.Eventually(ctx, 20*time.Second, "containerd has the image", func(ctx context.Context) error {
			st, err := n.CRI.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: testimages.Busybox}})
			if err == nil && st.GetImage().GetId() != id {
				err = fmt.Errorf("it has %q by that name, want %s", st.GetImage().GetId(), id)
			}
			return err
		}))
		pod, ctr := n.Pod("imported"), lab.Sh("c", "echo it runs")
		podID, err := n.CRI.RunPod(ctx, pod)
		must(t, err)
		defer func() { must(t, n.CRI.RemovePod(context.Background(), podID)) }()
		ctrID, err := n.CRI.Start(ctx, podID, pod, ctr)
		must(t, err)
		_, err = n.CRI.WaitExit(ctx, ctrID, soon)
		must(t, err)
		if log, err := lab.Log(pod, ctr); err != nil || len(log) != 1 || log[0].Text != "it runs" {
			t.Errorf("its log is %v, %v", log, err)
		}
	})

	for _, format := range []string{"oci-archive", "docker-archive"} {
		t.Run("skopeo, "+format, func(t *testing.T) {
			skopeo, err := exec.LookPath("skopeo")
			if err != nil {
				t.Skip("there is no skopeo here: apt-get install skopeo")
			}
			config, err := exec.CommandContext(t.Context(), skopeo, "inspect", "--config", "--raw", format+":"+file).Output()
			must(t, err)
			if got := digest.FromBytes(config).String(); got != id {
				t.Errorf("its configuration is %s, want %s", got, id)
			}
			// It reads the layers and compares them with their digests.
			cmd := exec.CommandContext(t.Context(), skopeo, "--insecure-policy", "copy", format+":"+file, "dir:"+t.TempDir())
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("skopeo copy: %v: %s", err, out)
			}
		})
	}
}

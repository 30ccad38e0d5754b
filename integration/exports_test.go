//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestOthersReadExports: what berth exports is the same image to containerd, which runs it, and, where it is installed, to
// skopeo and podman.
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

	t.Run("podman", func(t *testing.T) {
		podman, err := exec.LookPath("podman")
		if err != nil {
			t.Skip("there is no podman here: apt-get install podman")
		}
		dir := t.TempDir()
		run := func(args ...string) string {
			own := []string{"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs"}
			out, err := exec.CommandContext(t.Context(), podman, append(own, args...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("podman %v: %v: %s", args, err, out)
			}
			return strings.TrimSpace(string(out))
		}
		// A name of Docker Hub: podman would take its short form for one of localhost.
		const hub = "docker.io/library/busybox:exported"
		archive := filepath.Join(dir, "both.tar")
		from.run(t, "images", "import", "--name", hub, file)
		from.run(t, "images", "export", "--file", archive, hub)
		run("load", "--quiet", "--input", archive)
		for _, name := range []string{testimages.Busybox, hub} {
			if got := run("image", "inspect", "--format", "sha256:{{.Id}} {{.RepoTags}}", name); !strings.HasPrefix(got, id+" ") || !strings.Contains(got, name) {
				t.Errorf("by the name %s it has %q, want %s", name, got, id)
			}
		}
		for _, format := range []string{"docker-archive", "oci-archive"} {
			back := filepath.Join(dir, format+".tar")
			run("save", "--quiet", "--format", format, "--output", back, testimages.Busybox)
			from.run(t, "images", "remove", "--force", testimages.Busybox)
			if got, want := from.run(t, "images", "import", back), "imported "+testimages.Busybox+" ("+id+")"; got != want {
				t.Errorf("back as %s: %q, want %q", format, got, want)
			}
		}
	})
}

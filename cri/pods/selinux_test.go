package pods

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
)

func TestSELinuxLevelsKeepPodsApart(t *testing.T) {
	var l levels
	seen := map[string]string{}
	for i := range 500 {
		id := fmt.Sprint(i)
		level := l.reserve(id)
		if other, taken := seen[level]; taken {
			t.Fatalf("%s has the level of %s: %s", id, other, level)
		}
		seen[level] = id
	}
	l.free("7")
	if len(l.held) != 499 {
		t.Errorf("%d levels are held", len(l.held))
	}
}

func TestSELinuxLevelsOfFailedCallsAreReleased(t *testing.T) {
	m := &Manager{host: spec.Host{SELinux: spec.SELinux{Enabled: true, Process: "u:r:container_t:s0", File: "u:object_r:container_file_t:s0"}}}
	pod := func(o *cri.SELinuxOption) *cri.PodSandboxConfig {
		return &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{SelinuxOptions: o}}}
	}
	if _, err := m.labelPod("bad", pod(&cri.SELinuxOption{Level: "s0,c1"})); !errdefs.IsInvalidArgument(err) || len(m.levels.held) != 0 {
		t.Errorf("%v, held: %v", err, m.levels.held)
	}
	labels, err := m.labelPod("given", pod(&cri.SELinuxOption{Level: "s0:c1,c2"}))
	if err != nil || m.levels.held["given"] != "s0:c1,c2" || labels.Process != "u:r:container_t:s0:c1,c2" {
		t.Errorf("%v, %v, held: %v", labels, err, m.levels.held)
	}
	ctr := &cri.ContainerConfig{Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{SelinuxOptions: &cri.SELinuxOption{Level: "nonsense"}}}}
	if err := m.labelContainer("c", ctr, labels); !errdefs.IsInvalidArgument(err) || len(m.levels.held) != 1 {
		t.Errorf("%v, held: %v", err, m.levels.held)
	}
}

// labelOf reads a file's context; xattrs of that name can be had without SELinux, too.
func labelOf(t *testing.T, path string) string {
	t.Helper()
	label, err := fileContext(unix.Lgetxattr, path)
	if errors.Is(err, unix.ENODATA) {
		return ""
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return label
}

const testLabel = "system_u:object_r:container_file_t:s0:c1,c2"

// volumeTree is a directory with a file, directories, a link that leads out of it, a fifo, and a neighbour that has to stay as
// it is.
func volumeTree(t *testing.T) (volume, neighbour string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("contexts are set by root")
	}
	dir := t.TempDir()
	volume, neighbour = filepath.Join(dir, "volume"), filepath.Join(dir, "neighbour")
	err := errors.Join(
		os.MkdirAll(filepath.Join(volume, "a", "b"), 0o755), os.MkdirAll(neighbour, 0o755),
		os.WriteFile(filepath.Join(volume, "a", "b", "file"), nil, 0), os.WriteFile(filepath.Join(neighbour, "file"), nil, 0o644),
		os.Symlink(neighbour, filepath.Join(volume, "link")), unix.Mkfifo(filepath.Join(volume, "fifo"), 0o600),
	)
	if err != nil {
		t.Fatal(err)
	}
	return volume, neighbour
}

func TestRelabel(t *testing.T) {
	volume, neighbour := volumeTree(t)
	if err := relabelTree(t.Context(), volume, testLabel, false); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", "a", "a/b", "a/b/file", "link", "fifo"} {
		if got := labelOf(t, filepath.Join(volume, name)); got != testLabel {
			t.Errorf("%q has %q", name, got)
		}
	}
	for _, path := range []string{neighbour, filepath.Join(neighbour, "file")} {
		if got := labelOf(t, path); got == testLabel {
			t.Errorf("%s is relabelled through a link", path)
		}
	}
	if err := relabelTree(t.Context(), filepath.Join(neighbour, "file"), testLabel, false); err != nil || labelOf(t, filepath.Join(neighbour, "file")) != testLabel {
		t.Errorf("a volume that is a file: %v", err)
	}
	if err := relabelTree(t.Context(), filepath.Join(volume, "link", "file"), "x", false); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a root behind a link: %v", err)
	}
	if err := relabelTree(t.Context(), filepath.Join(volume, "none"), "x", false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a root that is not there: %v", err)
	}
}

// A container that has the volume, too, swaps a directory for a link to what it wants to have.
func TestRelabelWhileLinksAreSwapped(t *testing.T) {
	volume, neighbour := volumeTree(t)
	dir, link := filepath.Join(volume, "a", "b"), filepath.Join(volume, "link")
	for i := range 200 { // so that a walk is in the directory for a while
		if err := errors.Join(os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600), os.WriteFile(filepath.Join(neighbour, fmt.Sprint(i)), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	swapped := make(chan error)
	go func() {
		var err error
		for err == nil {
			select {
			case <-done:
				swapped <- nil
				return
			default:
				err = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
		swapped <- err
	}()
	for i := range 100 {
		if err := relabelTree(t.Context(), volume, fmt.Sprintf("system_u:object_r:container_file_t:s0:c1,c%d", i+2), false); err != nil {
			t.Error(err)
		}
	}
	close(done)
	if err := <-swapped; err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(neighbour)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if got := labelOf(t, filepath.Join(neighbour, e.Name())); strings.Contains(got, ":s0:c1,") {
			t.Fatalf("%s of the neighbour is relabelled", e.Name())
		}
	}
	if got := labelOf(t, neighbour); strings.Contains(got, ":s0:c1,") {
		t.Error("the neighbour is relabelled")
	}
}

// Only where the operator says so does the root speak for the files below.
func TestRelabelOnce(t *testing.T) {
	volume, _ := volumeTree(t)
	late := filepath.Join(volume, "late")
	for _, once := range []bool{true, false} {
		if err := errors.Join(relabelTree(t.Context(), volume, testLabel, once), os.WriteFile(late, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		before := labelOf(t, late)
		if err := relabelTree(t.Context(), volume, testLabel, once); err != nil {
			t.Fatal(err)
		}
		if got := labelOf(t, late); once && got != before || !once && got != testLabel {
			t.Errorf("once %v: %q", once, got)
		}
	}
}

// A walk that is broken off has not labelled the root, so that the next one does not believe it.
func TestRelabelIsBrokenOff(t *testing.T) {
	volume, _ := volumeTree(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := relabelTree(ctx, volume, testLabel, false); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if got := labelOf(t, volume); got == testLabel {
		t.Error("the root is labelled")
	}
	cwd, err := os.Open(volume)
	if err != nil {
		t.Fatal(err)
	}
	defer cwd.Close()
	at := int(cwd.Fd())
	for range relabelDepth + 2 {
		if err := unix.Mkdirat(at, "d", 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(at, "d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if at != int(cwd.Fd()) {
			_ = unix.Close(at)
		}
		at = next
	}
	_ = unix.Close(at)
	if err := relabelTree(t.Context(), volume, testLabel, false); err == nil || labelOf(t, volume) == testLabel {
		t.Errorf("a tree without an end: %v", err)
	}
}

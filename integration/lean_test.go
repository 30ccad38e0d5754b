//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/integration/lab"
)

// TestContainersAreMadeAmongFewMounts: where containers are created, the mounts of pods are not, so that one costs the same
// beside none and beside hundreds. All the same it has what is mounted on the node later, whichever daemon there is by then,
// and its hooks see the node.
func TestContainersAreMadeAmongFewMounts(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	ledger(t, n)
	var firstID string
	var first *runtimeapi.PodSandboxConfig
	for i := range 3 {
		pod, podID, _ := runTrap(t, n, fmt.Sprintf("lean-%d", i), lab.Sleeper("c"))
		if i == 0 {
			first, firstID = pod, podID
		}
		pid, err := shimPID(ctx, n, podID)
		must(t, err)
		must(t, cgroups.Verify(cgroups.Path(n.Cgroup()+"/"+podID), pid)) // it goes there itself
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
		must(t, err)
		if strings.Contains(string(mounts), n.Run()+"/") {
			t.Errorf("the shim of pod %d is among mounts of pods:\n%s", i, mounts)
		}
	}

	// A volume that the node mounts now: a directory and a file below its mount point.
	volume := func(name string) []*runtimeapi.Mount {
		dir := filepath.Join(n.Dir, name)
		mountpoint(t, dir, unix.MS_PRIVATE)
		must(t, os.Mkdir(dir+"/sub", 0o755))
		must(t, os.WriteFile(dir+"/sub/x", []byte(name), 0o644))
		return []*runtimeapi.Mount{bindMount(dir+"/sub", "/volume"), bindMount(dir+"/sub/x", "/file")}
	}
	sees := func(name string, change func(*runtimeapi.ContainerConfig)) {
		t.Helper()
		ctr := lab.Sh(name, "cat /volume/x /file; touch /volume/written; sleep 86400")
		ctr.Mounts = volume(name)
		change(ctr)
		id, err := n.CRI.Start(ctx, firstID, first, ctr)
		must(t, err)
		if out, err := n.CRI.Exec(ctx, id, "cat", "/volume/x", "/file"); err != nil || out != name+name {
			t.Errorf("%s sees %q, %v", name, out, err)
		}
		must(t, lab.Eventually(ctx, soon, "the volume is the node's", func(context.Context) error {
			_, err := os.Stat(filepath.Join(n.Dir, name, "sub", "written"))
			return err
		}))
	}
	sees("late", func(*runtimeapi.ContainerConfig) {})
	must(t, n.KillBerth())
	must(t, n.StartBerth(ctx))
	sees("later", func(*runtimeapi.ContainerConfig) {})

	seen := filepath.Join(n.Dir, "seen")
	script := fmt.Sprintf("cat %s/hooked/sub/x > %s", n.Dir, seen)
	cdiDevice(t, n.CDIStatic(), "hooked", fmt.Sprintf(`{"hooks":[{"hookName":"createRuntime","path":%q,"args":["sh","-c",%q]}]}`, n.Tools.Busybox, script))
	sees("hooked", withCDI("hooked"))
	if text, err := os.ReadFile(seen); err != nil || string(text) != "hooked" {
		t.Errorf("the hook has seen %q of the node, %v", text, err)
	}
}

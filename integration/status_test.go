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

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

// TestStatusTellsOfTheDisk fills the node's disk, and makes it read-only. A full one leaves the runtime ready: it is by
// ending pods that room comes back.
func TestStatusTellsOfTheDisk(t *testing.T) {
	n := idleNode(t, lab.Options{})
	if n.Foreign() {
		t.Skip("the disk of another runtime is not ours to fill")
	}
	ctx := t.Context()
	must(t, unix.Mount("berth-lab-disk", n.Root(), "tmpfs", 0, "size=32m"))
	t.Cleanup(func() {
		if err := unix.Unmount(n.Root(), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	must(t, n.StartBerth(ctx))
	must(t, wantConditions(ctx, n, nil))

	big := filepath.Join(n.Root(), "big")
	f, err := os.Create(big)
	must(t, err)
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(block)
	}
	must(t, f.Close())
	must(t, wantConditions(ctx, n, map[string]string{"StorageReady": "StorageFull"}))
	must(t, os.Remove(big))
	must(t, wantConditions(ctx, n, nil))

	// What the kernel does to a file system after an error, as seen by whoever opens a path.
	must(t, unix.Mount("berth-lab-dead", n.Root(), "tmpfs", unix.MS_RDONLY, "size=1m"))
	err = wantConditions(ctx, n, map[string]string{"StorageReady": "StorageReadOnly", "RuntimeReady": "StorageReadOnly"})
	must(t, unix.Unmount(n.Root(), 0))
	must(t, err)
	must(t, wantConditions(ctx, n, nil))
}

// TestStatusTellsOfTheExecServer: one that has ended, and that cannot be started again, is a runtime that is not ready.
func TestStatusTellsOfTheExecServer(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	newStreamingPod(t, n)
	must(t, wantConditions(ctx, n, nil))
	// With no descriptor to be had, no process is started.
	var was unix.Rlimit
	must(t, unix.Prlimit(n.Berth.PID(), unix.RLIMIT_NOFILE, nil, &was))
	must(t, unix.Prlimit(n.Berth.PID(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}, nil))
	must(t, unix.Kill(stormProcesses(t, n)["exec server"], unix.SIGKILL))
	err := wantConditions(ctx, n, map[string]string{"RuntimeReady": "ExecServerNotReady"})
	must(t, unix.Prlimit(n.Berth.PID(), unix.RLIMIT_NOFILE, &was, nil))
	must(t, err)
	must(t, wantConditions(ctx, n, nil))
}

// TestStatusTellsOfCgroups: a hierarchy that is read-only, in the daemon's mount namespace alone.
func TestStatusTellsOfCgroups(t *testing.T) {
	root, err := lab.RepoRoot()
	must(t, err)
	bin := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nexec unshare --mount --propagation private %s/bin/berth \"$@\"\n", root)
	must(t, os.WriteFile(filepath.Join(bin, "berth"), []byte(script), 0o755))
	n := startNode(t, lab.Options{Tools: tools, Log: t.Logf, Bin: bin})
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	must(t, wantConditions(ctx, n, nil))
	hierarchy := cgroupRoot
	if !onCgroup2() {
		hierarchy = filepath.Join(cgroupRoot, "pids")
	}
	remount := func(how string) {
		cmd := exec.CommandContext(ctx, "nsenter", "--mount", "--target", fmt.Sprint(n.Berth.PID()), "mount", "-o", "remount,bind,"+how, hierarchy)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("remount: %v: %s", err, out)
		}
	}
	remount("ro")
	must(t, wantConditions(ctx, n, map[string]string{"RuntimeReady": "CgroupsNotReady"}))
	remount("rw")
	must(t, wantConditions(ctx, n, nil))
}

// conditionsOf tells the conditions that are false, and why.
func conditionsOf(ctx context.Context, n *lab.Node) (map[string]string, error) {
	resp, err := n.CRI.RuntimeServiceClient.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return nil, err
	}
	bad := map[string]string{}
	for _, c := range resp.Status.Conditions {
		if !c.Status {
			bad[c.Type] = c.Reason + ": " + c.Message
		}
	}
	return bad, nil
}

// wantConditions waits until exactly these conditions are false, for these reasons.
func wantConditions(ctx context.Context, n *lab.Node, want map[string]string) error {
	return lab.Eventually(ctx, time.Minute, "conditions", func(ctx context.Context) error {
		got, err := conditionsOf(ctx, n)
		if err != nil {
			return err
		}
		for c, reason := range want {
			if !strings.HasPrefix(got[c], reason+": ") {
				return fmt.Errorf("%v, want %v", got, want)
			}
		}
		if len(got) != len(want) {
			return fmt.Errorf("%v, want %v", got, want)
		}
		return nil
	})
}

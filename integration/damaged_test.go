//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestDamagedRecords starts the daemon with records of a pod and of a container that a bad disk has cut short: what they
// named is lost to every client, and so must not run on, beside the one that the kubelet makes in its place, nor keep its
// address, whose result was lost, too.
func TestDamagedRecords(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("another runtime has other records")
	}
	ctx := t.Context()
	var pods, ctrs [2]string
	for i, name := range []string{"pod-is-damaged", "container-is-damaged"} {
		cfg := n.Pod(name)
		id, err := n.CRI.RunPod(ctx, cfg)
		must(t, err)
		pods[i] = id
		ctrs[i], err = n.CRI.Start(ctx, id, cfg, lab.Sleeper("lost"))
		must(t, err)
	}
	must(t, n.KillBerth())
	for _, record := range []string{filepath.Join("pods", pods[0]), filepath.Join("containers", ctrs[1])} {
		must(t, os.Truncate(filepath.Join(n.Root(), record+".json"), 100))
	}
	results, err := filepath.Glob(filepath.Join(n.Root(), "cni", "results", "*"+pods[0]+"*"))
	if err != nil || len(results) != 1 {
		t.Fatalf("results of the pod: %v, %v", results, err)
	}
	must(t, os.Remove(results[0]))
	must(t, n.StartBerth(ctx))
	must(t, lab.Eventually(ctx, 10*time.Second, "only the other pod's shim is left", func(ctx context.Context) error {
		left, err := n.Processes()
		if err != nil {
			return err
		}
		for pid, name := range left {
			if !strings.Contains(name, pods[1]) {
				return fmt.Errorf("process %d is left: %s", pid, name)
			}
		}
		return nil
	}))
	must(t, lab.Eventually(ctx, soon, "only the other pod's address is left", func(context.Context) error {
		if left := addresses(t, n); len(left) != 1 {
			return fmt.Errorf("addresses %v", left)
		}
		return nil
	}))
	list, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	must(t, err)
	if len(list.Items) != 1 || list.Items[0].Id != pods[1] || list.Items[0].State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("pods are %v", list.Items)
	}
	again, err := n.CRI.Start(ctx, pods[1], n.Pod("container-is-damaged"), lab.Sleeper("lost"))
	must(t, err)
	_, err = n.CRI.Exec(ctx, again, "true")
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, pods[1]))
}

// TestAFullDiskEndsNoPod has a daemon start on a disk that somebody has filled: pods run on, and end once there is space.
func TestAFullDiskEndsNoPod(t *testing.T) {
	ctx := t.Context()
	n := idleNode(t, lab.Options{})
	if n.Foreign() {
		t.Skip("another runtime has other records")
	}
	mountDisk(t, n.Root(), 64<<20)
	must(t, n.StartRegistry(ctx))
	must(t, n.StartBerth(ctx))
	_, err := n.CRI.Pull(ctx, testimages.Busybox)
	must(t, err)
	var pods, ctrs []string
	for name, pid := range map[string]runtimeapi.NamespaceMode{"shares": runtimeapi.NamespaceMode_POD, "apart": runtimeapi.NamespaceMode_CONTAINER} {
		cfg := n.Pod(name)
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = pid
		id, err := n.CRI.RunPod(ctx, cfg)
		must(t, err)
		ctr, err := n.CRI.Start(ctx, id, cfg, lab.Sleeper("c"))
		must(t, err)
		pods, ctrs = append(pods, id), append(ctrs, ctr)
	}
	fill := filepath.Join(n.Root(), "fill")
	f, err := os.Create(fill)
	must(t, err)
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	must(t, f.Close())
	must(t, n.KillBerth())
	must(t, n.StartBerth(ctx))
	for _, ctr := range ctrs {
		if _, err := n.CRI.Exec(ctx, ctr, "true"); err != nil {
			t.Errorf("after a start on a full disk: %v", err)
		}
	}
	must(t, os.Remove(fill))
	for _, pod := range pods {
		must(t, n.CRI.RemovePod(ctx, pod))
	}
}

//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// kubeNode is a node whose kubelet is registered with an API server. All tests of one kubelet configuration share it.
type kubeNode struct {
	*lab.Node
	cp *lab.ControlPlane
}

// kubeFeature is one feature of the kubelet's, seen through the API server and in the container.
type kubeFeature struct {
	name string
	run  func(*testing.T, kubeNode)
}

// TestKubeFeatures runs pods that an API server hands to a stock kubelet on berth, with features that need something of the
// runtime. What needs gates or a policy that change every pod has a kubelet of its own.
func TestKubeFeatures(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools, "--feature-gates", "ContainerStopSignals=true")
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last errors of the API server:\n%s", cp.Complaints())
		}
		if err := cp.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Run("default", func(t *testing.T) {
		n := newKubeNode(t, cp, nil)
		n.features(t, resizeFeatures, identityFeatures, volumeFeatures, kubectlFeatures, lifecycleFeatures)
	})
	t.Run("gates", func(t *testing.T) {
		// It says what lists and events it gets.
		runtime := newNodeServing(t, "--log-level", "debug") // and the runtime which calls it gets
		n := joinKubeNode(t, runtime, cp, []string{"--vmodule", "remote_runtime=10,evented=4"}, lab.FeatureGates(gates...), wholeStats)
		n.features(t, gatedFeatures)
		n.features(t, restartFeatures)
	})
	t.Run("static CPU manager", func(t *testing.T) {
		needCPUs(t)
		n := newKubeNode(t, cp, nil, staticCPUs)
		n.features(t, cpuManagerFeatures)
	})
}

// newKubeNode starts a node with a kubelet of that configuration.
func newKubeNode(t *testing.T, cp *lab.ControlPlane, args []string, change ...func(map[string]any)) kubeNode {
	t.Helper()
	return joinKubeNode(t, newNode(t), cp, args, change...)
}

// joinKubeNode gives a node a kubelet. At the end of the test all its pods must have been deleted, and nothing be left of
// them.
func joinKubeNode(t *testing.T, node *lab.Node, cp *lab.ControlPlane, args []string, change ...func(map[string]any)) kubeNode {
	t.Helper()
	n := kubeNode{node, cp}
	for _, image := range []string{testimages.Busybox, testimages.Httpd} {
		_, err := n.CRI.Pull(t.Context(), image)
		must(t, err)
	}
	must(t, n.JoinKubelet(t.Context(), cp, args, change...))
	before, err := n.Snapshot()
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last errors of the kubelet:\n%s", n.Kubelet.Complaints(""))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*soon)
		defer cancel()
		if err := n.RetireKubelet(ctx, soon); err != nil {
			t.Error(err)
			return
		}
		if n.Foreign() {
			return
		}
		if err := n.SettleWithin(ctx, before, soon); err != nil {
			t.Error(err)
		}
	})
	return n
}

// features runs tests side by side.
func (n kubeNode) features(t *testing.T, lists ...[]kubeFeature) {
	t.Run("pods", func(t *testing.T) {
		for _, list := range lists {
			for _, feature := range list {
				t.Run(feature.name, func(t *testing.T) {
					t.Parallel()
					feature.run(t, n)
				})
			}
		}
	})
}

// create makes a pod with that spec (YAML, indented by two). The pod is deleted with the test.
func (n kubeNode) create(t *testing.T, name, spec string) {
	t.Helper()
	manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, labels: {app: %s}}\nspec:\n  nodeName: %s\n  terminationGracePeriodSeconds: 5\n%s",
		name, name, n.Network(), strings.TrimPrefix(spec, "\n"))
	must(t, n.cp.CreatePod(t.Context(), manifest))
	t.Cleanup(func() {
		if err := n.cp.DeletePod(context.Background(), name, soon); err != nil {
			t.Error(err)
		}
	})
}

// apply is create, and waits until the pod is as wanted.
func (n kubeNode) apply(t *testing.T, name, spec string, want func(*lab.Pod) error) *lab.Pod {
	t.Helper()
	n.create(t, name, spec)
	return n.wait(t, name, want)
}

// wait waits until the API server has the pod as wanted.
func (n kubeNode) wait(t *testing.T, name string, want func(*lab.Pod) error) *lab.Pod {
	t.Helper()
	pod, err := n.cp.WaitPod(t.Context(), name, soon, want)
	must(t, err)
	return pod
}

// sh runs a shell command in a container and returns its output without the last line's end.
func (n kubeNode) sh(t *testing.T, pod *lab.Pod, container, script string) string {
	t.Helper()
	out, err := n.try(t.Context(), pod, container, script)
	must(t, err)
	return out
}

func (n kubeNode) try(ctx context.Context, pod *lab.Pod, container, script string) (string, error) {
	_, id, _ := strings.Cut(pod.Container(container).ContainerID, "://")
	out, err := n.CRI.Exec(ctx, id, "sh", "-c", script)
	return strings.TrimSuffix(out, "\n"), err
}

// becomes wants a shell command in a container to print something before long.
func (n kubeNode) becomes(t *testing.T, pod *lab.Pod, container, script, want string) {
	t.Helper()
	err := lab.Eventually(t.Context(), soon, script, func(ctx context.Context) error {
		got, err := n.try(ctx, pod, container, script)
		if err == nil && got != want {
			err = fmt.Errorf("it is %q, want %q", got, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// wantLog wants the log of a container to be that text before long.
func (n kubeNode) wantLog(t *testing.T, pod, container, want string) {
	t.Helper()
	err := lab.Eventually(t.Context(), soon, "log of "+container, func(ctx context.Context) error {
		got, err := n.cp.Get(ctx, fmt.Sprintf("/api/v1/namespaces/default/pods/%s/log?container=%s", pod, container))
		if err == nil && string(got) != want {
			err = fmt.Errorf("%q, want %q", got, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// wantFile wants a file of the machine to have that content before long.
func wantFile(t *testing.T, path, want string) {
	t.Helper()
	err := lab.Eventually(t.Context(), soon, path, func(context.Context) error {
		got, err := os.ReadFile(path)
		if err == nil && string(got) != want {
			err = fmt.Errorf("%q, want %q", got, want)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// cgroupV2 tells whether the machine has the unified hierarchy.
func cgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// sleeper is a container's command that ends at once on SIGTERM.
const sleeper = `[sh, -c, "trap 'exit 0' TERM; sleep 86400 & wait"]`

// brief is how long a condition that must not come is waited for.
const brief = 3 * time.Second

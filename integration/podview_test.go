//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/podview"
)

// TestPodView compares what programs see of their containers with the files in podview/testdata, which are of one kernel.
// On another kernel, or with other cgroup controllers, it is skipped, which the end of `make test-integration` tells; limits that
// the tests were started with are made those of the files. With BERTH_PODVIEW=update it writes berth's files anew, and containerd's by asking the
// real one; then differences.txt has to explain what differs (podview.TestDifferencesAreExplained).
func TestPodView(t *testing.T) {
	update := os.Getenv("BERTH_PODVIEW") == "update"
	suffix, machine := ".v1.txt", podViewMachine(t)
	if cgroupV2() {
		suffix = ".v2.txt"
	}
	of := filepath.Join("podview/testdata", "machine"+suffix)
	if update {
		must(t, os.WriteFile(of, []byte(machine), 0o644))
	}
	want, err := os.ReadFile(of)
	if kernelOf(string(want)) != kernelOf(machine) {
		t.Skipf("the views are of another machine:\n%s(%v) and not of this one:\n%sBERTH_PODVIEW=update makes them anew", want, err, machine)
	}
	takeLimits(t, string(want))
	nodes := map[string]lab.Options{"berth": {Tools: tools, Log: t.Logf}}
	if update {
		nodes["containerd"] = lab.Options{Tools: tools, Log: t.Logf, Containerd: true}
	}
	for runtime, options := range nodes {
		t.Run(runtime, func(t *testing.T) {
			n := startNode(t, options)
			for _, kind := range podview.Kinds {
				t.Run(kind, func(t *testing.T) {
					view := podview.Normalise(lookAround(t, n, kind))
					file := filepath.Join("podview/testdata", runtime, kind+suffix)
					if update {
						must(t, os.MkdirAll(filepath.Dir(file), 0o755))
						must(t, os.WriteFile(file, []byte(strings.Join(view, "\n")+"\n"), 0o644))
						return
					}
					want, err := os.ReadFile(file)
					must(t, err)
					for _, d := range podview.Compare(kind, "now", view, "before", strings.Split(strings.TrimSpace(string(want)), "\n")) {
						t.Error(d)
					}
				})
			}
		})
	}
}

// podViewLimits are the limits that programs started here get from the tests' own.
var podViewLimits = []struct {
	name     string
	resource int
}{{"open files", unix.RLIMIT_NOFILE}, {"core", unix.RLIMIT_CORE}, {"locked memory", unix.RLIMIT_MEMLOCK}, {"stack", unix.RLIMIT_STACK}}

// kernelOf is a machine without its limits.
func kernelOf(machine string) string {
	kernel, _, _ := strings.Cut(machine, podViewLimits[0].name)
	return kernel
}

// takeLimits gives this process, and so what it starts, the limits of a machine until the test ends.
func takeLimits(t *testing.T, machine string) {
	t.Helper()
	for _, limit := range podViewLimits {
		var now, want unix.Rlimit
		must(t, unix.Getrlimit(limit.resource, &now))
		_, after, _ := strings.Cut(machine, limit.name+" ")
		_, err := fmt.Sscan(after, &want.Cur, &want.Max)
		must(t, err)
		if now == want {
			continue
		}
		if err := unix.Setrlimit(limit.resource, &want); err != nil {
			t.Skipf("the views are of a machine whose limit of %s is %d and %d, here it is %d and %d: %v", limit.name, want.Cur, want.Max, now.Cur, now.Max, err)
		}
		t.Cleanup(func() {
			if err := unix.Setrlimit(limit.resource, &now); err != nil { // a hard one, without CAP_SYS_RESOURCE
				t.Logf("the limit of %s stays %d and %d: %v", limit.name, want.Cur, want.Max, err)
			}
		})
	}
}

// podViewMachine is what of a machine decides about what its pods see.
func podViewMachine(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	must(t, unix.Uname(&u))
	release := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)
	controllers, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	var names []string
	for line := range strings.Lines(string(controllers)) {
		names = append(names, strings.Split(line, ":")[1])
	}
	machine := fmt.Sprintf("Linux %s.%s\ncgroup controllers %s\n", release[0], release[1], strings.Join(names, " "))
	for _, limit := range podViewLimits {
		var r unix.Rlimit
		must(t, unix.Getrlimit(limit.resource, &r))
		machine += fmt.Sprintf("%s %d %d\n", limit.name, r.Cur, r.Max)
	}
	return machine
}

// lookAround is what a container of a new pod of that kind sees.
func lookAround(t *testing.T, n *lab.Node, kind string) string {
	t.Helper()
	pod := n.Pod("view")
	ctr := lab.Sh("view", "trap 'exit 0' TERM; : > /dev/shm/up; sleep 86400 & wait")
	security := ctr.Linux.SecurityContext
	switch kind {
	case "plain": // as a kubelet sends a pod that names no profile
		security.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	case "restricted":
		security.RunAsUser, security.RunAsGroup = number(1000), number(1000)
		security.NoNewPrivs, security.ReadonlyRootfs = true, true
		security.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
		ctr.Linux.Resources = &runtimeapi.LinuxContainerResources{
			CpuShares: 512, CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 985,
		}
	case "privileged":
		pod.Linux.SecurityContext.Privileged, security.Privileged = true, true
		security.MaskedPaths, security.ReadonlyPaths, security.Seccomp = nil, nil, nil
	}
	podID, err := n.CRI.RunPod(t.Context(), pod)
	must(t, err)
	defer func() {
		if err := n.CRI.RemovePod(t.Context(), podID); err != nil {
			t.Error(err)
		}
	}()
	id, err := n.CRI.Start(t.Context(), podID, pod, ctr)
	must(t, err)
	out, err := n.CRI.Exec(t.Context(), id, "sh", "-c", podview.Script)
	must(t, err)
	return likeTheNode(t, out)
}

// likeTheNode leaves out of a view what the processor decides, and no runtime: whether it has to be kept from speculating. A
// process that was kept from it otherwise than the node's own still differs.
func likeTheNode(t *testing.T, view string) string {
	t.Helper()
	const field = "Speculation_Store_Bypass:"
	status, err := os.ReadFile("/proc/self/status")
	must(t, err)
	_, after, _ := strings.Cut(string(status), field)
	own, _, _ := strings.Cut(after, "\n")
	return strings.ReplaceAll(view, field+" "+strings.TrimSpace(own)+"\n", field+" as the node's\n")
}

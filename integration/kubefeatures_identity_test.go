//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

var identityFeatures = []kubeFeature{
	{"user namespace", userNamespace},
	{"supplemental groups policy", groupsPolicy},
	{"unmasked proc", procMount},
}

// userNamespace has two pods whose root is nobody on the machine, and not the same nobody; what one writes to a volume is
// root's.
func userNamespace(t *testing.T, n kubeNode) {
	var bases []string
	for _, name := range []string{"userns-1", "userns-2"} {
		pod := n.apply(t, name, `
  hostUsers: false
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - name: c
    image: `+testimages.Busybox+`
    command: [sh, -c, "touch /v/mine && trap 'exit 0' TERM; sleep 86400 & wait"]
    volumeMounts: [{name: v, mountPath: /v}]
`, lab.Running)
		fields := strings.Fields(n.sh(t, pod, "c", "cat /proc/self/uid_map"))
		if len(fields) != 3 || fields[0] != "0" || fields[1] == "0" || fields[2] != "65536" {
			t.Fatalf("the user namespace maps %v, want 0 to a range of 65536", fields)
		}
		bases = append(bases, fields[1])
		if got := n.sh(t, pod, "c", "id -u; stat -c '%u %g' /v/mine /bin/busybox"); got != "0\n0 0\n0 0" {
			t.Errorf("in the container: %q", got)
		}
		// Idmapped mounts: neither the volume nor the image has the range's owner on the disk.
		mine := filepath.Join(n.Dir, "kubelet/pods", pod.Metadata.UID, "volumes/kubernetes.io~empty-dir/v/mine")
		if owner := fileOwner(t, mine); owner != 0 {
			t.Errorf("%s belongs to %d", mine, owner)
		}
		_, id, _ := strings.Cut(pod.Container("c").ContainerID, "://")
		if got := processOwner(t, n, id); got != fields[1] {
			t.Errorf("the container's process runs as %s on the machine, want %s", got, fields[1])
		}
	}
	if bases[0] == bases[1] {
		t.Errorf("both pods have the range at %s", bases[0])
	}
}

func groupsPolicy(t *testing.T, n kubeNode) {
	for _, test := range []struct {
		policy, groups string
	}{
		{"Merge", "3000 4000 50000"}, // the image's /etc/group has user 1000 in 50000
		{"Strict", "3000 4000"},
	} {
		name := "groups-" + strings.ToLower(test.policy)
		pod := n.apply(t, name, fmt.Sprintf(`
  securityContext: {runAsUser: 1000, runAsGroup: 3000, supplementalGroups: [4000], supplementalGroupsPolicy: %s}
  containers:
  - {name: c, image: %q, command: %s}
`, test.policy, testimages.Busybox, sleeper), lab.Running)
		groups := strings.Fields(n.sh(t, pod, "c", "id -G"))
		slices.Sort(groups)
		if got := strings.Join(groups, " "); got != test.groups {
			t.Errorf("%s: the container has groups %s, want %s", test.policy, got, test.groups)
		}
		user := pod.Container("c").User
		if user == nil || user.Linux == nil {
			t.Errorf("%s: the status has no user", test.policy)
			continue
		}
		told := slices.Sorted(slices.Values(user.Linux.SupplementalGroups))
		if got := strings.Trim(fmt.Sprint(told), "[]"); user.Linux.UID != 1000 || user.Linux.GID != 3000 || got != test.groups {
			t.Errorf("%s: the status has %+v, want 1000, 3000 and %s", test.policy, *user.Linux, test.groups)
		}
	}
}

// procMount has nothing of /proc masked in a pod that asks for that, which only one with a user namespace may.
func procMount(t *testing.T, n kubeNode) {
	for _, test := range []struct {
		name, spec string
		masked     bool
	}{
		{"proc-default", "", true},
		{"proc-unmasked", "securityContext: {procMount: Unmasked}", false},
	} {
		pod := n.apply(t, test.name, fmt.Sprintf(`
  hostUsers: false
  containers:
  - name: c
    image: %q
    command: %s
    %s
`, testimages.Busybox, sleeper, test.spec), lab.Running)
		masks := n.sh(t, pod, "c", "grep -c ' /proc/' /proc/self/mounts || true")
		if (masks != "0") != test.masked {
			t.Errorf("%s: %s mounts below /proc", test.name, masks)
		}
	}
}

func fileOwner(t *testing.T, path string) uint32 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	return st.Uid
}

// processOwner is the user, on the machine, of a container's processes.
func processOwner(t *testing.T, n kubeNode, container string) string {
	t.Helper()
	processes, err := n.Processes()
	must(t, err)
	for pid := range processes {
		cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !strings.Contains(string(cgroup), container) {
			continue
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		must(t, err)
		for _, line := range strings.Split(string(status), "\n") {
			if uids, ok := strings.CutPrefix(line, "Uid:"); ok {
				return strings.Fields(uids)[0]
			}
		}
	}
	t.Fatalf("container %.12s has no process", container)
	return ""
}

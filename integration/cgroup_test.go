//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
)

const cgroupRoot = "/sys/fs/cgroup"

// onCgroup2 tells whether the controllers of this machine are on cgroup v2.
func onCgroup2() bool {
	var st unix.Statfs_t
	return unix.Statfs(cgroupRoot, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// hasController tells whether this machine has a controller.
func hasController(controller string) bool {
	if !onCgroup2() {
		return onFileSystem(filepath.Join(cgroupRoot, controller))
	}
	list, _ := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	for _, c := range strings.Fields(string(list)) {
		if c == controller {
			return true
		}
	}
	return false
}

func onFileSystem(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// cgroupFile is the path of a file of a cgroup: one on v1, below its controller, another on v2.
func cgroupFile(cgroup, controller, v1, v2 string) string {
	if onCgroup2() {
		return filepath.Join(cgroupRoot, cgroup, v2)
	}
	return filepath.Join(cgroupRoot, controller, cgroup, v1)
}

// limitOf reads such a file; what is not there reads as "".
func limitOf(t *testing.T, cgroup, controller, v1, v2 string) string {
	t.Helper()
	data, err := os.ReadFile(cgroupFile(cgroup, controller, v1, v2))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// cgroupOf is where a container's cgroup is, and the process that is its init.
func cgroupOf(ctx context.Context, n *lab.Node, id string) (cgroup string, pid int, err error) {
	resp, err := n.CRI.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return "", 0, err
	}
	var info struct {
		PID        int    `json:"pid"`
		CgroupPath string `json:"cgroupPath"`
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		return "", 0, err
	}
	return info.CgroupPath, info.PID, nil
}

// newNodeServing is newNode with more arguments of `berth serve`.
func newNodeServing(t *testing.T, args ...string) *lab.Node {
	t.Helper()
	return startNode(t, lab.Options{Tools: tools, Log: t.Logf, Serve: args})
}

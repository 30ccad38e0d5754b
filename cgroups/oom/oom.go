package oom

import (
	"errors"
	"os"
	"path"
	"strconv"
	"strings"
)

// ErrNoCount is the error for a file of the kernel that has no count of kills (before Linux 4.13).
var ErrNoCount = errors.New("no oom_kill count")

// MemoryDir is the directory of a cgroup in the hierarchy of the memory controller, whose mount point the daemon has
// found out: "/sys/fs/cgroup" on v2, "/sys/fs/cgroup/memory" mostly on v1.
func MemoryDir(mountPoint, cgroup string) string {
	return path.Join(mountPoint, path.Clean("/"+cgroup))
}

// Kills reads the count from the cgroup's directory of the memory controller. The error wraps os.ErrNotExist when the
// cgroup does not exist.
func Kills(memoryCgroupDir string) (uint64, error) {
	data, err := os.ReadFile(memoryCgroupDir + "/memory.events")
	if errors.Is(err, os.ErrNotExist) {
		data, err = os.ReadFile(memoryCgroupDir + "/memory.oom_control")
	}
	if err != nil {
		return 0, err
	}
	return parse(string(data))
}

// parse reads the flat keyed format that both files have.
func parse(data string) (uint64, error) {
	for line := range strings.Lines(data) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, ErrNoCount
}

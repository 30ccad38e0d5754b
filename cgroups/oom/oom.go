package oom

import (
	"errors"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// ErrNoCount is the error for a file of the kernel that has no count of kills (before Linux 4.13).
var ErrNoCount = errors.New("no oom_kill count")

// Kills reads the count from the cgroup's directory of the memory controller. The error wraps os.ErrNotExist when the
// cgroup does not exist.
func Kills(memoryCgroupDir string) (uint64, error) {
	data, err := os.ReadFile(memoryCgroupDir + "/memory.events")
	switch {
	case err == nil:
		return parse(string(data))
	case errors.Is(err, os.ErrNotExist):
		return killsV1(memoryCgroupDir)
	case errors.Is(err, syscall.ENODEV): // removed between open and read
		return 0, &os.PathError{Op: "read", Path: memoryCgroupDir, Err: os.ErrNotExist}
	}
	return 0, err
}

// killsV1 adds up what v1 counts in each cgroup by itself: a container with an init of its own has made some.
func killsV1(dir string) (uint64, error) {
	data, err := os.ReadFile(dir + "/memory.oom_control")
	if errors.Is(err, syscall.ENODEV) {
		err = &os.PathError{Op: "read", Path: dir, Err: os.ErrNotExist}
	}
	if err != nil {
		return 0, err
	}
	n, err := parse(string(data))
	if err != nil {
		return 0, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		below, err := killsV1(dir + "/" + e.Name())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		n += below
	}
	return n, nil
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

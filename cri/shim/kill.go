package shim

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// KillCgroup kills every process in a cgroup directory and those below it, and waits until none is left, since a
// process that forks may be ahead of us. A directory that does not exist holds none.
func KillCgroup(dir string) error {
	if dir == "" {
		return nil
	}
	// Linux 5.14 does all of it at once, on v2.
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if err == nil {
		return nil
	}
	deadline := time.Now().Add(5 * time.Second)
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		pids, err := CgroupProcesses(dir)
		if err != nil {
			return err
		}
		left := 0
		for _, pid := range pids {
			if !alive(pid) { // a zombie stays in its cgroup until it is reaped
				continue
			}
			left++
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				return os.NewSyscallError("kill", err)
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("processes in " + dir + " survive SIGKILL: they are stuck in the kernel, on a dead volume perhaps")
		}
		time.Sleep(wait)
	}
}

// CgroupProcesses returns the processes in a cgroup directory and those below it.
func CgroupProcesses(dir string) ([]int, error) {
	var pids []int
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return nil, err
	}
	for line := range bytes.Lines(data) {
		if pid, err := strconv.Atoi(string(bytes.TrimSpace(line))); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() {
			sub, err := CgroupProcesses(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			pids = append(pids, sub...)
		}
	}
	return pids, nil
}

// alive tells whether a process runs: a zombie does not, unless only its first thread is one.
func alive(pid int) bool {
	dir := "/proc/" + strconv.Itoa(pid)
	if runs(dir + "/stat") {
		return true
	}
	threads, err := os.ReadDir(dir + "/task")
	if err != nil {
		return false
	}
	for _, t := range threads {
		if runs(dir + "/task/" + t.Name() + "/stat") {
			return true
		}
	}
	return false
}

// runs tells whether the thread of a stat file is there and has not ended.
func runs(file string) bool {
	stat, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	_, after, _ := bytes.Cut(stat[max(0, bytes.LastIndexByte(stat, ')')):], []byte(" "))
	return !bytes.HasPrefix(after, []byte("Z")) && !bytes.HasPrefix(after, []byte("X"))
}

package shim

import (
	"bytes"
	"errors"
	"io/fs"
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
		thaw(dir)
		if time.Now().After(deadline) {
			return errors.New("processes in " + dir + " survive SIGKILL: they are stuck in the kernel, on a dead volume perhaps")
		}
		time.Sleep(wait)
	}
}

// thaw has the processes in a cgroup directory and those below it go on, whoever has frozen them: on v1 a frozen process
// does not die of SIGKILL, and one that may write to its cgroup can freeze itself.
func thaw(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.WriteFile(filepath.Join(path, "freezer.state"), []byte("THAWED"), 0)
		}
		return nil // it may have gone
	})
}

// RemoveCgroup removes a cgroup directory that has no processes any more, and those below it. It may be busy for a moment
// after its last process has ended.
func RemoveCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, RemoveCgroup(filepath.Join(dir, e.Name())))
		}
	}
	if rm := unix.Rmdir(dir); rm != nil && rm != unix.ENOENT {
		return errors.Join(err, &os.PathError{Op: "rmdir", Path: dir, Err: rm})
	}
	return nil
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

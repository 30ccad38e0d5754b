package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
)

// execute runs one process in a container, in a cgroup of its own below the container's.
func execute(req shim.ExecRequest, files []*os.File, started func(pid int)) (int, error) {
	var p specs.Process
	if err := json.Unmarshal(req.Process, &p); err != nil {
		return 0, fmt.Errorf("process: %w", err)
	}
	c, join, err := loadForExec(req)
	if err != nil {
		return 0, err
	}
	if !req.Terminal {
		if err := replaceHostNull(files, func(i int) (*os.File, error) { return ownNull(c, i) }); err != nil {
			return 0, err
		}
	}
	process, err := newProcess(&p, files, req.Terminal)
	if err != nil {
		return 0, err
	}
	if req.CgroupDir != "" {
		if err := os.Mkdir(execDir(req), 0o755); err != nil {
			return 0, err
		}
		killed := &atomic.Bool{}
		kills.Store(execDir(req), killed)
		defer func() {
			kills.Delete(execDir(req))
			leave(req, killed)
		}()
		process.SubCgroupPaths = map[string]string{req.CgroupController: execName(req)}
	}
	process.LogLevel = logLevel
	if join != nil {
		process.SubCgroupPaths = nil
		process.LogLevel += "\n" + strings.Join(join, "\n")
	}
	done := startSlot()
	err = c.Run(process)
	done()
	if err != nil {
		return 0, plain(err)
	}
	pid, err := process.Pid()
	if err != nil {
		return 0, err
	}
	started(pid)
	state, err := process.Wait()
	if state == nil {
		return 0, fmt.Errorf("wait: %w", err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	if !ok {
		return 0, errors.New("wait: no status")
	}
	return shim.ExitCode(unix.WaitStatus(status)), nil
}

// slots bounds how many execs start at once: more than two on a processor only make each other slower.
var slots = make(chan struct{}, 2*runtime.NumCPU())

// slotWait is how long an exec waits for its turn. Those before it may hang, in a dead volume.
const slotWait = time.Second

// startSlot waits for the turn of an exec to start, and returns what ends it.
func startSlot() (done func()) {
	t := time.NewTimer(slotWait)
	defer t.Stop()
	select {
	case slots <- struct{}{}:
		return func() { <-slots }
	case <-t.C:
		return func() {}
	}
}

func execName(req shim.ExecRequest) string {
	return "exec-" + strconv.Itoa(os.Getpid()) + "-" + strconv.FormatUint(req.Seq, 10)
}

func execDir(req shim.ExecRequest) string { return filepath.Join(req.CgroupDir, execName(req)) }

// kills are the execs that run, by their cgroups, and whether they are to be killed.
var kills sync.Map

// killExecution kills an exec'd process with all that it has started.
func killExecution(req shim.ExecRequest, pid int) {
	if req.CgroupDir != "" {
		if killed, ok := kills.Load(execDir(req)); ok {
			killed.(*atomic.Bool).Store(true)
		}
		if err := shim.KillCgroup(execDir(req)); err != nil {
			fmt.Fprintln(os.Stderr, "kill exec in", req.ID+":", err)
		}
	}
	// It may have been moved to another cgroup. A pid that is not our child any more may be anybody's.
	if pid > 0 && parent(pid) == os.Getpid() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
}

// parent is the parent of a process, 0 if there is none.
func parent(pid int) int {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 2 {
		return 0
	}
	ppid, _ := strconv.Atoi(fields[1])
	return ppid
}

// leave removes the cgroup of an exec that has ended. What it has left running in the background goes on in the
// container's own cgroup, unless the exec was killed: its process may be gone before those that fork meanwhile are, and
// they must not get away.
func leave(req shim.ExecRequest, killed *atomic.Bool) {
	dir := execDir(req)
	for range 50 {
		if killed.Load() {
			if err := shim.KillCgroup(dir); err != nil { // stays where it is, and goes with the container
				fmt.Fprintln(os.Stderr, "kill exec in", req.ID+":", err)
				return
			}
		}
		err := unix.Rmdir(dir)
		if err == nil || err == unix.ENOENT {
			return
		}
		pids, err := shim.CgroupProcesses(dir)
		if err != nil {
			return
		}
		if killed.Load() {
			pids = nil // zombies
		}
		for _, pid := range pids {
			_ = os.WriteFile(filepath.Join(req.CgroupDir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
		time.Sleep(time.Millisecond)
	}
}

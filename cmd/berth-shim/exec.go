package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cri/shim"
)

// execute runs one process in a container, in a cgroup of its own below the container's. When ctx ends, the process is
// killed with all that it has started.
func execute(ctx context.Context, req shim.ExecRequest, files []*os.File, started func(pid int)) (int, error) {
	running, err := slots.take(ctx, slotTime)
	if err != nil {
		return 0, err
	}
	defer running()
	process, err := prepare(req, files)
	if err != nil {
		return 0, err
	}
	if req.CgroupDir != "" {
		if err := os.Mkdir(execDir(req), 0o755); err != nil {
			return 0, err
		}
		defer leave(ctx, req)
	}
	var pid atomic.Int64
	stop := context.AfterFunc(ctx, func() { killExecution(req, int(pid.Load())) })
	defer stop()
	if err := process.run(); err != nil {
		return 0, plain(err)
	}
	running()
	p, err := process.Pid()
	if err != nil {
		return 0, err
	}
	pid.Store(int64(p))
	if ctx.Err() != nil { // it may have been killed before it was where it is now
		killExecution(req, p)
	}
	started(p)
	untilExit(p)
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

// execution is a process and the container that it is going to run in.
type execution struct {
	*libcontainer.Process
	container *libcontainer.Container
}

func (e execution) run() error {
	return withoutStrays(func() error { return e.container.Run(e.Process) })
}

// withoutStrays starts a process, and ends what is left of one that failed to start. libcontainer starts it by way of two
// others, and when the first is killed it does not know of those that come after: they would be zombies for as long as
// this process runs, and one in a container's PID namespace keeps the container's init from ending. They are children of
// the thread that has started the first, where no other exec starts one meanwhile.
func withoutStrays(start func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadChildren()
	err := start()
	if err == nil {
		return nil
	}
	for _, pid := range threadChildren() {
		if slices.Contains(before, pid) {
			continue
		}
		_ = unix.Kill(pid, unix.SIGKILL) // a child that nobody else waits for: its number is its own
		go func() {
			for {
				if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
					return
				}
			}
		}()
	}
	return err
}

// threadChildren are the children that this thread has started and that are not waited for yet.
func threadChildren() (pids []int) {
	data, err := os.ReadFile("/proc/thread-self/children")
	if err != nil {
		return nil // a kernel without CONFIG_PROC_CHILDREN
	}
	for field := range strings.FieldsSeq(string(data)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// prepare reads what a request asks for.
func prepare(req shim.ExecRequest, files []*os.File) (e execution, err error) {
	var p specs.Process
	if err := json.Unmarshal(req.Process, &p); err != nil {
		return e, fmt.Errorf("process: %w", err)
	}
	c, join, err := loadForExec(req)
	if err != nil {
		return e, err
	}
	if !req.Terminal {
		if err := replaceHostNull(files, func(i int) (*os.File, error) { return ownNull(c, i) }); err != nil {
			return e, err
		}
	}
	process, err := newProcess(&p, files, req.Terminal)
	if err != nil {
		return e, err
	}
	if join == nil && req.CgroupDir != "" {
		process.SubCgroupPaths = map[string]string{req.CgroupController: execName(req)}
	}
	lines := append([]string{logLevel}, join...)
	if c.Config().Seccomp != nil {
		lines = append(lines, recordLine(req.StateRoot, req.ID))
	}
	process.LogLevel = strings.Join(lines, "\n")
	return execution{process, c}, nil
}

// untilExit waits for a process to end. libcontainer's own way to wait holds a thread for each that runs.
func untilExit(pid int) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}

// slots bounds how many execs start at once: more than two on a processor only make each other slower.
var slots = make(turns, 2*runtime.NumCPU())

// slotTime is how long one may keep others from starting. It may hang, in a dead volume.
const slotTime = 2 * time.Second

var errKilledEarly = errors.New("killed before it was its turn to start")

// turns has room for as many as may be at it at once.
type turns chan struct{}

// take waits for the turn of an exec to start, first come, first served, and returns what ends it. Nothing has been done
// yet for one that is not wanted any more when its turn would come: so those that time out do not keep a busy node from
// the others.
func (t turns) take(ctx context.Context, longest time.Duration) (done func(), err error) {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return nil, errKilledEarly
	}
	free := sync.OnceFunc(func() { <-t })
	if ctx.Err() != nil {
		free()
		return nil, errKilledEarly
	}
	timer := time.AfterFunc(longest, free)
	return func() { timer.Stop(); free() }, nil
}

func execName(req shim.ExecRequest) string { return shim.ExecCgroup(os.Getpid(), req.Seq) }

func execDir(req shim.ExecRequest) string { return filepath.Join(req.CgroupDir, execName(req)) }

// killExecution kills an exec'd process with all that it has started. pid is 0 as long as it is not known.
func killExecution(req shim.ExecRequest, pid int) {
	if req.CgroupDir != "" {
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
func leave(ctx context.Context, req shim.ExecRequest) {
	dir := execDir(req)
	for range 50 {
		if ctx.Err() != nil {
			if err := shim.KillCgroup(dir); err != nil { // stays where it is, and goes with the container
				fmt.Fprintln(os.Stderr, "kill exec in", req.ID+":", err)
				return
			}
		}
		if shim.RemoveCgroup(dir) == nil {
			return
		}
		pids, err := shim.CgroupProcesses(dir)
		if err != nil {
			return
		}
		if ctx.Err() != nil {
			pids = nil // zombies
		}
		for _, pid := range pids {
			_ = os.WriteFile(filepath.Join(req.CgroupDir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
		}
		time.Sleep(time.Millisecond)
	}
}

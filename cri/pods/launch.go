package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/internal/step"
	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/network"
)

// launcher starts shims and exec servers from one sealed copy of the shim's program in memory: nothing that a container
// can do changes it (CVE-2019-5736), libcontainer copies nothing per container since it sees the seals, and all shims
// share their text.
type launcher struct {
	exe *os.File
	env []string
}

// sealedFD is the least descriptor of the sealed program: children get their own files below it.
const sealedFD = 100

func newLauncher(path string) (*launcher, error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	// With vm.memfd_noexec the flag must be there, and before Linux 6.3 it must not.
	fd, err := unix.MemfdCreate("berth-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL {
		fd, err = unix.MemfdCreate("berth-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err == unix.EACCES {
		return nil, errors.New("the kernel forbids executable memory files: set the sysctl vm.memfd_noexec to 0 or 1")
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, sealedFD)
	_ = unix.Close(fd)
	if err != nil {
		return nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	exe := os.NewFile(uintptr(high), "berth-shim")
	if _, err := io.Copy(exe, src); err != nil {
		_ = exe.Close()
		return nil, err
	}
	if err := unix.Fchmod(high, 0o511); err != nil {
		_ = exe.Close()
		return nil, os.NewSyscallError("fchmod", err)
	}
	if _, err := unix.FcntlInt(uintptr(high), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		_ = exe.Close()
		return nil, os.NewSyscallError("fcntl F_ADD_SEALS", err)
	}
	l := &launcher{exe: exe, env: []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		// One thread at a time runs Go in a shim and in an init: more cost a shim 250 KiB and an init its start.
		"GOMAXPROCS=1",
	}}
	for _, name := range []string{"BERTH_SHIM_FAIL_AT", "BERTH_SHIM_FAIL_LIST"} { // the shim's own fail points
		if v, ok := os.LookupEnv(name); ok {
			l.env = append(l.env, strings.Replace(name, "_SHIM", "", 1)+"="+v)
		}
	}
	return l, nil
}

func (l *launcher) close() { _ = l.exe.Close() }

// path is the program's, for as long as this process lives.
func (l *launcher) path() string { return "/proc/self/fd/" + strconv.Itoa(int(l.exe.Fd())) }

// start starts the program in a mode, with files from descriptor 3 on. Its standard output and error go to out.
func (l *launcher) start(args []string, out *os.File, files ...*os.File) (*os.Process, error) {
	return l.startAs(&os.ProcAttr{Env: l.env, Sys: &syscall.SysProcAttr{}}, args, out, files...)
}

// startAs is start with more attributes.
func (l *launcher) startAs(attr *os.ProcAttr, args []string, out *os.File, files ...*os.File) (*os.Process, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	attr.Dir, attr.Files, attr.Sys.Setsid = "/", append([]*os.File{null, out, out}, files...), true
	return os.StartProcess(l.path(), append([]string{"berth-shim"}, args...), attr)
}

// startIn is start in a cgroup of a sandbox, which the process is in before it does anything: it is made there, or goes there
// itself. joined is false where it has to be moved.
func (l *launcher) startIn(cgroup cgroups.Path, args []string, out *os.File, files ...*os.File) (proc *os.Process, joined bool, err error) {
	tasks, unified, ok := cgroups.Entrances(cgroup)
	if !ok {
		proc, err = l.start(args, out, files...)
		return proc, false, err
	}
	attr := &os.ProcAttr{Env: l.env, Sys: &syscall.SysProcAttr{}}
	if len(tasks) > 0 {
		attr.Env = append(slices.Clone(l.env), joinEnv+strings.Join(tasks, "\n"))
	}
	if unified != "" {
		dir, err := os.Open(unified)
		if err != nil {
			return nil, false, err
		}
		defer dir.Close()
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(dir.Fd())
	}
	proc, err = l.startAs(attr, args, out, files...)
	if unified != "" && (errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.E2BIG)) { // before Linux 5.7
		proc, err = l.start(args, out, files...)
		return proc, false, err
	}
	return proc, true, err
}

// joinEnv tells a shim the files "tasks" of cgroups that it moves itself into before it does anything, one in a line.
const joinEnv = "_BERTH_JOIN="

// launch is a shim to be started.
type launch struct {
	dir         string
	cgroup      cgroups.Path
	namespaces  []string // pinned, to be in
	mounts      *leanMounts
	sharedPID   bool
	userns      string // of the pod's own, pinned, or ""
	nobody      uint32 // user and group in it that have nothing
	labels      spec.Labels
	oomScoreAdj int
}

// usernsFile is the pod's user namespace for a shim: the first descriptor after those that every shim gets.
const usernsFile = "/proc/self/fd/5"

// startShim starts a shim and returns its pid when its socket can be connected to.
func (l *launcher) startShim(ctx context.Context, a launch) (int, error) {
	log, err := os.OpenFile(filepath.Join(a.dir, "shim.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer readyR.Close()
	defer readyW.Close()
	goR, goW, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer goR.Close()
	defer goW.Close()
	args, files := []string{"shim", a.dir}, []*os.File{readyW, goR}
	if a.mounts != nil {
		args = append(args, "lean")
	}
	if a.sharedPID {
		args = append(args, "shared-pid")
		if a.userns != "" {
			// Opened here, since nothing is pinned where the shim is.
			userns, err := os.Open(a.userns)
			if err != nil {
				return 0, err
			}
			defer userns.Close()
			files = append(files, userns)
			args = append(args, usernsFile, strconv.FormatUint(uint64(a.nobody), 10))
		}
		if a.labels != (spec.Labels{}) {
			args = append(args, "selinux", a.labels.Process, a.labels.Mount)
		}
	}
	var proc *os.Process
	joined := false
	err = thread.Throwaway(func() error {
		if err := network.Enter(a.namespaces); err != nil {
			return err
		}
		if err := a.mounts.enter(); err != nil { // last: nothing is pinned there
			return err
		}
		proc, joined, err = l.startIn(a.cgroup, args, log, files...)
		return err
	})
	if err != nil {
		return 0, err
	}
	_ = readyW.Close()
	go func() { _, _ = proc.Wait() }() // reap it, if it ends while we are its parent
	// It waits for goW before it starts anything, so that all of it is in its cgroup.
	if !joined {
		err = cgroups.AddProcess(a.cgroup, proc.Pid)
	}
	if err == nil {
		err = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", proc.Pid), []byte(strconv.Itoa(a.oomScoreAdj)), 0)
	}
	step.Point("RunPodSandbox.shim.started")
	if err == nil {
		_, err = goW.Write([]byte{1})
	}
	if err == nil {
		err = awaitByte(ctx, readyR)
	}
	if err != nil {
		_ = proc.Kill()
		said, _ := os.ReadFile(filepath.Join(a.dir, "shim.log"))
		return 0, fmt.Errorf("shim did not come up: %w (it said: %q)", err, said)
	}
	return proc.Pid, nil
}

func awaitByte(ctx context.Context, f *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	_, err := f.Read(b[:])
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// execServerEnds is more than an exec server takes to end, with what it runs, once its socket is closed.
const execServerEnds = 15 * time.Second

// execServers keeps one exec server at hand.
type execServers struct {
	launcher *launcher
	ended    func(pid int) // is told that one has ended
	mu       sync.Mutex
	server   *shim.ExecServer
	proc     *os.Process // of server
	closed   bool
}

func (e *execServers) get() (*shim.ExecServer, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, errors.New("the daemon is stopping")
	}
	if e.server != nil && !e.server.Gone() {
		return e.server, nil
	}
	ours, theirs, err := shim.ExecSocketpair()
	if err != nil {
		return nil, err
	}
	their := os.NewFile(uintptr(theirs), "exec server")
	defer their.Close()
	proc, err := e.launcher.start([]string{"exec"}, os.Stderr, their)
	if err != nil {
		_ = unix.Close(ours)
		return nil, fmt.Errorf("start exec server: %w", err)
	}
	go func() {
		_, _ = proc.Wait()
		e.ended(proc.Pid)
	}()
	if last := e.proc; last != nil { // it has ended or will soon, unless it is stopped
		time.AfterFunc(execServerEnds, func() { _ = last.Kill() })
	}
	e.proc = proc
	e.server, err = shim.NewExecServer(ours)
	return e.server, err
}

func (e *execServers) close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	if e.server != nil {
		e.server.Close()
	}
}

// cgroupDirectories are where a shim looks at a container's cgroup.
type cgroupDirectories struct {
	kill       string // holds all its processes
	controller string // which hierarchy that is; "" on v2
	memory     string // has its count of out-of-memory kills
}

// cgroupDirs chooses, on v1, the freezer's hierarchy: nobody limits or measures there, so that the cgroups of execs
// below the container's disturb nobody.
func cgroupDirs(p cgroups.Path) (d cgroupDirectories, err error) {
	if cgroups.Version() == 1 {
		d.controller = "freezer"
	}
	if d.kill, err = cgroups.Dir(p, d.controller); err != nil {
		return d, err
	}
	d.memory, err = cgroups.Dir(p, "memory")
	return d, err
}

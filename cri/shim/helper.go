package shim

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// SelfExe is what a shim starts its helpers from: itself, which is a sealed memfd that no container can change
// (CVE-2019-5736).
const SelfExe = "/proc/self/exe"

// helperIdle is how long a helper waits parked for work before it ends, since it is several times the size of the shim.
const helperIdle = 10 * time.Second

// helpers keeps one process parked that can create a container: it has libcontainer linked in and its start-up behind
// it. A helper serves one creation and ends; the container's init becomes a child of the shim, its subreaper.
type helpers struct {
	reaper *reaper
	lean   bool // each has mounts of its own, a copy of the shim's
	mu     sync.Mutex
	parked *helper
}

type helper struct {
	pid   int
	conn  *conn
	ended chan struct{} // closed when it has been reaped
}

// park starts a helper ahead of need.
func (h *helpers) park() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.parked != nil {
		return
	}
	if p, err := h.spawn(nil); err == nil {
		h.parked = p
	}
}

// take returns a helper that waits for its task.
func (h *helpers) take() (*helper, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.parked; p != nil {
		h.parked = nil
		select {
		case <-p.ended: // idle for too long
			_ = p.conn.Close()
		default:
			return p, nil
		}
	}
	return h.spawn(nil)
}

// spawn starts a helper, in a mount namespace unless that is nil.
func (h *helpers) spawn(mounts *os.File) (*helper, error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, err
	}
	defer unix.Close(theirs)
	p := &helper{ended: make(chan struct{})}
	if p.conn, err = newConn(ours); err != nil {
		_ = unix.Close(ours)
		return nil, err
	}
	p.pid, err = h.reaper.start(func() (int, error) {
		attr := &syscall.ProcAttr{
			Dir: "/",
			Env: os.Environ(),
			// Standard input and output are the shim's: nothing, and its log.
			Files: []uintptr{0, 1, 2, uintptr(theirs)},
			Sys:   &syscall.SysProcAttr{},
		}
		if mounts != nil {
			return forkExecIn(mounts, attr)
		}
		if h.lean {
			attr.Sys.Cloneflags = unix.CLONE_NEWNS
		}
		return syscall.ForkExec(SelfExe, helperArgs, attr)
	}, func(unix.WaitStatus) { close(p.ended) })
	if err != nil {
		_ = p.conn.Close()
		return nil, fmt.Errorf("start helper: %w", err)
	}
	return p, nil
}

var helperArgs = []string{"berth-shim", "create"}

// forkExecIn starts a helper in a mount namespace, from a thread that goes there first.
func forkExecIn(mounts *os.File, attr *syscall.ProcAttr) (pid int, err error) {
	err = thread.Throwaway(func() (err error) {
		if err := EnterMounts(mounts); err != nil {
			return err
		}
		pid, err = syscall.ForkExec(SelfExe, helperArgs, attr)
		return err
	})
	return pid, err
}

// EnterMounts moves this thread, which has to be thrown away, into a mount namespace.
func EnterMounts(ns *os.File) error {
	fd, err := fdOf(ns)
	if err != nil {
		return err
	}
	// No thread that shares its root and working directory with others can change its mounts.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNS))
}

// HelperRequest is what a helper is told: to create one container. The descriptors beside it are its stdin, stdout and
// stderr, or the socket that takes its terminal's master, and then the mounts of the request.
type HelperRequest struct {
	Create CreateRequest
}

// HelperResponse is its answer. The helper then waits until it may end: until then the init is its child.
type HelperResponse struct {
	PID   int    `json:",omitempty"`
	Error string `json:",omitempty"`
}

// create has a helper create a container and returns the pid of its init, which waits to be started. adopt is called
// with the pid while the helper is still its parent.
func (h *helpers) create(req CreateRequest, streams, mounts []*os.File, adopt func(pid int)) (int, error) {
	files := slices.Concat(streams, mounts)
	var p *helper
	var err error
	switch {
	case !req.HostMounts:
		p, err = h.take()
	case len(mounts) != 1:
		return 0, &Error{CodeInvalid, "create without the mount namespace"}
	default:
		files = streams
		p, err = h.spawn(mounts[0])
	}
	if err != nil {
		return 0, err
	}
	defer p.conn.Close()
	if err := p.conn.send(HelperRequest{req}, files...); err != nil {
		_ = h.reaper.kill(p.pid, unix.SIGKILL)
		return 0, fmt.Errorf("helper: %w", err)
	}
	timeout := time.Duration(req.DeadlineMS) * time.Millisecond
	if timeout <= 0 {
		timeout = 2 * time.Minute
	}
	// A helper that hangs (a dead FUSE volume) is killed, and with it what it has started.
	timer := time.AfterFunc(timeout, func() { _ = h.reaper.kill(p.pid, unix.SIGKILL) })
	defer timer.Stop()
	var res HelperResponse
	if _, err := p.conn.receive(&res); err != nil {
		_ = h.reaper.kill(p.pid, unix.SIGKILL)
		if !timer.Stop() {
			return 0, &Error{CodeDeadline, fmt.Sprintf("not created within %s", timeout)}
		}
		return 0, fmt.Errorf("helper ended before it had created the container (is the node short of memory, or a volume stuck?): %w", err)
	}
	if res.Error != "" {
		return 0, errors.New(res.Error)
	}
	adopt(res.PID)
	return res.PID, nil
}

// ServeHelper is the helper's side: it waits on the socket for one task, has create do it, answers, and returns when the
// shim has taken note.
func ServeHelper(fd int, create func(req CreateRequest, files []*os.File) (int, error)) error {
	// A plain poll, since a parked helper should cost no more threads than it has.
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, int(helperIdle.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("poll", err)
		}
		if n == 0 {
			return nil
		}
		break
	}
	c, err := newConn(fd)
	if err != nil {
		return err
	}
	c.blocking = true
	var req HelperRequest
	files, err := c.receive(&req)
	if err != nil {
		return err
	}
	var res HelperResponse
	res.PID, err = create(req.Create, files)
	if err != nil {
		res.Error = errorText(err)
	}
	closeAll(files)
	if err := c.send(res); err != nil {
		return err
	}
	_, _ = c.receive(&req) // the shim closes its end
	return nil
}

package shim

import (
	"os"
	"os/signal"
	"sync"

	"golang.org/x/sys/unix"
)

// reaper waits for every child of this process, those that it inherits as subreaper, too: inits whose helper has ended,
// and orphans of containers without a PID namespace of their own.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]func(unix.WaitStatus)
}

func startReaper() *reaper {
	r := &reaper{waiting: map[int]func(unix.WaitStatus){}}
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	go func() {
		for range c {
			r.reap()
		}
	}()
	return r
}

func (r *reaper) reap() {
	for {
		// Under the lock, so that a child is waited for only after whoever started it has said who wants to know.
		r.mu.Lock()
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			r.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			r.mu.Unlock()
			return
		}
		told := r.waiting[pid]
		delete(r.waiting, pid)
		r.mu.Unlock()
		if told != nil {
			go told(status)
		}
	}
}

// start runs f, which starts a child and returns its pid, and has told called with the child's end.
func (r *reaper) start(f func() (int, error), told func(unix.WaitStatus)) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := f()
	if err == nil {
		r.waiting[pid] = told
	}
	return pid, err
}

// adopt has told called with the end of a process that is going to be a child of this one when its parent ends.
func (r *reaper) adopt(pid int, told func(unix.WaitStatus)) {
	r.mu.Lock()
	r.waiting[pid] = told
	r.mu.Unlock()
}

// kill signals a child whose end nobody has been told yet. Its pid is its own until it is waited for, which happens under
// the same lock: a signal never reaches a process that got the pid later.
func (r *reaper) kill(pid int, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ours := r.waiting[pid]; !ours {
		return nil
	}
	if err := unix.Kill(pid, sig); err != nil && err != unix.ESRCH {
		return os.NewSyscallError("kill", err)
	}
	return nil
}

// exitCode is the status as a shell tells it: 128 + n for signal n.
func exitCode(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ExecRequest is one message to the node's exec server: to run a process in a container, or to kill one that it runs.
// Beside it come the process's stdin, stdout and stderr, or the socket that takes its terminal's master.
type ExecRequest struct {
	Seq  uint64
	Kill bool `json:",omitempty"`
	Ping bool `json:",omitempty"` // answer, and nothing else

	ID        string          `json:",omitempty"` // container
	StateRoot string          `json:",omitempty"` // libcontainer's directory
	Process   json.RawMessage `json:",omitempty"` // an OCI process
	Terminal  bool            `json:",omitempty"`
	// InFile says that the process comes in a file, the last of those beside the message.
	InFile bool `json:",omitempty"`
	// CgroupDir and CgroupController are where the process gets a cgroup of its own, below the container's, so that it
	// can be killed with all that it has started: the container's directory in one hierarchy and that hierarchy's
	// controller, "" on v2.
	CgroupDir        string `json:",omitempty"`
	CgroupController string `json:",omitempty"`
}

// ExecCgroup is the name of the cgroup of one execution: after the process id of its exec server and its number there.
func ExecCgroup(server int, seq uint64) string {
	return fmt.Sprintf("%s%d", ExecCgroups(server), seq)
}

// ExecCgroups is how the names of all cgroups of an exec server's executions begin.
func ExecCgroups(server int) string { return fmt.Sprintf("exec-%d-", server) }

// ExecResponse tells first that the process runs, or why not, and then how it ended.
type ExecResponse struct {
	Seq    uint64
	Error  string `json:",omitempty"`
	PID    int    `json:",omitempty"`
	Exited bool   `json:",omitempty"`
	Code   int    `json:",omitempty"` // 128 + signal where a signal ended it
}

// maxInline is how long a process may be in a message. A longer one goes in a file: the variables of a container may be
// two megabytes (Kubernetes adds seven for each service of a namespace), and a message is one packet.
const maxInline = 64 << 10

// toFile moves the process out of the request, into a file of memory.
func (r *ExecRequest) toFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("process", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "process")
	if _, err := f.Write(r.Process); err != nil {
		_ = f.Close()
		return nil, err
	}
	r.Process, r.InFile = nil, true
	return f, nil
}

// fromFile takes the process from the last of the files, and returns the others.
func (r *ExecRequest) fromFile(files []*os.File) ([]*os.File, error) {
	if !r.InFile {
		return files, nil
	}
	last := len(files) - 1
	if last < 0 {
		return files, errors.New("a process without its file")
	}
	f := files[last]
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return files[:last], err
	}
	r.Process = make(json.RawMessage, info.Size())
	_, err = f.ReadAt(r.Process, 0) // its offset is where the daemon has stopped to write
	return files[:last], err
}

// Executor runs one process in a container. It calls started with the process's pid and returns its exit code. When ctx
// ends, it kills the process with all that it has started.
type Executor func(ctx context.Context, req ExecRequest, files []*os.File, started func(pid int)) (int, error)

// ServeExec is the exec server's side: it serves the socket until the daemon has gone, and then kills what still runs:
// an exec belongs to the client that waits for it.
func ServeExec(fd int, run Executor) error {
	c, err := newConn(fd)
	if err != nil {
		return err
	}
	c.blocking = true
	var (
		mu      sync.Mutex
		send    sync.Mutex
		running = map[uint64]context.CancelFunc{}
		all     sync.WaitGroup
	)
	reply := func(r ExecResponse) {
		send.Lock()
		defer send.Unlock()
		_ = c.send(r) // without a daemon there is nobody to tell
	}
	for {
		var req ExecRequest
		files, err := c.receive(&req)
		if err != nil {
			break
		}
		if req.Ping {
			reply(ExecResponse{Seq: req.Seq, Exited: true})
			continue
		}
		if req.Kill {
			mu.Lock()
			if kill := running[req.Seq]; kill != nil {
				kill()
			}
			mu.Unlock()
			continue
		}
		files, err = req.fromFile(files)
		if err != nil {
			closeAll(files)
			reply(ExecResponse{Seq: req.Seq, Error: errorText(err)})
			continue
		}
		ctx, kill := context.WithCancel(context.Background())
		mu.Lock()
		running[req.Seq] = kill
		mu.Unlock()
		all.Go(func() {
			code, err := run(ctx, req, files, func(pid int) {
				closeAll(files)
				reply(ExecResponse{Seq: req.Seq, PID: pid})
			})
			closeAll(files)
			mu.Lock()
			delete(running, req.Seq)
			mu.Unlock()
			kill()
			if err != nil {
				reply(ExecResponse{Seq: req.Seq, Error: errorText(err)})
				return
			}
			reply(ExecResponse{Seq: req.Seq, Exited: true, Code: code})
		})
	}
	mu.Lock()
	for _, kill := range running {
		kill()
	}
	mu.Unlock()
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
	}
	return nil
}

// ExecServer is the daemon's side of an exec server, which it has started.
type ExecServer struct {
	conn     *conn
	patience time.Duration // with a server that takes no message, or does not answer one
	send     sync.Mutex

	mu      sync.Mutex
	seq     uint64
	waiting map[uint64]chan ExecResponse
	err     error
}

// ErrExecServerGone is in the chain of errors of executions that were under way when the exec server ended.
var ErrExecServerGone = errors.New("the exec server has ended")

// NewExecServer speaks to an exec server through a socket of [ExecSocketpair].
func NewExecServer(fd int) (*ExecServer, error) {
	c, err := newConn(fd)
	if err != nil {
		return nil, err
	}
	s := &ExecServer{conn: c, patience: 30 * time.Second, waiting: map[uint64]chan ExecResponse{}}
	go s.receive()
	return s, nil
}

// ExecSocketpair returns the two ends of a socket for an exec server, close-on-exec.
func ExecSocketpair() (ours, theirs int, err error) { return socketpair() }

func (s *ExecServer) receive() {
	for {
		var r ExecResponse
		files, err := s.conn.receive(&r)
		closeAll(files)
		s.mu.Lock()
		if err != nil {
			s.err = ErrExecServerGone
			for _, c := range s.waiting {
				close(c)
			}
			s.waiting = nil
			s.mu.Unlock()
			_ = s.conn.Close()
			return
		}
		c := s.waiting[r.Seq]
		if r.Error != "" || r.Exited {
			delete(s.waiting, r.Seq)
		}
		s.mu.Unlock()
		if c != nil {
			c <- r // room for both answers
		}
	}
}

// Gone tells whether the exec server has ended.
func (s *ExecServer) Gone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil
}

// Close has the exec server end, and what it runs.
func (s *ExecServer) Close() { _ = s.conn.Close() }

// Execution is a process that was asked for.
type Execution struct {
	server *ExecServer
	seq    uint64
	c      chan ExecResponse
	PID    int
}

// Start has a process run and returns when it does. The files stay the caller's to close. When ctx ends first, the
// process is killed.
func (s *ExecServer) Start(ctx context.Context, req ExecRequest, files ...*os.File) (*Execution, error) {
	seq, c, err := s.expect()
	if err != nil {
		return nil, err
	}
	req.Seq = seq
	e := &Execution{server: s, seq: seq, c: c}
	if err := s.request(req, files); err != nil {
		s.forget(req.Seq)
		return nil, fmt.Errorf("exec server: %w", err)
	}
	select {
	case r, ok := <-c:
		switch {
		case !ok:
			return nil, ErrExecServerGone
		case r.Error != "":
			return nil, errors.New(r.Error)
		case r.Exited: // cannot be before it has started
			return nil, errors.New("exec server answered out of order")
		}
		e.PID = r.PID
		return e, nil
	case <-ctx.Done():
		go func() { // the answers still to come have room in c
			e.Kill()
			s.check()
		}()
		return nil, context.Cause(ctx)
	}
}

// expect returns the number of a request to be made, and where its answers will be.
func (s *ExecServer) expect() (uint64, chan ExecResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, nil, s.err
	}
	c := make(chan ExecResponse, 2)
	s.seq++
	s.waiting[s.seq] = c
	return s.seq, c, nil
}

// check gives up on a server that is stopped or stuck, so that the next exec gets another. One that only waits, for an
// exec that hangs in a dead volume, answers.
func (s *ExecServer) check() {
	seq, c, err := s.expect()
	if err != nil {
		return
	}
	if s.request(ExecRequest{Seq: seq, Ping: true}, nil) != nil {
		s.forget(seq)
		return
	}
	select {
	case <-c:
	case <-time.After(s.patience):
		s.Close()
	}
}

func (s *ExecServer) request(req ExecRequest, files []*os.File) error {
	if len(req.Process) > maxInline {
		f, err := req.toFile()
		if err != nil {
			return err
		}
		defer f.Close()
		files = append(slices.Clip(files), f)
	}
	s.send.Lock()
	defer s.send.Unlock()
	_ = s.conn.f.SetWriteDeadline(time.Now().Add(s.patience))
	err := s.conn.send(req, files...)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.Close()
		return ErrExecServerGone
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET): // its end is just not read yet
		return ErrExecServerGone
	}
	return err
}

func (s *ExecServer) forget(seq uint64) {
	s.mu.Lock()
	delete(s.waiting, seq)
	s.mu.Unlock()
}

// Wait waits for the process to end and returns its exit code.
func (e *Execution) Wait(ctx context.Context) (int, error) {
	for {
		select {
		case r, ok := <-e.c:
			switch {
			case !ok:
				return 0, ErrExecServerGone
			case r.Error != "":
				return 0, errors.New(r.Error)
			case r.Exited:
				return r.Code, nil
			}
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// Kill kills the process and all that it has started.
func (e *Execution) Kill() {
	_ = e.server.request(ExecRequest{Seq: e.seq, Kill: true}, nil)
}

// ExitCode is a wait status as a shell tells it: 128 + n for signal n.
func ExitCode(s unix.WaitStatus) int { return exitCode(s) }

// ConsolePair returns a socket for a terminal: the end to give away, and a function that waits for the terminal's master
// on the other.
func ConsolePair() (theirs *os.File, master func() (*os.File, error), abandon func(), err error) {
	our, their, err := socketpair()
	if err != nil {
		return nil, nil, nil, err
	}
	return os.NewFile(uintptr(their), "console"), func() (*os.File, error) { return ReceiveConsole(our) }, func() { _ = unix.Close(our) }, nil
}

// Pipe returns a pipe of which one end is for a container's process, blocking, and the other ours, driven by the poller.
func Pipe(weWrite bool) (r, w *os.File, err error) { return pipe(weWrite) }

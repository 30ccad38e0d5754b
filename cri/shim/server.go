package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/step"
)

// SocketName is the name of a shim's socket in the directory of its pod.
const SocketName = "shim.sock"

// Server is the shim: the containers of one pod and the socket on which the daemon speaks to it.
type Server struct {
	dir     string
	pause   int
	reaper  *reaper
	helpers helpers

	mu         sync.Mutex
	containers map[string]*container
	making     map[string]chan struct{} // being created; closed when that has ended
	kills      podKills
	watchers   map[*watcher]struct{}
	quit       chan struct{}
}

// watcher is a client that is told every change. It gets them in order, from a queue without bound: a container has
// three changes in its life.
type watcher struct {
	conn  *conn
	mu    sync.Mutex
	cond  sync.Cond
	queue []Response
	gone  bool
}

// Pause says what the process is like that is PID 1 of a PID namespace that the pod's containers share.
type Pause struct {
	// Userns is the file of the pod's own user namespace, or "".
	Userns string
	// Nobody is the user and group that it becomes in that: 65534 may be none there.
	Nobody uint32
	// Label and Context are the SELinux contexts of the process and of its root, or "".
	Label, Context string
}

// Serve runs the shim in dir, the pod's directory, until it is told to shut down: it never ends by itself. With pause,
// which may be nil, it starts the process that is PID 1 of the pod's PID namespace. A lean one is in a mount namespace with
// little in it, and each helper gets a copy of that. ready is called when the socket can be connected to.
func Serve(dir string, pause *Pause, lean bool, ready func()) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
	}
	s := &Server{dir: dir, reaper: startReaper(), containers: map[string]*container{}, making: map[string]chan struct{}{}, watchers: map[*watcher]struct{}{}, quit: make(chan struct{})}
	s.helpers.reaper, s.helpers.lean = s.reaper, lean
	if pause != nil {
		if err := s.startPause(*pause); err != nil {
			return err
		}
	}
	fd, err := listen(filepath.Join(dir, SocketName))
	if err != nil {
		return err
	}
	l := os.NewFile(uintptr(fd), "listener")
	defer l.Close()
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	step.Point("shim.ready.before")
	ready()
	s.helpers.park()
	go func() { <-s.quit; _ = l.Close() }()
	for {
		var (
			nfd  int
			aerr error
		)
		err := raw.Read(func(fd uintptr) bool {
			nfd, _, aerr = unix.Accept4(int(fd), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return aerr != unix.EAGAIN
		})
		if err != nil {
			break // closed
		}
		if aerr != nil {
			continue
		}
		// The directory is root's alone; this is for whoever moves it elsewhere (CVE-2020-15257).
		if cred, err := unix.GetsockoptUcred(nfd, unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil || cred.Uid != 0 {
			_ = unix.Close(nfd)
			continue
		}
		go s.serve(&conn{f: os.NewFile(uintptr(nfd), "client")})
	}
	_ = os.Remove(filepath.Join(dir, SocketName))
	return nil
}

func listen(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	addr, done, err := address(path)
	if err == nil {
		err = unix.Bind(fd, addr)
		done()
	}
	if err == nil {
		err = unix.Listen(fd, 64)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("listen on %s: %w", path, err)
	}
	return fd, nil
}

// address is the address of a socket whose path may be longer than the 107 bytes that fit into one: it then goes
// through a descriptor of the directory. done frees it.
func address(path string) (*unix.SockaddrUnix, func(), error) {
	if len(path) < 100 {
		return &unix.SockaddrUnix{Name: path}, func() {}, nil
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	return &unix.SockaddrUnix{Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))}, func() { _ = unix.Close(dir) }, nil
}

func (s *Server) serve(c *conn) {
	var req Request
	files, err := c.receive(&req)
	if err != nil {
		_ = c.Close()
		return
	}
	if req.Verb == VerbWatch {
		closeAll(files)
		s.watch(c)
		return
	}
	defer c.Close()
	res := Response{Pause: s.pause}
	step.Point("shim." + req.Verb + ".before")
	err = s.handle(req, files, &res)
	step.Point("shim." + req.Verb + ".after")
	if err != nil {
		res.Error = errorText(err)
		var coded *Error
		if errors.As(err, &coded) {
			res.Code = coded.Code
		}
	}
	if err := c.send(res); err != nil && req.Verb == VerbCreate && res.Error == "" {
		s.orphaned(req.Create.ID)
	}
	if req.Verb == VerbShutdown && res.Error == "" {
		close(s.quit)
	}
}

func (s *Server) handle(req Request, files []*os.File, res *Response) error {
	take := func(want bool) *os.File {
		if !want || len(files) == 0 {
			return nil
		}
		f := files[0]
		files = files[1:]
		return f
	}
	defer func() { closeAll(files) }()
	switch req.Verb {
	case VerbCreate:
		if req.Create == nil || req.Create.ID == "" {
			return &Error{CodeInvalid, "create without a container"}
		}
		log := take(req.Create.Log)
		pid, err := s.create(*req.Create, log, files)
		res.PID = pid
		return err
	case VerbShutdown:
		s.mu.Lock()
		defer s.mu.Unlock()
		for id, c := range s.containers {
			select {
			case <-c.exited:
			default:
				return &Error{CodeState, "container " + id + " runs"}
			}
		}
		select {
		case <-s.quit:
			return &Error{CodeState, "is shutting down already"}
		default:
		}
		if s.pause > 0 {
			_ = s.reaper.kill(s.pause, unix.SIGKILL)
		}
		return nil
	}
	c := s.container(req.ID)
	if c == nil {
		return &Error{CodeNotFound, "no container " + req.ID}
	}
	switch req.Verb {
	case VerbStart:
		return c.start()
	case VerbKill:
		return c.kill(req.Signal, req.All)
	case VerbDelete:
		select {
		case <-c.exited:
		default:
			return &Error{CodeState, "container runs"}
		}
		s.mu.Lock()
		if s.containers[req.ID] == c {
			s.kills.gone += c.snapshot().OOMKills
			delete(s.containers, req.ID)
		}
		s.mu.Unlock()
		return nil
	case VerbAttach:
		in, out, errs := take(req.Stdin), take(req.Stdout), take(req.Stderr)
		return c.attach(in, out, errs)
	case VerbCloseStdin:
		c.closeStdin()
		return nil
	case VerbResize:
		return c.resize(req.Width, req.Height)
	case VerbReopenLog:
		f := take(true)
		if f == nil {
			return &Error{CodeInvalid, "reopen-log without a file"}
		}
		if c.snapshot().Status == Exited {
			_ = f.Close()
			return &Error{CodeState, "container has exited"}
		}
		c.log.Reopen(f)
		return nil
	}
	return &Error{CodeInvalid, "unknown verb " + fmt.Sprintf("%.20q", req.Verb)}
}

// container looks a container up. One that is just being created, for a client that may have died since, is waited for.
func (s *Server) container(id string) *container {
	s.mu.Lock()
	c, making := s.containers[id], s.making[id]
	s.mu.Unlock()
	if c == nil && making != nil {
		<-making
		s.mu.Lock()
		c = s.containers[id]
		s.mu.Unlock()
	}
	return c
}

// orphaned kills a container whose creator has gone before it heard of it: it has no record of it.
func (s *Server) orphaned(id string) {
	if c := s.container(id); c != nil {
		_ = c.kill(int(unix.SIGKILL), true)
	}
}

func (c *container) snapshot() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

func (s *Server) create(req CreateRequest, logFile *os.File, mounts []*os.File) (int, error) {
	s.mu.Lock()
	_, exists := s.containers[req.ID]
	if s.making[req.ID] != nil {
		exists = true
	}
	made := make(chan struct{})
	if !exists {
		if req.Slice != "" {
			s.kills.begin(req.MemoryDir)
		}
		s.making[req.ID] = made
		defer func() {
			s.mu.Lock()
			delete(s.making, req.ID)
			s.mu.Unlock()
			close(made)
		}()
	}
	s.mu.Unlock()
	if exists {
		if logFile != nil {
			_ = logFile.Close()
		}
		return 0, &Error{CodeState, "container exists"}
	}
	c, theirs, err := s.newContainer(req, logFile)
	if err != nil {
		return 0, err
	}
	pid, err := s.helpers.create(req, theirs, mounts, func(pid int) {
		c.mu.Lock()
		c.state.PID = pid
		c.mu.Unlock()
		s.reaper.adopt(pid, c.ended) // before anybody can ask to kill it
		s.mu.Lock()
		s.containers[req.ID] = c
		s.mu.Unlock()
	})
	closeAll(theirs)
	if err != nil {
		c.abandon()
		return 0, err
	}
	step.Point("shim.connect.before")
	if err := c.connect(); err != nil {
		_ = c.kill(int(unix.SIGKILL), true)
		return 0, err
	}
	s.tell(c.snapshot())
	return pid, nil
}

// tell queues a change for every watcher.
func (s *Server) tell(state State) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		w.put(Response{State: &state})
	}
}

func (w *watcher) put(r Response) {
	w.mu.Lock()
	w.queue = append(w.queue, r)
	w.cond.Signal()
	w.mu.Unlock()
}

// watch sends the state of each container, then that this was all, then each change until the client has gone.
func (s *Server) watch(c *conn) {
	w := &watcher{conn: c}
	w.cond.L = &w.mu
	s.mu.Lock()
	for _, ctr := range s.containers {
		state := ctr.snapshot()
		w.queue = append(w.queue, Response{State: &state})
	}
	w.queue = append(w.queue, Response{Synced: true, Pause: s.pause})
	s.watchers[w] = struct{}{}
	s.mu.Unlock()
	go func() {
		var ignored Request
		_, _ = c.receive(&ignored) // returns when the client closes
		w.mu.Lock()
		w.gone = true
		w.cond.Signal()
		w.mu.Unlock()
	}()
	for {
		w.mu.Lock()
		for len(w.queue) == 0 && !w.gone {
			w.cond.Wait()
		}
		queue, gone := w.queue, w.gone
		w.queue = nil
		w.mu.Unlock()
		for _, r := range queue {
			if err := c.send(r); err != nil {
				gone = true
				break
			}
		}
		if gone {
			break
		}
	}
	s.mu.Lock()
	delete(s.watchers, w)
	s.mu.Unlock()
	_ = c.Close()
}

package shim

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/step"
)

// ExitFile is the file in a container's bundle that keeps its last State once it has exited: it outlives the shim.
const ExitFile = "exit.json"

// drainTime is how long the output of a container whose processes are all gone is waited for.
const drainTime = 2 * time.Second

// container is one container of this shim.
type container struct {
	req  CreateRequest
	shim *Server

	mu      sync.Mutex
	state   State
	ours    []*os.File // until the container is connected: the read ends of its output
	stdin   *os.File   // write end, or the terminal; nil when there is none or it was closed
	console *os.File
	exited  chan struct{} // closed when the exit has been told

	log            *Log
	stdout, stderr sinks
	pumps          sync.WaitGroup
}

// newContainer makes the ends of the container's streams and returns those that its init gets: stdin, stdout and
// stderr, or one socket which its terminal comes through. Our own wait in c.ours until connect or abandon.
func (s *Server) newContainer(req CreateRequest, logFile *os.File) (c *container, theirs []*os.File, err error) {
	c = &container{req: req, shim: s, log: NewLog(logFile), exited: make(chan struct{})}
	c.state = State{ID: req.ID, Status: Created}
	defer func() {
		if err != nil {
			closeAll(theirs)
			c.abandon()
		}
	}()
	if req.Terminal {
		our, their, err := socketpair()
		if err != nil {
			return c, nil, err
		}
		c.ours = []*os.File{os.NewFile(uintptr(our), "console")}
		return c, []*os.File{os.NewFile(uintptr(their), "console")}, nil
	}
	if req.Stdin {
		r, w, err := pipe(true)
		if err != nil {
			return c, theirs, err
		}
		theirs, c.stdin = append(theirs, r), w
	} else {
		null, err := os.Open(os.DevNull)
		if err != nil {
			return c, theirs, err
		}
		theirs = append(theirs, null)
	}
	for range 2 {
		r, w, err := pipe(false)
		if err != nil {
			return c, theirs, err
		}
		theirs, c.ours = append(theirs, w), append(c.ours, r)
	}
	return c, theirs, nil
}

// connect begins to copy the output of a container that has been created.
func (c *container) connect() error {
	if c.req.Terminal {
		fd, err := fdOf(c.ours[0])
		if err != nil {
			return err
		}
		defer c.ours[0].Close()
		return c.takeConsole(fd)
	}
	c.pump(c.ours[0], "stdout", &c.stdout)
	c.pump(c.ours[1], "stderr", &c.stderr)
	return nil
}

// abandon closes what newContainer has made for a container that did not come to be.
func (c *container) abandon() {
	closeAll(c.ours)
	if c.stdin != nil {
		_ = c.stdin.Close()
	}
	c.log.Close()
}

// pipe returns a pipe of which one end is for the container, blocking, and the other ours, driven by the poller.
func pipe(weWrite bool) (r, w *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	ours := p[0]
	if weWrite {
		ours = p[1]
	}
	_ = unix.SetNonblock(ours, true)
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe"), nil
}

// takeConsole receives the master of the container's terminal, which its init has made inside.
func (c *container) takeConsole(fd int) error {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	master, err := ReceiveConsole(dup)
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.console = master
	if c.req.Stdin {
		c.stdin = master
	}
	c.mu.Unlock()
	c.pump(master, "stdout", &c.stdout)
	return nil
}

// ReceiveConsole takes the master of a terminal from a socket, on which libcontainer's init sends it, and closes the
// socket. The master is driven by the poller.
func ReceiveConsole(fd int) (*os.File, error) {
	conn, err := newConn(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	defer conn.Close()
	_ = conn.f.SetReadDeadline(time.Now().Add(10 * time.Second))
	master, err := conn.receiveFile()
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return master, nil
}

func (c *container) pump(src *os.File, name string, attached *sinks) {
	c.pumps.Add(1)
	go func() {
		defer c.pumps.Done()
		pump(src, c.log.stream(name), attached)
		attached.end()
		if !c.req.Terminal {
			_ = src.Close()
		}
	}()
}

// start lets the parked init go on: it waits for its fifo to be opened for reading, writes one byte, and executes the
// container's program (libcontainer's protocol between create and start).
func (c *container) start() error {
	err := c.release()
	if err == nil {
		c.shim.tell(c.snapshot())
	}
	return err
}

func (c *container) release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Status != Created {
		return &Error{CodeState, "container is " + string(c.state.Status)}
	}
	fifo := filepath.Join(c.req.StateRoot, c.req.ID, "exec.fifo")
	fd, err := unix.Open(fifo, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: fifo, Err: err}
	}
	defer unix.Close(fd)
	if err := awaitByte(fd, func() bool { return alive(c.state.PID) }); err != nil {
		return err
	}
	_ = os.Remove(fifo)
	c.state.Status = Running
	return nil
}

// awaitByte reads the byte that the init at the other end of a fifo writes before it executes the container's program. That may end
// as soon as it has begun: an init that is not alive any more has written its byte, if it ever does.
func awaitByte(fifo int, alive func() bool) error {
	fds := []unix.PollFd{{Fd: int32(fifo), Events: unix.POLLIN}}
	for gone := false; ; gone = !alive() {
		n, err := unix.Poll(fds, 100)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if n > 0 {
			break
		}
		if gone && err == nil {
			return &Error{CodeState, "container ended before it was started"}
		}
	}
	var b [1]byte
	if n, err := unix.Read(fifo, b[:]); n != 1 {
		return &Error{CodeState, fmt.Sprintf("container ended before it was started (%v)", err)}
	}
	return nil
}

func (c *container) kill(sig int, all bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Status == Exited {
		return nil
	}
	if all {
		if err := KillCgroup(c.req.CgroupDir); err != nil {
			return err
		}
		sig = int(unix.SIGKILL) // init may have been moved out of its cgroup
	}
	return c.shim.reaper.kill(c.state.PID, unix.Signal(sig))
}

// ended is called by the reaper with the end of init. What it leaves behind in its cgroup goes with it.
func (c *container) ended(status unix.WaitStatus) {
	at := time.Now()
	kills := c.shim.oomKills(c, status) // at once: systemd removes a scope whose last process has ended
	step.Point("shim.exit.before")
	_ = KillCgroup(c.req.CgroupDir)
	drained := make(chan struct{})
	go func() { c.pumps.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(drainTime): // some process elsewhere holds the pipe
	}
	c.mu.Lock()
	c.state.Status, c.state.ExitCode, c.state.Exited = Exited, exitCode(status), at
	c.state.OOMKills, c.state.LogDropped = kills, c.log.Dropped()
	state := c.state
	if c.stdin != nil && c.stdin != c.console {
		_ = c.stdin.Close()
	}
	c.stdin = nil
	if c.console != nil {
		_ = c.console.Close()
	}
	c.mu.Unlock()
	c.log.Close()
	step.Point("shim.exit-file.before")
	if err := writeExit(c.req.Bundle, state); err != nil {
		fmt.Fprintln(os.Stderr, "exit of", c.req.ID, "not kept:", err)
	}
	step.Point("shim.tell-exit.before")
	c.shim.tell(state)
	close(c.exited)
}

func writeExit(bundle string, s State) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := filepath.Join(bundle, "."+ExitFile)
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(bundle, ExitFile))
}

// ReadExit returns the state that a shim kept of a container that has exited.
func ReadExit(bundle string) (*State, error) {
	f, err := os.Open(filepath.Join(bundle, ExitFile))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, MaxMessage))
	if err != nil {
		return nil, err
	}
	var s State
	if err := decode(data, &s); err != nil {
		return nil, err
	}
	return &s, nil
}

// attach adds a client's streams. Its stdin is copied until it ends.
func (c *container) attach(stdin, stdout, stderr *os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Status == Exited {
		closeFiles(stdin, stdout, stderr)
		return &Error{CodeState, "container has exited"}
	}
	if stdout != nil {
		c.stdout.add(stdout)
	}
	if stderr != nil {
		c.stderr.add(stderr)
	}
	if stdin != nil {
		if c.stdin == nil {
			_ = stdin.Close()
		} else {
			go feed(c.stdin, stdin, func() {
				if c.req.StdinOnce && !c.req.Terminal {
					c.closeStdin()
				}
			})
		}
	}
	return nil
}

func (c *container) closeStdin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stdin != nil && c.stdin != c.console {
		_ = c.stdin.Close()
		c.stdin = nil
	}
}

func (c *container) resize(width, height uint16) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.console == nil {
		return &Error{CodeState, "container has no terminal"}
	}
	return SetSize(c.console, width, height)
}

// SetSize tells a terminal how large it is, in characters.
func SetSize(tty *os.File, width, height uint16) error {
	fd, err := fdOf(tty)
	if err != nil {
		return err
	}
	return os.NewSyscallError("ioctl TIOCSWINSZ", unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width}))
}

func closeFiles(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// receiveFile reads one message that is only there for the descriptor beside it.
func (c *conn) receiveFile() (*os.File, error) {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		buf     [4096]byte
		oob     [64]byte
		n, oobn int
		rerr    error
	)
	err = raw.Read(func(fd uintptr) bool {
		n, oobn, _, _, rerr = unix.Recvmsg(int(fd), buf[:], oob[:], unix.MSG_CMSG_CLOEXEC)
		return rerr != unix.EAGAIN
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return nil, err
	}
	files, err := parseFiles(oob[:oobn], true)
	if err != nil {
		return nil, err
	}
	if len(files) != 1 {
		closeAll(files)
		return nil, fmt.Errorf("%d descriptors came with %d bytes, not one", len(files), n)
	}
	return files[0], nil
}

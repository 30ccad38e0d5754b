package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// MaxMessage bounds one message, in bytes. Messages are packets of a SOCK_SEQPACKET socket with up to [maxFiles]
// descriptors beside them, of which [MaxMounts] are mounts.
const (
	MaxMessage = 128 << 10
	MaxMounts  = 240
	maxFiles   = MaxMounts + 4 // the kernel takes 253 (SCM_MAX_FD)
)

// Verbs of a shim.
const (
	VerbCreate     = "create"
	VerbStart      = "start"
	VerbKill       = "kill"
	VerbDelete     = "delete"
	VerbAttach     = "attach"
	VerbResize     = "resize"
	VerbReopenLog  = "reopen-log"
	VerbWatch      = "watch"
	VerbShutdown   = "shutdown"
	VerbCloseStdin = "close-stdin"
)

// Request is one message to a shim. Which fields count depends on Verb.
type Request struct {
	Verb   string
	ID     string         `json:",omitempty"` // container
	Create *CreateRequest `json:",omitempty"`
	Signal int            `json:",omitempty"` // kill
	All    bool           `json:",omitempty"` // kill: SIGKILL every process of the container's cgroup
	Width  uint16         `json:",omitempty"` // resize
	Height uint16         `json:",omitempty"`
	// Streams says which descriptors follow with attach, in this order: stdin, stdout, stderr.
	Stdin, Stdout, Stderr bool `json:",omitempty"`
}

// CreateRequest is what a shim needs to have a container created. With it comes the log's descriptor, if Log is set.
type CreateRequest struct {
	ID        string
	Bundle    string // directory of config.json; the exit file is written there
	StateRoot string // libcontainer's directory: its state of the container is in StateRoot/ID
	// SeccompRecords is a directory for compiled seccomp profiles, which all shims share; "" has each process compile
	// its own.
	SeccompRecords string `json:",omitempty"`
	// CgroupDir is a directory of cgroupfs that holds all processes of the container (v2: its cgroup; v1: its cgroup in
	// one hierarchy), to kill what is left when init has exited.
	CgroupDir string
	// MemoryDir is where the out-of-memory counter is (v2: the same; v1: in the memory hierarchy).
	MemoryDir string
	// Slice is the slice of systemd that the container's scope SCOPEPREFIX-ID.scope is to be in; "" where cgroups are
	// not systemd's.
	Slice       string `json:",omitempty"`
	ScopePrefix string `json:",omitempty"`
	// Trees are directories, and Sources mounts of the specification by their index, whose mounts come as descriptors after
	// the log's, in this order: the mount namespace of a lean shim is without them. Instead, HostMounts says that the
	// descriptor of a mount namespace comes, to create the container in.
	Trees      []string `json:",omitempty"`
	Sources    []int    `json:",omitempty"`
	HostMounts bool     `json:",omitempty"`
	Terminal   bool
	Stdin      bool
	StdinOnce  bool
	Log        bool
	// Deadline bounds the creation, in milliseconds from now.
	DeadlineMS int64
}

// Status of a container as its shim sees it.
type Status string

// The statuses, in the order in which a container has them.
const (
	Created Status = "created"
	Running Status = "running"
	Exited  Status = "exited"
)

// State of one container.
type State struct {
	ID       string
	PID      int
	Status   Status
	ExitCode int       `json:",omitempty"` // 128 + signal where a signal ended it
	Exited   time.Time `json:",omitzero"`
	// OOMKills counts the processes of the container that the kernel killed for memory.
	OOMKills uint64 `json:",omitempty"`
	// LogDropped counts the bytes of output that could not be written to the log (no space left).
	LogDropped uint64 `json:",omitempty"`
}

// Response is a shim's answer. To watch, it is the first of many: one State per change.
type Response struct {
	Error string `json:",omitempty"`
	Code  string `json:",omitempty"` // an errno-like class, see [Error]
	PID   int    `json:",omitempty"`
	State *State `json:",omitempty"`
	// Pause is the process that is PID 1 of the pod's shared PID namespace, in the first answer of a shim.
	Pause int `json:",omitempty"`
	// Synced ends the list of states that a watch begins with.
	Synced bool `json:",omitempty"`
}

// Error classes of Response.Code.
const (
	CodeNotFound = "not found" // no such container in this shim
	CodeState    = "state"     // not in a state that allows it
	CodeInvalid  = "invalid"   // the request makes no sense
	CodeDeadline = "deadline"  // not done by the deadline that came with the request
)

// maxError bounds the text of an error in an answer, in bytes: it may quote what was asked for, and an answer that does not
// fit into a message would never come.
const maxError = 8 << 10

func errorText(err error) string {
	text := err.Error()
	if len(text) > maxError {
		text = text[:maxError] + "…"
	}
	return text
}

// Error is an error that a shim answered.
type Error struct{ Code, Message string }

func (e *Error) Error() string { return e.Message }

// conn is one end of a SOCK_SEQPACKET unix socket. The os package's poller drives it, so that a waiting goroutine holds
// no thread, without the net package in the shim.
type conn struct {
	f *os.File
	// blocking leaves received descriptors as they are, for a process that hands them on to a container. Otherwise
	// they are made non-blocking, so that waiting for one holds no thread.
	blocking bool
}

func newConn(fd int) (*conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return &conn{f: os.NewFile(uintptr(fd), "shim socket")}, nil
}

func (c *conn) Close() error { return c.f.Close() }

// send writes one message with files beside it.
func (c *conn) send(msg any, files ...*os.File) error {
	data, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if len(data) > MaxMessage {
		return fmt.Errorf("message of %d bytes is over the %d allowed", len(data), MaxMessage)
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			if fds[i], err = fdOf(f); err != nil {
				return err
			}
		}
		oob = unix.UnixRights(fds...)
	}
	raw, err := c.f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Write(func(fd uintptr) bool {
		serr = unix.Sendmsg(int(fd), data, oob, nil, unix.MSG_NOSIGNAL)
		return serr != unix.EAGAIN
	})
	if err == nil {
		err = serr
	}
	return err
}

// receive reads one message into msg and returns the files beside it, close-on-exec, which are then the caller's.
// io.EOF means that the other side has closed.
func (c *conn) receive(msg any) ([]*os.File, error) {
	raw, err := c.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var (
		buf, oob  []byte
		n, oobn   int
		recvflags int
		rerr      error
	)
	err = raw.Read(func(fd uintptr) bool {
		// The length first: a shim waits here for days and must not hold a buffer of the largest size meanwhile.
		n, _, _, _, rerr = unix.Recvmsg(int(fd), nil, nil, unix.MSG_PEEK|unix.MSG_TRUNC)
		if rerr != nil {
			return rerr != unix.EAGAIN
		}
		buf, oob = make([]byte, min(n, MaxMessage+1)), make([]byte, unix.CmsgSpace(4*maxFiles))
		n, oobn, recvflags, _, rerr = unix.Recvmsg(int(fd), buf, oob, unix.MSG_CMSG_CLOEXEC)
		return rerr != unix.EAGAIN
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return nil, err
	}
	files, err := parseFiles(oob[:oobn], !c.blocking)
	if err == nil && recvflags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || n > MaxMessage {
		err = fmt.Errorf("message is over %d bytes or has more than %d descriptors", MaxMessage, maxFiles)
	}
	if err == nil && n == 0 && len(files) == 0 {
		return nil, io.EOF
	}
	if err == nil {
		err = decode(buf[:n], msg)
	}
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// fdOf returns the descriptor of f without making it blocking, as [os.File.Fd] would.
func fdOf(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	n := -1
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

func decode(data []byte, msg any) error {
	if err := json.Unmarshal(data, msg); err != nil {
		return fmt.Errorf("message: %w", err)
	}
	return nil
}

func parseFiles(oob []byte, nonblock bool) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // credentials and the like carry no descriptor
		}
		for _, fd := range fds {
			if nonblock {
				_ = unix.SetNonblock(fd, true)
			}
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if len(files) > maxFiles {
		closeAll(files)
		return nil, errors.New("too many descriptors")
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// socketpair returns two connected SOCK_SEQPACKET sockets, close-on-exec.
func socketpair() (int, int, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, os.NewSyscallError("socketpair", err)
	}
	return p[0], p[1], nil
}

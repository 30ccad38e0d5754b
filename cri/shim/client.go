package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Client speaks to the shim at a socket. It holds no connection: each call makes its own.
type Client struct{ Socket string }

// ErrGone is in the chain of the error of a call to a shim that is not there, or ended during the call: it does nothing
// and tells nothing any more. One that only does not answer may still.
var ErrGone = errors.New("the shim has ended")

// gone attaches [ErrGone] to errors of a socket which nobody is behind.
func gone(err error) error {
	for _, e := range []error{io.EOF, unix.ENOENT, unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w (%w)", ErrGone, err)
		}
	}
	return err
}

func (c Client) dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	addr, done, err := address(c.Socket)
	if err == nil {
		err = unix.Connect(fd, addr)
		done()
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("connect to shim at %s: %w", c.Socket, gone(err))
	}
	conn, err := newConn(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return conn, nil
}

func (c Client) call(ctx context.Context, req Request, files ...*os.File) (*Response, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := conn.send(req, files...); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("shim %s: %w", req.Verb, gone(err))
	}
	var res Response
	extra, err := conn.receive(&res)
	closeAll(extra)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("shim %s: %w", req.Verb, gone(err))
	}
	if res.Error != "" {
		return nil, &Error{res.Code, res.Error}
	}
	return &res, nil
}

// Create has a container created and returns the pid of its init, which waits to be started. logFile, opened for
// appending, may be nil. mounts are those that the request names, or the mount namespace.
func (c Client) Create(ctx context.Context, req CreateRequest, logFile *os.File, mounts ...*os.File) (int, error) {
	if d, ok := ctx.Deadline(); ok {
		req.DeadlineMS = max(1, time.Until(d).Milliseconds())
	}
	req.Log = logFile != nil
	var files []*os.File
	if logFile != nil {
		files = append(files, logFile)
	}
	files = append(files, mounts...)
	res, err := c.call(ctx, Request{Verb: VerbCreate, ID: req.ID, Create: &req}, files...)
	if err != nil {
		return 0, err
	}
	return res.PID, nil
}

// Start has a created container run its program.
func (c Client) Start(ctx context.Context, id string) error {
	_, err := c.call(ctx, Request{Verb: VerbStart, ID: id})
	return err
}

// Signal sends a signal to a container's init. One that has exited is no error.
func (c Client) Signal(ctx context.Context, id string, sig int) error {
	_, err := c.call(ctx, Request{Verb: VerbKill, ID: id, Signal: sig})
	return err
}

// KillAll sends SIGKILL to every process of a container.
func (c Client) KillAll(ctx context.Context, id string) error {
	_, err := c.call(ctx, Request{Verb: VerbKill, ID: id, All: true})
	return err
}

// Delete has the shim forget a container that has exited.
func (c Client) Delete(ctx context.Context, id string) error {
	_, err := c.call(ctx, Request{Verb: VerbDelete, ID: id})
	return err
}

// Attach hands the shim the ends of a client's streams; nil ones are left out. They stay the caller's to close.
func (c Client) Attach(ctx context.Context, id string, stdin, stdout, stderr *os.File) error {
	var files []*os.File
	for _, f := range []*os.File{stdin, stdout, stderr} {
		if f != nil {
			files = append(files, f)
		}
	}
	_, err := c.call(ctx, Request{Verb: VerbAttach, ID: id, Stdin: stdin != nil, Stdout: stdout != nil, Stderr: stderr != nil}, files...)
	return err
}

// Resize sets the size of a container's terminal.
func (c Client) Resize(ctx context.Context, id string, width, height uint16) error {
	_, err := c.call(ctx, Request{Verb: VerbResize, ID: id, Width: width, Height: height})
	return err
}

// ReopenLog has the shim go on in another file.
func (c Client) ReopenLog(ctx context.Context, id string, f *os.File) error {
	_, err := c.call(ctx, Request{Verb: VerbReopenLog, ID: id}, f)
	return err
}

// Shutdown ends the shim. It refuses while a container runs.
func (c Client) Shutdown(ctx context.Context) error {
	_, err := c.call(ctx, Request{Verb: VerbShutdown})
	return err
}

// Watch is a connection on which a shim tells what happens to its containers.
type Watch struct {
	conn  *conn
	pause int
	once  sync.Once
}

// Watch connects and returns the state of every container now; Next then gives each change.
func (c Client) Watch() (*Watch, []State, error) {
	conn, err := c.dial()
	if err != nil {
		return nil, nil, err
	}
	if err := conn.send(Request{Verb: VerbWatch}); err != nil {
		_ = conn.Close()
		return nil, nil, err
	}
	w := &Watch{conn: conn}
	_ = conn.f.SetReadDeadline(time.Now().Add(10 * time.Second))
	var states []State
	for {
		var r Response
		if _, err := conn.receive(&r); err != nil {
			_ = conn.Close()
			return nil, nil, fmt.Errorf("watch shim at %s: %w", c.Socket, err)
		}
		if r.State != nil {
			states = append(states, *r.State)
		}
		if r.Synced {
			w.pause = r.Pause
			break
		}
	}
	_ = conn.f.SetReadDeadline(time.Time{})
	return w, states, nil
}

// Pause is the process that is PID 1 of the pod's shared PID namespace, or 0.
func (w *Watch) Pause() int { return w.pause }

// Next waits for the next change. Its error means that the shim has ended, or that the watch was closed.
func (w *Watch) Next() (State, error) {
	for {
		var r Response
		if _, err := w.conn.receive(&r); err != nil {
			return State{}, err
		}
		if r.State != nil {
			return *r.State, nil
		}
	}
}

// Close ends the watch.
func (w *Watch) Close() { w.once.Do(func() { _ = w.conn.Close() }) }

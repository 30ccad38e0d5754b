package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
)

// What ExecSync keeps of stdout and stderr, in bytes; the rest is read and dropped. The CRI allows 16 MiB for each
// stream, and the kubelet takes 16 MiB for both, but a byte that is kept costs four before it is sent, and probes that
// write without end come from many pods at once (CVE-2022-1708, CVE-2022-31030). So all calls together keep maxKept,
// beyond keptEach that each may have in any case; kubelets look at the first 10 KiB.
const (
	maxKept       = 8 << 20
	keptEach      = 64 << 10
	maxExecOutput = maxKept + keptEach
)

// maxExecs bounds the execs and attached clients of one pod.
const maxExecs = 100

// ExecSync runs a command in a running container and returns what it wrote, all that was written when it ended, and its
// exit code. Processes that it left in the background are not waited for. A timeout above zero kills it, with all that
// it has started, and returns an error of the class context.DeadlineExceeded.
func (m *Manager) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (stdout, stderr []byte, exitCode int32, err error) {
	if timeout > 0 && len(cmd) > 0 { // its arguments may be passwords, and errors are logged
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("command %q timed out after %s: %w", cmd[0], timeout, context.DeadlineExceeded))
		defer cancel()
	}
	room := &budget{left: maxExecOutput, all: &m.execRoom}
	defer room.release()
	out, errs := &bounded{room: room}, &bounded{room: room}
	code, err := m.Exec(ctx, id, cmd, Streams{Stdout: out, Stderr: errs})
	if err != nil {
		return nil, nil, 0, err
	}
	return out.bytes(), errs.bytes(), int32(code), nil
}

// pool is what all budgets share.
type pool struct {
	mu   sync.Mutex
	used int
}

func (p *pool) take(n int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n = min(n, maxKept-p.used)
	p.used += n
	return n
}

func (p *pool) give(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used -= n
}

// budget is what the streams of one exec may keep together.
type budget struct {
	all *pool

	mu     sync.Mutex
	left   int
	kept   int
	shared int // of it, from the pool
}

// take says how many of n bytes may be kept.
func (b *budget) take(n int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n = min(n, b.left)
	free := min(n, max(0, keptEach-b.kept))
	more := b.all.take(n - free)
	b.left -= free + more
	b.kept += free + more
	b.shared += more
	return free + more
}

func (b *budget) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all.give(b.shared)
	b.shared = 0
}

// bounded keeps what fits into its budget and drops the rest. It keeps pieces: one array that grows would be copied, and
// its former selves be garbage, several times over.
type bounded struct {
	room   *budget
	pieces [][]byte
}

func (b *bounded) Write(p []byte) (int, error) {
	keep := p[:b.room.take(len(p))]
	if last := len(b.pieces) - 1; last >= 0 {
		n := min(len(keep), cap(b.pieces[last])-len(b.pieces[last]))
		b.pieces[last] = append(b.pieces[last], keep[:n]...)
		keep = keep[n:]
	}
	if len(keep) > 0 {
		size := 1 << 10
		if len(b.pieces) > 0 {
			size = 64 << 10
		}
		b.pieces = append(b.pieces, append(make([]byte, 0, max(size, len(keep))), keep...))
	}
	return len(p), nil
}

func (b *bounded) bytes() []byte { return slices.Concat(b.pieces...) }

// Exec runs a command in a running container with the streams of a client, and returns its exit code. When ctx ends, it
// is killed with all that it has started.
func (m *Manager) Exec(ctx context.Context, id string, cmd []string, s Streams) (int, error) {
	if len(cmd) == 0 {
		return 0, fmt.Errorf("cmd is empty: %w", errdefs.ErrInvalidArgument)
	}
	c, err := m.container(id)
	if err != nil {
		return 0, err
	}
	if v := c.view.Load(); v.State != cri.ContainerState_CONTAINER_RUNNING {
		return 0, failedPrecondition("container %s is %s, not running", c.rec.ID, stateName(v.State))
	}
	done, err := c.pod.session()
	if err != nil {
		return 0, err
	}
	defer done()
	base, err := c.execProcess()
	if err != nil {
		return 0, err
	}
	process, err := spec.ExecProcess(&specs.Spec{Process: base}, cmd, s.TTY)
	if err != nil {
		return 0, err
	}
	data, err := json.Marshal(process)
	if err != nil {
		return 0, err
	}
	dirs, err := cgroupDirs(cgroups.Path(c.rec.Cgroup))
	if err != nil {
		return 0, err
	}
	server, err := m.execs.get()
	if err != nil {
		return 0, err
	}
	req := shim.ExecRequest{
		ID: c.rec.ID, StateRoot: m.stateRoot(), Process: data, Terminal: s.TTY,
		CgroupDir: dirs.kill, CgroupController: dirs.controller,
	}
	var code int
	if s.TTY {
		code, err = execTTY(ctx, server, req, s)
	} else {
		code, err = execPipes(ctx, server, req, s)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		err = context.Cause(ctx)
	case err != nil:
		err = c.execFailed(err)
	}
	return code, err
}

// exitFollows is how long after an exec that failed because its container ends the exit may be told.
const exitFollows = 100 * time.Millisecond

// execFailed says why an exec could not run. One in a container that just ends fails in many ways, none of which says so.
func (c *container) execFailed(err error) error {
	wait := exitFollows
	if _, gone := os.Readlink(fmt.Sprintf("/proc/%d/root", c.view.Load().PID)); gone != nil {
		wait = exitIsTold // its init has ended, a zombie has no root either
	}
	select {
	case <-c.exited:
		return failedPrecondition("container %s has exited meanwhile (%v)", c.rec.ID, err)
	case <-time.After(wait):
		return ofShim(err)
	}
}

// killWait is how long a killed process may take to be gone.
const killWait = 10 * time.Second

// await waits for the process to end; when ctx ends first it is killed, and awaited all the same, for the caller may
// count on it being gone.
func await(ctx context.Context, e *shim.Execution) (int, error) {
	code, err := e.Wait(ctx)
	if err == nil || ctx.Err() == nil {
		return code, err
	}
	e.Kill()
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), killWait)
	defer cancel()
	if _, werr := e.Wait(late); werr != nil {
		return 0, errors.Join(context.Cause(ctx), werr)
	}
	return 0, context.Cause(ctx)
}

func execPipes(ctx context.Context, server *shim.ExecServer, req shim.ExecRequest, s Streams) (int, error) {
	var theirs, ours []*os.File
	defer func() { closeFiles(theirs); closeFiles(ours) }()
	add := func(wanted, weWrite bool) (*os.File, error) {
		if !wanted {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			theirs = append(theirs, null)
			return nil, err
		}
		r, w, err := shim.Pipe(weWrite)
		if err != nil {
			return nil, err
		}
		if weWrite {
			r, w = w, r
		}
		ours, theirs = append(ours, r), append(theirs, w)
		return r, nil
	}
	stdin, err := add(s.Stdin != nil, true)
	if err != nil {
		return 0, err
	}
	stdout, err := add(s.Stdout != nil, false)
	if err != nil {
		return 0, err
	}
	stderr, err := add(s.Stderr != nil, false)
	if err != nil {
		return 0, err
	}
	e, err := server.Start(ctx, req, theirs...)
	if err != nil {
		return 0, err
	}
	closeFiles(theirs)
	theirs = nil
	if stdin != nil {
		go func() { // ends when the client closes its side, or when the process has gone and stdin is closed below
			_, _ = io.Copy(stdin, s.Stdin)
			_ = stdin.Close()
		}()
	}
	var outputs sync.WaitGroup
	drainers := make([]*drainer, 0, 2)
	for _, o := range []struct {
		from *os.File
		to   io.Writer
	}{{stdout, s.Stdout}, {stderr, s.Stderr}} {
		if o.from != nil {
			d := &drainer{from: o.from, to: o.to}
			drainers = append(drainers, d)
			outputs.Go(d.run)
		}
	}
	code, err := await(ctx, e)
	for _, d := range drainers {
		d.finish()
	}
	finished := make(chan struct{})
	go func() { outputs.Wait(); close(finished) }()
	select {
	case <-finished:
	case <-ctx.Done(): // a client that has stopped reading, and then gone
	}
	return code, err
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// drainer copies a process's output to its client until the end of file, or, once the process has ended, until nothing
// more is in the pipe: a background child that holds the other end is not waited for.
type drainer struct {
	from *os.File
	to   io.Writer
}

func (d *drainer) run() {
	buf := make([]byte, 32<<10)
	for {
		n, err := d.from.Read(buf)
		if n > 0 {
			_, _ = d.to.Write(buf[:n]) // a client that has gone: the process must not block for it
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break // the process has ended
		}
		if err != nil {
			return
		}
	}
	raw, err := d.from.SyscallConn()
	if err != nil {
		return
	}
	// What it wrote is in the pipe by now. A child that goes on writing must not keep us longer than a pipe is large.
	size := 1 << 16
	_ = raw.Control(func(fd uintptr) {
		if n, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0); err == nil {
			size = n
		}
	})
	for size > 0 {
		n := 0
		_ = raw.Control(func(fd uintptr) {
			n, err = unix.Read(int(fd), buf[:min(len(buf), size)])
		})
		if n <= 0 || err != nil {
			return
		}
		_, _ = d.to.Write(buf[:n])
		size -= n
	}
}

// finish tells that the process has ended.
func (d *drainer) finish() { _ = d.from.SetReadDeadline(time.Unix(1, 0)) }

func execTTY(ctx context.Context, server *shim.ExecServer, req shim.ExecRequest, s Streams) (int, error) {
	socket, receive, abandon, err := shim.ConsolePair()
	if err != nil {
		return 0, err
	}
	e, err := server.Start(ctx, req, socket)
	_ = socket.Close()
	if err != nil {
		abandon()
		return 0, err
	}
	master, err := receive()
	if err != nil {
		gone, cancel := context.WithCancelCause(ctx)
		cancel(err)
		return await(gone, e)
	}
	defer master.Close()
	if s.Stdin != nil {
		go func() { _, _ = io.Copy(master, s.Stdin) }()
	}
	stop := resizeLoop(s.Resize, func(size TerminalSize) error { return shim.SetSize(master, size.Width, size.Height) })
	defer stop()
	finished := make(chan struct{})
	if s.Stdout != nil {
		d := &drainer{from: master, to: s.Stdout}
		go func() { d.run(); close(finished) }()
		defer d.finish()
	} else {
		close(finished)
	}
	code, err := await(ctx, e)
	if s.Stdout != nil {
		_ = master.SetReadDeadline(time.Unix(1, 0))
	}
	select {
	case <-finished:
	case <-ctx.Done():
	}
	return code, err
}

// resizeLoop follows a client's terminal until stop is called.
func resizeLoop(sizes <-chan TerminalSize, set func(TerminalSize) error) (stop func()) {
	done := make(chan struct{})
	go func() {
		for {
			select {
			case size, ok := <-sizes:
				if !ok {
					return
				}
				if size.Width > 0 && size.Height > 0 {
					_ = set(size) // the process may have gone
				}
			case <-done:
				return
			}
		}
	}()
	return sync.OnceFunc(func() { close(done) })
}

// session counts the execs and attached clients of a pod.
func (p *pod) session() (done func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sessions >= maxExecs {
		return nil, fmt.Errorf("pod sandbox %s has %d execs and attached clients: %w", p.rec.ID, p.sessions, errdefs.ErrResourceExhausted)
	}
	p.sessions++
	return func() {
		p.mu.Lock()
		p.sessions--
		p.mu.Unlock()
	}, nil
}

// Attach connects a client to a container's own streams, until its output ends or ctx does.
func (m *Manager) Attach(ctx context.Context, id string, s Streams) error {
	c, err := m.container(id)
	if err != nil {
		return err
	}
	if v := c.view.Load(); v.State != cri.ContainerState_CONTAINER_RUNNING && v.State != cri.ContainerState_CONTAINER_CREATED {
		return failedPrecondition("container %s is %s, not running", c.rec.ID, stateName(v.State))
	}
	done, err := c.pod.session()
	if err != nil {
		return err
	}
	defer done()
	if s.TTY {
		s.Stderr = nil // a terminal has one output
	}
	var theirs [3]*os.File
	var ours []*os.File
	defer func() { closeFiles(theirs[:]); closeFiles(ours) }()
	var outputs sync.WaitGroup
	var stdin *os.File
	if s.Stdin != nil {
		r, w, err := shim.Pipe(true)
		if err != nil {
			return err
		}
		theirs[0], stdin, ours = r, w, append(ours, w)
	}
	type copying struct {
		to   io.Writer
		from *os.File
	}
	var copies []copying
	for i, to := range []io.Writer{s.Stdout, s.Stderr} {
		if to == nil {
			continue
		}
		r, w, err := shim.Pipe(false)
		if err != nil {
			return err
		}
		theirs[i+1], ours = w, append(ours, r)
		copies = append(copies, copying{to, r})
	}
	if err := c.pod.shim().Attach(ctx, c.rec.ID, theirs[0], theirs[1], theirs[2]); err != nil {
		return fmt.Errorf("container %s: %w", c.rec.ID, ofShim(err))
	}
	closeFiles(theirs[:])
	theirs = [3]*os.File{}
	stop := resizeLoop(s.Resize, func(size TerminalSize) error {
		return c.pod.shim().Resize(ctx, c.rec.ID, size.Width, size.Height)
	})
	defer stop()
	ended := make(chan struct{})
	if stdin != nil {
		in := make(chan struct{})
		go func() {
			_, _ = io.Copy(stdin, s.Stdin)
			_ = stdin.Close()
			close(in)
		}()
		if len(copies) == 0 {
			outputs.Go(func() {
				select {
				case <-in:
				case <-c.exited:
				case <-ctx.Done():
				}
			})
		}
	}
	for _, cp := range copies {
		outputs.Go(func() {
			if _, err := io.Copy(cp.to, cp.from); err != nil {
				_ = cp.from.Close() // the client has gone: the shim drops it at its next write
			}
		})
	}
	go func() { outputs.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

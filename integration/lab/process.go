package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a long-running program of a node, with its output in a file.
type Process struct {
	Name string
	Log  string // path of its output

	cmd  *exec.Cmd
	out  *os.File
	done chan struct{}
}

// spawner starts processes from one thread that never ends. The kernel's parent-death signal, which makes sure that a
// test binary that is killed leaves no daemon behind, is sent when the thread that forked ends.
var spawner = sync.OnceValue(func() chan func() {
	calls := make(chan func())
	go func() {
		runtime.LockOSThread()
		for call := range calls {
			call()
		}
	}()
	return calls
})

// start runs a program in a process group of its own, so that a Ctrl-C at the terminal reaches only the test, which then
// cleans up. Output is appended to the log.
func start(name, log string, env []string, program string, args ...string) (*Process, error) {
	p, err := prepare(name, log, env, program, args...)
	if err != nil {
		return nil, err
	}
	started := make(chan error)
	spawner() <- func() { started <- p.cmd.Start() }
	if err := p.begun(<-started); err != nil {
		return nil, err
	}
	go p.wait()
	return p, nil
}

// prepare opens the log of a program that is to be started.
func prepare(name, log string, env []string, program string, args ...string) (*Process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	return &Process{Name: name, Log: log, cmd: cmd, out: out, done: make(chan struct{})}, nil
}

// begun closes what a program that was started, or was not, has its own copy of.
func (p *Process) begun(err error) error {
	_ = p.out.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	return nil
}

// wait returns when the program has ended.
func (p *Process) wait() {
	_ = p.cmd.Wait() // how it ended is in its ProcessState
	close(p.done)
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed once the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Alive tells whether the process still runs.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the process with SIGKILL and waits until it is gone. A process that has ended already is no error.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.Name, err)
	}
	<-p.done
	return nil
}

// Stop asks the process to end with SIGTERM, and kills it when it has not after ten seconds, which is an error.
func (p *Process) Stop() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.Name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
		return errors.Join(fmt.Errorf("%s does not end on SIGTERM", p.Name), p.Kill())
	}
}

// Tail is the end of the process's output, for messages.
func (p *Process) Tail(lines int) string { return Tail(p.Log, lines) }

// Tail is the end of a log, for messages.
func Tail(log string, lines int) string {
	text, err := os.ReadFile(log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// patience multiplies every wait: in an emulated machine all takes many times as long (BERTH_PATIENCE=10).
var patience = sync.OnceValue(func() time.Duration {
	n, err := strconv.Atoi(os.Getenv("BERTH_PATIENCE"))
	if err != nil || n < 1 {
		return 1
	}
	return time.Duration(n)
})

// Patience is how long to wait on this machine for what takes so long on another.
func Patience(within time.Duration) time.Duration { return within * patience() }

// ready polls until the probe succeeds. It fails at once, with the end of the output, when the process ends before.
func (p *Process) ready(ctx context.Context, within time.Duration, probe func(context.Context) error) error {
	within *= patience()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%v) before it was ready; its last lines:\n%s", p.Name, p.cmd.ProcessState, p.Tail(15))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %v: %w\n%s", p.Name, within, err, p.Tail(15))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Eventually polls a condition until it holds; the error of the last try tells why it did not.
func Eventually(ctx context.Context, within time.Duration, what string, try func(context.Context) error) error {
	within *= patience()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %v: %w", what, within, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/integration/lab"
)

// start starts a program that outlives this process, in a cgroup, by which it and all that it starts is found again. The log is
// where its output is added. Files are the program's from descriptor 3 on.
func (c *Cluster) start(name, cgroup, log string, nsenter []string, files []*os.File, program string, args ...string) (*process, error) {
	procs, err := procsFile(cgroup)
	if err != nil {
		return nil, err
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer func() { _ = out.Close() }()
	words := append([]string{"-c", `echo $$ > "$0" && exec "$@"`, procs}, nsenter...)
	cmd := exec.Command("/bin/sh", append(append(words, program), args...)...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = out, out, files
	// containerd finds its shim in PATH, which finds runc there.
	cmd.Env = append(os.Environ(), "PATH="+c.path("bin")+":"+os.Getenv("PATH"), "OTEL_TRACES_EXPORTER=none", "OTEL_SDK_DISABLED=true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, log: log, pid: cmd.Process.Pid, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // its log says how it ended
		close(p.ended)
	}()
	return p, nil
}

// process is a program that this process has started.
type process struct {
	name, log string
	pid       int
	ended     chan struct{}
}

// ready waits until a probe succeeds. A program that ends before, or takes too long, is the error, with the end of its log.
func (p *process) ready(ctx context.Context, within time.Duration, probe func(context.Context) error) error {
	within = lab.Patience(within)
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	last := errors.New("no probe has ended by then")
	for {
		err := probe(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil { // else it is what becomes of a probe whose time is over
			last = err
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s ended before it was ready. The end of %s:\n%s", p.name, p.log, lab.Tail(p.log, 15))
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready after %v: %w. The end of %s:\n%s", p.name, within, last, p.log, lab.Tail(p.log, 15))
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// run runs a command to its end; what it prints is the result, and part of an error.
func run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Kubectl runs kubectl as an administrator. Its error has what it said.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectl(ctx, "", args...)
}

// Apply has kubectl apply a manifest.
func (c *Cluster) Apply(ctx context.Context, manifest string) error {
	_, err := c.kubectl(ctx, manifest, "apply", "-f", "-")
	return err
}

func (c *Cluster) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.program("kubectl"), append([]string{"--kubeconfig", c.Kubeconfig(), "--cache-dir", c.path("kubectl-cache")}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return string(out), err
}

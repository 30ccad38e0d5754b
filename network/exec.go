package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

const (
	maxOutput = 1 << 20  // what a plugin may say on stdout
	maxStderr = 16 << 10 // what is kept of stderr
	maxQuoted = 512      // what an error quotes of either
	drain     = time.Second
	busyTries = 5
	busyWait  = 200 * time.Millisecond
)

// plugins runs CNI plugins for libcni.
type plugins struct {
	version.PluginDecoder
	log *slog.Logger
}

// FindInPath finds the program of a plugin. Unlike libcni's, it wants it executable.
func (*plugins) FindInPath(typ string, dirs []string) (string, error) {
	if err := validType(typ); err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	for _, dir := range dirs {
		file := filepath.Join(dir, typ)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("no plugin %q in %s: %w", typ, strings.Join(dirs, ":"), errdefs.ErrUnavailable)
}

// ExecPlugin runs a plugin until it ends or ctx does.
func (e *plugins) ExecPlugin(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	for try := 1; ; try++ {
		out, err := e.run(ctx, program, stdin, environ)
		if !errors.Is(err, syscall.ETXTBSY) || try == busyTries {
			return out, err
		}
		// It is being installed right now.
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(busyWait):
		}
	}
}

func (e *plugins) run(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program)
	// A group of its own, to kill it with what it has started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	running, _ := ctx.Value(runningKey{}).(*os.File)
	if running != nil {
		cmd.ExtraFiles = []*os.File{running}
	}
	kill := func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.Cancel = kill
	cmd.WaitDelay = drain
	stdout := &bounded{max: maxOutput, overflow: kill}
	stderr := &bounded{max: maxStderr}
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), stdout, stderr

	err := cmd.Start()
	if err == nil {
		if running != nil {
			noteRunning(running, cmd.Process.Pid)
		}
		err = cmd.Wait()
	}
	switch {
	case stdout.over:
		return nil, fmt.Errorf("more than %d bytes of output: %w", maxOutput, errdefs.ErrResourceExhausted)
	case ctx.Err() != nil && err != nil:
		return nil, fmt.Errorf("killed: %w%s", ctx.Err(), said("stderr", stderr.buf.Bytes()))
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // a process that it left behind holds its stdout
		if stderr.buf.Len() > 0 {
			e.log.Debug("cni plugin wrote to stderr", "plugin", program, "stderr", quote(stderr.buf.Bytes()))
		}
		return stdout.buf.Bytes(), nil
	}
	return nil, failure(err, stdout.buf.Bytes(), stderr.buf.Bytes())
}

// failure makes an error of what a plugin left that failed.
func failure(err error, stdout, stderr []byte) error {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err // could not be run
	}
	var e cnitypes.Error
	switch {
	case len(stdout) == 0:
		return fmt.Errorf("%w, no message%s", err, said("stderr", stderr))
	case json.Unmarshal(stdout, &e) != nil || (e.Msg == "" && e.Code == 0):
		return fmt.Errorf("%w%s%s", err, said("stdout", stdout), said("stderr", stderr))
	case e.Code == cnitypes.ErrTryAgainLater, e.Code == cnitypes.ErrPluginNotAvailable, e.Code == cnitypes.ErrLimitedConnectivity:
		return fmt.Errorf("%w (code %d): %w", &e, e.Code, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%w (code %d)%s", &e, e.Code, said("stderr", stderr))
}

func said(where string, data []byte) string {
	if len(data) == 0 {
		return ""
	}
	return ", " + where + ": " + quote(data)
}

// quote shows foreign text on one line.
func quote(data []byte) string {
	if data = bytes.TrimSpace(data); len(data) > maxQuoted {
		return fmt.Sprintf("%q…", data[:maxQuoted])
	}
	return fmt.Sprintf("%q", data)
}

// bounded keeps the first max bytes. What comes after is dropped; overflow, if not nil, is called then. The buffer is not
// embedded: io.Copy would find its ReadFrom, which has no bound.
type bounded struct {
	buf      bytes.Buffer
	max      int
	overflow func() error
	over     bool
}

func (b *bounded) Write(p []byte) (int, error) {
	room := b.max - b.buf.Len()
	if len(p) <= room {
		return b.buf.Write(p)
	}
	b.buf.Write(p[:room])
	if b.overflow != nil && !b.over {
		_ = b.overflow() // the process has ended by itself
	}
	b.over = true
	return len(p), nil
}

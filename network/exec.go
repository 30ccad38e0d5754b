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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/berth-run/berth/internal/step"
	"github.com/berth-run/berth/network/cni"
)

const (
	maxOutput = 1 << 20  // what a plugin may say on stdout
	maxStderr = 16 << 10 // what is kept of stderr
	maxQuoted = 512      // what an error quotes of either
	drain     = time.Second
	busyTries = 5
	busyWait  = 200 * time.Millisecond
)

// plugins runs CNI plugins for libcni: in this process where it can, and else their programs.
type plugins struct {
	version.PluginDecoder
	log       *slog.Logger
	inProcess *cni.Plugins
	exec      []string // types whose programs are run in any case; ExecAll is all
	programs  programs
}

// answered is what comes before the type of a plugin that is answered in process, where else is the path of its program.
const answered = "in-process:"

// typeOf is the type of the plugin that a program is of, or is answered in its stead.
func typeOf(program string) string { return strings.TrimPrefix(filepath.Base(program), answered) }

// FindInPath finds who answers a plugin.
func (e *plugins) FindInPath(typ string, dirs []string) (string, error) {
	if err := validType(typ); err != nil {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	file, err := findProgram(typ, dirs)
	if e.answers(typ, file) {
		return answered + typ, nil
	}
	return file, err
}

// answers says whether a plugin is answered in process: unless the node's program, if it has one, may do something else.
func (e *plugins) answers(typ, file string) bool {
	if !cni.Known(typ) || slices.Contains(e.exec, typ) || slices.Contains(e.exec, ExecAll) {
		return false
	}
	return file == "" || e.programs.reference(e.log, typ, file)
}

// InProcess are the types of plugins that are answered in process.
func InProcess() []string { return cni.Types() }

// findProgram finds the program of a plugin. Unlike libcni's FindInPath, it wants it executable.
func findProgram(typ string, dirs []string) (string, error) {
	for _, dir := range dirs {
		file := filepath.Join(dir, typ)
		if st, err := os.Stat(file); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("no plugin %q in %s: %w", typ, strings.Join(dirs, ":"), errdefs.ErrUnavailable)
}

// ExecPlugin runs a plugin until it ends or ctx does. It passes a fail point before and after, so that a daemon can be killed
// anywhere in a chain.
func (e *plugins) ExecPlugin(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	point := "plugin." + typeOf(program) + "." + variable(environ, "CNI_COMMAND")
	step.Point(point + ".before")
	out, err := e.answer(ctx, program, stdin, environ)
	step.Point(point + ".after")
	return out, err
}

func (e *plugins) answer(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
	typ, ok := strings.CutPrefix(program, answered)
	if !ok {
		return e.execProgram(ctx, program, stdin, environ)
	}
	out, err := e.inProcess.Run(ctx, typ, stdin, environ, checked{e})
	var spec *cnitypes.Error
	switch {
	case errors.Is(err, cni.ErrProgram):
		file, ferr := findProgram(typ, binDirs(environ))
		if ferr != nil {
			return nil, fmt.Errorf("%w: %w", err, ferr)
		}
		e.log.Debug("program of a plugin is run", "plugin", file, "reason", err)
		return e.execProgram(ctx, file, stdin, environ)
	case errors.Is(err, cni.ErrConfig) && !classed(err) && settled(ctx, typ, variable(environ, "CNI_COMMAND")):
		e.log.Warn("a plugin refuses its configuration at DEL as it did at ADD: it has made nothing, and is passed over",
			"plugin", typ, "pod", variable(environ, "CNI_CONTAINERID"), "error", err)
		return nil, nil
	case errors.As(err, &spec):
		return nil, specFailure(spec.Code, err)
	}
	return out, err
}

// binDirs are the directories of programs that plugins are told.
func binDirs(environ []string) []string { return filepath.SplitList(variable(environ, "CNI_PATH")) }

// variable is the value of a variable that plugins are told, the first where there are more.
func variable(environ []string, name string) string {
	for _, kv := range environ {
		if value, ok := strings.CutPrefix(kv, name+"="); ok {
			return value
		}
	}
	return ""
}

func (e *plugins) execProgram(ctx context.Context, program string, stdin []byte, environ []string) ([]byte, error) {
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
	}
	return fmt.Errorf("%w%s", specFailure(e.Code, &e), said("stderr", stderr))
}

// specFailure gives an error of the specification its class, unless it has it from a plugin that was delegated to.
func specFailure(code uint, err error) error {
	if classed(err) {
		return err
	}
	return &codedError{specClass(code, err)}
}

// codedError is an error that says its code.
type codedError struct{ error }

func (e *codedError) Unwrap() error { return e.error }

// classed says whether an error is that of a plugin that was delegated to.
func classed(err error) bool {
	var coded *codedError
	return errors.As(err, &coded)
}

func specClass(code uint, err error) error {
	switch code {
	case cnitypes.ErrTryAgainLater, cnitypes.ErrPluginNotAvailable, cnitypes.ErrLimitedConnectivity:
		return fmt.Errorf("%w (code %d): %w", err, code, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%w (code %d)", err, code)
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

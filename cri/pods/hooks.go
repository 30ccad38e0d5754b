package pods

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Hooks of a container's specification come from CDI and from plugins of NRI, and have an end ([spec.BoundHooks]).
// libcontainer runs all but one kind of them, in the helper that creates the container and in its init. The last, poststop,
// is for when the container is gone, and nobody of libcontainer is there any more: the daemon runs it.

// poststopAll is what all of them may take together.
const poststopAll = 60 * time.Second

// poststop runs the container's poststop hooks once its processes and its cgroup are gone. Their failure is told and stops
// nothing, as the runtime specification wants it. A daemon that is killed meanwhile runs them again.
func (c *container) poststop(ctx context.Context) {
	if _, err := os.Stat(filepath.Join(c.m.stateRoot(), c.rec.ID)); errors.Is(err, fs.ErrNotExist) {
		return // it was never created, or undone by libcontainer, which has run them
	}
	data, err := os.ReadFile(c.dir("config.json"))
	if err != nil {
		return
	}
	var s specs.Spec
	if json.Unmarshal(data, &s) != nil || s.Hooks == nil || len(s.Hooks.Poststop) == 0 {
		return
	}
	state, err := json.Marshal(specs.State{Version: s.Version, ID: c.rec.ID, Status: specs.StateStopped, Bundle: c.dir(), Annotations: s.Annotations})
	if err != nil {
		return
	}
	// Whoever waits for the container's end may give up; the vendor's device is to be released all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), poststopAll)
	defer cancel()
	for _, h := range s.Hooks.Poststop {
		if err := runHook(ctx, h, state); err != nil {
			c.m.log.Warn("a poststop hook has failed", "id", c.rec.ID, "hook", h.Path, "error", err)
		}
	}
}

// runHook runs one program with the state on its standard input. What it leaves running does not hold us.
func runHook(ctx context.Context, h specs.Hook, state []byte) error {
	if h.Timeout != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(*h.Timeout)*time.Second)
		defer cancel()
	}
	out := &firstBytes{most: 4 << 10}
	cmd := exec.CommandContext(ctx, h.Path)
	cmd.Args, cmd.Env, cmd.Dir = h.Args, h.Env, "/"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(state), out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("has not ended in time: %q", out)
	}
	return fmt.Errorf("%w: %q", err, out)
}

// firstBytes keeps the beginning of what is written to it.
type firstBytes struct {
	bytes.Buffer
	most int
}

func (b *firstBytes) Write(p []byte) (int, error) {
	if room := b.most - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

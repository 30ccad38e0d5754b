package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// runTimeout is how long a program may take: with tens of thousands of Services it takes seconds.
const runTimeout = 5 * time.Minute

// lockWait is how many seconds a program waits for another one to let go of the lock of iptables (/run/xtables.lock).
const lockWait = "5"

// programs are those of a family. The zero value is what the host calls iptables; a backend is nft or legacy. Those that change
// tables get what is held.
type programs struct {
	family  model.Family
	backend string
	held    *os.File
}

// name is that of a program; kind is empty, save or restore.
func (p programs) name(kind string) string {
	out := "iptables"
	if p.family == model.IPv6 {
		out = "ip6tables"
	}
	for _, s := range []string{p.backend, kind} {
		if s != "" {
			out += "-" + s
		}
	}
	return out
}

// MissingError is a program that is not there.
type MissingError struct{ Program string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is not there: install the package iptables, or set mode to nftables, which needs no program", e.Program)
}

// run runs a program and has what it writes. The program does not outlive this one, which may be killed: what waits its turn would
// change tables that the next proxy has read by then.
func (p programs) run(kind, input string, args ...string) (string, error) {
	ctx, stop := context.WithTimeout(context.Background(), runTimeout)
	defer stop()
	cmd := exec.CommandContext(ctx, p.name(kind), args...)
	var out, said bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &said
	if kind == "restore" && p.held != nil {
		cmd.ExtraFiles = []*os.File{p.held}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // it is killed when the thread ends that has started it
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return "", &MissingError{p.name(kind)}
	case ctx.Err() != nil:
		return "", fmt.Errorf("%s did not end within %v", p.name(kind), runTimeout)
	case err != nil:
		return "", fmt.Errorf("%s: %w: %s", p.name(kind), err, place(said.String(), input))
	}
	return out.String(), nil
}

// save reads the tables.
func (p programs) save() (saved, error) {
	text, err := p.run("save", "")
	if err != nil {
		return nil, err
	}
	return parse(text)
}

// saveCounted is save, with what rules have counted.
func (p programs) saveCounted() (saved, map[chain][]program.Count, error) {
	text, err := p.run("save", "", "--counters")
	if err != nil {
		return nil, nil, err
	}
	return parseCounted(text)
}

// restore commits a batch.
func (p programs) restore(b *batch) error {
	_, err := p.run("restore", b.String(), "--noflush", "--wait", lockWait)
	return err
}

// canaryThere says whether a table has not been flushed.
func (p programs) canaryThere(t table) (bool, error) {
	_, err := p.run("", "", "--wait", lockWait, "-t", t.String(), "-S", canary)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return false, nil
	}
	return true, err
}

// place adds the line of the input that a program complains of.
func place(said, input string) string {
	said = strings.TrimSpace(said)
	_, after, ok := strings.Cut(said, "line ")
	if !ok {
		return said
	}
	digits := strings.TrimRight(after[:min(len(after), 9)], " :abcdefghijklmnopqrstuvwxyz")
	n, err := strconv.Atoi(digits)
	lines := strings.Split(input, "\n")
	if err != nil || n < 1 || n > len(lines) {
		return said
	}
	return said + ": " + lines[n-1]
}

// Supported says why a family cannot be programmed by what the host has; nil if it can.
func Supported(f model.Family) error {
	for _, kind := range []string{"save", "restore"} {
		if _, err := exec.LookPath(programs{family: f}.name(kind)); err != nil {
			return &MissingError{programs{family: f}.name(kind)}
		}
	}
	if _, err := (programs{family: f}).run("", "", "--wait", lockWait, "-t", nat.String(), "-S", "POSTROUTING"); err != nil {
		return fmt.Errorf("the kernel has no table nat of %s: %w", f, err)
	}
	return nil
}

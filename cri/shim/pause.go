package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// startPause starts PID 1 of the pod's shared PID namespace, and waits until it has given up everything that containers
// which may trace it could use (cmd/berth-shim/pause.go).
func (s *Server) startPause(p Pause) error {
	var ready [2]int
	if err := unix.Pipe2(ready[:], unix.O_CLOEXEC); err != nil {
		return os.NewSyscallError("pipe2", err)
	}
	out := os.NewFile(uintptr(ready[0]), "ready")
	defer out.Close()
	attr := &syscall.ProcAttr{
		Dir: "/", Env: []string{"_BERTH_PAUSE=1"}, Files: []uintptr{0, 1, 2, uintptr(ready[1])},
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Setsid: true},
	}
	if p.Label != "" {
		attr.Env = append(attr.Env, "_BERTH_PAUSE_LABEL="+p.Label)
	}
	if p.Context != "" {
		attr.Env = append(attr.Env, "_BERTH_PAUSE_CONTEXT="+p.Context)
	}
	if p.Userns != "" {
		userns, err := os.Open(p.Userns)
		if err != nil {
			return errors.Join(err, unix.Close(ready[1]))
		}
		defer userns.Close()
		// The PID namespace has to belong to the user namespace: so it makes it itself, once it is there.
		attr.Sys.Cloneflags = 0
		attr.Env = append(attr.Env, "_BERTH_PAUSE_NOBODY="+strconv.FormatUint(uint64(p.Nobody), 10))
		attr.Files = append(attr.Files, userns.Fd())
	}
	start := func() (int, error) {
		defer unix.Close(ready[1])
		return syscall.ForkExec(SelfExe, []string{"berth-shim", "pause"}, attr)
	}
	ended := func(unix.WaitStatus) {
		fmt.Fprintln(os.Stderr, "PID 1 of the pod's PID namespace has ended, and with it its containers")
	}
	told := ended
	if p.Userns != "" {
		told = func(unix.WaitStatus) {} // who starts is not who stays
	}
	pid, err := s.reaper.start(start, told)
	if err != nil {
		return fmt.Errorf("start PID 1 of the shared PID namespace: %w", err)
	}
	if p.Userns != "" {
		var b [4]byte
		if _, err := io.ReadFull(out, b[:]); err != nil {
			return fmt.Errorf("PID 1 of the shared PID namespace was not started: %w", err)
		}
		pid = int(int32(binary.NativeEndian.Uint32(b[:])))
		s.reaper.adopt(pid, ended)
	}
	s.pause = pid
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
		return fmt.Errorf("PID 1 of the shared PID namespace ended at once: %w", err)
	}
	return nil
}

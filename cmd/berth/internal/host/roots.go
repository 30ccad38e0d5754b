package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Lock is the claim of a daemon on its roots. The kernel drops it with the process, however that ends.
type Lock struct{ files []*os.File }

// Claim makes both directories, sees that they can be written to, and locks them. Root has mode 0700 whatever it was
// (CVE-2021-41103: what is below holds setuid files of images), and run 0711, since root of a pod's user namespace passes
// through it on its way to its own files. The error of a second daemon names the pid of the first.
func Claim(root, run string) (*Lock, error) {
	l := &Lock{}
	for _, dir := range []struct {
		name, path string
		mode       os.FileMode
	}{{"root", root, 0o700}, {"run", run, 0o711}} {
		f, err := claim(dir.name, dir.path, dir.mode)
		if err != nil {
			return nil, errors.Join(err, l.Release())
		}
		l.files = append(l.files, f)
	}
	return l, nil
}

// Release drops the claim. The files stay: to remove one would let two daemons lock two files of one name.
func (l *Lock) Release() error {
	var errs []error
	for _, f := range l.files {
		errs = append(errs, f.Close())
	}
	l.files = nil
	return errors.Join(errs...)
}

func claim(name, dir string, mode os.FileMode) (*os.File, error) {
	remedy := fmt.Sprintf("make it writable, or choose another with --%s", name)
	if err := os.MkdirAll(dir, mode); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, dir, cause(err), remedy)
	}
	if err := os.Chmod(dir, mode); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, dir, cause(err), remedy)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", name, dir, cause(err), remedy)
	}
	if err := lock(f); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%s %s is in use by another berth serve (pid %s): stop that one, or give this one its own --root, --run and --socket", name, dir, holder(f))
		} else {
			err = fmt.Errorf("%s %s: lock: %w: choose one on a file system with locks, with --%s", name, dir, err, name)
		}
		return nil, errors.Join(err, f.Close())
	}
	if err := writePID(f); err != nil {
		return nil, errors.Join(fmt.Errorf("%s %s: %w: %s", name, dir, cause(err), remedy), f.Close())
	}
	return f, nil
}

// A daemon that was killed may hold its lock for a while: it gives its memory back first, and a child that was just being
// started has a copy of every descriptor, until it executes its program.
const dyingHolds = 2 * time.Second

// lock locks a file. It waits only where whoever has the lock by its own account is dead or dying.
func lock(f *os.File) error {
	for end := time.Now().Add(dyingHolds); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(end) {
			return err
		}
		if pid, perr := strconv.Atoi(holder(f)); perr != nil || !dying(pid) {
			return err
		}
	}
}

// dying tells whether a process is gone, on its way, or told to go by a signal that it cannot refuse.
func dying(pid int) bool {
	for file, says := range map[string]func(string) bool{"stat": isExiting, "status": isKilled} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || err == nil && says(string(text)) {
			return true
		}
	}
	return false
}

// isExiting reads the state and the flags of proc_pid_stat(5), the first and the seventh field after the name in brackets.
func isExiting(stat string) bool {
	const exiting = 0x4 // PF_EXITING of the kernel's sched.h
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 7 {
		return false
	}
	flags, err := strconv.ParseUint(fields[6], 10, 32)
	return fields[0] == "Z" || fields[0] == "X" || err == nil && flags&exiting != 0
}

// isKilled reads the signals that wait, of the thread and of the process, from proc_pid_status(5).
func isKilled(status string) bool {
	for line := range strings.Lines(status) {
		name, mask, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		if set, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err == nil && set&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}

func writePID(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder reads the pid that the holder of a lock wrote.
func holder(f *os.File) string {
	data, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	pid := strings.TrimSpace(string(data))
	if _, perr := strconv.ParseUint(pid, 10, 32); err != nil || perr != nil {
		return "unknown"
	}
	return pid
}

// cause is the system's words without the path, which the message has already.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

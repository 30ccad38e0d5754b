package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Programs of plugins outlive a daemon that is killed. Were they killed with it, they would leave halves that no later DEL takes away:
// the bridge plugin forgets its firewall rules once it has deleted the link (it learns the addresses from it), and no ADD
// gets over a bridge without an address. So they finish, and the next daemon waits for them before it runs others for the
// same pod: they hold the lock of a file, through a descriptor that they inherit.

// lingerTime is how long plugins that an earlier daemon has left are waited for, before they are killed.
const lingerTime = 20 * time.Second

// runningFile is the file that is there while plugins of a pod run.
func (m *Manager) runningFile(id string) string { return filepath.Join(m.opts.RunDir, "running-"+id) }

type runningKey struct{}

// alone waits until no plugin of an earlier daemon runs for a pod. The plugins that are run with the context that it
// returns keep others waiting until done is called, or, should this process be killed, until they have ended.
func (m *Manager) alone(ctx context.Context, id string) (_ context.Context, done func(), err error) {
	if err := os.MkdirAll(m.opts.RunDir, 0o700); err != nil {
		return nil, nil, err
	}
	file := m.runningFile(id)
	patience := time.Now().Add(m.linger)
	for {
		f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && sameFile(f, file) {
			return context.WithValue(ctx, runningKey{}, f), func() { endAlone(f, file) }, nil
		}
		if err != nil && time.Now().After(patience) {
			m.log.Warn("a plugin of an earlier daemon does not end and is killed", "pod", id)
			killPlugin(f, id)
			_ = os.Remove(file) // whoever still holds the lock of that one is not waited for any longer
		}
		_ = f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, nil, fmt.Errorf("lock %s: %w", file, err)
		}
		select {
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("plugins of an earlier daemon still run: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// tryAlone is alone where no plugin of the pod runs, be it of this daemon or of an earlier one; else done is nil.
func (m *Manager) tryAlone(id string) (done func(), err error) {
	if err := os.MkdirAll(m.opts.RunDir, 0o700); err != nil {
		return nil, err
	}
	file := m.runningFile(id)
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil && sameFile(f, file) {
		return func() { endAlone(f, file) }, nil
	}
	return nil, f.Close()
}

func endAlone(f *os.File, file string) {
	// What a plugin has left in the background may hold the lock for ever: the next call makes another file.
	_ = os.Remove(file)
	_ = f.Close()
}

// sameFile tells whether a file is still the one of that name.
func sameFile(f *os.File, name string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(name)
	return err == nil && os.SameFile(a, b)
}

// noteRunning notes the process group of a plugin in the file whose lock it holds.
func noteRunning(f *os.File, pid int) {
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(pid)), 0) // only to kill it, should it hang
	}
}

// killPlugin kills the process group that is noted in a file, if it still is a plugin of that pod.
func killPlugin(f *os.File, id string) {
	var buf [16]byte
	n, _ := f.ReadAt(buf[:], 0)
	pid, err := strconv.Atoi(string(buf[:n]))
	if err != nil || pid <= 1 {
		return
	}
	environ, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || !bytes.Contains(environ, []byte("CNI_CONTAINERID="+id+"\x00")) {
		return
	}
	_ = syscall.Kill(-pid, syscall.SIGKILL)
}

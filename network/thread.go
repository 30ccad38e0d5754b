package network

import (
	"fmt"
	"os"
	"runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// onThrowawayThread runs f on an operating system thread which ends with it, so that f may move the thread to other
// namespaces: no other goroutine ever runs there, and the runtime starts no thread from it.
func onThrowawayThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			// The main thread cannot end before the process does, and /proc/PID/ns shows its namespaces. While this
			// goroutine holds it, another one gets another thread.
			done <- onThrowawayThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f() // no UnlockOSThread: the runtime ends the thread of a goroutine that ends locked to it
	}()
	return <-done
}

// InNamespace runs f on a thread of its own in the network namespace that is pinned at path. Goroutines that f starts do
// not run there: a dialer must try its addresses one after the other (no happy eyeballs).
func InNamespace(path string, f func() error) error {
	ns, err := os.Open(path)
	if err != nil {
		if os.IsNotExist(err) {
			return fmt.Errorf("network namespace: %w: %w", err, errdefs.ErrNotFound)
		}
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // opened for reading
	return onThrowawayThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return f()
	})
}

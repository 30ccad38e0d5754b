package network

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// InNamespaces runs f on a thread of its own in the namespaces that are pinned at paths, of whichever kinds, and where it is
// called if there are none. Processes that f starts are there, too; goroutines are not: a dialer must try its addresses one
// after the other (no happy eyeballs). The error is of the class errdefs.ErrNotFound where a path does not exist.
func InNamespaces(paths []string, f func() error) error {
	if len(paths) == 0 {
		return f()
	}
	return thread.Throwaway(func() error {
		if err := Enter(paths); err != nil {
			return err
		}
		return f()
	})
}

// Enter moves this thread, which has to be thrown away, into the namespaces that are pinned at paths. The error is of the
// class errdefs.ErrNotFound where a path does not exist.
func Enter(paths []string) error {
	for _, path := range paths {
		if err := enter(path, 0); err != nil {
			return err
		}
	}
	return nil
}

// enter moves this thread to the namespace of a file, which has to be of the kind that flag (unix.CLONE_NEWNET …) says; 0
// is any.
func enter(path string, flag int) error {
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(ns, flag)
		_ = unix.Close(ns) // opened for reading
	}
	if os.IsNotExist(err) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("enter namespace %s: %w", path, err)
	}
	return nil
}

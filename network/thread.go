package network

import (
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

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
	return thread.Throwaway(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return f()
	})
}

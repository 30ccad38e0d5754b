package cni

import (
	"errors"
	"fmt"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/berth-run/berth/internal/thread"
)

// podNamespace opens the pod's namespace, which the caller closes.
func (c *call) podNamespace() (ns.NetNS, error) {
	netns, err := ns.GetNS(c.netns)
	if err != nil {
		return nil, fmt.Errorf("failed to open netns %q: %v", c.netns, err)
	}
	return netns, nil
}

// inside runs f on a thread of its own in a namespace.
func inside(netns ns.NetNS, f func() error) error {
	return thread.Throwaway(func() error {
		if err := netns.Set(); err != nil {
			return err
		}
		return f()
	})
}

// insidePath is inside for a path.
func insidePath(path string, f func() error) error {
	netns, err := ns.GetNS(path)
	if err != nil {
		return err
	}
	defer netns.Close() //nolint:errcheck // opened for reading
	return inside(netns, f)
}

// gone says that the path of a namespace does not exist, which is no error to whoever takes things down.
func gone(err error) bool {
	var e ns.NSPathNotExistErr
	return errors.As(err, &e)
}

package cgroups

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/cgroups/oom"
)

// OOMKills is how many processes of p the kernel has killed because memory ran out. The error is of the class
// errdefs.ErrNotFound where the cgroup does not exist.
func OOMKills(p Path) (uint64, error) {
	if err := p.check(); err != nil {
		return 0, err
	}
	mount, err := MemoryMount()
	if err != nil {
		return 0, err
	}
	n, err := oom.Kills(oom.MemoryDir(mount, string(p)))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("OOM kills of cgroup %s: %w: %w", p, err, errdefs.ErrNotFound)
	case err != nil:
		return 0, fmt.Errorf("OOM kills of cgroup %s: %w", p, err)
	}
	return n, nil
}

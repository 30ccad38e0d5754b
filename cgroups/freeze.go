package cgroups

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
)

// Freeze holds every process of p and of the cgroups below it still, and returns when they are. The error is of the class
// errdefs.ErrNotFound where p does not exist.
func Freeze(p Path) error { return setFrozen(p, cgroups.Frozen) }

// Thaw lets them go on.
func Thaw(p Path) error { return setFrozen(p, cgroups.Thawed) }

func setFrozen(p Path, state cgroups.FreezerState) error {
	l, err := at(p)
	if err != nil {
		return err
	}
	if !Exists(p) {
		return fmt.Errorf("cgroup %s cannot be %s: %w", p, state, errdefs.ErrNotFound)
	}
	m, err := l.manager(p, &cgroups.Resources{SkipDevices: true})
	if err == nil {
		err = m.Freeze(state)
	}
	if err != nil {
		return fmt.Errorf("cgroup %s cannot be %s: %w", p, state, err)
	}
	return nil
}

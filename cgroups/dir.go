package cgroups

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Dir is the directory of p in the hierarchy of a controller ("freezer", "memory"): on v2 the only one that p has.
func Dir(p Path, controller string) (string, error) {
	l, err := host()
	if err != nil {
		return "", err
	}
	if dir := l.dir(p, controller); dir != "" {
		return dir, nil
	}
	return "", fmt.Errorf("the %s controller is not mounted: %w", controller, errdefs.ErrFailedPrecondition)
}

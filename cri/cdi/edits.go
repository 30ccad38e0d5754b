package cdi

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/berth-run/berth/cri/spec"
)

// Edits are what devices add to a specification.
type Edits struct {
	devices []string
	edits   *cdi.ContainerEdits
}

// check refuses what would not work or would leave the container, with the names of the devices.
func (e *Edits) check() error {
	bad := func(what, value, why string) error {
		return fmt.Errorf("CDI devices %s: %s %q %s: %w", strings.Join(e.devices, ", "), what, value, why, errdefs.ErrFailedPrecondition)
	}
	if e.edits.ContainerEdits == nil {
		return nil
	}
	for _, kv := range e.edits.Env {
		if strings.IndexByte(kv, 0) >= 0 {
			return bad("environment variable", kv, "contains a NUL byte")
		}
	}
	for _, d := range e.edits.DeviceNodes {
		if !inside(d.Path) {
			return bad("device node", d.Path, "is not an absolute path in the container without '..'")
		}
	}
	for _, m := range e.edits.Mounts {
		if !inside(m.ContainerPath) || m.ContainerPath == "/" {
			return bad("mount point", m.ContainerPath, "is not an absolute path in the container without '..'")
		}
		if !path.IsAbs(m.HostPath) {
			return bad("mount source", m.HostPath, "is not absolute")
		}
	}
	for _, h := range e.edits.Hooks {
		// A relative path would be looked up where whoever runs the hook happens to be, which for some is the image.
		if !path.IsAbs(h.Path) {
			return bad("hook", h.Path, "is not an absolute path")
		}
		for _, kv := range h.Env {
			if strings.IndexByte(kv, 0) >= 0 {
				return bad("hook's environment variable", kv, "contains a NUL byte")
			}
		}
	}
	return nil
}

func inside(p string) bool {
	return path.IsAbs(p) && !slices.Contains(strings.Split(p, "/"), "..") && strings.IndexByte(p, 0) < 0
}

// Apply edits the specification in place. It looks at the device nodes of the host that the files do not describe in full.
// Nil edits nothing.
func (e *Edits) Apply(s *specs.Spec) error {
	if e == nil || e.edits.ContainerEdits == nil {
		return nil
	}
	if err := e.edits.Apply(s); err != nil {
		return fmt.Errorf("CDI devices %s: %w: %w", strings.Join(e.devices, ", "), err, errdefs.ErrFailedPrecondition)
	}
	spec.BoundHooks(s.Hooks)
	return nil
}

// Groups are the additional groups of the edits, which the container's user is in as well.
func (e *Edits) Groups() []uint32 {
	if e == nil || e.edits.ContainerEdits == nil {
		return nil
	}
	return e.edits.AdditionalGIDs
}

package cdi

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// Bounds on a hook, in seconds: what it gets if its file says nothing, and what it can have at most.
const (
	hookTimeout    = 10
	maxHookTimeout = 60
)

// hookPath is the environment of a hook whose file gives it none. Without any it would have that of whoever runs it.
const hookPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

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
	if s.Hooks != nil {
		for _, list := range [][]specs.Hook{
			s.Hooks.Prestart, s.Hooks.CreateRuntime, s.Hooks.CreateContainer, s.Hooks.StartContainer, s.Hooks.Poststart, s.Hooks.Poststop, //nolint:staticcheck // deprecated, not gone
		} {
			for i := range list {
				bound(&list[i])
			}
		}
	}
	return nil
}

// bound gives a hook an end and an environment of its own: that of the daemon is no business of a vendor's program, and
// that of the image is a container's, which must not reach one of the host's (CVE-2025-23266).
func bound(h *specs.Hook) {
	seconds := hookTimeout
	if h.Timeout != nil && *h.Timeout > 0 {
		seconds = min(*h.Timeout, maxHookTimeout)
	}
	h.Timeout = &seconds
	if len(h.Env) == 0 {
		h.Env = []string{hookPath}
	}
	if len(h.Args) == 0 {
		h.Args = []string{h.Path}
	}
}

// Groups are the additional groups of the edits, which the container's user is in as well.
func (e *Edits) Groups() []uint32 {
	if e == nil || e.edits.ContainerEdits == nil {
		return nil
	}
	return e.edits.AdditionalGIDs
}

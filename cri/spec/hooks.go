package spec

import "github.com/opencontainers/runtime-spec/specs-go"

// Bounds on a hook, in seconds: what it gets if nobody says anything, and what it can have at most.
const (
	hookTimeout    = 10
	maxHookTimeout = 60
)

// hookPath is the environment of a hook that was given none. Without any it would have that of whoever runs it.
const hookPath = "PATH=" + defaultPath

// BoundHooks gives every hook, whoever asks for it, an end, an argument and an environment of its own: that of the daemon is
// no business of a vendor's program, and that of the image is a container's, which must not reach one of the host's
// (CVE-2025-23266).
func BoundHooks(hooks *specs.Hooks) {
	if hooks == nil {
		return
	}
	for _, list := range [][]specs.Hook{
		hooks.Prestart, hooks.CreateRuntime, hooks.CreateContainer, hooks.StartContainer, hooks.Poststart, hooks.Poststop, //nolint:staticcheck // deprecated, not gone
	} {
		for i := range list {
			boundHook(&list[i])
		}
	}
}

func boundHook(h *specs.Hook) {
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

package spec

import (
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestCVE_2025_23266_HooksOfEveryKindAreBounded(t *testing.T) {
	long, negative, short := 7200, -1, 3
	hooks := &specs.Hooks{
		Prestart:        []specs.Hook{{Path: "/a"}}, //nolint:staticcheck // deprecated, not gone
		CreateRuntime:   []specs.Hook{{Path: "/a", Timeout: &long}},
		CreateContainer: []specs.Hook{{Path: "/a", Timeout: &negative}},
		StartContainer:  []specs.Hook{{Path: "/a", Timeout: &short, Env: []string{"A=b"}, Args: []string{"a", "x"}}},
		Poststart:       []specs.Hook{{Path: "/a"}},
		Poststop:        []specs.Hook{{Path: "/a"}, {Path: "/a"}},
	}
	BoundHooks(hooks)
	path := []string{"PATH=" + defaultPath}
	for _, tc := range []struct {
		kind      string
		is        []specs.Hook
		seconds   int
		env, args []string
	}{
		{"prestart", hooks.Prestart, 10, path, []string{"/a"}}, //nolint:staticcheck // deprecated, not gone
		{"createRuntime", hooks.CreateRuntime, 60, path, []string{"/a"}},
		{"createContainer", hooks.CreateContainer, 10, path, []string{"/a"}},
		{"startContainer", hooks.StartContainer, 3, []string{"A=b"}, []string{"a", "x"}},
		{"poststart", hooks.Poststart, 10, path, []string{"/a"}},
		{"poststop", hooks.Poststop, 10, path, []string{"/a"}},
	} {
		for _, h := range tc.is {
			if h.Timeout == nil || *h.Timeout != tc.seconds || !slices.Equal(h.Env, tc.env) || !slices.Equal(h.Args, tc.args) {
				t.Errorf("%s: %+v, want %d s, %q, %q", tc.kind, h, tc.seconds, tc.env, tc.args)
			}
		}
	}
	if long != 7200 {
		t.Error("who has asked for it finds another timeout")
	}
	BoundHooks(nil)
}

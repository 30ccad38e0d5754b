package spec

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseRlimit(t *testing.T) {
	for s, want := range map[string]specs.POSIXRlimit{
		"nofile=1024:4096":            {Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096},
		"nofile=1024":                 {Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 1024},
		"core=0:unlimited":            {Type: "RLIMIT_CORE", Soft: 0, Hard: math.MaxUint64},
		"memlock=-1:-1":               {Type: "RLIMIT_MEMLOCK", Soft: math.MaxUint64, Hard: math.MaxUint64},
		"stack=8388608:-1":            {Type: "RLIMIT_STACK", Soft: 8 << 20, Hard: math.MaxUint64},
		"":                            {},
		"nofile":                      {},
		"nofile=":                     {},
		"nofile=1:":                   {},
		"nofile=:1":                   {},
		"nofile=2:1":                  {},
		"nofile=unlimited:1":          {},
		"nofile=1:2:3":                {},
		"nofile=-2":                   {},
		"nofile=+1":                   {},
		"nofile=1e3":                  {},
		"nofile=99999999999999999999": {},
		"NOFILE=1":                    {},
		"RLIMIT_NOFILE=1":             {},
		"files=1":                     {},
		" nofile=1":                   {},
		"nofile =1":                   {},
	} {
		got, err := ParseRlimit(s)
		if got != want || (err == nil) != (want.Type != "") {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
		if err != nil && (!errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), rlimitsField)) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if _, err := ParseRlimits([]string{"nofile=1", "core=0", "nofile=2"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("one resource twice: %v", err)
	}
	if got, err := ParseRlimits([]string{"nofile=1", "core=0"}); err != nil || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzParseRlimit(f *testing.F) {
	for _, s := range []string{"nofile=1024:4096", "core=-1", "stack=unlimited:1", "cpu=1:2:3", "=", "a=b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseRlimit(s)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) || l != (specs.POSIXRlimit{}) {
				t.Errorf("%q: %+v, %v", s, l, err)
			}
			return
		}
		if l.Soft > l.Hard || !strings.HasPrefix(l.Type, "RLIMIT_") || strings.ContainsAny(l.Type, " =\n") {
			t.Errorf("%q: %+v", s, l)
		}
	})
}

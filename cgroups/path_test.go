package cgroups

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestJoin(t *testing.T) {
	for _, tc := range []struct{ parent, id, want string }{
		{"", "x", "/berth/x"},
		{"/", "x", "/x"},
		{"/kubepods/burstable/podX", "abc", "/kubepods/burstable/podX/abc"},
		{"/test.slice/", "abc", "/test.slice/abc"},
		{"/a b/é", "x", "/a b/é/x"},
		{"relative", "x", ""},
		{"./relative", "x", ""},
		{"../up", "x", ""},
		{"/a/../b", "x", ""},
		{"/..", "x", ""},
		{"/a/./b", "x", ""},
		{"/a//b", "x", ""},
		{"/a\nb", "x", ""},
		{"/a\x00b", "x", ""},
		{"/" + strings.Repeat("x", 256), "x", ""},
		{strings.Repeat("/"+strings.Repeat("x", 250), 13), "x", ""},
		{"/a", "", ""},
		{"/a", ".", ""},
		{"/a", "..", ""},
		{"/a", "b/c", ""},
		{"/a", "/", ""},
		{"/a", "b\n", ""},
	} {
		got, err := Join(tc.parent, tc.id)
		switch {
		case tc.want == "" && !errors.Is(err, errdefs.ErrInvalidArgument):
			t.Errorf("Join(%q, %q) = %q, %v", tc.parent, tc.id, got, err)
		case tc.want != "" && (err != nil || got != Path(tc.want)):
			t.Errorf("Join(%q, %q) = %q, %v, want %q", tc.parent, tc.id, got, err, tc.want)
		}
	}
}

// A container in the root cgroup has no limits; and what may be in a record must not lead out of the hierarchy.
func TestCVE_2025_47291_NeverTheRootCgroup(t *testing.T) {
	for _, s := range []string{"", "/", "//", "/.", "/..", "/a/..", "a", "/a/", "/a//b", "../a", "/a/../../b"} {
		if _, err := ParsePath(s); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ParsePath(%q): %v", s, err)
		}
		p := Path(s) // made without the check
		if err := CreateSandbox(p); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("CreateSandbox(%q): %v", s, err)
		}
		if err := Kill(p); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Kill(%q): %v", s, err)
		}
		if err := Remove(p); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Remove(%q): %v", s, err)
		}
		if err := AddProcess(p, 1); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("AddProcess(%q): %v", s, err)
		}
		if err := Update(p, nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Update(%q): %v", s, err)
		}
		if _, err := ReadStats(p); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ReadStats(%q): %v", s, err)
		}
		if _, err := Processes(p); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Processes(%q): %v", s, err)
		}
		if err := Verify(p, 1); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Verify(%q): %v", s, err)
		}
		if Exists(p) {
			t.Errorf("Exists(%q)", s)
		}
	}
}

func FuzzPath(f *testing.F) {
	f.Add("/kubepods/podX", "abc")
	f.Add("/a/../b", "..")
	f.Add("", "x")
	f.Fuzz(func(t *testing.T, parent, id string) {
		p, err := Join(parent, id)
		if err != nil {
			return
		}
		s := string(p)
		if filepath.Clean(s) != s || !filepath.IsAbs(s) || s == "/" || filepath.Base(s) != id || strings.ContainsAny(s, "\x00\n") {
			t.Errorf("Join(%q, %q) = %q", parent, id, s)
		}
		if again, err := ParsePath(s); err != nil || again != p {
			t.Errorf("ParsePath(%q) = %q, %v", s, again, err)
		}
	})
}

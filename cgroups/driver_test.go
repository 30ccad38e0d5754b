package cgroups

import (
	"errors"
	"path"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups/systemd"
)

func TestScopesOfSystemd(t *testing.T) {
	id := strings.Repeat("ab", 32)
	scope := "/berth-" + id + ".scope"
	for _, tc := range []struct{ parent, want string }{
		{"", "/berth.slice" + scope},
		{"/test.slice", "/test.slice" + scope},
		{"test.slice", "/test.slice" + scope},
		{"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a_1b.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a_1b.slice" + scope},
		{"kubepods-burstable-podX.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice" + scope},
		{"/../a-b.slice", "/a.slice/a-b.slice" + scope}, // its last part alone counts
		{"/kubepods/burstable/podX", ""},
		{"/", ""},
		{"/.slice", ""},
		{"/-.slice", ""},
		{"/-a.slice", ""},
		{"/a--b.slice", ""},
		{"/a b.slice", ""},
		{"/a\n.slice", ""},
		{"/a@b.slice", ""},
		{"/é.slice", ""},
		{"/x.scope", ""},
		{"/" + strings.Repeat("x", 250) + ".slice", ""},
	} {
		got, err := Systemd.Join(tc.parent, id)
		if tc.want == "" {
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "cgroup parent") {
				t.Errorf("Join(%q) = %q, %v", tc.parent, got, err)
			}
			continue
		}
		if err != nil || string(got) != tc.want {
			t.Errorf("Join(%q) = %q, %v, want %q", tc.parent, got, err, tc.want)
			continue
		}
		s, ok := got.Scope()
		if !ok || s.ID != id || s.Unit() != "berth-"+id+".scope" || s.Slice != path.Base(path.Dir(tc.want)) {
			t.Errorf("Scope of %q: %+v, %v", got, s, ok)
		}
	}
	for _, id := range []string{"", "a-b", "a b", "a/b", "..", strings.Repeat("x", 250)} {
		if got, err := Systemd.Join("/a.slice", id); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("Join of id %q: %q, %v", id, got, err)
		}
	}
}

// A directory that is only called like a scope is not taken for one: nobody would find a unit of it.
func TestWhatIsNoScope(t *testing.T) {
	for _, p := range []Path{"/kubepods/podX/abc", "/berth-abc.scope", "/a.slice/abc", "/a.slice/crio-abc.scope", "/b/a.slice/berth-abc.scope", "/a-b.slice/berth-abc.scope", "/a.slice/berth-a-b.scope", "/a.slice/berth-.scope", "/a.slice/berth-abc.scope/exec-1"} {
		if s, ok := p.Scope(); ok {
			t.Errorf("%s is taken for %+v", p, s)
		}
	}
}

func TestChooseDriver(t *testing.T) {
	booted := systemd.IsRunningSystemd()
	auto := Cgroupfs
	if booted {
		auto = Systemd
	}
	for option, want := range map[string]Driver{"auto": auto, "cgroupfs": Cgroupfs, "": "", "systemD": ""} {
		got, err := ChooseDriver(option)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", option, got, err)
		}
	}
	got, err := ChooseDriver("systemd")
	if booted != (got == Systemd) || booted != (err == nil) {
		t.Errorf("systemd, which is process 1: %v: %q, %v", booted, got, err)
	}
}

func FuzzScope(f *testing.F) {
	for _, s := range []string{"", "/kubepods.slice/kubepods-podX.slice", "a-b-c.slice", "-.slice", "/a--b.slice", "../x.slice", `/a\x2db.slice`, "/a:b.slice/"} {
		f.Add(s, "abc")
	}
	f.Fuzz(func(t *testing.T, parent, id string) {
		p, err := Systemd.Join(parent, id)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("%q, %q: %v", parent, id, err)
			}
			return
		}
		if checked, err := ParsePath(string(p)); err != nil || checked != p {
			t.Errorf("%q, %q: %q: %v", parent, id, p, err)
		}
		s, ok := p.Scope()
		if !ok || s.ID != id {
			t.Fatalf("%q, %q: %q has the scope %+v, %v", parent, id, p, s, ok)
		}
		// Where systemd puts the slice is where we look for it.
		if dir, err := systemd.ExpandSlice(s.Slice); err != nil || dir != path.Dir(string(p)) {
			t.Errorf("%q, %q: %q is in %q: %v", parent, id, p, dir, err)
		}
		if again, err := Systemd.Join(path.Dir(string(p)), id); err != nil || again != p {
			t.Errorf("%q again is %q, %v", p, again, err)
		}
	})
}

package cdi

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

// document is a file that defines devices, each of which sets a variable to what.
func document(what string, devices ...string) string {
	var b strings.Builder
	b.WriteString("cdiVersion: \"0.6.0\"\nkind: vendor.com/gpu\ncontainerEdits:\n  env: [\"ALL=" + what + "\"]\ndevices:\n")
	for _, d := range devices {
		fmt.Fprintf(&b, "- name: %q\n  containerEdits:\n    env: [\"GPU_%s=%s\"]\n", d, d, what)
	}
	return b.String()
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// applied is a specification with the devices in it.
func applied(t *testing.T, r Registry, names ...string) *specs.Spec {
	t.Helper()
	edits, err := r.Resolve(names)
	if err != nil {
		t.Fatal(err)
	}
	s := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
	if err := edits.Apply(s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLaterDirectoryWins(t *testing.T) {
	dir := t.TempDir()
	r := Registry{Dirs: []string{dir + "/a", dir + "/missing", dir + "/b"}}
	write(t, dir+"/a/one.yaml", document("a", "0", "1"))
	write(t, dir+"/b/two.yaml", document("b", "1", "2"))
	s := applied(t, r, "vendor.com/gpu=0", "vendor.com/gpu=1", "vendor.com/gpu=1")
	if want := []string{"ALL=b", "GPU_0=a", "GPU_1=b"}; !slices.Equal(s.Process.Env, want) {
		t.Errorf("environment %q, want %q", s.Process.Env, want)
	}
	if s := applied(t, r); len(s.Process.Env) > 0 {
		t.Errorf("no device, but %q", s.Process.Env)
	}
}

func TestUnknownAndAmbiguousDevicesAreNamed(t *testing.T) {
	dir := t.TempDir()
	r := Registry{Dirs: []string{dir}}
	write(t, dir+"/one.yaml", document("a", "0", "1"))
	write(t, dir+"/two.json", `{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","devices":[{"name":"1","containerEdits":{"env":["X=1"]}}]}`)
	write(t, dir+"/broken.yaml", "devices: [")
	for name, words := range map[string][]string{
		"vendor.com/gpu=9": {"vendor.com/gpu=9", dir, "broken.yaml"},
		"vendor.com/gpu=1": {"vendor.com/gpu=1", "two files"},
	} {
		_, err := r.Resolve([]string{"vendor.com/gpu=0", name})
		if !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q is not in %v", name, w, err)
			}
		}
	}
	if _, err := (Registry{}).Resolve([]string{"vendor.com/gpu=0"}); err == nil || !strings.Contains(err.Error(), "cdiSpecDirs") {
		t.Errorf("CDI is off: %v", err)
	}
}

// A directory that is full of traps neither holds us nor takes memory, and what is good in it works.
func TestHostileFilesAreBounded(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/good.yaml", document("good", "0"))
	for _, name := range []string{"fifo.yaml", "fifo.json"} {
		if err := unix.Mkfifo(filepath.Join(dir, name), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"zero.yaml": "/dev/zero", "tty.yaml": "/dev/tty", "self.yaml": "self.yaml", "kmsg.json": "/proc/kmsg", "fifolink.yaml": "fifo.yaml", "dir.yaml": "/proc",
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "sub.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	huge, err := os.Create(filepath.Join(dir, "huge.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(huge.Truncate(1<<40), huge.Close()); err != nil {
		t.Fatal(err)
	}
	// Aliases of aliases: a megabyte of text that would be 10^9 nodes.
	var bomb strings.Builder
	bomb.WriteString("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n")
	for i := 1; i < 10; i++ {
		fmt.Fprintf(&bomb, "a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i-1), 10), ","))
	}
	write(t, dir+"/bomb.yaml", bomb.String())
	write(t, dir+"/deep.json", strings.Repeat("[", 1<<19)+strings.Repeat("]", 1<<19))
	write(t, dir+"/empty.yaml", "")
	write(t, dir+"/null.yaml", "null")
	write(t, dir+"/nodevices.yaml", "cdiVersion: \"0.6.0\"\nkind: vendor.com/x\ndevices: [null]\n")

	r := Registry{Dirs: []string{dir, filepath.Join(dir, "fifo.yaml"), filepath.Join(dir, "good.yaml")}}
	done := make(chan error, 1)
	go func() {
		_, err := r.Resolve([]string{"vendor.com/gpu=0"})
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("reading the directory does not end")
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = r.Resolve([]string{"vendor.com/gpu=missing"})
	runtime.ReadMemStats(&after)
	if err == nil || len(err.Error()) > 4096 {
		t.Errorf("error of %d bytes: %.200v", len(fmt.Sprint(err)), err)
	}
	if grown := (after.TotalAlloc - before.TotalAlloc) >> 20; grown > 256 {
		t.Errorf("one look allocates %d MiB", grown)
	}
}

func TestManyFilesAreBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range maxFiles + 10 {
		write(t, fmt.Sprintf("%s/%05d.yaml", dir, i), "x")
	}
	files, err := specFiles(dir)
	if len(files) != maxFiles || err == nil {
		t.Errorf("%d files, %v", len(files), err)
	}
}

func TestEditsThatLeaveTheContainerAreRefused(t *testing.T) {
	for name, edit := range map[string]string{
		"upward device":    `{"deviceNodes":[{"path":"/dev/../../x","hostPath":"/dev/null"}]}`,
		"relative device":  `{"deviceNodes":[{"path":"dev/x","hostPath":"/dev/null"}]}`,
		"missing device":   `{"deviceNodes":[{"path":"/dev/x","hostPath":"/dev/no-such-device"}]}`,
		"file as device":   `{"deviceNodes":[{"path":"/dev/x","hostPath":"/etc/passwd"}]}`,
		"bad permissions":  `{"deviceNodes":[{"path":"/dev/null","permissions":"rx"}]}`,
		"upward mount":     `{"mounts":[{"hostPath":"/tmp","containerPath":"/a/../../b"}]}`,
		"mount over root":  `{"mounts":[{"hostPath":"/tmp","containerPath":"/"}]}`,
		"relative source":  `{"mounts":[{"hostPath":"tmp","containerPath":"/b"}]}`,
		"relative hook":    `{"hooks":[{"hookName":"createRuntime","path":"./evil"}]}`,
		"unknown hook":     `{"hooks":[{"hookName":"whenever","path":"/bin/true"}]}`,
		"NUL in a value":   `{"env":["A=b\u0000c"]}`,
		"nameless value":   `{"env":["=b"]}`,
		"NUL in a hook":    `{"hooks":[{"hookName":"poststop","path":"/bin/true","env":["A=\u0000"]}]}`,
		"closID goes up":   `{"intelRdt":{"closID":".."}}`,
		"unknown property": `{"seccomp":"off"}`,
		"nothing":          `{}`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir+"/x.json", `{"cdiVersion":"0.7.0","kind":"vendor.com/gpu","devices":[{"name":"0","containerEdits":`+edit+`}]}`)
			edits, err := Registry{Dirs: []string{dir}}.Resolve([]string{"vendor.com/gpu=0"})
			if err == nil {
				err = edits.Apply(&specs.Spec{Process: &specs.Process{}})
			}
			if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "vendor.com/gpu=0") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// CVE-2025-23266: a hook has nothing of the image's, and no daemon's environment; and it ends.
func TestCVE_2025_23266_HooksHaveTheirOwnEnvironmentAndEnd(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/x.json", `{"cdiVersion":"0.7.0","kind":"vendor.com/gpu","devices":[{"name":"0","containerEdits":{"hooks":[
		{"hookName":"createRuntime","path":"/bin/true"},
		{"hookName":"createContainer","path":"/bin/true","timeout":7200,"env":["A=b"]},
		{"hookName":"startContainer","path":"/bin/true","timeout":3},
		{"hookName":"poststop","path":"/bin/true","args":["true","x"]}]}}]}`)
	s := applied(t, Registry{Dirs: []string{dir}}, "vendor.com/gpu=0")
	const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, h := range []struct {
		is      []specs.Hook
		seconds int
		env     string
	}{
		{s.Hooks.CreateRuntime, 10, path},
		{s.Hooks.CreateContainer, 60, "A=b"},
		{s.Hooks.StartContainer, 3, path},
		{s.Hooks.Poststop, 10, path},
	} {
		if len(h.is) != 1 || *h.is[0].Timeout != h.seconds || !slices.Equal(h.is[0].Env, []string{h.env}) || len(h.is[0].Args) == 0 {
			t.Errorf("hook %+v, want %d s and %q", h.is, h.seconds, h.env)
		}
	}
}

func TestGroupsAndDevices(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/x.json", `{"cdiVersion":"0.7.0","kind":"vendor.com/gpu","devices":[{"name":"0","containerEdits":{
		"additionalGids":[44,0],"deviceNodes":[{"path":"/dev/x","hostPath":"/dev/null","permissions":"rw"}],
		"mounts":[{"hostPath":"/usr/lib","containerPath":"/usr/lib/vendor","options":["ro","bind"]}]}}]}`)
	r := Registry{Dirs: []string{dir}}
	s := applied(t, r, "vendor.com/gpu=0")
	if d := s.Linux.Devices; len(d) != 1 || d[0].Path != "/dev/x" || d[0].Major != 1 || d[0].Minor != 3 {
		t.Errorf("devices %+v", d)
	}
	if d := s.Linux.Resources.Devices; len(d) != 1 || d[0].Access != "rw" || !d[0].Allow {
		t.Errorf("rules %+v", d)
	}
	if len(s.Mounts) != 1 || s.Mounts[0].Destination != "/usr/lib/vendor" {
		t.Errorf("mounts %+v", s.Mounts)
	}
	if g := s.Process.User.AdditionalGids; !slices.Equal(g, []uint32{44}) {
		t.Errorf("groups %v", g)
	}
}

// FuzzNames: whatever name is asked for, it is an error or a device of a file, and never a file that the name leads to.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"vendor.com/gpu=0", "", "/", "=", "a/b=c", "../x/y=z", "vendor.com/gpu=0\x00", strings.Repeat("a", 300) + "/b=c", "vendor.com/gpu=../../0", "é/ü=ß"} {
		f.Add(s)
	}
	dir := f.TempDir()
	if err := os.WriteFile(dir+"/x.yaml", []byte(document("x", "0", "1-2_3.4:5")), 0o644); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name string) {
		_, _, _, bad := parser.ParseQualifiedName(name)
		edits, err := Registry{Dirs: []string{dir}}.Resolve([]string{name})
		if err == nil && (bad != nil || edits == nil || name != "vendor.com/gpu=0" && name != "vendor.com/gpu=1-2_3.4:5") {
			t.Errorf("%q is a device", name)
		}
		if err != nil && !errors.Is(err, errdefs.ErrFailedPrecondition) {
			t.Errorf("%q: %v", name, err)
		}
	})
}

// FuzzSpecification: no file makes the reader, or the edits, panic.
func FuzzSpecification(f *testing.F) {
	f.Add([]byte(document("x", "0")))
	f.Add([]byte(`{"cdiVersion":"1.1.0","kind":"vendor.com/gpu","devices":[{"name":"0","containerEdits":{"hooks":[{"hookName":"poststop","path":"/x"}],"intelRdt":{"closID":"a"},"netDevices":[{"hostInterfaceName":"a","name":"b"}]}}]}`))
	f.Add([]byte("devices: [null, {containerEdits: {mounts: [null], hooks: [null], deviceNodes: [null]}}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > maxFile {
			return
		}
		spec, err := parse(data, 0)
		if err != nil {
			return
		}
		for _, d := range spec.Devices {
			_ = d.Name
		}
	})
}

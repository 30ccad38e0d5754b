package spec

import (
	"errors"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func fileMode(m uint32) *os.FileMode {
	mode := os.FileMode(m)
	return &mode
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		name                           string
		entrypoint, cmd, command, args []string
		want                           []string // nil: refused
	}{
		{"image alone", []string{"/e"}, []string{"c"}, nil, nil, []string{"/e", "c"}},
		{"command drops the image's CMD", []string{"/e"}, []string{"c"}, []string{"/x"}, nil, []string{"/x"}},
		{"args replace CMD only", []string{"/e"}, []string{"c"}, nil, []string{"a"}, []string{"/e", "a"}},
		{"both", []string{"/e"}, []string{"c"}, []string{"/x"}, []string{"a"}, []string{"/x", "a"}},
		{"CMD alone", nil, []string{"/c", "d"}, nil, nil, []string{"/c", "d"}},
		{"empty entrypoint of docker build", []string{""}, []string{"/c"}, nil, nil, []string{"/c"}},
		{"args alone", nil, nil, nil, []string{"/a"}, []string{"/a"}},
		{"nothing", nil, nil, nil, nil, nil},
		{"empty program", nil, nil, []string{"", "x"}, nil, nil},
		{"NUL", nil, nil, []string{"/x"}, []string{"a\x00b"}, nil},
		{"NUL of the image", []string{"/e\x00"}, nil, nil, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			change := func(in *Input) {
				in.Image.Entrypoint, in.Image.Cmd, in.Container.Command, in.Container.Args = c.entrypoint, c.cmd, c.command, c.args
			}
			if c.want == nil {
				refuse(t, change)
				return
			}
			if got := mustContainer(t, change).Spec.Process.Args; !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestEnvironment(t *testing.T) {
	env := func(kv ...string) (list []*cri.KeyValue) {
		for _, e := range kv {
			k, v, _ := strings.Cut(e, "=")
			list = append(list, &cri.KeyValue{Key: k, Value: []byte(v)})
		}
		return list
	}
	path := "PATH=" + defaultPath
	for _, c := range []struct {
		name  string
		tty   bool
		host  string
		image []string
		cri   []*cri.KeyValue
		want  []string
	}{
		{"defaults", false, "web-0", nil, nil, []string{path, "HOSTNAME=web-0", "HOME=/root"}},
		{"terminal", true, "web-0", nil, nil, []string{path, "TERM=xterm", "HOSTNAME=web-0", "HOME=/root"}},
		{"the node's hostname", false, "", nil, nil, []string{path, "HOSTNAME=node-1", "HOME=/root"}},
		{"image over defaults", true, "h", []string{"PATH=/bin", "TERM=vt100"}, nil, []string{"PATH=/bin", "TERM=vt100", "HOSTNAME=h", "HOME=/root"}},
		{"request over image", false, "h", []string{"A=1", "B=2"}, env("A=3"), []string{path, "HOSTNAME=h", "A=3", "B=2", "HOME=/root"}},
		{"last duplicate wins", false, "h", nil, env("A=1", "B=2", "A=3", "HOSTNAME=me"), []string{path, "HOSTNAME=me", "A=3", "B=2", "HOME=/root"}},
		{"HOME as given", false, "h", []string{"HOME=/data"}, nil, []string{path, "HOSTNAME=h", "HOME=/data"}},
		{"empty HOME is none", false, "h", nil, env("HOME="), []string{path, "HOSTNAME=h", "HOME=/root"}},
		{"values may have lines", false, "h", nil, env("A=x\ny=z"), []string{path, "HOSTNAME=h", "A=x\ny=z", "HOME=/root"}},
		{"image entries that say nothing", false, "h", []string{"A", "=x", ""}, nil, []string{path, "HOSTNAME=h", "HOME=/root"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := mustContainer(t, func(in *Input) {
				in.Container.Tty, in.Sandbox.Hostname, in.Image.Env, in.Container.Envs = c.tty, c.host, c.image, c.cri
			}).Spec.Process.Env
			if !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestEnvironmentRefused(t *testing.T) {
	for _, c := range []struct{ key, value, word string }{
		{"", "x", "config.envs[0].key: is empty"},
		{"A=B", "x", "config.envs[0].key"},
		{"A\x00", "x", "config.envs[0].key"},
		{"A", "x\x00", "config.envs[0].value"},
	} {
		refuse(t, func(in *Input) { in.Container.Envs = []*cri.KeyValue{{Key: c.key, Value: []byte(c.value)}} }, c.word)
	}
	refuse(t, func(in *Input) { in.Image.Env = []string{"A=\x00"} }, "image environment")
}

func TestCVE_2022_4318_HomeWithControlCharacter(t *testing.T) {
	for _, home := range []string{"/root\nevil:x:0:0::/:", "/root\r", "/\x7f", "/\x1b[2J"} {
		refuse(t, func(in *Input) { in.Container.Envs = []*cri.KeyValue{{Key: "HOME", Value: []byte(home)}} }, "config.envs[0].value")
		refuse(t, func(in *Input) { in.Image.Env = []string{"HOME=" + home} }, "image environment")
	}
	out := mustContainer(t, func(in *Input) { in.Container.Envs = []*cri.KeyValue{{Key: "HOME", Value: []byte(`/a\nb`)}} })
	if !slices.Contains(out.Spec.Process.Env, `HOME=/a\nb`) {
		t.Errorf("environment %q", out.Spec.Process.Env)
	}
}

// Without HOME libcontainer would parse the container's passwd itself.
func TestCVE_2026_47262_HomeIsAlwaysSet(t *testing.T) {
	for _, passwd := range []string{"", testPasswd, "root:x:0:0:::"} {
		out := mustContainer(t, func(in *Input) { in.Passwd = []byte(passwd) })
		if !slices.ContainsFunc(out.Spec.Process.Env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=/") }) {
			t.Errorf("passwd %q: no HOME in %q", passwd, out.Spec.Process.Env)
		}
	}
}

func TestWorkingDirectory(t *testing.T) {
	for _, c := range []struct{ image, request, want string }{
		{"", "", "/"}, {"/srv", "", "/srv"}, {"/srv", "/data/", "/data"}, {"srv", "", "/srv"}, {"../../srv", "", "/srv"},
	} {
		got := mustContainer(t, func(in *Input) { in.Image.WorkingDir, in.Container.WorkingDir = c.image, c.request }).Spec.Process.Cwd
		if got != c.want {
			t.Errorf("image %q, request %q: %q, want %q", c.image, c.request, got, c.want)
		}
	}
	refuse(t, func(in *Input) { in.Container.WorkingDir = "srv" }, `config.working_dir: "srv" is not absolute`)
	refuse(t, func(in *Input) { in.Container.WorkingDir = "/srv\n" }, "config.working_dir", "control")
	refuse(t, func(in *Input) { in.Image.WorkingDir = "/srv\x00" }, "image working directory")
}

// libcontainer's errors as a container's creation has them.
func TestErrorsOfTheWorkingDirectoryNameItsField(t *testing.T) {
	const file, chdir = "mkdir /etc/passwd: not a directory", `chdir to cwd ("/data") set in config.json failed: permission denied`
	for _, c := range []struct{ text, request, cwd, want string }{
		{file, "/etc/passwd", "/etc/passwd", `config.working_dir: "/etc/passwd" cannot be used: ` + file},
		{file, "/etc//passwd/a/b", "/etc/passwd/a/b", `config.working_dir: "/etc//passwd/a/b" cannot be used: ` + file},
		{file, "", "/etc/passwd", `image working directory: "/etc/passwd" cannot be used: ` + file},
		{chdir, "/data", "/data", `config.working_dir: "/data" cannot be used: ` + chdir},
		{file, "/etc/passwd2", "/etc/passwd2", file}, // something else's directory
		{chdir, "/dat", "/dat", chdir},
		{`exec: "/data": permission denied`, "/data", "/data", `exec: "/data": permission denied`},
		{file, "", "/", file},
	} {
		was := errors.New(c.text)
		err := OfWorkingDir(was, &cri.ContainerConfig{WorkingDir: c.request}, c.cwd)
		if err.Error() != c.want || errdefs.IsFailedPrecondition(err) == errors.Is(err, was) {
			t.Errorf("%q, request %q, %q: %q, want %q", c.text, c.request, c.cwd, err, c.want)
		}
	}
}

func TestNoNewPrivilegesTerminalAndReadOnlyRoot(t *testing.T) {
	for _, on := range []bool{false, true} {
		s := mustContainer(t, func(in *Input) {
			security(in).NoNewPrivs, security(in).ReadonlyRootfs, in.Container.Tty = on, on, on
		}).Spec
		if s.Process.NoNewPrivileges != on || s.Root.Readonly != on || s.Process.Terminal != on {
			t.Errorf("%v: no_new_privs %v, read-only %v, terminal %v", on, s.Process.NoNewPrivileges, s.Root.Readonly, s.Process.Terminal)
		}
		if len(s.Process.Rlimits) > 0 {
			t.Errorf("rlimits %v: none are the default", s.Process.Rlimits)
		}
	}
}

func TestExecProcess(t *testing.T) {
	s := mustContainer(t, func(in *Input) { in.Image.User = "web" }).Spec
	p, err := ExecProcess(s, []string{"sh", "-c", "id"}, true)
	if err != nil {
		t.Fatal(err)
	}
	want := *s.Process
	want.Args, want.Terminal, want.Env = []string{"sh", "-c", "id"}, true, append(slices.Clone(s.Process.Env), "TERM=xterm")
	if !reflect.DeepEqual(*p, want) {
		t.Errorf("got %+v, want %+v", *p, want)
	}
	p.Env[0], p.Capabilities.Bounding[0], p.User.AdditionalGids[0], *p.OOMScoreAdj = "x", "x", 9, 9
	if s.Process.Env[0] == "x" || s.Process.Capabilities.Bounding[0] == "x" || s.Process.User.AdditionalGids[0] == 9 || *s.Process.OOMScoreAdj == 9 {
		t.Error("the exec shares memory with the container")
	}
	if again, _ := ExecProcess(s, []string{"x"}, false); again.Terminal || slices.Contains(again.Env, "TERM=xterm") {
		t.Error("an exec without a terminal has one")
	}
	for _, cmd := range [][]string{nil, {}, {""}, {"x", "\x00"}} {
		_, err := ExecProcess(s, cmd, false)
		refused(t, err, errdefs.ErrInvalidArgument, "cmd")
	}
}

// Environments of containers of one image have shared an array; a later one wrote into an earlier one's.
func TestCVE_2021_21334_NothingSharedBetweenContainers(t *testing.T) {
	in := request(func(in *Input) {
		privileged(in)
		in.Image.Env = append(make([]string, 0, 64), "A=1")
		in.Image.Entrypoint = append(make([]string, 0, 64), "/app")
		in.Container.Mounts = []*cri.Mount{{ContainerPath: "/a", HostPath: "/a", MountOptions: append(make([]string, 0, 8), "noexec")}}
		in.Container.Linux.Resources.Unified = map[string]string{"memory.high": "1"}
	})
	outs := make([]*Output, 8)
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() {
			mine := in
			mine.Container = &cri.ContainerConfig{
				Metadata: in.Container.Metadata, Image: in.Container.Image, Linux: in.Container.Linux, Mounts: in.Container.Mounts,
				Envs: []*cri.KeyValue{{Key: "N", Value: []byte{byte('0' + i)}}}, Args: []string{string(byte('0' + i))},
			}
			out, err := Container(mine)
			if err != nil {
				t.Error(err)
				return
			}
			outs[i] = out
			// What a later edit of the specification would do.
			p := out.Spec.Process
			p.Env = append(p.Env, "X="+string(byte('0'+i)))
			p.Args[0] = p.Args[1]
			out.Spec.Linux.Resources.Unified["memory.high"] = p.Args[1]
			*out.Spec.Linux.Devices[0].UID = uint32(i)
			for _, m := range out.Spec.Mounts {
				for j := range m.Options {
					m.Options[j] = p.Args[1]
				}
			}
		})
	}
	wg.Wait()
	for i, out := range outs {
		n := string(byte('0' + i))
		p := out.Spec.Process
		if !slices.Contains(p.Env, "N="+n) || p.Env[len(p.Env)-1] != "X="+n || p.Args[0] != n ||
			out.Spec.Linux.Resources.Unified["memory.high"] != n || *out.Spec.Linux.Devices[0].UID != uint32(i) {
			t.Errorf("container %s has another's: %q %q", n, p.Env, p.Args)
		}
	}
	if in.Image.Env[0] != "A=1" || in.Image.Entrypoint[0] != "/app" || *in.Host.Devices[0].UID != 0 ||
		in.Container.Mounts[0].MountOptions[0] != "noexec" || in.Container.Linux.Resources.Unified["memory.high"] != "1" {
		t.Error("a container wrote into its input")
	}
}

func TestSameRequestSameSpecification(t *testing.T) {
	// The same request gives the same specification, byte for byte: records and golden files depend on it.
	a, b := mustContainer(t, privileged), mustContainer(t, privileged)
	if !reflect.DeepEqual(a, b) {
		t.Error("two computations differ")
	}
}

package spec

import (
	"bytes"
	"errors"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// classified says whether a refusal tells its caller what it is.
func classified(err error) bool {
	return errors.Is(err, errdefs.ErrInvalidArgument) || errors.Is(err, errdefs.ErrFailedPrecondition) || errors.Is(err, errdefs.ErrNotImplemented)
}

func FuzzPasswdAndGroup(f *testing.F) {
	f.Add([]byte(testPasswd), []byte(testGroup), "web", uint32(1000))
	f.Add([]byte("a:b"), []byte(":::a,,a\n#"), "a", uint32(0))
	f.Add([]byte(":::::::::\n\n:x:0:0"), []byte{}, "", uint32(1<<31))
	f.Fuzz(func(t *testing.T, passwd, group []byte, name string, uid uint32) {
		for _, look := range []func() (account, bool, error){
			func() (account, bool, error) { return userByName(passwd, name) },
			func() (account, bool, error) { return userByID(passwd, uid) },
		} {
			user, ok, err := look()
			if err != nil {
				if !errors.Is(err, errdefs.ErrInvalidArgument) {
					t.Errorf("unclassified: %v", err)
				}
				continue
			}
			if user.uid > maxID || user.gid > maxID {
				t.Errorf("ids beyond int32: %+v", user)
			}
			if !ok && user != (account{}) {
				t.Errorf("not found, but %+v", user)
			}
			if strings.ContainsAny(user.name+user.home, "\n:") {
				t.Errorf("a field spans lines or fields: %+v", user)
			}
		}
		gids, err := groupsOf(group, name)
		if err == nil && len(gids) > bytes.Count(group, []byte{'\n'})+1 {
			t.Errorf("%d memberships of %d lines", len(gids), bytes.Count(group, []byte{'\n'})+1)
		}
		if name == "" && len(gids) > 0 {
			t.Errorf("the user without a name is in %v", gids)
		}
	})
}

func FuzzUser(f *testing.F) {
	for _, s := range []string{"", "0", "web", "web:logs", "1000:2000", "4294967296", "-1", "+1", "web:-1", ":", "::", "a:b:c", "root\n", "٣"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, user string) {
		id, err := resolveIdentity(nil, user, []byte(testPasswd), []byte(testGroup))
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("unclassified: %v", err)
			}
			if controls(err.Error()) {
				t.Errorf("control characters in %q", err)
			}
			return
		}
		if id.uid > maxID || id.gid > maxID || !slices.Contains(id.groups, id.gid) || !path.IsAbs(id.home) {
			t.Errorf("%q is %+v", user, id)
		}
		// Root is only who says so: by nothing, by name, or by a number of value zero.
		name, _, _ := strings.Cut(user, ":")
		if id.uid == 0 && name != "root" && strings.Trim(name, "+-0") != "" {
			t.Errorf("%q became root", user)
		}
	})
}

func FuzzSysctl(f *testing.F) {
	f.Add("net.core.somaxconn", "1", false, false)
	f.Add("kernel/shmmax", "1+kernel.core_pattern=x", true, false)
	f.Add("net.//.kernel", "1", false, true)
	f.Fuzz(func(t *testing.T, name, value string, hostNetwork, hostIPC bool) {
		ns := &cri.NamespaceOption{}
		if hostNetwork {
			ns.Network = cri.NamespaceMode_NODE
		}
		if hostIPC {
			ns.Ipc = cri.NamespaceMode_NODE
		}
		got, err := SandboxSysctls(&cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{
			Sysctls:         map[string]string{name: value},
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: ns},
		}})
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("unclassified: %v", err)
			}
			return
		}
		for k, v := range got {
			// The file that whoever sets it opens below /proc/sys.
			file := path.Join("/proc/sys", strings.NewReplacer(".", "/", "/", ".").Replace(k))
			ipc := strings.HasPrefix(file, "/proc/sys/fs/mqueue/") || slices.Contains(ipcSysctls, k)
			net := strings.HasPrefix(file, "/proc/sys/net/")
			if (!ipc || hostIPC) && (!net || hostNetwork) {
				t.Errorf("%q sets %s", name, file)
			}
			if strings.ContainsAny(v, "=+\n\r\x00/|") {
				t.Errorf("value %q", v)
			}
		}
	})
}

func FuzzSeccompProfile(f *testing.F) {
	f.Add([]byte(blockMkdir))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64"}],"syscalls":[{"name":"x","action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}}]}`))
	f.Add([]byte(`{"syscalls":[null]}`))
	sc := &cri.LinuxContainerSecurityContext{Seccomp: &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/p"}}
	s := mustSpec(f)
	f.Fuzz(func(t *testing.T, profile []byte) {
		filter, err := seccompFilter(sc, s, profile, testHost(2))
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("unclassified: %v", err)
			}
			return
		}
		if filter == nil || filter.DefaultAction == "" {
			t.Errorf("profile %q became unconfined", profile)
		}
	})
}

func mustSpec(f *testing.F) *specs.Spec {
	out, err := Container(request(nil))
	if err != nil {
		f.Fatal(err)
	}
	return out.Spec
}

// FuzzContainer feeds the bytes of a CRI request and holds what must be true of every container that is accepted.
func FuzzContainer(f *testing.F) {
	for _, change := range representative {
		in := request(change)
		sandbox, err := proto.Marshal(in.Sandbox)
		if err != nil {
			f.Fatal(err)
		}
		container, err := proto.Marshal(in.Container)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(sandbox, container, in.Image.User, uint8(in.Host.CgroupVersion))
	}
	f.Fuzz(func(t *testing.T, sandbox, container []byte, imageUser string, version uint8) {
		in := request(nil)
		in.Sandbox, in.Container = &cri.PodSandboxConfig{}, &cri.ContainerConfig{}
		if proto.Unmarshal(sandbox, in.Sandbox) != nil || proto.Unmarshal(container, in.Container) != nil {
			t.Skip()
		}
		in.Image.User, in.Host = imageUser, testHost(1+int(version)%2)
		in.Namespaces = Namespaces{Net: "/net", IPC: "/ipc", UTS: "/uts", PID: "/pid", Target: "/target"}
		in.Sources, in.Devices, in.SeccompProfile = nil, nil, []byte(blockMkdir)
		for range in.Container.GetMounts() {
			in.Sources = append(in.Sources, Source{Path: "/source", Shared: true})
		}
		for range in.Container.GetDevices() {
			in.Devices = append(in.Devices, []specs.LinuxDevice{device("", 8, 16)})
		}
		sandboxErr, containerErr := ValidateSandbox(in.Sandbox), ValidateContainer(in.Sandbox, in.Container)
		out, err := Container(in)
		if (sandboxErr != nil || containerErr != nil) && err == nil {
			t.Fatalf("validation refuses (%v, %v) what Container accepts", sandboxErr, containerErr)
		}
		if err != nil {
			if !classified(err) {
				t.Errorf("unclassified: %v", err)
			}
			if controls(err.Error()) || len(err.Error()) > 1000 {
				t.Errorf("not for a log: %q", err)
			}
			return
		}
		checkInvariants(t, in, out)
	})
}

func checkInvariants(t *testing.T, in Input, out *Output) {
	t.Helper()
	s, p, l := out.Spec, out.Spec.Process, out.Spec.Linux
	sc := in.Container.GetLinux().GetSecurityContext()
	privileged := sc.GetPrivileged()
	if c := p.Capabilities; len(sc.GetCapabilities().GetAddAmbientCapabilities()) == 0 && len(c.Inheritable)+len(c.Ambient) > 0 {
		t.Errorf("inheritable %v, ambient %v", c.Inheritable, c.Ambient)
	}
	if len(s.Annotations) > 0 || s.Hooks != nil || len(l.Sysctl) > 0 || len(p.Rlimits) > 0 {
		t.Errorf("annotations %v, hooks %v, sysctls %v, rlimits %v", s.Annotations, s.Hooks, l.Sysctl, p.Rlimits)
	}
	if r := l.Resources.Devices; r[0].Allow || r[0].Type != "" || r[0].Access != "rwm" {
		t.Errorf("first device rule %+v", r[0])
	}
	for _, r := range l.Resources.Devices[1:] {
		if !privileged && (r.Major == nil || r.Minor == nil) {
			t.Errorf("device rule without numbers: %+v", r)
		}
	}
	if p.User.UID > maxID || p.User.GID > maxID || !slices.Contains(p.User.AdditionalGids, p.User.GID) {
		t.Errorf("user %+v", p.User)
	}
	if len(p.Args) == 0 || !path.IsAbs(p.Cwd) || controls(p.Cwd) || p.OOMScoreAdj == nil {
		t.Errorf("args %q, cwd %q, oom_score_adj %v", p.Args, p.Cwd, p.OOMScoreAdj)
	}
	home := 0
	seen := map[string]bool{}
	for _, kv := range p.Env {
		key, value, ok := strings.Cut(kv, "=")
		if !ok || key == "" || seen[key] || strings.Contains(kv, "\x00") {
			t.Errorf("environment %q", kv)
		}
		seen[key] = true
		if key == "HOME" && value != "" && !controls(value) {
			home++
		}
	}
	if home != 1 {
		t.Errorf("no HOME in %q", p.Env)
	}
	if !privileged {
		if !slices.Equal(l.MaskedPaths, sc.GetMaskedPaths()) || !slices.Equal(l.ReadonlyPaths, sc.GetReadonlyPaths()) {
			t.Errorf("masked %v, read-only %v", l.MaskedPaths, l.ReadonlyPaths)
		}
		if sc.GetSeccomp() != nil && sc.GetSeccomp().GetProfileType() != cri.SecurityProfile_Unconfined && l.Seccomp == nil {
			t.Error("unconfined without being asked")
		}
	}
	has := map[specs.LinuxNamespaceType]bool{}
	for _, n := range l.Namespaces {
		has[n.Type] = true
	}
	if !has[specs.MountNamespace] || has[specs.NetworkNamespace] == HostNetwork(in.Sandbox) || has[specs.IPCNamespace] == HostIPC(in.Sandbox) ||
		has[specs.UTSNamespace] == HostNetwork(in.Sandbox) || !has[specs.PIDNamespace] && !HostPID(in.Sandbox) {
		t.Errorf("namespaces %v", l.Namespaces)
	}
	for i, m := range s.Mounts {
		for _, later := range s.Mounts[i+1:] {
			if m.Type == "bind" && later.Type == "bind" && strings.HasPrefix(m.Destination, later.Destination+"/") {
				t.Errorf("%q would hide %q", later.Destination, m.Destination)
			}
		}
		if !path.IsAbs(m.Destination) || path.Clean(m.Destination) != m.Destination || m.Destination == "/" || controls(m.Destination) {
			t.Errorf("mount %d at %q", i, m.Destination)
		}
		if m.Destination == "/sys/fs/cgroup" && m.Type == "cgroup" && !privileged && !slices.Contains(m.Options, "ro") {
			t.Errorf("cgroupfs %v", m.Options)
		}
	}
}

package spec

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCapabilities(t *testing.T) {
	without := func(list []string, names ...string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(c string) bool { return slices.Contains(names, c) })
	}
	sorted := func(list []string) []string { // by number, as the specification has them
		return slices.DeleteFunc(slices.Clone(allCapabilities), func(c string) bool { return !slices.Contains(list, c) })
	}
	for _, c := range []struct {
		name       string
		request    *cri.Capability
		privileged bool
		held       []string
		want       []string
	}{
		{"default", nil, false, nil, defaultCapabilities},
		{"add one", &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}, false, nil, append(slices.Clone(defaultCapabilities), "CAP_NET_ADMIN")},
		{"any case, with prefix", &cri.Capability{AddCapabilities: []string{"cap_net_admin"}}, false, nil, append(slices.Clone(defaultCapabilities), "CAP_NET_ADMIN")},
		{"drop one", &cri.Capability{DropCapabilities: []string{"CHOWN"}}, false, nil, without(defaultCapabilities, "CAP_CHOWN")},
		{"add all", &cri.Capability{AddCapabilities: []string{"ALL"}}, false, nil, allCapabilities},
		{"add all but one", &cri.Capability{AddCapabilities: []string{"all"}, DropCapabilities: []string{"SYS_ADMIN"}}, false, nil, without(allCapabilities, "CAP_SYS_ADMIN")},
		{"drop all", &cri.Capability{DropCapabilities: []string{"ALL"}}, false, nil, nil},
		{"drop all but one", &cri.Capability{AddCapabilities: []string{"KILL"}, DropCapabilities: []string{"ALL"}}, false, nil, []string{"CAP_KILL"}},
		{"drop all beats add all", &cri.Capability{AddCapabilities: []string{"ALL", "KILL"}, DropCapabilities: []string{"ALL"}}, false, nil, []string{"CAP_KILL"}},
		{"a drop beats an addition", &cri.Capability{AddCapabilities: []string{"KILL"}, DropCapabilities: []string{"KILL"}}, false, nil, without(defaultCapabilities, "CAP_KILL")},
		{"privileged", &cri.Capability{DropCapabilities: []string{"ALL"}}, true, nil, allCapabilities},
		{"berth has few", nil, false, []string{"CAP_KILL", "CAP_SYS_ADMIN"}, []string{"CAP_KILL"}},
		{"all that berth has", &cri.Capability{AddCapabilities: []string{"ALL"}}, false, []string{"CAP_KILL", "CAP_SYS_ADMIN"}, []string{"CAP_KILL", "CAP_SYS_ADMIN"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := mustContainer(t, func(in *Input) {
				security(in).Capabilities, in.Host.Capabilities = c.request, c.held
				if c.privileged {
					privileged(in)
				}
			}).Spec.Process.Capabilities
			want := sorted(c.want)
			for name, set := range map[string][]string{"bounding": got.Bounding, "effective": got.Effective, "permitted": got.Permitted} {
				if !slices.Equal(set, want) {
					t.Errorf("%s %v, want %v", name, set, want)
				}
			}
			if len(got.Inheritable)+len(got.Ambient) > 0 {
				t.Errorf("inheritable %v, ambient %v", got.Inheritable, got.Ambient)
			}
		})
	}
	refuse(t, func(in *Input) { security(in).Capabilities = &cri.Capability{AddCapabilities: []string{"KILL", "FLY"}} },
		`capabilities.add_capabilities[1]: "FLY" is not a capability`)
	refuse(t, func(in *Input) { security(in).Capabilities = &cri.Capability{AddAmbientCapabilities: []string{"ALL"}} },
		"add_ambient_capabilities[0]")
	_, err := Container(request(func(in *Input) {
		in.Host.Capabilities = []string{"CAP_KILL"}
		security(in).Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	}))
	refused(t, err, errdefs.ErrFailedPrecondition, "SYS_ADMIN")
}

func TestCVE_2022_29162_InheritableIsEmpty(t *testing.T) {
	for name, change := range map[string]func(*Input){
		"default": nil, "privileged": privileged,
		"all": func(in *Input) { security(in).Capabilities = &cri.Capability{AddCapabilities: []string{"ALL"}} },
	} {
		s := mustContainer(t, change).Spec
		exec, err := ExecProcess(s, []string{"x"}, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []*specs.LinuxCapabilities{s.Process.Capabilities, exec.Capabilities} {
			if len(c.Inheritable)+len(c.Ambient) > 0 {
				t.Errorf("%s: inheritable %v, ambient %v", name, c.Inheritable, c.Ambient)
			}
		}
	}
	// Asked for by name, ambient works, and for that the kernel wants exactly the same in the inheritable set.
	c := mustContainer(t, func(in *Input) {
		security(in).Capabilities = &cri.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE", "KILL"}, DropCapabilities: []string{"KILL"}}
	}).Spec.Process.Capabilities
	if want := []string{"CAP_NET_BIND_SERVICE"}; !slices.Equal(c.Ambient, want) || !slices.Equal(c.Inheritable, want) {
		t.Errorf("ambient %v, inheritable %v", c.Ambient, c.Inheritable)
	}
}

const blockMkdir = `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`

func TestSeccomp(t *testing.T) {
	localhost := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/var/lib/kubelet/seccomp/p.json"}
	allows := func(f *specs.LinuxSeccomp, call string) bool {
		return f != nil && slices.ContainsFunc(f.Syscalls, func(s specs.LinuxSyscall) bool {
			return s.Action == specs.ActAllow && slices.Contains(s.Names, call) && len(s.Args) == 0
		})
	}
	filter := func(change func(*Input)) *specs.LinuxSeccomp { return mustContainer(t, change).Spec.Linux.Seccomp }

	f := filter(nil)
	if f == nil || f.DefaultAction != specs.ActErrno || !allows(f, "read") || allows(f, "mount") || allows(f, "bpf") {
		t.Fatalf("RuntimeDefault is not the default profile: %+v", f)
	}
	f = filter(func(in *Input) { security(in).Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}} })
	if !allows(f, "mount") {
		t.Error("the default profile does not honour the capability")
	}
	for name, change := range map[string]func(*Input){
		"nil": func(in *Input) { security(in).Seccomp = nil },
		"unconfined": func(in *Input) {
			security(in).Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
		},
		"old unconfined": func(in *Input) { security(in).Seccomp, security(in).SeccompProfilePath = nil, "unconfined" }, //nolint:staticcheck // tests it
		"privileged":     privileged,
		"privileged with a profile": func(in *Input) {
			privileged(in)
			security(in).Seccomp = localhost
		},
		"unconfined where there is no seccomp": func(in *Input) { security(in).Seccomp, in.Host.SeccompEnabled = nil, false },
	} {
		if f := filter(change); f != nil {
			t.Errorf("%s: filtered", name)
		}
	}
	for name, change := range map[string]func(*Input){
		"field": func(in *Input) { security(in).Seccomp = localhost },
		"old string": func(in *Input) {
			security(in).Seccomp, security(in).SeccompProfilePath = nil, "localhost//var/lib/kubelet/seccomp/p.json" //nolint:staticcheck // tests it
		},
		"field beats the old string": func(in *Input) { security(in).Seccomp, security(in).SeccompProfilePath = localhost, "unconfined" }, //nolint:staticcheck // tests it
	} {
		with := func(in *Input) {
			change(in)
			in.SeccompProfile = []byte(blockMkdir)
		}
		f := filter(with)
		if f == nil || f.DefaultAction != specs.ActAllow || len(f.Syscalls) != 1 || f.Syscalls[0].Action != specs.ActErrno {
			t.Errorf("%s: filter %+v", name, f)
		}
		if p, err := SeccompProfilePath(request(with).Container); err != nil || p != localhost.LocalhostRef {
			t.Errorf("%s: path %q, %v", name, p, err)
		}
	}
	if p, err := SeccompProfilePath(request(privileged).Container); err != nil || p != "" {
		t.Errorf("privileged: path %q, %v", p, err)
	}
	_, err := Container(request(func(in *Input) { in.Host.SeccompEnabled = false }))
	refused(t, err, errdefs.ErrFailedPrecondition, "seccomp", "RuntimeDefault")

	for _, c := range []struct {
		p    cri.SecurityProfile_ProfileType
		ref  string
		want string
	}{
		{cri.SecurityProfile_Localhost, "", "localhost_ref: is empty"},
		{cri.SecurityProfile_Localhost, "p.json", "clean absolute path"},
		{cri.SecurityProfile_Localhost, "/a/../../etc/shadow", "clean absolute path"},
		{cri.SecurityProfile_Localhost, "/a\n", "control character"},
		{cri.SecurityProfile_RuntimeDefault, "/a", "is given with profile type RuntimeDefault"},
		{9, "", "seccomp.profile_type: 9"},
	} {
		refuse(t, func(in *Input) { security(in).Seccomp = &cri.SecurityProfile{ProfileType: c.p, LocalhostRef: c.ref} }, c.want)
	}
	refuse(t, func(in *Input) { security(in).Seccomp, security(in).SeccompProfilePath = nil, "whatever" }, "seccomp_profile_path") //nolint:staticcheck // tests it
}

func TestCVE_2023_2431_EmptyLocalhostProfile(t *testing.T) {
	for _, profile := range []string{
		"", " \n", "{}", "null", "[]", `"x"`, "{", `{"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`,
		`{"defaultAction":"SCMP_ACT_NOTHING"}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"ALLOW"}]}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":6,"op":"SCMP_CMP_EQ"}]}]}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"op":"=="}]}]}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"read","names":["write"],"action":"SCMP_ACT_ALLOW"}]}`,
		`{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[null]}`,
	} {
		t.Run(profile, func(t *testing.T) {
			refuse(t, func(in *Input) {
				security(in).Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/p.json"}
				in.SeccompProfile = []byte(profile)
			}, "config.linux.security_context.seccomp.localhost_ref", "/p.json")
		})
	}
}

func TestAppArmor(t *testing.T) {
	type sp = cri.SecurityProfile
	local := func(ref string) *sp { return &sp{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: ref} }
	for _, c := range []struct {
		name       string
		field      *sp
		old        string
		on, privil bool
		want       string
	}{
		{"nothing asked, AppArmor on", nil, "", true, false, DefaultAppArmorProfile},
		{"nothing asked, AppArmor off", nil, "", false, false, ""},
		{"RuntimeDefault", &sp{}, "", true, false, DefaultAppArmorProfile},
		{"Unconfined", &sp{ProfileType: cri.SecurityProfile_Unconfined}, "", true, false, ""},
		{"Unconfined, AppArmor off", &sp{ProfileType: cri.SecurityProfile_Unconfined}, "", false, false, ""},
		{"Localhost", local("mine"), "", true, false, "mine"},
		{"Localhost with prefix", local("localhost/mine"), "", true, false, "mine"},
		{"old Localhost", nil, "localhost/mine", true, false, "mine"},
		{"old default", nil, "runtime/default", true, false, DefaultAppArmorProfile},
		{"old unconfined", nil, "unconfined", true, false, ""},
		{"field beats the old string", local("localhost/mine"), "localhost/other", true, false, "mine"},
		{"privileged", local("mine"), "", true, true, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			change := func(in *Input) {
				security(in).Apparmor, security(in).ApparmorProfile = c.field, c.old //nolint:staticcheck // tests it
				in.Host.AppArmorEnabled, in.AppArmorLoaded = c.on, true
				if c.privil {
					privileged(in)
				}
			}
			if got := mustContainer(t, change).Spec.Process.ApparmorProfile; got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			in := request(change)
			if got, err := AppArmorProfile(in.Container, in.Host); err != nil || got != c.want {
				t.Errorf("AppArmorProfile: %q, %v", got, err)
			}
			in.AppArmorLoaded = false
			if _, err := Container(in); c.want != "" {
				refused(t, err, errdefs.ErrFailedPrecondition, c.want, "is not loaded")
			} else if err != nil {
				t.Errorf("nothing to load, but %v", err)
			}
		})
	}
	for _, p := range []*sp{{}, local("mine")} {
		_, err := Container(request(func(in *Input) { security(in).Apparmor = p }))
		refused(t, err, errdefs.ErrFailedPrecondition, "no AppArmor")
	}
	for _, ref := range []string{"", "localhost/", "unconfined", "a\nb"} {
		refuse(t, func(in *Input) { security(in).Apparmor = local(ref) }, "apparmor.localhost_ref")
	}
	refuse(t, func(in *Input) { security(in).ApparmorProfile = "mine" }, "apparmor_profile") //nolint:staticcheck // tests it
}

func TestPathsExactlyAsGiven(t *testing.T) {
	masked, readonly := []string{"/proc/kcore", "/sys/devices/virtual/powercap", "/bin/ls"}, []string{"/proc/sys"}
	l := mustContainer(t, func(in *Input) { security(in).MaskedPaths, security(in).ReadonlyPaths = masked, readonly }).Spec.Linux
	if !slices.Equal(l.MaskedPaths, masked) || !slices.Equal(l.ReadonlyPaths, readonly) {
		t.Errorf("masked %v, read-only %v", l.MaskedPaths, l.ReadonlyPaths)
	}
	l.MaskedPaths[0], l.ReadonlyPaths[0] = "/x", "/x"
	if masked[0] != "/proc/kcore" || readonly[0] != "/proc/sys" {
		t.Error("the lists are shared with the request")
	}
	for name, change := range map[string]func(*Input){
		"unmasked proc": func(in *Input) { security(in).MaskedPaths, security(in).ReadonlyPaths = nil, nil },
		"privileged":    privileged,
	} {
		if l := mustContainer(t, change).Spec.Linux; len(l.MaskedPaths)+len(l.ReadonlyPaths) > 0 {
			t.Errorf("%s: masked %v, read-only %v", name, l.MaskedPaths, l.ReadonlyPaths)
		}
	}
	refuse(t, func(in *Input) { security(in).MaskedPaths = []string{"/a", "proc"} }, "masked_paths[1]")
	refuse(t, func(in *Input) { security(in).ReadonlyPaths = []string{"/a\n"} }, "readonly_paths[0]")
}

func TestPrivilegedNeedsAPrivilegedPod(t *testing.T) {
	refuse(t, func(in *Input) { security(in).Privileged = true }, "config.linux.security_context.privileged: true")
}

func TestDevices(t *testing.T) {
	kvm := func() []specs.LinuxDevice {
		return []specs.LinuxDevice{{Type: "c", Major: 10, Minor: 232, FileMode: fileMode(0o666)}}
	}
	l := mustContainer(t, func(in *Input) {
		in.Container.Devices = []*cri.Device{
			{ContainerPath: "/dev/kvm", HostPath: "/dev/kvm", Permissions: "mr"},
			{ContainerPath: "/dev/disks/", HostPath: "/dev/mapper", Permissions: "rwm"},
			{ContainerPath: "/dev/kvm", HostPath: "/dev/kvm2", Permissions: "w"},
		}
		second := kvm()
		second[0].Minor = 233
		in.Devices = [][]specs.LinuxDevice{kvm(), {device("a", 253, 0), device("b/c", 253, 1)}, second}
	}).Spec.Linux
	var nodes, rules []string
	for _, d := range l.Devices {
		nodes = append(nodes, fmt.Sprintf("%s %s %d:%d", d.Path, d.Type, d.Major, d.Minor))
	}
	for _, r := range l.Resources.Devices {
		s := fmt.Sprintf("%v %s %s", r.Allow, r.Type, r.Access)
		if r.Major != nil {
			s += fmt.Sprintf(" %d:%d", *r.Major, *r.Minor)
		}
		rules = append(rules, s)
	}
	wantNodes := []string{"/dev/disks/a b 253:0", "/dev/disks/b/c b 253:1", "/dev/kvm c 10:233"}
	wantRules := []string{"false  rwm", "true c rm 10:232", "true b rwm 253:0", "true b rwm 253:1", "true c w 10:233"}
	if !slices.Equal(nodes, wantNodes) || !slices.Equal(rules, wantRules) {
		t.Errorf("nodes %q\nwant  %q\nrules %q\nwant  %q", nodes, wantNodes, rules, wantRules)
	}
	for word, d := range map[string]*cri.Device{
		"container_path": {ContainerPath: "kvm", HostPath: "/dev/kvm", Permissions: "r"},
		"host_path":      {ContainerPath: "/dev/kvm", HostPath: "", Permissions: "r"},
		"permissions":    {ContainerPath: "/dev/kvm", HostPath: "/dev/kvm", Permissions: ""},
		`"rwx"`:          {ContainerPath: "/dev/kvm", HostPath: "/dev/kvm", Permissions: "rwx"},
	} {
		refuse(t, func(in *Input) { in.Container.Devices = []*cri.Device{d} }, "config.devices[0]", word)
	}
	for word, found := range map[string][]specs.LinuxDevice{"holds none": {}, `type "p"`: {{Type: "p"}}} {
		_, err := Container(request(func(in *Input) {
			in.Container.Devices = []*cri.Device{{ContainerPath: "/dev/x", HostPath: "/dev/x", Permissions: "r"}}
			in.Devices = [][]specs.LinuxDevice{found}
		}))
		refused(t, err, errdefs.ErrFailedPrecondition, "config.devices[0].host_path", word)
	}
	for _, name := range []string{"", "gpu", "vendor.com/gpu", "vendor.com/gpu=", "=0", "/gpu=0", "vendor.com/g pu=0", "../gpu=0", "vendor.com/gpu=a\nb"} {
		_, err := Container(request(func(in *Input) { in.Container.CDIDevices = []*cri.CDIDevice{{Name: "vendor.com/gpu=0"}, {Name: name}} }))
		refused(t, err, errdefs.ErrInvalidArgument, "CDI_devices[1].name")
	}
}

func TestPrivilegedHasTheHostsDevices(t *testing.T) {
	l := mustContainer(t, privileged).Spec.Linux
	if len(l.Devices) != 2 || l.Devices[0].Path != "/dev/sda" || *l.Devices[0].FileMode != 0o660 || *l.Devices[0].GID != 6 {
		t.Errorf("devices %+v", l.Devices)
	}
	if r := l.Resources.Devices; len(r) != 2 || r[0].Allow || !r[1].Allow || r[1].Type != "" || r[1].Major != nil || r[1].Access != "rwm" {
		t.Errorf("rules %+v", r)
	}
}

func TestGHSA_g54h_m393_cpwq_FirstRuleDeniesAll(t *testing.T) {
	for name, change := range map[string]func(*Input){
		"default": nil, "privileged": privileged,
		"v1": func(in *Input) { in.Host = testHost(1) },
		"device": func(in *Input) {
			in.Container.Devices = []*cri.Device{{ContainerPath: "/dev/sdb", HostPath: "/dev/sdb", Permissions: "r"}}
		},
	} {
		r := mustContainer(t, change).Spec.Linux.Resources.Devices[0]
		if r.Allow || r.Access != "rwm" || r.Type != "" || r.Major != nil || r.Minor != nil {
			t.Errorf("%s: first rule %+v", name, r)
		}
	}
}

// Annotations have become systemd properties, labels of images commands on the host.
func TestCVE_2024_3154_AnnotationsAreNotConfiguration(t *testing.T) {
	plain := mustContainer(t, nil)
	hostile := map[string]string{
		"org.systemd.property.DeviceAllow": "/dev/sda rwm", "io.kubernetes.cri-o.Devices": "/dev/sda",
		"io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw": "true", "cdi.k8s.io/x": "vendor.com/gpu=all",
		"run.oci.keep_original_groups": "1", "io.kubernetes.cri.sandbox-id": "x",
		"container.apparmor.security.beta.kubernetes.io/app": "unconfined", "seccomp.security.alpha.kubernetes.io/pod": "unconfined",
	}
	in := request(func(in *Input) {
		in.Container.Annotations, in.Container.Labels = hostile, hostile
		in.Sandbox.Annotations, in.Sandbox.Labels = hostile, hostile
		in.Container.Image.Annotations = hostile
	})
	sameSpec(t, in, plain)
}

func TestCVE_2026_53488_ImageLabelsAreNotConfiguration(t *testing.T) {
	in := request(nil)
	plain := mustContainer(t, nil)
	in.Image.Labels = map[string]string{"io.containerd.image.command": "/bin/evil", "org.systemd.property.TasksMax": "1", "uidmap": "0:0:1"}
	in.Image.ExposedPorts = map[string]struct{}{"22/tcp": {}}
	in.Image.Volumes = map[string]struct{}{"/../../etc": {}}
	sameSpec(t, in, plain)
}

func sameSpec(t *testing.T, in Input, want *Output) {
	t.Helper()
	got, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := encode(t, got.Spec), encode(t, want.Spec); a != b {
		t.Errorf("the specification changed:\n%s", a)
	}
	if len(got.Spec.Annotations) > 0 || got.Spec.Hooks != nil || strings.Contains(encode(t, got.Spec), "systemd") {
		t.Errorf("annotations or hooks in %s", encode(t, got.Spec))
	}
}

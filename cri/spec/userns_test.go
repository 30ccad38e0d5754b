package spec

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func oneRange(host, container, length uint32) []*cri.IDMapping {
	return []*cri.IDMapping{{HostId: host, ContainerId: container, Length: length}}
}

// withUserns puts pod and container into a user namespace of 65536 ids from 65536 on.
func withUserns(in *Input) {
	u := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: oneRange(65536, 0, 65536), Gids: oneRange(131072, 0, 65536)}
	podSecurity(in).NamespaceOptions.UsernsOptions = u
	security(in).NamespaceOptions.UsernsOptions = u
	in.Namespaces.User = "/run/ns/user"
}

func TestUserNamespaces(t *testing.T) {
	const pod, node = cri.NamespaceMode_POD, cri.NamespaceMode_NODE
	good := oneRange(65536, 0, 65536)
	for _, c := range []struct {
		name  string
		u     *cri.UserNamespace
		words string // of the error; "" is none
	}{
		{"none", nil, ""},
		{"NODE", &cri.UserNamespace{Mode: node}, ""},
		{"POD", &cri.UserNamespace{Mode: pod, Uids: good, Gids: good}, ""},
		{"POD up to the last id", &cri.UserNamespace{Mode: pod, Uids: oneRange(math.MaxUint32-10, 0, 10), Gids: good}, ""},
		{"NODE with users", &cri.UserNamespace{Mode: node, Uids: good}, "uids: 1 mappings"},
		{"NODE with groups", &cri.UserNamespace{Mode: node, Gids: good}, "gids: 1 mappings"},
		{"CONTAINER", &cri.UserNamespace{Mode: cri.NamespaceMode_CONTAINER}, "mode: CONTAINER"},
		{"TARGET", &cri.UserNamespace{Mode: cri.NamespaceMode_TARGET}, "mode: TARGET"},
		{"no such mode", &cri.UserNamespace{Mode: 17}, "mode: 17"},
		{"POD without mappings", &cri.UserNamespace{}, "uids: 0 mappings"},
		{"POD without groups", &cri.UserNamespace{Uids: good}, "gids: 0 mappings"},
		{"two mappings", &cri.UserNamespace{Uids: append(oneRange(5, 0, 1), good...), Gids: good}, "uids: 2 mappings"},
		{"root unmapped", &cri.UserNamespace{Uids: good, Gids: oneRange(1000, 1, 10)}, "gids[0].container_id: 1"},
		{"root of the node", &cri.UserNamespace{Uids: oneRange(0, 0, 10), Gids: good}, "uids[0].host_id: 0"},
		{"empty mapping", &cri.UserNamespace{Uids: oneRange(1000, 0, 0), Gids: good}, "uids[0].length: 0"},
		{"beyond the last id", &cri.UserNamespace{Uids: oneRange(math.MaxUint32-9, 0, 10), Gids: good}, "uids[0].length: 10"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := request(func(in *Input) {
				withUserns(in)
				podSecurity(in).NamespaceOptions.UsernsOptions = c.u
				security(in).NamespaceOptions.UsernsOptions = c.u
			})
			for at, err := range map[string]error{
				"config.linux.security_context.namespace_options.userns_options":         ValidateContainer(in.Sandbox, in.Container),
				"config.linux.security_context.namespace_options.userns_options.":        ValidateSandbox(in.Sandbox),
				"sandbox_config.linux.security_context.namespace_options.userns_options": second(Container(in)),
			} {
				if c.words == "" {
					if err != nil {
						t.Errorf("%s: %v", at, err)
					}
					continue
				}
				refused(t, err, errdefs.ErrInvalidArgument, strings.TrimSuffix(at, "."), c.words)
			}
		})
	}
	in := request(func(in *Input) {
		withUserns(in)
		podSecurity(in).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: node}
	})
	refused(t, ValidateContainer(in.Sandbox, in.Container), errdefs.ErrInvalidArgument, "userns_options", "differs from the pod's, NODE")
	in = request(func(in *Input) {
		withUserns(in)
		security(in).NamespaceOptions.UsernsOptions = nil
	})
	refused(t, ValidateContainer(in.Sandbox, in.Container), errdefs.ErrInvalidArgument, "userns_options", "none", "differs from the pod's, POD 0:65536+65536 0:131072+65536")
	s := mustContainer(t, func(in *Input) { podSecurity(in).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: node} }).Spec
	if len(s.Linux.UIDMappings) > 0 || slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }) {
		t.Error("mode NODE has a user namespace")
	}
}

func TestUserNamespaceIsNotSharedWithNamespacesOfTheNode(t *testing.T) {
	for word, change := range map[string]func(*cri.NamespaceOption){
		"pid: NODE": func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE },
		"ipc: NODE": func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE },
	} {
		in := request(func(in *Input) { withUserns(in); change(podSecurity(in).NamespaceOptions) })
		refused(t, ValidateSandbox(in.Sandbox), errdefs.ErrInvalidArgument, "config.linux.security_context.namespace_options."+word)
	}
}

func TestContainerOfAUserNamespace(t *testing.T) {
	s := mustContainer(t, withUserns).Spec
	at := slices.IndexFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace })
	if at < 0 || s.Linux.Namespaces[at].Path != "/run/ns/user" || len(s.Linux.UIDMappings) > 0 {
		t.Errorf("namespaces %v, mappings %v", s.Linux.Namespaces, s.Linux.UIDMappings)
	}
	find := func(s *specs.Spec, at string) specs.Mount {
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == at })
		return s.Mounts[i]
	}
	if m := find(s, "/sys"); m.Type != "sysfs" {
		t.Errorf("/sys is %v", m)
	}
	if m := find(s, "/dev/pts"); !slices.Contains(m.Options, "gid=5") {
		t.Errorf("/dev/pts is %v", m)
	}
	s = mustContainer(t, func(in *Input) {
		withUserns(in)
		podSecurity(in).NamespaceOptions.Network, security(in).NamespaceOptions.Network = cri.NamespaceMode_NODE, cri.NamespaceMode_NODE
		podSecurity(in).NamespaceOptions.UsernsOptions.Gids[0].Length = 5
	}).Spec
	if m := find(s, "/sys"); m.Type != "bind" || m.Source != "/sys" || !slices.Contains(m.Options, "rro") || !slices.Contains(m.Options, "rbind") {
		t.Errorf("/sys in the node's network is %v", m)
	}
	if m := find(s, "/dev/pts"); slices.Contains(m.Options, "gid=5") {
		t.Errorf("/dev/pts of five groups is %v", m)
	}
}

func TestIDMappedMounts(t *testing.T) {
	mount := func(uids, gids []*cri.IDMapping) *cri.Mount {
		return &cri.Mount{HostPath: "/data", ContainerPath: "/data", UidMappings: uids, GidMappings: gids}
	}
	with := func(m *cri.Mount) func(*Input) {
		return func(in *Input) {
			withUserns(in)
			in.Container.Mounts, in.Sources = []*cri.Mount{m}, []Source{{Path: "/data"}}
		}
	}
	find := func(s *specs.Spec) specs.Mount {
		return s.Mounts[slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/data" })]
	}
	uids, gids := oneRange(65536, 0, 65536), oneRange(131072, 0, 65536)
	m := find(mustContainer(t, with(mount(uids, gids))).Spec)
	if !slices.Contains(m.Options, "idmap") || m.UIDMappings != nil || m.GIDMappings != nil {
		t.Errorf("the pod's own mapping: %v", m)
	}
	m = find(mustContainer(t, with(mount(oneRange(65543, 1000, 1), gids))).Spec)
	want := []specs.LinuxIDMapping{{ContainerID: 1000, HostID: 65543, Size: 1}}
	if !slices.Contains(m.Options, "idmap") || !slices.Equal(m.UIDMappings, want) || len(m.GIDMappings) != 1 {
		t.Errorf("another mapping: %v", m)
	}
	m = find(mustContainer(t, with(mount(nil, nil))).Spec)
	if slices.Contains(m.Options, "idmap") || m.UIDMappings != nil {
		t.Errorf("no mapping: %v", m)
	}
	image := &cri.Mount{ContainerPath: "/data", Image: &cri.ImageSpec{Image: "x"}, Readonly: true, UidMappings: uids, GidMappings: gids}
	if m = find(mustContainer(t, with(image)).Spec); slices.Contains(m.Options, "idmap") || m.UIDMappings != nil {
		t.Errorf("image volume: %v", m)
	}
	const at = "config.mounts[0]."
	for words, m := range map[string]*cri.Mount{
		at + "gidMappings: is empty":                     mount(uids, nil),
		at + "uidMappings: is empty":                     mount(nil, gids),
		at + "uidMappings[0].length: 0":                  mount(oneRange(1, 0, 0), gids),
		at + "gidMappings[0].length: 2 goes beyond":      mount(uids, oneRange(1, math.MaxUint32-1, 2)),
		at + "uidMappings[1].container_id: 9..9 overlap": mount(append(oneRange(70000, 0, 10), oneRange(90000, 9, 1)...), gids),
		at + "uidMappings[1].host_id: 70009..70009":      mount(append(oneRange(70000, 0, 10), oneRange(70009, 20, 1)...), gids),
	} {
		refuse(t, with(m), words)
	}
	// CVE-2021-43784: the length of very many mappings has wrapped on the way to the kernel.
	refuse(t, with(mount(make([]*cri.IDMapping, 10_000), gids)), at+"uidMappings: 10000 mappings are more than 340")
	in := request(with(mount(uids, gids)))
	podSecurity(&in).NamespaceOptions.UsernsOptions, security(&in).NamespaceOptions.UsernsOptions = nil, nil
	refused(t, ValidateContainer(in.Sandbox, in.Container), errdefs.ErrInvalidArgument, at+"uidMappings", "without a user namespace")
}

func TestUsersBeyondTheMappingAreRefused(t *testing.T) {
	small := func(change func(*Input)) func(*Input) {
		return func(in *Input) {
			withUserns(in)
			podSecurity(in).NamespaceOptions.UsernsOptions.Uids[0].Length = 1000
			podSecurity(in).NamespaceOptions.UsernsOptions.Gids[0].Length = 2000
			change(in)
		}
	}
	mustContainer(t, small(func(in *Input) {
		sc := security(in)
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = &cri.Int64Value{Value: 999}, &cri.Int64Value{Value: 1999}, []int64{1999}
	}))
	for words, change := range map[string]func(*Input){
		"run_as_user.value: 1000 is not in the pod's user namespace, which has ids 0..999": func(in *Input) { security(in).RunAsUser = &cri.Int64Value{Value: 1000} },
		"run_as_group.value: 2000": func(in *Input) {
			security(in).RunAsUser, security(in).RunAsGroup = &cri.Int64Value{}, &cri.Int64Value{Value: 2000}
		},
		"supplemental_groups[1]: 5000":   func(in *Input) { security(in).SupplementalGroups = []int64{1, 5000} },
		"image USER: 1000":               func(in *Input) { in.Image.User = "web"; in.Passwd = []byte(testPasswd) },
		"run_as_username: 1001":          func(in *Input) { security(in).RunAsUsername = "nohome"; in.Passwd = []byte(testPasswd) },
		"image USER: its primary group:": func(in *Input) { in.Image.User = "1:2000" },
	} {
		refuse(t, small(change), words)
	}
}

func TestPingGroupsAreNotSetInAUserNamespace(t *testing.T) {
	in := request(withUserns)
	set, err := SandboxSysctls(in.Sandbox)
	if err != nil || set[pingGroups] != "" || set[unprivilegedPorts] != "0" {
		t.Errorf("%v, %v", set, err)
	}
}

func TestPodsDoNotShareIDs(t *testing.T) {
	in := request(withUserns) // users from 65536, groups from 131072
	for _, c := range []struct {
		theirs UserNamespace
		field  string
	}{
		{UserNamespace{IDs{131072, 65536}, IDs{65536, 65536}}, ""},
		{UserNamespace{IDs{1, 65535}, IDs{math.MaxUint32 - 1, 1}}, ""},
		{UserNamespace{IDs{1, 65536}, IDs{1, 1}}, "uids[0].host_id: 65536..131071"},
		{UserNamespace{IDs{131071, 1}, IDs{1, 1}}, "uids[0].host_id: 65536..131071"},
		{UserNamespace{IDs{1, math.MaxUint32 - 1}, IDs{1, 1}}, "uids[0].host_id: 65536..131071"},
		{UserNamespace{IDs{1, 1}, IDs{196607, 1}}, "gids[0].host_id: 131072..196607"},
	} {
		err := ApartFrom(in.Sandbox, "shop/other", c.theirs)
		if c.field == "" {
			if err != nil {
				t.Errorf("%v: %v", c.theirs, err)
			}
			continue
		}
		refused(t, err, errdefs.ErrInvalidArgument, "userns_options."+c.field, "overlaps", "shop/other")
	}
	if err := ApartFrom(request(nil).Sandbox, "other", UserNamespace{IDs{0, math.MaxUint32}, IDs{0, math.MaxUint32}}); err != nil {
		t.Errorf("a pod in the node's user namespace: %v", err)
	}
}

// FuzzIDMappings: what is accepted maps root, no id of the node's root, nothing beyond the last id, and nothing twice.
func FuzzIDMappings(f *testing.F) {
	f.Add(int32(0), uint32(65536), uint32(0), uint32(65536), uint32(65536), uint32(0), uint32(65536), uint32(70000), uint32(5), uint32(1))
	f.Add(int32(2), uint32(0), uint32(0), uint32(0), uint32(1), uint32(1), uint32(math.MaxUint32), uint32(0), uint32(0), uint32(0))
	f.Add(int32(0), uint32(math.MaxUint32), uint32(0), uint32(1), uint32(1), uint32(0), uint32(math.MaxUint32-1), uint32(1), uint32(0), uint32(math.MaxUint32))
	f.Fuzz(func(t *testing.T, mode int32, uh, uc, ul, gh, gc, gl, mh, mc, ml uint32) {
		u := &cri.UserNamespace{Mode: cri.NamespaceMode(mode), Uids: oneRange(uh, uc, ul), Gids: oneRange(gh, gc, gl)}
		in := request(func(in *Input) {
			withUserns(in)
			podSecurity(in).NamespaceOptions.UsernsOptions, security(in).NamespaceOptions.UsernsOptions = u, u
			in.Container.Mounts = []*cri.Mount{{HostPath: "/a", ContainerPath: "/a", UidMappings: append(oneRange(mh, mc, ml), u.Uids...), GidMappings: u.Gids}}
			in.Sources = []Source{{Path: "/a"}}
		})
		got, own := Userns(in.Sandbox)
		if ValidateSandbox(in.Sandbox) == nil {
			if !own || uc != 0 || gc != 0 || got != (UserNamespace{IDs{uh, ul}, IDs{gh, gl}}) {
				t.Fatalf("%v accepted as %v", u, got)
			}
			for _, r := range []IDs{got.UIDs, got.GIDs} {
				if r.Host == 0 || r.Length == 0 || uint64(r.Host)+uint64(r.Length) > math.MaxUint32 {
					t.Fatalf("%v accepted", r)
				}
				if !r.Overlap(r) || !r.Overlap(IDs{r.Host, 1}) || r.Overlap(IDs{r.Host - 1, 1}) || r.Overlap(IDs{r.Host + r.Length, 1}) {
					t.Fatalf("overlap of %v", r)
				}
			}
		}
		out, err := Container(in)
		if err != nil {
			return
		}
		m := out.Spec.Mounts[slices.IndexFunc(out.Spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/a" })]
		if len(m.UIDMappings) != 2 || m.UIDMappings[0] != (specs.LinuxIDMapping{ContainerID: mc, HostID: mh, Size: ml}) {
			t.Fatalf("mount %v", m)
		}
		if uint64(mc) < uint64(ul) { // the pod's own mapping begins with 0
			t.Fatalf("mappings %v overlap", m.UIDMappings)
		}
	})
}

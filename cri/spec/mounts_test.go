package spec

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func destinations(list []specs.Mount) (out []string) {
	for _, m := range list {
		out = append(out, m.Destination)
	}
	return out
}

func mountAt(t *testing.T, list []specs.Mount, at string) specs.Mount {
	t.Helper()
	i := slices.IndexFunc(list, func(m specs.Mount) bool { return m.Destination == at })
	if i < 0 {
		t.Fatalf("nothing is mounted at %s: %v", at, destinations(list))
	}
	return list[i]
}

func TestMountsParentsFirst(t *testing.T) {
	got := destinations(mustContainer(t, func(in *Input) {
		in.Container.Mounts = []*cri.Mount{
			{ContainerPath: "/var/lib/app/data", HostPath: "/d"},
			{ContainerPath: "/var/", HostPath: "/v"},
			{ContainerPath: "/etc", HostPath: "/e"},
			{ContainerPath: "/etc/hosts", HostPath: "/h"},
		}
	}).Spec.Mounts)
	want := []string{
		"/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", // the kernel's
		"/var", "/etc", // depth one, as given
		"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", // then the pod's beside the request's
		"/var/lib/app/data",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestRequestedMountReplacesBerths(t *testing.T) {
	s := mustContainer(t, func(in *Input) {
		in.Container.Mounts = []*cri.Mount{
			{ContainerPath: "/etc/hosts/", HostPath: "/kubelet/hosts"},
			{ContainerPath: "/dev/shm", HostPath: "/kubelet/shm"},
			{ContainerPath: "/sys", HostPath: "/sys"},
		}
	}).Spec
	for at, source := range map[string]string{"/etc/hosts": "/kubelet/hosts", "/dev/shm": "/kubelet/shm", "/sys": "/sys", "/etc/hostname": "/run/p/hostname"} {
		if m := mountAt(t, s.Mounts, at); m.Source != source {
			t.Errorf("%s comes from %s, want %s", at, m.Source, source)
		}
		n := 0
		for _, d := range destinations(s.Mounts) {
			if d == at {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s is mounted %d times", at, n)
		}
	}
	dev := destinations(mustContainer(t, func(in *Input) {
		in.PodFiles = PodFiles{}
		in.Container.Mounts = []*cri.Mount{{ContainerPath: "/dev", HostPath: "/dev"}}
	}).Spec.Mounts)
	if want := []string{"/proc", "/sys", "/sys/fs/cgroup", "/dev"}; !slices.Equal(dev, want) {
		t.Errorf("with the host's /dev: %v, want %v", dev, want)
	}
}

func TestPodFiles(t *testing.T) {
	for _, readonly := range []bool{false, true} {
		s := mustContainer(t, func(in *Input) { security(in).ReadonlyRootfs = readonly }).Spec
		access := map[bool]string{false: "rw", true: "ro"}[readonly]
		for _, at := range []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"} {
			if m := mountAt(t, s.Mounts, at); !slices.Equal(m.Options, []string{"rbind", "rprivate", access}) || m.Type != "bind" {
				t.Errorf("read-only root %v: %s has %v", readonly, at, m.Options)
			}
		}
		if m := mountAt(t, s.Mounts, "/dev/shm"); !slices.Equal(m.Options, []string{"rbind", "rprivate", "rw", "nosuid", "noexec", "nodev"}) {
			t.Errorf("/dev/shm has %v", m.Options)
		}
	}
	host := mustContainer(t, func(in *Input) {
		podSecurity(in).NamespaceOptions.Ipc = cri.NamespaceMode_NODE
		security(in).NamespaceOptions.Ipc = cri.NamespaceMode_NODE
		in.PodFiles.Shm = "/dev/shm"
	}).Spec
	if m := mountAt(t, host.Mounts, "/dev/shm"); m.Source != "/dev/shm" || !slices.Equal(m.Options, []string{"rbind", "rprivate", "rw"}) {
		t.Errorf("the host's /dev/shm: %+v", m)
	}
	none := mustContainer(t, func(in *Input) { in.PodFiles = PodFiles{} }).Spec
	if slices.Contains(destinations(none.Mounts), "/etc/hosts") || mountAt(t, none.Mounts, "/dev/shm").Type != "tmpfs" {
		t.Errorf("without files of the pod: %v", destinations(none.Mounts))
	}
}

func TestMountOptionsAndPropagation(t *testing.T) {
	const (
		private = cri.MountPropagation_PROPAGATION_PRIVATE
		slave   = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		shared  = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	)
	for _, c := range []struct {
		name  string
		m     *cri.Mount
		src   Source
		want  string // options, or the error
		root  string
		class error
	}{
		{"plain", &cri.Mount{}, Source{}, "rbind rprivate rw", "", nil},
		{"read-only", &cri.Mount{Readonly: true}, Source{}, "rbind rprivate ro", "", nil},
		{"recursively", &cri.Mount{Readonly: true, RecursiveReadOnly: true}, Source{}, "rbind rprivate rro", "", nil},
		{"from the host", &cri.Mount{Propagation: slave}, Source{Slave: true}, "rbind rslave rw", "rslave", nil},
		{"from a shared one", &cri.Mount{Propagation: slave, Readonly: true}, Source{Shared: true}, "rbind rslave ro", "rslave", nil},
		{"both ways", &cri.Mount{Propagation: shared}, Source{Shared: true}, "rbind rshared rw", "rshared", nil},
		{"further options", &cri.Mount{MountOptions: []string{"noexec", "nosuid"}}, Source{}, "rbind rprivate rw noexec nosuid", "", nil},
		{"from a private one", &cri.Mount{Propagation: slave}, Source{}, "shared or slave", "", errdefs.ErrFailedPrecondition},
		{"both ways from a slave", &cri.Mount{Propagation: shared}, Source{Slave: true}, "shared mount", "", errdefs.ErrFailedPrecondition},
		{"rro but writable", &cri.Mount{RecursiveReadOnly: true}, Source{}, "contradicts readonly", "", errdefs.ErrInvalidArgument},
		{"rro but not private", &cri.Mount{Readonly: true, RecursiveReadOnly: true, Propagation: slave}, Source{Slave: true}, "PROPAGATION_PRIVATE", "", errdefs.ErrInvalidArgument},
		{"unknown propagation", &cri.Mount{Propagation: 3}, Source{}, "propagation: 3", "", errdefs.ErrInvalidArgument},
		{"option that widens", &cri.Mount{MountOptions: []string{"noexec", "rw"}}, Source{}, `mount_options[1]: "rw"`, "", errdefs.ErrInvalidArgument},
		{"option for the kernel", &cri.Mount{MountOptions: []string{"lowerdir=/"}}, Source{}, "mount_options[0]", "", errdefs.ErrInvalidArgument},
		{"id-mapped", &cri.Mount{UidMappings: []*cri.IDMapping{{Length: 1}}}, Source{}, "config.mounts[0].gidMappings", "", errdefs.ErrInvalidArgument},
		{"private is not shared", &cri.Mount{Propagation: private}, Source{Shared: true}, "rbind rprivate rw", "", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := request(func(in *Input) {
				c.m.ContainerPath, c.m.HostPath, c.src.Path = "/data", "/link", "/real"
				in.Container.Mounts, in.Sources = []*cri.Mount{c.m}, []Source{c.src}
			})
			out, err := Container(in)
			if c.class != nil {
				refused(t, err, c.class, "config.mounts[0]", c.want)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			m := mountAt(t, out.Spec.Mounts, "/data")
			if got := strings.Join(m.Options, " "); got != c.want || m.Source != "/real" || m.Type != "bind" {
				t.Errorf("got %q from %s, want %q", got, m.Source, c.want)
			}
			if got := out.Spec.Linux.RootfsPropagation; got != c.root {
				t.Errorf("propagation of the root %q, want %q", got, c.root)
			}
		})
	}
	both := mustContainer(t, func(in *Input) {
		in.Container.Mounts = []*cri.Mount{
			{ContainerPath: "/a", HostPath: "/a", Propagation: shared}, {ContainerPath: "/b", HostPath: "/b", Propagation: slave},
		}
	})
	if got := both.Spec.Linux.RootfsPropagation; got != "rshared" {
		t.Errorf("propagation of the root %q, want rshared", got)
	}
	_, err := Container(request(func(in *Input) {
		in.Host.RecursiveReadOnly = false
		in.Container.Mounts = []*cri.Mount{{ContainerPath: "/a", HostPath: "/a", Readonly: true, RecursiveReadOnly: true}}
	}))
	refused(t, err, errdefs.ErrFailedPrecondition, "recursive_read_only", "5.12")
}

func TestMountPathsRefused(t *testing.T) {
	for _, c := range []struct{ container, host, word string }{
		{"", "/a", "container_path"},
		{"data", "/a", "container_path"},
		{"/", "/a", "root of the container"},
		{"/a/..", "/a", "root of the container"},
		{"/a\n", "/a", "control character"},
		{"/a\x00", "/a", "control character"},
		{"/a", "", "host_path"},
		{"/a", "a", "host_path"},
		{"/a", "/a\x00", "host_path"},
	} {
		refuse(t, func(in *Input) { in.Container.Mounts = []*cri.Mount{{ContainerPath: c.container, HostPath: c.host}} },
			"config.mounts[0]", c.word)
	}
	mustContainer(t, func(in *Input) { in.Container.Mounts = []*cri.Mount{{ContainerPath: "/a", HostPath: "/odd\tname"}} })
}

func TestCVE_2021_43784_PathsAndMappingsAreBounded(t *testing.T) {
	long := "/" + strings.Repeat("a/", 35_000)
	for word, change := range map[string]func(*Input){
		"config.mounts[0].container_path":               func(in *Input) { in.Container.Mounts = []*cri.Mount{{ContainerPath: long, HostPath: "/a"}} },
		"config.mounts[0].host_path":                    func(in *Input) { in.Container.Mounts = []*cri.Mount{{ContainerPath: "/a", HostPath: long}} },
		"config.devices[0].host_path":                   func(in *Input) { in.Container.Devices = []*cri.Device{{ContainerPath: "/a", HostPath: long}} },
		"config.working_dir":                            func(in *Input) { in.Container.WorkingDir = long },
		"image working directory":                       func(in *Input) { in.Image.WorkingDir = long },
		"config.linux.security_context.masked_paths[0]": func(in *Input) { security(in).MaskedPaths = []string{long} },
		"sandbox_config.linux.security_context.namespace_options": func(in *Input) {
			podSecurity(in).NamespaceOptions.UsernsOptions = &cri.UserNamespace{Uids: make([]*cri.IDMapping, 10_000)}
		},
	} {
		refuse(t, change, word)
	}
}

func TestImageVolume(t *testing.T) {
	volume := func() *cri.Mount {
		return &cri.Mount{ContainerPath: "/model", Readonly: true, Image: &cri.ImageSpec{Image: "sha256:def"}, ImageSubPath: "weights/v1"}
	}
	s := mustContainer(t, func(in *Input) {
		in.Container.Mounts, in.Sources = []*cri.Mount{volume()}, []Source{{Path: "/run/berth/volumes/1/weights/v1"}}
	}).Spec
	m := mountAt(t, s.Mounts, "/model")
	if m.Source != "/run/berth/volumes/1/weights/v1" || !slices.Equal(m.Options, []string{"rbind", "rprivate", "ro"}) {
		t.Errorf("mount %+v", m)
	}
	for word, change := range map[string]func(*cri.Mount){
		"readonly":       func(m *cri.Mount) { m.Readonly = false },
		"host_path":      func(m *cri.Mount) { m.HostPath = "/a" },
		"propagation":    func(m *cri.Mount) { m.Propagation = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL },
		`"../x"`:         func(m *cri.Mount) { m.ImageSubPath = "../x" },
		`"/x"`:           func(m *cri.Mount) { m.ImageSubPath = "/x" },
		`"a/../../x"`:    func(m *cri.Mount) { m.ImageSubPath = "a/../../x" },
		`"x\n"`:          func(m *cri.Mount) { m.ImageSubPath = "x\n" },
		"image_sub_path": func(m *cri.Mount) { m.Image, m.HostPath = nil, "/a" },
	} {
		refuse(t, func(in *Input) {
			m := volume()
			change(m)
			in.Container.Mounts = []*cri.Mount{m}
		}, "config.mounts[0]", word)
	}
}

func TestSysAndCgroupAccess(t *testing.T) {
	for _, c := range []struct {
		name    string
		change  func(*Input)
		sys     string
		cgroup  []string
		cgroupn bool
	}{
		{"v2", nil, "ro", []string{"nosuid", "noexec", "nodev", "relatime", "ro"}, true},
		{"v1", func(in *Input) { in.Host = testHost(1); in.Host.CgroupMountOptions = nil }, "ro", []string{"nosuid", "noexec", "nodev", "relatime", "ro"}, false},
		{"v2 privileged", privileged, "rw", []string{"nosuid", "noexec", "nodev", "relatime", "rw", "nsdelegate", "memory_recursiveprot"}, false},
	} {
		s := mustContainer(t, c.change).Spec
		if m := mountAt(t, s.Mounts, "/sys"); m.Options[len(m.Options)-1] != c.sys {
			t.Errorf("%s: /sys has %v", c.name, m.Options)
		}
		if m := mountAt(t, s.Mounts, "/sys/fs/cgroup"); !slices.Equal(m.Options, c.cgroup) {
			t.Errorf("%s: /sys/fs/cgroup has %v", c.name, m.Options)
		}
		has := slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace && n.Path == "" })
		if has != c.cgroupn {
			t.Errorf("%s: own cgroup namespace %v", c.name, has)
		}
	}
}

func TestCVE_2023_25809_CgroupfsIsReadOnly(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := mountAt(t, mustContainer(t, func(in *Input) { in.Host = testHost(version) }).Spec.Mounts, "/sys/fs/cgroup")
		if !slices.Contains(m.Options, "ro") || slices.Contains(m.Options, "rw") {
			t.Errorf("v%d: %v", version, m.Options)
		}
	}
}

// Mounts of berth's own never take their source from the image or go below a path that the request did not name.
func TestCVE_2022_23648_ImageVolumesDeclareNothing(t *testing.T) {
	before := destinations(mustContainer(t, nil).Spec.Mounts)
	after := destinations(mustContainer(t, func(in *Input) {
		in.Image.Volumes = map[string]struct{}{"/../../etc": {}, "/sys": {}, "/data": {}}
	}).Spec.Mounts)
	if !slices.Equal(before, after) {
		t.Errorf("VOLUME changed the mounts: %v, was %v", after, before)
	}
}

func TestFactsMustMatchTheRequest(t *testing.T) {
	in := request(func(in *Input) { in.Container.Mounts = []*cri.Mount{{ContainerPath: "/a", HostPath: "/a"}} })
	in.Sources = nil
	if _, err := Container(in); err == nil {
		t.Error("a mount without facts was accepted")
	}
	in = request(func(in *Input) {
		in.Container.Devices = []*cri.Device{{ContainerPath: "/a", HostPath: "/a", Permissions: "r"}}
	})
	in.Devices = nil
	if _, err := Container(in); err == nil {
		t.Error("a device without facts was accepted")
	}
	for _, change := range []func(*Input){
		func(in *Input) { in.RootfsPath = "rootfs" }, func(in *Input) { in.RootfsPath = "/" },
		func(in *Input) { in.CgroupPath = "" }, func(in *Input) { in.CgroupPath = "/a/../b" }, func(in *Input) { in.CgroupPath = "/" },
	} {
		if _, err := Container(request(change)); err == nil {
			t.Error("a bad path of the caller was accepted")
		}
	}
}

package spec

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	testPasswd = "root:x:0:0:root:/root:/bin/sh\n" +
		"daemon:x:1:1::/usr/sbin:/sbin/nologin\n" +
		"\n# comment\n" +
		"web:x:1000:2000:Web,,,:/home/web:/bin/sh\n" +
		"nohome:x:1001:2001\n" +
		"4294967296:x:7:7::/wrong:\n" +
		"big:x:4294967296:0::/:\n" +
		"nogid:x:8::::\n"
	testGroup = "root:x:0:\n" +
		"web:x:2000:web\n" +
		"logs:x:4:daemon,web\n" +
		"# x:x:5:web\n" +
		"webby:x:6:webby\n" +
		"audio:x:29:web\n" +
		"broken:x:99999999999:broken\n"
)

func device(path string, major, minor int64) specs.LinuxDevice {
	mode := uint32(0o660)
	uid, gid := uint32(0), uint32(6)
	fm := fileMode(mode)
	return specs.LinuxDevice{Path: path, Type: "b", Major: major, Minor: minor, FileMode: fm, UID: &uid, GID: &gid}
}

// testHost is a host with everything.
func testHost(version int) Host {
	return Host{
		CgroupVersion:      version,
		CgroupMountOptions: []string{"nsdelegate", "memory_recursiveprot"},
		Devices:            []specs.LinuxDevice{device("/dev/sda", 8, 0), device("/dev/null", 1, 3)},
		Hostname:           "node-1",
		SeccompEnabled:     true,
		RecursiveReadOnly:  true,
		SwapController:     true,
		HugePageSizes:      []string{"2MB", "1GB"},
		OOMScoreAdjFloor:   -1000,
	}
}

// request is a plain container in a plain pod, as a kubelet asks for it; change makes it another one.
func request(change func(*Input)) Input {
	in := Input{
		ID: strings.Repeat("c", 64),
		Sandbox: &cri.PodSandboxConfig{
			Metadata:     &cri.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "7f7e", Attempt: 1},
			Hostname:     "web-0",
			LogDirectory: "/var/log/pods/shop_web_7f7e",
			Linux: &cri.LinuxPodSandboxConfig{
				CgroupParent: "/kubepods/pod7f7e",
				SecurityContext: &cri.LinuxSandboxSecurityContext{
					NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
				},
			},
		},
		Container: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "app"},
			Image:    &cri.ImageSpec{Image: "sha256:abc"},
			LogPath:  "app/0.log",
			Linux: &cri.LinuxContainerConfig{
				Resources: &cri.LinuxContainerResources{},
				SecurityContext: &cri.LinuxContainerSecurityContext{
					NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER},
					MaskedPaths:      []string{"/proc/kcore", "/sys/firmware"},
					ReadonlyPaths:    []string{"/proc/sys"},
					Seccomp:          &cri.SecurityProfile{},
				},
			},
		},
		Image:      ocispec.ImageConfig{Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, Env: []string{"MODE=prod"}},
		Host:       testHost(2),
		Namespaces: Namespaces{Net: "/run/ns/net", IPC: "/run/ns/ipc", UTS: "/run/ns/uts"},
		RootfsPath: "/run/berth/containers/c/rootfs",
		CgroupPath: "/kubepods/pod7f7e/c",
		PodFiles:   PodFiles{Hosts: "/run/p/hosts", Hostname: "/run/p/hostname", ResolvConf: "/run/p/resolv.conf", Shm: "/run/p/shm"},
		Passwd:     []byte(testPasswd),
		Group:      []byte(testGroup),
	}
	if change != nil {
		change(&in)
	}
	// Facts for mounts and devices that the case does not care about.
	for len(in.Sources) < len(in.Container.GetMounts()) {
		p := in.Container.Mounts[len(in.Sources)].GetHostPath()
		if p == "" {
			p = "/run/berth/volumes/image"
		}
		in.Sources = append(in.Sources, Source{Path: p, Shared: true})
	}
	for len(in.Devices) < len(in.Container.GetDevices()) {
		in.Devices = append(in.Devices, []specs.LinuxDevice{device("", 8, 16)})
	}
	return in
}

func security(in *Input) *cri.LinuxContainerSecurityContext {
	return in.Container.Linux.SecurityContext
}

func podSecurity(in *Input) *cri.LinuxSandboxSecurityContext { return in.Sandbox.Linux.SecurityContext }

func privileged(in *Input) {
	podSecurity(in).Privileged = true
	security(in).Privileged = true
}

func id(v int64) *cri.Int64Value { return &cri.Int64Value{Value: v} }

// mustContainer computes a container that must be possible.
func mustContainer(t *testing.T, change func(*Input)) *Output {
	t.Helper()
	out, err := Container(request(change))
	if err != nil {
		t.Fatalf("Container: %v", err)
	}
	return out
}

// refused asserts that the request is refused with that class, and that the error holds all of the words.
func refused(t *testing.T, err, class error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("accepted; want an error with %q", words)
	}
	if !errors.Is(err, class) {
		t.Errorf("error %q is not %v", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// refuse asserts that a container is refused as invalid.
func refuse(t *testing.T, change func(*Input), words ...string) {
	t.Helper()
	_, err := Container(request(change))
	refused(t, err, errdefs.ErrInvalidArgument, words...)
}

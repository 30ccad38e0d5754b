package spec

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write testdata/*.json instead of comparing")

// representative are containers of each kind; other tests use them too.
var representative = map[string]func(*Input){
	"default":    nil,
	"default-v1": func(in *Input) { in.Host = testHost(1) },
	"privileged": privileged,
	"host-namespaces": func(in *Input) {
		node := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE, Ipc: cri.NamespaceMode_NODE}
		podSecurity(in).NamespaceOptions, security(in).NamespaceOptions = node, node
		in.Sandbox.Hostname, in.Namespaces, in.PodFiles.Shm = "", Namespaces{}, "/dev/shm"
	},
	"shared-pid": func(in *Input) {
		podSecurity(in).NamespaceOptions, security(in).NamespaceOptions = nil, nil
		in.Namespaces.PID = "/run/ns/pid"
	},
	"debug-target": func(in *Input) {
		security(in).NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "abc"}
		in.Namespaces.Target = "/proc/4242/ns/pid"
		in.Container.Tty, in.Container.Stdin, in.Container.Command = true, true, []string{"sh"}
	},
	"resources-v2": func(in *Input) { in.Container.Linux.Resources = fullResources() },
	"resources-v1": func(in *Input) {
		in.Host = testHost(1)
		in.Container.Linux.Resources = fullResources()
		in.Container.Linux.Resources.Unified = nil
	},
	"strict-groups": func(in *Input) {
		sc := security(in)
		sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = id(1000), id(3000), []int64{4000, 50}
		sc.SupplementalGroupsPolicy, sc.NoNewPrivs, sc.ReadonlyRootfs = cri.SupplementalGroupsPolicy_Strict, true, true
		sc.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}
	},
	"mounts-and-devices": func(in *Input) {
		in.Image.User = "web"
		in.Container.Mounts = []*cri.Mount{
			{ContainerPath: "/var/run/secrets/token", HostPath: "/var/lib/kubelet/token", Readonly: true},
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/etc-hosts"},
			{ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/log"},
			{ContainerPath: "/mnt", HostPath: "/mnt", Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL},
			{ContainerPath: "/ro", HostPath: "/ro", Readonly: true, RecursiveReadOnly: true, MountOptions: []string{"noexec"}},
			{ContainerPath: "/model", Readonly: true, Image: &cri.ImageSpec{Image: "sha256:def"}},
		}
		in.Container.Devices = []*cri.Device{{ContainerPath: "/dev/xvda", HostPath: "/dev/sda", Permissions: "mr"}}
	},
}

func fullResources() *cri.LinuxContainerResources {
	return &cri.LinuxContainerResources{
		CpuPeriod: 100_000, CpuQuota: 50_000, CpuShares: 512, MemoryLimitInBytes: 128 << 20, OomScoreAdj: 900,
		CpusetCpus: "0-1", CpusetMems: "0", MemorySwapLimitInBytes: 160 << 20,
		HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB"}, {PageSize: "64KB"}},
		Unified:        map[string]string{"memory.high": "100000000", "pids.max": "512", "memory.oom.group": "1"},
	}
}

// TestGolden holds the whole specification of each kind: a change of any field shows in review. The system calls of the
// default seccomp profile are left out, for they are another module's and depend on the architecture.
func TestGolden(t *testing.T) {
	for name, change := range representative {
		t.Run(name, func(t *testing.T) {
			out := mustContainer(t, change)
			if f := out.Spec.Linux.Seccomp; f != nil {
				f.Syscalls, f.Architectures = nil, nil
			}
			got := encode(t, out) + "\n"
			file := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s differs; look at `go test ./cri/spec -run Golden -update && git diff`. Got:\n%s", file, got)
			}
		})
	}
}

func encode(t *testing.T, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestSpecificationSurvivesJSON: records and the create helper read it back.
func TestSpecificationSurvivesJSON(t *testing.T) {
	for name, change := range representative {
		first := encode(t, mustContainer(t, change).Spec)
		var back specs.Spec
		if err := json.Unmarshal([]byte(first), &back); err != nil {
			t.Fatal(err)
		}
		if second := encode(t, back); first != second {
			t.Errorf("%s: changed to %s", name, second)
		}
	}
}

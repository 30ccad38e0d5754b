//go:build linux && cgo

package spec

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/cgroups"
	cgroupdevices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/configs/validate"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// convert does what the create helper does: read the specification back and make libcontainer's configuration of it.
func convert(t testing.TB, in Input, out *Output) *configs.Config {
	t.Helper()
	b, err := json.Marshal(out.Spec)
	if err != nil {
		t.Fatal(err)
	}
	var s specs.Spec
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{CgroupName: in.ID, Spec: &s})
	if err != nil {
		t.Fatalf("specconv refuses: %v", err)
	}
	// Validate asks the machine it runs on which cgroup version there is; of v2 it then checks no more than this.
	if in.Host.CgroupVersion == 2 && !cgroups.IsCgroup2UnifiedMode() {
		config.Cgroups.Unified = nil
	}
	if _, err := cgroups.ConvertMemorySwapToCgroupV2Value(config.Cgroups.MemorySwap, config.Cgroups.Memory); err != nil {
		t.Errorf("memory and swap: %v", err)
	}
	if err := validate.Validate(config); err != nil {
		t.Fatalf("libcontainer refuses: %v", err)
	}
	return config
}

// rootfs is a directory that libcontainer accepts as one.
func rootfs(t testing.TB) string {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestLibcontainerAccepts(t *testing.T) {
	dir := rootfs(t)
	for name, change := range representative {
		t.Run(name, func(t *testing.T) {
			in := request(change)
			in.RootfsPath = dir
			out, err := Container(in)
			if err != nil {
				t.Fatal(err)
			}
			config := convert(t, in, out)

			if config.Cgroups.Path != in.CgroupPath {
				t.Errorf("cgroup %q, want %q", config.Cgroups.Path, in.CgroupPath)
			}
			if len(config.Sysctl) > 0 || config.Hostname != "" {
				t.Errorf("sysctls %v, hostname %q", config.Sysctl, config.Hostname)
			}
			if labels := config.Labels; len(labels) != 1 { // "bundle=" of libcontainer itself
				t.Errorf("annotations became labels: %q", labels)
			}
			if len(config.Capabilities.Inheritable) > 0 {
				t.Errorf("inheritable %v", config.Capabilities.Inheritable)
			}
			if len(config.Hooks) > 0 && len(config.Hooks[configs.Prestart])+len(config.Hooks[configs.CreateRuntime]) > 0 {
				t.Errorf("hooks %v", config.Hooks)
			}
			for _, m := range config.Mounts {
				if m.IsBind() && m.Data != "" {
					t.Errorf("%s: options that bind mounts do not have: %q", m.Destination, m.Data)
				}
			}
			first := config.Cgroups.Devices[0]
			if first.Allow || first.Type != cgroupdevices.WildcardDevice || first.Permissions != "rwm" {
				t.Errorf("first device rule %+v", first)
			}
			for _, path := range []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"} {
				n := 0
				for _, d := range config.Devices {
					if d.Path == path {
						n++
					}
				}
				if n != 1 {
					t.Errorf("%s is made %d times", path, n)
				}
			}
		})
	}
}

// TestLibcontainerMount holds what the options mean, as the kernel gets them.
func TestLibcontainerMount(t *testing.T) {
	in := request(representative["mounts-and-devices"])
	in.RootfsPath = rootfs(t)
	out, err := Container(in)
	if err != nil {
		t.Fatal(err)
	}
	config := convert(t, in, out)
	at := func(path string) *configs.Mount {
		i := slices.IndexFunc(config.Mounts, func(m *configs.Mount) bool { return m.Destination == path })
		return config.Mounts[i]
	}
	if m := at("/ro"); m.RecAttr == nil || m.RecAttr.Attr_set != unix.MOUNT_ATTR_RDONLY || m.Flags&unix.MS_NOEXEC == 0 {
		t.Errorf("recursive read-only: %+v", m)
	}
	if m := at("/mnt"); !slices.Equal(m.PropagationFlags, []int{unix.MS_SHARED | unix.MS_REC}) || config.RootPropagation != unix.MS_SHARED|unix.MS_REC {
		t.Errorf("propagation %v, of the root %v", m.PropagationFlags, config.RootPropagation)
	}
	if m := at("/var/run/secrets/token"); m.Flags&unix.MS_RDONLY == 0 || m.Flags&unix.MS_BIND == 0 || m.Flags&unix.MS_REC == 0 {
		t.Errorf("read-only: %+v", m)
	}
	if m := at("/dev/shm"); m.Flags&(unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC) != unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC {
		t.Errorf("/dev/shm: %+v", m)
	}
}

// TestLibcontainerSeccomp: each rule of the default profile and of a Localhost profile is one libcontainer knows.
func TestLibcontainerSeccomp(t *testing.T) {
	in := request(func(in *Input) { security(in).Capabilities = &cri.Capability{AddCapabilities: []string{"ALL"}} })
	in.RootfsPath = rootfs(t)
	for range 2 {
		out, err := Container(in)
		if err != nil {
			t.Fatal(err)
		}
		if config := convert(t, in, out); config.Seccomp == nil || len(config.Seccomp.Syscalls) == 0 {
			t.Error("no filter")
		}
		security(&in).Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/p.json"}
		in.SeccompProfile = []byte(`{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86_64"],
			"syscalls":[{"names":["read","write"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"}]},
			{"name":"exit","action":"SCMP_ACT_ALLOW"}]}`)
	}
}

// TestLibcontainerSysctls: what a sandbox may set is what libcontainer would let a container of its own namespaces set.
func TestLibcontainerSysctls(t *testing.T) {
	given := map[string]string{
		"kernel.sem": "1 2 3 4", "kernel/shm_rmid_forced": "1", "fs.mqueue.msg_max": "9", "net/ipv4/conf/eth0.5/rp_filter": "1",
	}
	sysctls, err := SandboxSysctls(&cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Sysctls: given}})
	if err != nil {
		t.Fatal(err)
	}
	config := &configs.Config{Rootfs: rootfs(t), Sysctl: sysctls}
	for _, ns := range []configs.NamespaceType{configs.NEWNS, configs.NEWNET, configs.NEWIPC, configs.NEWUTS} {
		config.Namespaces.Add(ns, "")
	}
	if err := validate.Validate(config); err != nil {
		t.Error(err)
	}
}

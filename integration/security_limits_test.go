//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/images/imagestest"
	"github.com/berth-run/berth/integration/testimages"
)

// USER beyond int32 becomes 0 in setuid(2), or is looked up as a name that the image defines.
func (s *security) TestCVE_2024_40635_UserBeyondInt32(t *testing.T) {
	p := s.pod(t, plainPod)
	for _, user := range []string{"4294967296", "2147483648", "-1", "4294967295", "99999999999999999999", "+0", "0:4294967296", "1000:-1", "18446744073709551616:0"} {
		name, _, _ := strings.Cut(user, ":")
		for kind, entries := range map[string][]imagestest.Entry{
			"a number":       nil,
			"a name as well": {imagestest.File("etc/passwd", "root:x:0:0::/:/bin/sh\n"+name+":x:0:0::/:/bin/sh\n"), imagestest.File("etc/group", user+":x:0:\n")},
		} {
			if user == "+0" && kind == "a number" {
				continue // zero, whatever its sign
			}
			image := s.image(t, func(i *imagestest.Image) { i.Config.Config.User = user }, entries...)
			out, _, err := s.output(t, p, s.container(image, "id"))
			if user == "+0" && err == nil && strings.HasPrefix(out, "uid=0") {
				continue
			}
			wantCode(t, err, codes.InvalidArgument, "USER")
			if err == nil {
				t.Errorf("USER %s, %s, runs: %s", user, kind, out)
			}
		}
	}
	for _, uid := range []int64{1 << 31, 1 << 32, -1, 1<<63 - 1} {
		for field, change := range map[string]func(*runtimeapi.LinuxContainerSecurityContext){
			"run_as_user": func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.RunAsUser = &runtimeapi.Int64Value{Value: uid} },
			"run_as_group": func(sc *runtimeapi.LinuxContainerSecurityContext) {
				sc.RunAsUser, sc.RunAsGroup = &runtimeapi.Int64Value{}, &runtimeapi.Int64Value{Value: uid}
			},
			"supplemental_groups": func(sc *runtimeapi.LinuxContainerSecurityContext) { sc.SupplementalGroups = []int64{uid} },
		} {
			ctr := s.container("", "id")
			change(ctr.Linux.SecurityContext)
			_, _, err := s.output(t, p, ctr)
			wantCode(t, err, codes.InvalidArgument, field, strconv.FormatInt(uid, 10))
		}
	}
	ctr := s.container("", "id")
	ctr.Linux.SecurityContext.RunAsUsername = "4294967296"
	_, _, err := s.output(t, p, ctr)
	wantCode(t, err, codes.InvalidArgument, "run_as_username")
}

// Without the primary group among the supplementary ones, a file that denies the group is open to who changes its gid.
func (s *security) TestCVE_2023_25173_PrimaryGroupIsSupplementary(t *testing.T) {
	p := s.pod(t, plainPod)
	image := s.image(t, nil, imagestest.File("secret", "not for the group\n").Mode(0o604).Owner(0, 1000), imagestest.File("secret2", "nor for this\n").Mode(0o604).Owner(0, 5000))
	for policy, groups := range map[runtimeapi.SupplementalGroupsPolicy]string{
		runtimeapi.SupplementalGroupsPolicy_Merge:  "1000 5000 7000",
		runtimeapi.SupplementalGroupsPolicy_Strict: "1000 7000",
	} {
		ctr := s.idle(image)
		sc := ctr.Linux.SecurityContext
		sc.RunAsUser, sc.SupplementalGroups, sc.SupplementalGroupsPolicy = &runtimeapi.Int64Value{Value: 1000}, []int64{7000}, policy
		id := s.start(t, p, ctr)
		for _, pid := range []int{s.info(t, id).PID, s.execPID(t, id)} {
			if got := readStatus(t, pid)["Groups"]; got != groups {
				t.Errorf("%v: process %d has the groups %q, want %q", policy, pid, got, groups)
			}
		}
		out, code := s.exec(t, id, "id -G; cat /secret")
		if code == 0 || strings.Contains(out, "not for") || !strings.Contains(out, "Permission denied") {
			t.Errorf("%v: %s", policy, out)
		}
		out, _ = s.exec(t, id, "cat /secret2")
		if denied := strings.Contains(out, "Permission denied"); denied != (policy == runtimeapi.SupplementalGroupsPolicy_Merge) {
			t.Errorf("%v: group of the image: %s", policy, out)
		}
	}
}

// The daemon reads what an image has for /etc/passwd: too much, for ever, or the host's.
func (s *security) TestCVE_2026_47262_HostilePasswdAndGroup(t *testing.T) {
	p := s.pod(t, plainPod)
	var million strings.Builder
	for i := range 1_000_000 {
		fmt.Fprintf(&million, "g%d:x:%d:user\n", i, i)
	}
	must(t, os.WriteFile(filepath.Join(s.Dir, "hostpasswd"), []byte("hostuser:x:0:0::/:/bin/sh\n"), 0o644))
	for name, test := range map[string]struct {
		user    string
		entries []imagestest.Entry
	}{
		"5 GB sparse":          {"user", []imagestest.Entry{imagestest.GNUSparse("etc/passwd", 5<<30, 4<<30, "x")}},
		"5 GB sparse, by uid":  {"1000", []imagestest.Entry{imagestest.GNUSparse("etc/passwd", 5<<30, 4<<30, "x")}},
		"5 GB sparse group":    {"user", []imagestest.Entry{imagestest.GNUSparse("etc/group", 5<<30, 4<<30, "x")}},
		"fifo":                 {"user", []imagestest.Entry{imagestest.Fifo("etc/passwd")}},
		"zero device":          {"user", []imagestest.Entry{imagestest.Char("etc/passwd", 1, 5)}},
		"link to zero":         {"user", []imagestest.Entry{imagestest.Dir("dev"), imagestest.Char("dev/zero", 1, 5), imagestest.Symlink("etc/passwd", "/dev/zero")}},
		"link to the host":     {"hostuser", []imagestest.Entry{imagestest.Symlink("etc/passwd", s.Dir+"/hostpasswd")}},
		"link up to the host":  {"hostuser", []imagestest.Entry{imagestest.Symlink("etc/passwd", up+s.Dir+"/hostpasswd")}},
		"link to proc":         {"hostuser", []imagestest.Entry{imagestest.Symlink("etc/passwd", "/proc/self/root"+s.Dir+"/hostpasswd")}},
		"/etc is the host's":   {"hostuser", []imagestest.Entry{imagestest.Symlink("etc", s.Dir)}},
		"directory":            {"user", []imagestest.Entry{imagestest.Dir("etc/passwd")}},
		"a million groups":     {"user", []imagestest.Entry{imagestest.File("etc/group", million.String())}},
		"loop":                 {"user", []imagestest.Entry{imagestest.Symlink("etc/passwd", "passwd")}},
		"one line of 11 MB":    {"user", []imagestest.Entry{imagestest.File("etc/passwd", strings.Repeat("x", 11<<20))}},
		"a name that is a uid": {"1001x", []imagestest.Entry{imagestest.File("etc/passwd", "1001:x:0:0::/:/bin/sh\n")}},
	} {
		t.Run(name, func(t *testing.T) {
			image := s.image(t, func(i *imagestest.Image) { i.Config.Config.User = test.user }, test.entries...)
			before := residentKiB(t, s.Berth.PID())
			start := time.Now()
			out, _, err := s.output(t, p, s.container(image, "id"))
			took := time.Since(start)
			if err == nil {
				t.Errorf("runs: %s", out)
			}
			if took > 2*time.Second { // a second, on a machine that others use as well
				t.Errorf("refused after %v only", took)
			}
			if grown := peakKiB(t, s.Berth.PID()) - before; grown > 20<<10 {
				t.Errorf("the daemon grew by %d KiB", grown)
			}
		})
	}
}

// What is not one line in the request becomes another line in a file.
func (s *security) TestCVE_2022_4318_ControlCharacters(t *testing.T) {
	p := s.pod(t, plainPod)
	for _, bad := range []string{"x\ny", "x\ry", "x\x00y", "\n"} {
		ctr := s.container("", "id")
		ctr.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte(bad)}}
		_, _, err := s.output(t, p, ctr)
		wantCode(t, err, codes.InvalidArgument, "config.envs[0].value")
		for field, change := range map[string]func(*runtimeapi.PodSandboxConfig){
			"config.hostname":             func(c *runtimeapi.PodSandboxConfig) { c.Hostname = bad },
			"config.metadata.name":        func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Name = bad },
			"config.dns_config.servers":   func(c *runtimeapi.PodSandboxConfig) { c.DnsConfig.Servers = []string{bad} },
			"config.dns_config.searches":  func(c *runtimeapi.PodSandboxConfig) { c.DnsConfig.Searches = []string{bad} },
			"config.dns_config.options":   func(c *runtimeapi.PodSandboxConfig) { c.DnsConfig.Options = []string{bad} },
			"config.log_directory":        func(c *runtimeapi.PodSandboxConfig) { c.LogDirectory = "/tmp/" + bad },
			"config.linux.cgroup_parent":  func(c *runtimeapi.PodSandboxConfig) { c.Linux.CgroupParent = "/" + bad },
			"config.metadata.namespace":   func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Namespace = bad },
			"config.metadata.uid":         func(c *runtimeapi.PodSandboxConfig) { c.Metadata.Uid = bad },
			"config.linux.sysctls[net.x]": func(c *runtimeapi.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net.x": bad} },
		} {
			cfg := s.podConfig(plainPod)
			change(cfg)
			id, err := s.CRI.RunPod(t.Context(), cfg)
			wantCode(t, err, codes.InvalidArgument, field)
			if err == nil {
				must(t, s.CRI.RemovePod(t.Context(), id))
			}
		}
	}
	image := s.image(t, func(i *imagestest.Image) { i.Config.Config.User = "evil" }, imagestest.File("etc/passwd", "evil:x:1:1::/home\rroot:/bin/sh\n"))
	_, _, err := s.output(t, p, s.container(image, "id"))
	wantCode(t, err, codes.InvalidArgument, "passwd")
	ctr := s.container("", `echo "$HOME"`)
	ctr.Envs = []*runtimeapi.KeyValue{{Key: "HOME", Value: []byte(`/a\nb`)}}
	if out, code, err := s.output(t, p, ctr); err != nil || code != 0 || out != `/a\nb`+"\n" {
		t.Errorf("a literal backslash and n: %v, exit code %d: %q", err, code, out)
	}
}

// A value smuggles a second sysctl, or a pod in the host's namespace sets the host's.
func (s *security) TestCVE_2022_0811_Sysctls(t *testing.T) {
	for name, test := range map[string]struct {
		kind       podKind
		key, value string
	}{
		"plus":           {plainPod, "kernel.shmmax", "1+kernel.core_pattern=x"},
		"newline":        {plainPod, "kernel.shmmax", "1\nkernel.core_pattern=x"},
		"slash":          {plainPod, "kernel/core_pattern", "|/x"},
		"host's":         {plainPod, "kernel.core_pattern", "core"},
		"dots":           {plainPod, "net/../kernel/core_pattern", "x"},
		"dotted dots":    {plainPod, "net.//.kernel.core_pattern", "x"},
		"vm":             {plainPod, "vm.overcommit_memory", "1"},
		"host network":   {hostNetworkPod, "net.ipv4.ip_forward", "1"},
		"host network /": {hostNetworkPod, "net/ipv4/ip_forward", "1"},
		"host IPC":       {hostIPCPod, "kernel.shmmax", "1"},
		"host IPC queue": {hostIPCPod, "fs.mqueue.msg_max", "1"},
	} {
		cfg := s.podConfig(test.kind)
		cfg.Linux.Sysctls = map[string]string{test.key: test.value}
		id, err := s.CRI.RunPod(t.Context(), cfg)
		wantCode(t, err, codes.InvalidArgument, "config.linux.sysctls")
		if err == nil {
			t.Errorf("%s runs", name)
			must(t, s.CRI.RemovePod(t.Context(), id))
		}
	}
	// Each is in its namespace, but not everything that is there belongs to it: the kernel says so.
	cfg := s.podConfig(plainPod)
	cfg.Linux.Sysctls = map[string]string{"net.core.no_such_thing": "1"}
	if id, err := s.CRI.RunPod(t.Context(), cfg); err == nil {
		t.Errorf("pod %s runs", id)
	}
}

// A container in the root cgroup, or in its pod's, has no limits.
func (s *security) TestCVE_2025_47291_EveryModeHasItsCgroup(t *testing.T) {
	const limit = 64 << 20
	for _, kind := range []podKind{plainPod, privilegedPod, hostNetworkPod, sharedPIDPod, hostIPCPod} {
		p := s.pod(t, kind)
		ctr := s.idle("")
		ctr.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: limit, CpuPeriod: 100000, CpuQuota: 50000}
		ctr.Linux.SecurityContext.Privileged = kind == privilegedPod
		if kind == sharedPIDPod {
			ctr.Linux.SecurityContext.NamespaceOptions.Pid = runtimeapi.NamespaceMode_POD
		}
		id := s.start(t, p, ctr)
		for _, pid := range []int{s.info(t, id).PID, s.execPID(t, id)} {
			for controller, path := range cgroupsOf(t, pid) {
				if path != s.Cgroup()+"/"+id && !strings.HasPrefix(path, s.Cgroup()+"/"+id+"/exec-") {
					t.Errorf("%s: process %d is in %q of %s", kind, pid, path, controller)
				}
			}
			if got := memoryLimit(t, pid); got != limit {
				t.Errorf("%s: process %d may use %d bytes of memory, want %d", kind, pid, got, limit)
			}
		}
	}
	for _, parent := range []string{"/", "//", "/..", "/../x", "relative", s.Cgroup() + "/../../"} {
		cfg := s.podConfig(plainPod)
		cfg.Linux.CgroupParent = parent
		id, err := s.CRI.RunPod(t.Context(), cfg)
		if err == nil && (parent == "/" || parent == "//") { // the root may have pods as children
			must(t, s.CRI.RemovePod(t.Context(), id))
			continue
		}
		wantCode(t, err, codes.InvalidArgument, "cgroup_parent")
	}
}

// memoryLimit is what the kernel keeps a process to.
func memoryLimit(t *testing.T, pid int) int64 {
	t.Helper()
	for controller, path := range cgroupsOf(t, pid) {
		for _, file := range []string{"/sys/fs/cgroup/memory" + path + "/memory.limit_in_bytes", "/sys/fs/cgroup" + path + "/memory.max"} {
			text, err := os.ReadFile(file)
			if err != nil || controller != "memory" && controller != "" {
				continue
			}
			n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			if err != nil {
				return -1 // "max"
			}
			return n
		}
	}
	return -1
}

// A writable cgroup file system lets a container out of its limits.
func (s *security) TestCVE_2023_25809_CgroupfsIsReadOnly(t *testing.T) {
	for _, kind := range []podKind{plainPod, hostNetworkPod, sharedPIDPod} {
		p := s.pod(t, kind)
		ctr := s.idle("")
		ctr.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"DAC_OVERRIDE"}}
		id := s.start(t, p, ctr)
		out, code := s.exec(t, id, `n=0; for d in /sys/fs/cgroup /sys/fs/cgroup/*; do
			[ -f $d/cgroup.procs ] || continue; n=$((n+1)); echo 1 > $d/cgroup.procs && echo WRITTEN; mkdir $d/x && echo MADE; done; echo tried $n`)
		if code != 0 || strings.Contains(out, "WRITTEN") || strings.Contains(out, "MADE") || strings.Contains(out, "tried 0") ||
			!strings.Contains(out, "Read-only file system") {
			t.Errorf("%s: exit code %d: %s", kind, code, out)
		}
		for _, path := range []string{"/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper", "/sys/kernel/profiling", "/proc/irq/default_smp_affinity"} {
			if out, code := s.exec(t, id, "echo x > "+path); code == 0 {
				t.Errorf("%s: %s is written: %s", kind, path, out)
			}
		}
	}
}

// Device rules that are a deny list leave everything else open.
func (s *security) TestGHSA_g54h_m393_cpwq_DevicesAreDenied(t *testing.T) {
	var st unix.Stat_t
	must(t, unix.Stat("/", &st)) // the disk that the machine really has
	disk := fmt.Sprintf("b %d %d", unix.Major(st.Dev), unix.Minor(st.Dev))
	image := s.image(t, nil, imagestest.Block("fromimage", int64(unix.Major(st.Dev)), int64(unix.Minor(st.Dev))).Mode(0o666))
	nodes := []string{disk, "b 8 0", "c 1 1", "c 1 2", "c 1 11", "c 10 229", "c 10 237", "c 4 64", "b 7 0"}
	for _, kind := range []podKind{plainPod, hostNetworkPod, sharedPIDPod, hostIPCPod} {
		id := s.start(t, s.pod(t, kind), s.idle(image))
		for _, node := range nodes {
			out, _ := s.exec(t, id, "mknod /tmp/n "+node+" && head -c 1 /tmp/n; rm -f /tmp/n")
			if !strings.Contains(out, "Operation not permitted") {
				t.Errorf("%s: open of %s: %q", kind, node, out)
			}
		}
		if out, _ := s.exec(t, id, "head -c 1 /fromimage"); !strings.Contains(out, "Operation not permitted") {
			t.Errorf("%s: node of the image: %q", kind, out)
		}
		if out, code := s.exec(t, id, "head -c 4 /dev/zero | wc -c; echo x > /dev/null; head -c 1 /dev/urandom > /dev/full"); !strings.Contains(out, "No space left") {
			t.Errorf("%s: the devices that all have: exit code %d, %s", kind, code, out)
		}
	}
}

// Annotations are no configuration.
func (s *security) TestCVE_2024_3154_AnnotationsAreNotObeyed(t *testing.T) {
	hostile := map[string]string{
		"org.systemd.property.MemoryMax": "'infinity'", "io.kubernetes.cri-o.TrustedSandbox": "true", "io.kubernetes.cri-o.Devices": "/dev/kmsg:/dev/kmsg:rwm",
		"io.kubernetes.cri-o.userns-mode": "auto", "io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw": "true", "io.kubernetes.cri-o.UnifiedCgroup": "memory.max=max",
		"run.oci.systemd.subgroup": "x", "run.oci.keep_original_groups": "1", "cdi.k8s.io/x": "vendor.com/device=all", "io.katacontainers.config.hypervisor.path": "/bin/sh",
		"io.berth.privileged": "true", "berth.run/privileged": "true", "container.apparmor.security.beta.kubernetes.io/c": "unconfined",
		"seccomp.security.alpha.kubernetes.io/pod": "unconfined",
	}
	plain := s.ownPod(t, s.podConfig(plainPod))
	cfg := s.podConfig(plainPod)
	cfg.Annotations = hostile
	annotated := s.ownPod(t, cfg)
	var specs [2]string
	for i, p := range []*securityPod{plain, annotated} {
		ctr := s.idle("")
		if p == annotated {
			ctr.Annotations = hostile
		}
		id := s.start(t, p, ctr)
		specs[i] = s.spec(t, p, id)
	}
	if specs[0] != specs[1] {
		t.Errorf("the specification with annotations differs:\n%s\n%s", specs[0], specs[1])
	}
}

// spec is the specification of a container with what differs from one to the next taken out.
func (s *security) spec(t *testing.T, p *securityPod, id string) string {
	t.Helper()
	text := string(s.info(t, id).RuntimeSpec)
	for old, with := range map[string]string{id: "CONTAINER", p.id: "POD", p.cfg.Hostname: "HOSTNAME"} {
		text = strings.ReplaceAll(text, old, with)
	}
	return text
}

var repository = regexp.MustCompile(`REPO=hostile/i[0-9]+`)

// Labels of an image, and annotations of its layers, are obeyed as if they were the runtime's own.
func (s *security) TestCVE_2026_53488_ImageMetadataIsOpaque(t *testing.T) {
	p := s.pod(t, plainPod)
	keys := []string{
		"containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping", "containerd.io/snapshot.ref", "containerd.io/snapshot/cri.image-ref", "containerd.io/gc.root",
		"io.cri-containerd.image", "io.cri-containerd.pinned", "io.containerd.image.name", "io.kubernetes.cri.untrusted-workload", "org.opencontainers.image.ref.name",
		"org.opencontainers.image.stopSignal", "org.criu.checkpoint.container.name", "org.criu.checkpoint.rootfsImageName", "io.kubernetes.cri-o.annotations.checkpoint.name",
		"com.nvidia.volumes.needed", "devices.gpu", "io.berth.command", "berth.run/pinned", "run.oci.handler", "org.systemd.property.X",
	}
	const value = `0:0:4294967295,[\"/bin/sh\",\"-c\",\"touch /tmp/x\"]`
	evil := map[string]string{}
	for _, k := range keys {
		evil[k] = value
	}
	images := []string{
		s.image(t, nil, imagestest.File("x", "x")),
		s.image(t, func(i *imagestest.Image) {
			i.Config.Config.Labels = evil
			i.Manifest = func(m *ocispec.Manifest) { m.Annotations = evil }
			for n := range i.Layers {
				i.Layers[n].Descriptor = func(d *ocispec.Descriptor) { d.Annotations = evil }
			}
		}, imagestest.File("x", "x")),
	}
	var specs [2]string
	for i, image := range images {
		ctr := s.idle(image)
		id := s.start(t, p, ctr)
		specs[i] = s.spec(t, p, id)
		specs[i] = repository.ReplaceAllString(specs[i], "REPO=")
		st, err := s.CRI.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
		must(t, err)
		if st.Image.Pinned || !slices.Equal(st.Image.RepoTags, []string{image}) {
			t.Errorf("image: %v", st.Image)
		}
	}
	if specs[0] != specs[1] {
		t.Errorf("the specification with labels differs:\n%s\n%s", specs[0], specs[1])
	}
}

// A profile that is missing, empty or wrong must not mean "unconfined"; and init and exec have the same filter.
func (s *security) TestCVE_2023_2431_SeccompProfileIsNeverEmpty(t *testing.T) {
	p := s.pod(t, plainPod)
	dir := s.volume(t)
	write := func(name, text string) string {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
		return filepath.Join(dir, name)
	}
	profile := func(ref string) *runtimeapi.ContainerConfig {
		ctr := s.idle("")
		ctr.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
		return ctr
	}
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644))
	for name, ref := range map[string]string{
		"missing": filepath.Join(dir, "missing"), "no name": "", "relative": "profile.json", "empty": write("empty", ""), "null": write("null", "null"),
		"empty object": write("object", "{}"), "no JSON": write("text", "SCMP_ACT_ALLOW"), "directory": dir, "fifo": filepath.Join(dir, "fifo"),
		"no such action": write("action", `{"defaultAction":"SCMP_ACT_NONSENSE"}`), "huge": write("huge", strings.Repeat(" ", 2<<20)), "device": "/dev/zero",
	} {
		_, err := s.tryStart(t, p, profile(ref))
		if codeOf(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	deny := profile(write("deny", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`))
	for name, ctr := range map[string]*runtimeapi.ContainerConfig{"localhost": deny, "runtime default": s.idle("")} {
		id := s.start(t, p, ctr)
		if _, err := os.Stat(filepath.Join(s.Run(), "state", id, "seccomp.record")); err != nil && !s.Foreign() {
			t.Errorf("%s: each exec compiles its filter: %v", name, err)
		}
		for _, pid := range []int{s.info(t, id).PID, s.execPID(t, id)} {
			if got := readStatus(t, pid)["Seccomp"]; got != "2" {
				t.Errorf("%s: process %d has seccomp mode %s", name, pid, got)
			}
		}
		script := "mkdir /tmp/x"
		if name == "runtime default" {
			script = "unshare -m true"
		}
		if out, code := s.exec(t, id, script); code == 0 || !strings.Contains(out, "Operation not permitted") {
			t.Errorf("%s: %s: exit code %d: %s", name, script, code, out)
		}
	}
}

// What is masked is empty for init and exec: RAPL tells a neighbour's secrets by their power.
func (s *security) TestGHSA_7ww5_4wqc_m92c_MaskedPathsAreEmpty(t *testing.T) {
	p := s.pod(t, plainPod)
	ctr := s.idle("")
	sc := ctr.Linux.SecurityContext
	sc.MaskedPaths = append(sc.MaskedPaths, "/sys/devices/virtual/powercap", "/proc/interrupts", "/proc/asound", "/sys/devices/system/cpu/cpu0/thermal_throttle", "/proc/cpuinfo")
	id := s.start(t, p, ctr)
	root := fmt.Sprintf("/proc/%d/root", s.info(t, id).PID)
	seen := 0
	for _, path := range sc.MaskedPaths {
		st, err := os.Stat(root + path)
		if err != nil {
			continue // not on this kernel
		}
		seen++
		if st.IsDir() {
			if entries, err := os.ReadDir(root + path); err != nil || len(entries) > 0 {
				t.Errorf("%s has %v (%v)", path, entries, err)
			}
		} else if data, err := os.ReadFile(root + path); err != nil || len(data) > 0 {
			t.Errorf("%s has %.100q (%v)", path, data, err)
		}
		out, _ := s.exec(t, id, "[ -d "+path+" ] && ls -A "+path+" || cat "+path)
		if strings.TrimSpace(out) != "" {
			t.Errorf("an exec sees in %s: %.100q", path, out)
		}
		if out, code := s.exec(t, id, "echo x > "+path+"/x || mkdir "+path+"/y"); code == 0 {
			t.Errorf("%s can be written: %s", path, out)
		}
	}
	if seen < 4 {
		t.Errorf("this kernel has %d of the paths: nothing is shown", seen)
	}
}

// An image of another's checkpoint, or the call to make one, brings nothing.
func (s *security) TestCVE_2024_8676_CheckpointIsUnimplemented(t *testing.T) {
	id := s.start(t, s.pod(t, plainPod), s.idle(""))
	at := filepath.Join(s.volume(t), "checkpoint.tar")
	_, err := s.CRI.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: at})
	wantCode(t, err, codes.Unimplemented)
	if _, err := os.Stat(at); err == nil {
		t.Error("a file was made")
	}
	archive := imagestest.NewImage(imagestest.Layer(imagestest.File("spec.dump", "{}"), imagestest.File("config.dump", `{"rootfsImageName":"`+testimages.Busybox+`"}`)))
	archive.Manifest = func(m *ocispec.Manifest) {
		m.Annotations = map[string]string{"org.criu.checkpoint.container.name": "x", "io.kubernetes.cri-o.annotations.checkpoint.name": "x"}
	}
	ctr := s.container(s.pull(t, archive), "")
	ctr.Command = nil
	_, _, err = s.output(t, s.pod(t, plainPod), ctr)
	wantCode(t, err, codes.InvalidArgument, "config.command")
}

// cdiIsNotHonoured: a device name of the request that berth does not know must not be dropped silently.
func (s *security) TestCDIDeviceIsNotSilentlyDropped(t *testing.T) {
	ctr := s.container("", "true")
	ctr.CDIDevices = []*runtimeapi.CDIDevice{{Name: "vendor.com/device=all"}}
	if out, code, err := s.output(t, s.pod(t, plainPod), ctr); err == nil {
		t.Errorf("runs without its device, exit code %d: %s", code, out)
	}
}

// The namespace of another container is one of the same pod that runs, and no other process's.
func (s *security) TestTargetNamespaceIsThePodsOwn(t *testing.T) {
	p, other := s.pod(t, plainPod), s.pod(t, hostNetworkPod)
	target, stranger := s.start(t, p, s.idle("")), s.start(t, other, s.idle(""))
	debug := func(id string) *runtimeapi.ContainerConfig {
		ctr := s.container("", "cat /proc/1/cmdline; sleep 86400")
		ns := ctr.Linux.SecurityContext.NamespaceOptions
		ns.Pid, ns.TargetId = runtimeapi.NamespaceMode_TARGET, id
		return ctr
	}
	id := s.start(t, p, debug(target))
	if is, want := s.namespaces(t, s.info(t, id).PID, p, s.info(t, target).PID)["pid"], "init's"; is != want {
		t.Errorf("PID namespace: %s, want %s", is, want)
	}
	_, err := s.tryStart(t, p, debug(stranger))
	wantCode(t, err, codes.FailedPrecondition, "target_id")
	_, err = s.tryStart(t, p, debug(strings.Repeat("0", 64)))
	wantCode(t, err, codes.NotFound)
	_, err = s.CRI.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: target})
	must(t, err)
	_, err = s.tryStart(t, p, debug(target))
	wantCode(t, err, codes.FailedPrecondition, "target_id")
}

//go:build integration

package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// hostDevice makes a device node of the host that no container has by default: one without a driver, so that nothing comes
// of its being opened. The kernel asks first whether the container may.
func hostDevice(t *testing.T, path string) string {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, unix.Mknod(path, unix.S_IFCHR|0o640, int(unix.Mkdev(240, 99))))
	must(t, os.Chmod(path, 0o640))
	must(t, os.Chown(path, 0, 77))
	return path
}

func withDevice(host, container, permissions string) func(*runtimeapi.ContainerConfig) {
	return func(c *runtimeapi.ContainerConfig) {
		c.Devices = append(c.Devices, &runtimeapi.Device{HostPath: host, ContainerPath: container, Permissions: permissions})
	}
}

// deviceFields are about devices, and containers that have all.
func deviceFields() []fieldGroup {
	const about = "ContainerConfig.devices Device.host_path Device.container_path Device.permissions"
	may := func(permissions, want string) fieldCase {
		return fieldCase{"permissions " + permissions, about, func(t *testing.T, f *fields) {
			host := hostDevice(t, f.volume(t)+"/d")
			f.says(t, f.pod(t, plainPod), f.ctr("sh -c ': < /dev/mine' 2>&1 | grep -q 'not permitted' || echo read; sh -c ': > /dev/mine' 2>&1 | grep -q 'not permitted' || echo write", withDevice(host, "/dev/mine", permissions)), want)
		}}
	}
	refused := func(name string, code codes.Code, word string, change func(t *testing.T, f *fields) func(*runtimeapi.ContainerConfig)) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("true", change(t, f)), code, word)
		}}
	}
	privileged := withSecurity(func(s *containerSecurity) { s.Privileged = true })
	return []fieldGroup{
		{"devices", []fieldCase{
			may("r", "read\n"), may("w", "write\n"), may("rw", "read\nwrite\n"), may("mrw", "read\nwrite\n"), may("m", ""),
			{"none but the usual ones", about, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("ls /dev | grep -v core"), "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\n")
			}},
			{"as it is on the host", about, func(t *testing.T, f *fields) {
				host := hostDevice(t, f.volume(t)+"/d")
				f.says(t, f.pod(t, plainPod), f.ctr("stat -c '%F %t:%T %a %u:%g' /dev/sub/mine", withDevice(host, "/dev/sub/mine", "r")), "character special file f0:63 640 0:77\n")
			}},
			{"behind a link", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				hostDevice(t, dir+"/d")
				must(t, os.Symlink("d", dir+"/link"))
				f.says(t, f.pod(t, plainPod), f.ctr("stat -c '%F %t:%T' /dev/mine", withDevice(dir+"/link", "/dev/mine", "r")), "character special file f0:63\n")
			}},
			{"all of a directory", about, func(t *testing.T, f *fields) {
				dir := f.volume(t)
				hostDevice(t, dir+"/a")
				hostDevice(t, dir+"/sub/b")
				must(t, os.WriteFile(dir+"/file", nil, 0o644))
				f.says(t, f.pod(t, plainPod), f.ctr("cd /dev/all; find . -type c | sort; find . -type f; sh -c ': < a' 2>&1 | grep -q 'not permitted' || echo read", withDevice(dir, "/dev/all", "r")), "./a\n./sub/b\nread\n")
			}},
			{"twice, the last wins", about, func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("with containerd and runc it is the first")
				}
				dir := f.volume(t)
				hostDevice(t, dir+"/d")
				f.says(t, f.pod(t, plainPod), f.ctr("stat -c '%t:%T' /dev/mine", withDevice("/dev/zero", "/dev/mine", "r"), withDevice(dir+"/d", "/dev/mine", "r")), "f0:63\n")
			}},
			{"a user needs the file's permission, too", about, func(t *testing.T, f *fields) {
				host := hostDevice(t, f.volume(t)+"/d")
				f.says(t, f.pod(t, plainPod), f.ctr("sh -c ': < /dev/mine' 2>&1 | grep -o 'Permission denied'", withDevice(host, "/dev/mine", "rwm"), withSecurity(func(s *containerSecurity) { s.RunAsUser = number(1000) })), "Permission denied\n")
			}},
			refused("that is not there", codes.InvalidArgument, "host_path", func(*testing.T, *fields) func(*runtimeapi.ContainerConfig) {
				return withDevice("/dev/no-such-device", "/dev/mine", "r")
			}),
			refused("that is a file", codes.InvalidArgument, "host_path", func(t *testing.T, f *fields) func(*runtimeapi.ContainerConfig) {
				file := f.volume(t) + "/file"
				must(t, os.WriteFile(file, nil, 0o644))
				return withDevice(file, "/dev/mine", "r")
			}),
			{"permissions that do not exist", about, func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd leaves that to the kernel")
				}
				for _, p := range []string{"", "x", "rwx", "RW"} {
					f.refused(t, f.pod(t, plainPod), f.ctr("true", withDevice("/dev/null", "/dev/mine", p)), codes.InvalidArgument, "permissions")
				}
			}},
		}},
		{"privileged", []fieldCase{
			{"all devices of the host", "LinuxContainerSecurityContext.privileged", func(t *testing.T, f *fields) {
				var want []string
				must(t, filepath.WalkDir("/dev", func(path string, e fs.DirEntry, err error) error {
					switch {
					case err != nil:
						return nil // it went
					case e.IsDir() && slices.Contains([]string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/.lxc", "/dev/.lxd-mounts", "/dev/.udev"}, path):
						return fs.SkipDir
					case e.Type()&fs.ModeDevice != 0 && path != "/dev/console" && path != "/dev/ptmx":
						want = append(want, path)
					}
					return nil
				}))
				out := f.gives(t, f.pod(t, privilegedPod), f.ctr("find /dev -type c -o -type b", privileged))
				for _, path := range want {
					if _, err := os.Lstat(path); err == nil && !strings.Contains(out, path+"\n") {
						t.Errorf("%s is missing", path)
					}
				}
				if len(want) < 10 {
					t.Errorf("the host has %d devices only", len(want))
				}
			}},
			{"and may use them", "LinuxContainerSecurityContext.privileged", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, privilegedPod), f.ctr(": < /dev/kmsg && echo read; mknod /tmp/k c 1 11 && : < /tmp/k && echo made", privileged), "read\nmade\n")
			}},
			{"all capabilities", "LinuxContainerSecurityContext.privileged", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, privilegedPod), f.ctr("grep CapEff: /proc/self/status", privileged), "CapEff:\t"+readStatus(t, 1)["CapBnd"]+"\n")
			}},
			{"nothing is masked or read-only", "LinuxContainerSecurityContext.privileged", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, privilegedPod), f.ctr("for i in /proc/sys /sys /sys/fs/cgroup /proc/kcore /sys/firmware; do grep \" $i ro\" /proc/self/mountinfo; done; cat /proc/sys/net/core/somaxconn > /tmp/x && cat /tmp/x > /proc/sys/net/core/somaxconn && echo written", privileged), "written\n")
			}},
			{"no seccomp, whatever is asked for", "LinuxContainerSecurityContext.privileged LinuxContainerSecurityContext.seccomp", func(t *testing.T, f *fields) {
				for _, p := range []*runtimeapi.SecurityProfile{nil, {}, {ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: f.profile(t)}} {
					f.says(t, f.pod(t, privilegedPod), f.ctr("grep Seccomp: /proc/self/status", privileged, withSecurity(func(s *containerSecurity) { s.Seccomp = p })), "Seccomp:\t0\n")
				}
			}},
			{"a root that can be read-only", "LinuxContainerSecurityContext.privileged LinuxContainerSecurityContext.readonly_rootfs", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, privilegedPod), f.ctr("touch /x 2>/dev/null || echo no", privileged, withSecurity(func(s *containerSecurity) { s.ReadonlyRootfs = true })), "no\n")
			}},
		}},
	}
}

// profile is a seccomp profile of the host that keeps a container from making directories.
func (f *fields) profile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(f.volume(t), "profile.json")
	must(t, os.WriteFile(path, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}`), 0o644))
	return path
}

// confinementFields are about seccomp, AppArmor, masks and what the kernel is told of a container.
func confinementFields() []fieldGroup {
	const about = "LinuxContainerSecurityContext.seccomp SecurityProfile.profile_type SecurityProfile.localhost_ref"
	const test = "grep Seccomp: /proc/self/status; mkdir /x 2>/dev/null || echo no"
	seccomp := func(name string, p *runtimeapi.SecurityProfile, want string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr(test, withSecurity(func(s *containerSecurity) { s.Seccomp = p })), want)
		}}
	}
	local := func(path string) func(*runtimeapi.ContainerConfig) {
		return withSecurity(func(s *containerSecurity) {
			s.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: path}
		})
	}
	bad := func(name, content string) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			if f.peer && content == "{}" {
				t.Skip("containerd takes an empty profile (CVE-2023-2431 is the kubelet's)")
			}
			path := f.volume(t) + "/profile.json"
			if content != "" {
				must(t, os.WriteFile(path, []byte(content), 0o644))
			}
			f.refused(t, f.pod(t, plainPod), f.ctr("true", local(path)), codes.InvalidArgument, "seccomp")
		}}
	}
	masks := func(name, about, script, want string, change func(*containerSecurity)) fieldCase {
		return fieldCase{name, about, func(t *testing.T, f *fields) {
			f.says(t, f.pod(t, plainPod), f.ctr(script, withSecurity(change)), want)
		}}
	}
	const masked, readonly = "LinuxContainerSecurityContext.masked_paths", "LinuxContainerSecurityContext.readonly_paths"
	score := func(asked int64) fieldCase {
		return fieldCase{fmt.Sprint("oom_score_adj ", asked), "LinuxContainerResources.oom_score_adj", func(t *testing.T, f *fields) {
			want := max(asked, oomScoreFloor(t))
			cfg := f.ctr("cat /proc/self/oom_score_adj", func(c *runtimeapi.ContainerConfig) { c.Linux.Resources.OomScoreAdj = asked })
			f.says(t, f.pod(t, plainPod), cfg, fmt.Sprintln(want))
		}}
	}
	return []fieldGroup{
		{"seccomp", []fieldCase{
			seccomp("none given", nil, "Seccomp:\t0\n"),
			seccomp("RuntimeDefault", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, "Seccomp:\t2\n"),
			seccomp("Unconfined", &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, "Seccomp:\t0\n"),
			{"Localhost", about, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr(test, local(f.profile(t))), "Seccomp:\t2\nno\n")
			}},
			{"Localhost, an exec", about, func(t *testing.T, f *fields) {
				id := f.start(t, f.pod(t, plainPod), f.idleWith(local(f.profile(t))))
				if out, _ := f.exec(t, id, test); out != "Seccomp:\t2\nno\n" {
					t.Errorf("it says %q", out)
				}
			}},
			{"the default forbids", about, func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("unshare -U true 2>/dev/null || echo no"), "no\n")
			}},
			{"the old form", "LinuxContainerSecurityContext.seccomp_profile_path", func(t *testing.T, f *fields) {
				if f.peer {
					t.Skip("containerd has dropped it")
				}
				for old, want := range map[string]string{"": "0", "unconfined": "0", "runtime/default": "2", "docker/default": "2", "localhost/" + f.profile(t): "2"} {
					cfg := f.ctr("grep Seccomp: /proc/self/status", withSecurity(func(s *containerSecurity) { s.Seccomp, s.SeccompProfilePath = nil, old })) //nolint:staticcheck // deprecated, not gone
					f.says(t, f.pod(t, plainPod), cfg, "Seccomp:\t"+want+"\n")
				}
			}},
			bad("a file that is missing", ""), bad("a file that is empty", " "), bad("no JSON", "allow"), bad("an empty profile", "{}"),
			bad("an unknown action", `{"defaultAction":"SCMP_ACT_MAYBE"}`),
		}},
		{"AppArmor", []fieldCase{
			{"in force", "LinuxContainerSecurityContext.apparmor LinuxContainerSecurityContext.apparmor_profile", func(t *testing.T, f *fields) {
				if !appArmor() {
					t.Skip("this kernel has no AppArmor, or no parser for it is installed; the machine of integration/vm has both")
				}
				for want, change := range map[string]func(*containerSecurity){
					"(enforce)": func(*containerSecurity) {},
					"enforce":   func(s *containerSecurity) { s.Apparmor = &runtimeapi.SecurityProfile{} },
					"unconfined": func(s *containerSecurity) {
						s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
					},
					"unconfine": func(s *containerSecurity) { // the field beats the old string
						s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
						s.ApparmorProfile = "runtime/default" //nolint:staticcheck // deprecated, not gone
					},
				} {
					if out := f.gives(t, f.pod(t, plainPod), f.ctr("cat /proc/self/attr/current", withSecurity(change))); !strings.Contains(out, want) {
						t.Errorf("it says %q, want %q", out, want)
					}
				}
			}},
			{"a profile that is not loaded", "LinuxContainerSecurityContext.apparmor", func(t *testing.T, f *fields) {
				if f.peer && !appArmor() {
					t.Skip("containerd ignores it where AppArmor is off")
				}
				f.refused(t, f.pod(t, plainPod), f.ctr("true", withSecurity(func(s *containerSecurity) {
					s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: "no-such-profile"}
				})), codes.FailedPrecondition, "apparmor")
			}},
			{"unconfined works everywhere", "LinuxContainerSecurityContext.apparmor LinuxContainerSecurityContext.apparmor_profile", func(t *testing.T, f *fields) {
				f.says(t, f.pod(t, plainPod), f.ctr("echo runs", withSecurity(func(s *containerSecurity) {
					s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
				})), "runs\n")
				f.says(t, f.pod(t, plainPod), f.ctr("echo runs", withSecurity(func(s *containerSecurity) { s.ApparmorProfile = "unconfined" })), "runs\n") //nolint:staticcheck // deprecated, not gone
			}},
		}},
		{"procMount", []fieldCase{
			masks("a masked file", masked, "stat -c %t:%T /proc/timer_list; head -c 1 /proc/timer_list | wc -c", "1:3\n0\n", func(*containerSecurity) {}),
			masks("a masked directory", masked, "ls /sys/firmware /etc | head -n 3", "/etc:\n\n/sys/firmware:\n", func(s *containerSecurity) { s.MaskedPaths = []string{"/sys/firmware", "/etc"} }),
			masks("nothing is masked by itself", masked, "stat -c %F /proc/timer_list; grep ' /proc/' /proc/self/mountinfo | wc -l", "regular empty file\n0\n", func(s *containerSecurity) { s.MaskedPaths, s.ReadonlyPaths = nil, nil }),
			masks("what is masked but not there", masked, "echo runs", "runs\n", func(s *containerSecurity) { s.MaskedPaths = []string{"/proc/no-such", "/no/such"} }),
			masks("read-only paths", readonly, "(echo x > /proc/sys/kernel/domainname) 2>&1 | grep -o 'Read-only file system'; (touch /tmp/x) 2>&1; true", "Read-only file system\ntouch: /tmp/x: Read-only file system\n", func(s *containerSecurity) { s.ReadonlyPaths = []string{"/proc/sys", "/tmp"} }),
			masks("nothing is read-only by itself", readonly, "grep ' /proc/sys ' /proc/self/mountinfo | wc -l; cat /proc/sys/net/core/somaxconn > /tmp/x; cat /tmp/x > /proc/sys/net/core/somaxconn && echo written", "0\nwritten\n", func(s *containerSecurity) {
				s.MaskedPaths, s.ReadonlyPaths = nil, nil
				s.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined} // its default profile refuses the writing
			}),
			masks("what is read-only but not there", readonly, "echo runs", "runs\n", func(s *containerSecurity) { s.ReadonlyPaths = []string{"/proc/no-such", "/no/such"} }),
		}},
		{"out of memory", []fieldCase{score(0), score(1000), score(123), score(-998), score(-1000)}},
	}
}

// appArmor says whether AppArmor can be used here.
func appArmor() bool {
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	return err == nil && strings.HasPrefix(string(enabled), "Y")
}

// oomScoreFloor is what this machine lets us give: all, or no less than ours.
func oomScoreFloor(t *testing.T) int64 {
	t.Helper()
	var caps uint64
	_, err := fmt.Sscanf(readStatus(t, os.Getpid())["CapEff"], "%x", &caps)
	must(t, err)
	if caps&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return -1000
	}
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	must(t, err)
	var score int64
	_, err = fmt.Sscan(string(own), &score)
	must(t, err)
	return score
}

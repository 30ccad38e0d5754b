package spec

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mcs is a host with a policy that has levels; targeted one without.
var (
	mcs      = SELinux{Enabled: true, Process: "system_u:system_r:container_t:s0:c8,c9", File: "system_u:object_r:container_file_t:s0:c8,c9"}
	targeted = SELinux{Enabled: true, Process: "system_u:system_r:container_t", File: "system_u:object_r:container_file_t"}
)

func podWith(o *cri.SELinuxOption) *cri.PodSandboxConfig {
	in := request(func(in *Input) { podSecurity(in).SelinuxOptions = o })
	return in.Sandbox
}

func containerWith(o *cri.SELinuxOption) *cri.ContainerConfig {
	in := request(func(in *Input) { security(in).SelinuxOptions = o })
	return in.Container
}

func TestSELinuxLabels(t *testing.T) {
	type opts = cri.SELinuxOption
	for _, c := range []struct {
		name                  string
		host                  SELinux
		pod, ctr              *opts
		process, file         string // of the pod
		ctrProcess, ctrFile   string // where they differ from the pod's
		level, ctrSharedFiles string
	}{
		{name: "off", host: SELinux{Process: mcs.Process, File: mcs.File}, pod: &opts{Type: "spc_t", Level: "nonsense"}, ctr: &opts{Level: "nonsense"}},
		{name: "nothing asked", host: mcs, process: "system_u:system_r:container_t:s0:c1,c2", file: "system_u:object_r:container_file_t:s0:c1,c2", level: "s0:c1,c2"},
		{name: "empty options", host: mcs, pod: &opts{}, ctr: &opts{}, process: "system_u:system_r:container_t:s0:c1,c2", file: "system_u:object_r:container_file_t:s0:c1,c2", level: "s0:c1,c2"},
		{
			name: "all of the pod", host: mcs, pod: &opts{User: "u_u", Role: "r_r", Type: "t_t", Level: "s0:c4,c5"},
			process: "u_u:r_r:t_t:s0:c4,c5", file: "u_u:object_r:container_file_t:s0:c4,c5", level: "s0:c4,c5",
		},
		{
			name: "the container's type, at the pod's level", host: mcs, ctr: &opts{Type: "other_t"},
			process: "system_u:system_r:container_t:s0:c1,c2", file: "system_u:object_r:container_file_t:s0:c1,c2",
			ctrProcess: "system_u:system_r:other_t:s0:c1,c2", level: "s0:c1,c2",
		},
		{
			name: "the container's level, with the pod's type", host: mcs, pod: &opts{Type: "t_t"}, ctr: &opts{Level: "s0-s0:c0.c1023"},
			process: "system_u:system_r:t_t:s0:c1,c2", file: "system_u:object_r:container_file_t:s0:c1,c2",
			ctrProcess: "system_u:system_r:t_t:s0-s0:c0.c1023", ctrFile: "system_u:object_r:container_file_t:s0-s0:c0.c1023", level: "s0:c1,c2",
		},
		{name: "a policy without levels", host: targeted, ctr: &opts{Type: "other_t"}, process: targeted.Process, file: targeted.File, ctrProcess: "system_u:system_r:other_t"},
		{name: "a policy without containers", host: SELinux{Enabled: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			pod, err := PodLabels(podWith(c.pod), c.host, "s0:c1,c2")
			if want := (Labels{c.process, c.file}); err != nil || pod != want {
				t.Fatalf("pod: %v, %v, want %v", pod, err, want)
			}
			if pod.Level() != c.level {
				t.Errorf("level %q, want %q", pod.Level(), c.level)
			}
			want := pod
			if c.ctrProcess != "" {
				want.Process = c.ctrProcess
			}
			if c.ctrFile != "" {
				want.Mount = c.ctrFile
			}
			if got, err := ContainerLabels(containerWith(c.ctr), c.host, pod); err != nil || got != want {
				t.Errorf("container: %v, %v, want %v", got, err, want)
			}
		})
	}
	if got := (Labels{Mount: "u:object_r:t:s0:c1,c2"}).Shared(); got != "u:object_r:t:s0" {
		t.Errorf("shared: %q", got)
	}
}

func TestSELinuxOptionsAreRefusedByFieldAndValue(t *testing.T) {
	pod := Labels{mcs.Process, mcs.File}
	for _, c := range []struct {
		opts  *cri.SELinuxOption
		field string
	}{
		{&cri.SELinuxOption{Level: "s0,c4,c5"}, "level"},
		{&cri.SELinuxOption{Level: "s0:c1,"}, "level"},
		{&cri.SELinuxOption{Level: "s0:c5.c4"}, "level"},
		{&cri.SELinuxOption{Level: "s0:c1\n"}, "level"},
		{&cri.SELinuxOption{Level: "s0:c12345"}, "level"},
		{&cri.SELinuxOption{Level: "c1,c2"}, "level"},
		{&cri.SELinuxOption{Level: "s0:c1" + strings.Repeat(",c1", 2000)}, "level"},
		{&cri.SELinuxOption{Type: "spc_t:s0"}, "type"},
		{&cri.SELinuxOption{Type: "a b"}, "type"},
		{&cri.SELinuxOption{Role: "r\x00"}, "role"},
		{&cri.SELinuxOption{User: "system_u:"}, "user"},
		{&cri.SELinuxOption{User: "ü"}, "user"},
	} {
		_, err := PodLabels(podWith(c.opts), mcs, "s0:c1,c2")
		refused(t, err, errdefs.ErrInvalidArgument, "config.linux.security_context.selinux_options."+c.field+": \"")
		_, err = ContainerLabels(containerWith(c.opts), mcs, pod)
		refused(t, err, errdefs.ErrInvalidArgument, "config.linux.security_context.selinux_options."+c.field+": \"")
	}
	for _, level := range []string{"s0", "s0:c1", "s0:c1,c2", "s0:c0.c1023", "s0-s15:c0.c1023", "s0:c1,c3.c5,c9", "s0:c1-s0:c1,c2"} {
		if _, err := PodLabels(podWith(&cri.SELinuxOption{Level: level}), mcs, ""); err != nil {
			t.Errorf("level %s: %v", level, err)
		}
	}
	_, err := PodLabels(podWith(&cri.SELinuxOption{Level: "s0"}), targeted, "")
	refused(t, err, errdefs.ErrFailedPrecondition, "no levels")
	_, err = PodLabels(podWith(&cri.SELinuxOption{Type: "spc_t"}), SELinux{Enabled: true}, "")
	refused(t, err, errdefs.ErrFailedPrecondition, "spc_t", "no labels for containers")
	_, err = ContainerLabels(containerWith(&cri.SELinuxOption{Type: "spc_t"}), mcs, Labels{})
	refused(t, err, errdefs.ErrFailedPrecondition, "spc_t", "made without labels")
}

func TestSELinuxInTheSpecification(t *testing.T) {
	labelled := func(in *Input) {
		in.Labels = Labels{"u:r:container_t:s0:c1,c2", "u:object_r:container_file_t:s0:c1,c2"}
	}
	for _, c := range []struct {
		name           string
		change         func(*Input)
		process, mount string
	}{
		{"off", nil, "", ""},
		{"on", nil, "u:r:container_t:s0:c1,c2", "u:object_r:container_file_t:s0:c1,c2"},
		{"privileged is not confined, its files are its own", privileged, "", "u:object_r:container_file_t:s0:c1,c2"},
		{"a read-only root and an unmasked /proc", func(in *Input) {
			security(in).ReadonlyRootfs, security(in).MaskedPaths, security(in).ReadonlyPaths = true, nil, nil
		}, "u:r:container_t:s0:c1,c2", "u:object_r:container_file_t:s0:c1,c2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := mustContainer(t, func(in *Input) {
				if c.mount != "" {
					labelled(in)
				}
				if c.change != nil {
					c.change(in)
				}
			}).Spec
			if s.Process.SelinuxLabel != c.process || s.Linux.MountLabel != c.mount {
				t.Errorf("process %q, mounts %q", s.Process.SelinuxLabel, s.Linux.MountLabel)
			}
		})
	}
}

// Links are resolved before: what counts is where a mount leads to.
func TestCVE_2021_43816_SystemPathsAreNotRelabelled(t *testing.T) {
	volume := func(path string, labels Labels, relabel bool) func(*Input) {
		return func(in *Input) {
			in.Labels = labels
			in.Container.Mounts = []*cri.Mount{{HostPath: "/link", ContainerPath: "/etc/hosts", SelinuxRelabel: relabel}}
			in.Sources = []Source{{Path: path}}
		}
	}
	labels := Labels{mcs.Process, mcs.File}
	for _, path := range []string{"/", "/etc", "/etc/hosts", "/usr/lib/x", "/proc", "/sys/kernel", "/dev/shm", "/var", "/var/lib", "/home", "/root", "/var/lib/kubelet/pods"} {
		refuse(t, volume(path, labels, true), "config.mounts[0].selinux_relabel", path)
		mustContainer(t, volume(path, labels, false))
		mustContainer(t, volume(path, Labels{}, true)) // SELinux is off
	}
	for _, path := range []string{"/var/lib/kubelet/pods/1/volumes/x", "/srv/data", "/home/user/data", "/etcetera", "/tmp/x"} {
		mustContainer(t, volume(path, labels, true))
	}
}

//go:build integration

package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type podConfig = runtimeapi.PodSandboxConfig

// oddTexts are labels and annotations that somebody could take for something else.
var oddTexts = map[string]string{
	"io.kubernetes.pod.name": "x", "a.b/c": "line\nbreak\ttab \"quote\" 'single' \\ back", "empty": "", "unicode/ключ": "値 🚢", "json": `{"a":[1,2,{"b":null}]}`,
	"org.systemd.property.TasksMax": "1", "long": strings.Repeat("0123456789", 3000), "io.kubernetes.cri-o.userns-mode": "auto",
}

// podFields are about a pod as such.
func podFields() []fieldGroup {
	return []fieldGroup{{"pod", []fieldCase{
		{
			"metadata is told as given", "RunPodSandboxRequest.config PodSandboxConfig.metadata PodSandboxMetadata.name PodSandboxMetadata.uid PodSandboxMetadata.namespace PodSandboxMetadata.attempt",
			func(t *testing.T, f *fields) {
				p := f.newPod(t, plainPod, func(c *podConfig) { c.Metadata.Attempt = 7 })
				if st := f.podStatus(t, p.id); !proto.Equal(st.Metadata, p.cfg.Metadata) {
					t.Errorf("metadata %v, want %v", st.Metadata, p.cfg.Metadata)
				}
				list, err := f.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.id}})
				must(t, err)
				if len(list.Items) != 1 || !proto.Equal(list.Items[0].Metadata, p.cfg.Metadata) {
					t.Errorf("listed %v", list.Items)
				}
			},
		},
		{"the default handler", "RunPodSandboxRequest.runtime_handler", func(t *testing.T, f *fields) {
			if st := f.podStatus(t, f.pod(t, plainPod).id); st.RuntimeHandler != "" {
				t.Errorf("handler %q", st.RuntimeHandler)
			}
		}},
		{"no other handler", "RunPodSandboxRequest.runtime_handler", func(t *testing.T, f *fields) {
			_, err := f.CRI.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: f.podConfig(plainPod), RuntimeHandler: "no-such"})
			if err == nil || !strings.Contains(err.Error(), "no-such") {
				t.Errorf("error %v", err)
			}
		}},
		{"hostname", "PodSandboxConfig.hostname", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Hostname = "a-name.of-mine" })
			f.says(t, p, f.ctr("hostname; cat /etc/hostname; echo $HOSTNAME; uname -n"), strings.Repeat("a-name.of-mine\n", 4))
		}},
		{"the longest hostname", "PodSandboxConfig.hostname", func(t *testing.T, f *fields) {
			name := strings.Repeat("h", 64)
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Hostname = name })
			f.says(t, p, f.ctr("hostname"), name+"\n")
		}},
		{"the node's hostname on its network", "PodSandboxConfig.hostname", func(t *testing.T, f *fields) {
			name, err := os.Hostname()
			must(t, err)
			f.says(t, f.pod(t, hostNetworkPod), f.ctr("hostname; cat /etc/hostname; echo $HOSTNAME"), strings.Repeat(name+"\n", 3))
		}},
		{"log_directory is made", "PodSandboxConfig.log_directory", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) { c.LogDirectory += "/is/not/there/yet" })
			cfg := f.ctr("echo here")
			f.says(t, p, cfg, "here\n")
			if _, err := os.Stat(filepath.Join(p.cfg.LogDirectory, cfg.LogPath)); err != nil {
				t.Error(err)
			}
		}},
		{"no log_directory, no log", "PodSandboxConfig.log_directory", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) { c.LogDirectory = "" })
			id := f.start(t, p, f.ctr("yes | head -c 1000000"))
			if st, err := f.CRI.WaitExit(t.Context(), id, waitLong); err != nil || st.ExitCode != 0 || st.LogPath != "" {
				t.Errorf("%v: exit code %d, log %q", err, st.GetExitCode(), st.GetLogPath())
			}
		}},
		{"labels and annotations come back as they are", "PodSandboxConfig.labels PodSandboxConfig.annotations ContainerConfig.labels ContainerConfig.annotations", func(t *testing.T, f *fields) {
			odd := maps.Clone(oddTexts)
			if f.peer {
				delete(odd, "long") // containerd bounds a label to 4 KiB
			}
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Labels, c.Annotations = odd, odd })
			id := f.start(t, p, f.idleWith(func(c *runtimeapi.ContainerConfig) { c.Labels, c.Annotations = odd, odd }))
			f.sameTexts(t, p.id, id, odd)
		}},
		{"labels and annotations outlive the daemon", "PodSandboxConfig.labels PodSandboxConfig.annotations ContainerConfig.labels ContainerConfig.annotations", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("containerd is not restarted here")
			}
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Labels, c.Annotations = oddTexts, oddTexts })
			id := f.start(t, p, f.idleWith(func(c *runtimeapi.ContainerConfig) { c.Labels, c.Annotations = oddTexts, oddTexts }))
			pod, ctr := f.podStatus(t, p.id), f.status(t, id)
			must(t, f.KillBerth())
			must(t, f.StartBerth(t.Context()))
			f.sameTexts(t, p.id, id, oddTexts)
			if again := f.podStatus(t, p.id); !proto.Equal(again, pod) {
				t.Errorf("the pod's status was %v and is %v", pod, again)
			}
			if again := f.status(t, id); !proto.Equal(again, ctr) {
				t.Errorf("the container's status was %v and is %v", ctr, again)
			}
		}},
		{"annotations configure nothing", "PodSandboxConfig.annotations ContainerConfig.annotations", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) {
				c.Annotations = map[string]string{"cdi.k8s.io/x": "vendor.com/none=0", "io.kubernetes.cri-o.Devices": "/dev/kmsg", "security.alpha.kubernetes.io/sysctls": "kernel.shm_rmid_forced=1"}
			})
			f.says(t, p, f.ctr("cat /proc/sys/kernel/shm_rmid_forced; test ! -e /dev/kmsg", func(c *runtimeapi.ContainerConfig) {
				c.Annotations = map[string]string{"io.kubernetes.cri-o.Devices": "/dev/kmsg", "container.apparmor.security.beta.kubernetes.io/c": "localhost/none"}
			}), "0\n")
		}},
		{"cgroup_parent", "PodSandboxConfig.linux LinuxPodSandboxConfig.cgroup_parent", func(t *testing.T, f *fields) {
			p := f.pod(t, plainPod)
			id := f.start(t, p, f.idle(""))
			for controller, path := range cgroupsOf(t, f.info(t, id).PID) {
				if !strings.HasPrefix(path, f.Cgroup()+"/") {
					t.Errorf("%q: %s", controller, path)
				}
			}
		}},
		{"the sandbox's own user is no container's", "LinuxPodSandboxConfig.security_context LinuxSandboxSecurityContext.run_as_user LinuxSandboxSecurityContext.run_as_group LinuxSandboxSecurityContext.supplemental_groups LinuxSandboxSecurityContext.supplemental_groups_policy LinuxSandboxSecurityContext.readonly_rootfs", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) {
				sc := c.Linux.SecurityContext
				sc.RunAsUser, sc.RunAsGroup, sc.ReadonlyRootfs = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 1000}, true
				sc.SupplementalGroups, sc.SupplementalGroupsPolicy = []int64{4711}, runtimeapi.SupplementalGroupsPolicy_Strict
			})
			f.says(t, p, f.ctr("id -u; id -G; touch /x && echo made"), "0\n0\nmade\n")
		}},
		{"seccomp and AppArmor of the sandbox are no container's", "LinuxSandboxSecurityContext.seccomp LinuxSandboxSecurityContext.apparmor LinuxSandboxSecurityContext.seccomp_profile_path", func(t *testing.T, f *fields) {
			p := f.newPod(t, plainPod, func(c *podConfig) {
				sc := c.Linux.SecurityContext
				sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
				sc.Apparmor = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
				sc.SeccompProfilePath = "unconfined" //nolint:staticcheck // deprecated, not gone
			})
			f.says(t, p, f.ctr("grep Seccomp: /proc/self/status"), "Seccomp:\t2\n")
		}},
		{"a privileged container needs a privileged pod", "LinuxSandboxSecurityContext.privileged LinuxContainerSecurityContext.privileged", func(t *testing.T, f *fields) {
			f.refused(t, f.pod(t, plainPod), f.ctr("true", withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.Privileged = true })), codes.InvalidArgument, "privileged")
			f.says(t, f.pod(t, privilegedPod), f.ctr("grep CapEff /proc/self/status | grep -c 00000000a80425fb"), "1\n")
		}},
		{"SELinux options mean nothing where it is off", "LinuxSandboxSecurityContext.selinux_options LinuxContainerSecurityContext.selinux_options SELinuxOption.user SELinuxOption.role SELinuxOption.type SELinuxOption.level", func(t *testing.T, f *fields) {
			if seLinux() {
				t.Skip("SELinux is on")
			}
			o := &runtimeapi.SELinuxOption{User: "system_u", Role: "system_r", Type: "container_t", Level: "s0:c1,c2"}
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Linux.SecurityContext.SelinuxOptions = o })
			f.says(t, p, f.ctr("echo runs", withSecurity(func(s *runtimeapi.LinuxContainerSecurityContext) { s.SelinuxOptions = o })), "runs\n")
		}},
		{"all of linux may be missing", "PodSandboxConfig.linux ContainerConfig.linux LinuxContainerConfig.security_context", func(t *testing.T, f *fields) {
			if f.peer {
				t.Skip("its cgroup would not be this node's")
			}
			p := f.newPod(t, plainPod, func(c *podConfig) { c.Linux = &runtimeapi.LinuxPodSandboxConfig{CgroupParent: c.Linux.CgroupParent} })
			cfg := f.ctr("echo $((1+1)); grep Seccomp: /proc/self/status; echo $$ > /tmp/pid; test $(cat /tmp/pid) != 1", func(c *runtimeapi.ContainerConfig) { c.Linux = nil })
			f.says(t, p, cfg, "2\nSeccomp:\t0\n")
		}},
	}}}
}

// sameTexts wants labels and annotations in status and lists.
func (f *fields) sameTexts(t *testing.T, podID, id string, want map[string]string) {
	t.Helper()
	pods, err := f.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: podID}})
	must(t, err)
	ctrs, err := f.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
	must(t, err)
	if len(pods.Items) != 1 || len(ctrs.Containers) != 1 {
		t.Fatalf("%d pods and %d containers are listed", len(pods.Items), len(ctrs.Containers))
	}
	pod, ctr := f.podStatus(t, podID), f.status(t, id)
	for where, got := range map[string]map[string]string{
		"labels of the pod": pod.Labels, "annotations of the pod": pod.Annotations, "labels of the container": ctr.Labels,
		"annotations of the container": ctr.Annotations, "labels of the listed pod": pods.Items[0].Labels, "annotations of the listed pod": pods.Items[0].Annotations,
		"labels of the listed container": ctrs.Containers[0].Labels, "annotations of the listed container": ctrs.Containers[0].Annotations,
	} {
		if !maps.Equal(got, want) {
			t.Errorf("%s: %s", where, fmt.Sprintf("%.300q", got))
		}
	}
}

// idleWith is a container that waits for execs, changed.
func (f *fields) idleWith(change ...func(*runtimeapi.ContainerConfig)) *runtimeapi.ContainerConfig {
	cfg := f.idle("")
	for _, c := range change {
		c(cfg)
	}
	return cfg
}

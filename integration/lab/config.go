package lab

import (
	"os"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/testimages"
)

// Pod is the configuration of a pod, as a kubelet would send it, for tests to change where they differ. Its logs go below
// the node's directory.
func (n *Node) Pod(name string) *runtimeapi.PodSandboxConfig {
	uid := random()
	logs := filepath.Join(n.Dir, "logs", name+"_"+uid)
	_ = os.MkdirAll(logs, 0o755) // the runtime complains when it is missing
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: uid, Namespace: n.Network()},
		Hostname:     name,
		LogDirectory: logs,
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"10.91.0.53"}, Searches: []string{"lab.internal"}},
		Labels:       map[string]string{"io.kubernetes.pod.name": name},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: n.Cgroup(),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			},
		},
	}
}

// Container is the configuration of a busybox container that runs the command, for tests to change where they differ.
func Container(name string, cmd ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: testimages.Busybox},
		Command:  cmd,
		LogPath:  name + ".log",
		Labels:   map[string]string{"io.kubernetes.container.name": name},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
				MaskedPaths:      strings.Fields("/proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/sched_debug /proc/scsi /sys/firmware"),
				ReadonlyPaths:    strings.Fields("/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"),
			},
		},
	}
}

// Sh is a container that runs a shell script.
func Sh(name, script string) *runtimeapi.ContainerConfig {
	return Container(name, "sh", "-c", script)
}

// Sleeper is a container that does nothing and ends at once on SIGTERM.
func Sleeper(name string) *runtimeapi.ContainerConfig {
	return Sh(name, "trap 'exit 0' TERM; sleep 86400 & wait")
}

// LogLine is one line of a container's log in the CRI format.
type LogLine struct {
	Time, Stream, Tag, Text string
}

// Log reads the log of a container. A line that is not in the CRI format comes back with everything in Text.
func Log(pod *runtimeapi.PodSandboxConfig, ctr *runtimeapi.ContainerConfig) ([]LogLine, error) {
	data, err := os.ReadFile(filepath.Join(pod.LogDirectory, ctr.LogPath))
	if err != nil {
		return nil, err
	}
	var lines []LogLine
	for _, line := range strings.Split(strings.TrimSuffix(string(data), "\n"), "\n") {
		if parts := strings.SplitN(line, " ", 4); len(parts) == 4 {
			lines = append(lines, LogLine{parts[0], parts[1], parts[2], parts[3]})
		} else {
			lines = append(lines, LogLine{Text: line})
		}
	}
	return lines, nil
}

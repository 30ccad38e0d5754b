package spec

import (
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Container computes the specification of a container. It validates what it is given: a caller that has not called
// [ValidateContainer] is safe too.
func Container(in Input) (*Output, error) { return nil, errdefs.ErrNotImplemented }

// ValidateSandbox refuses a pod that can never run, naming field and value.
func ValidateSandbox(cfg *cri.PodSandboxConfig) error { return nil }

// ValidateContainer refuses a container that can never run in that pod, naming field and value.
func ValidateContainer(sandbox *cri.PodSandboxConfig, cfg *cri.ContainerConfig) error { return nil }

// ValidateResources refuses limits that can never be set (for UpdateContainerResources).
func ValidateResources(field string, r *cri.LinuxContainerResources) error { return nil }

// SandboxSysctls returns what to set in the pod's namespaces, names in dotted form.
func SandboxSysctls(cfg *cri.PodSandboxConfig) (map[string]string, error) { return nil, nil }

// Hostname is the pod's: its UTS name and the content of its /etc/hostname.
func Hostname(cfg *cri.PodSandboxConfig, h Host) string { return "" }

// ResolvConf renders the pod's /etc/resolv.conf; host is the node's.
func ResolvConf(dns *cri.DNSConfig, host []byte) []byte { return nil }

// StopSignal is the signal to stop a container with, and its name ("SIGTERM"); image is the image's StopSignal.
func StopSignal(cfg *cri.ContainerConfig, image string) (syscall.Signal, string, error) {
	return 0, "", nil
}

// Resources translates CRI limits for this host; also for UpdateContainerResources.
func Resources(r *cri.LinuxContainerResources, h Host) (*specs.LinuxResources, error) {
	return nil, nil
}

// MergeResources lays an update over what a container has: zero keeps, unified is merged by key.
func MergeResources(old, upd *cri.LinuxContainerResources) *cri.LinuxContainerResources { return nil }

// ExecProcess is a process beside the container's own: same user, groups, capabilities, environment and directory.
func ExecProcess(container *specs.Spec, cmd []string, tty bool) (*specs.Process, error) {
	return nil, nil
}

// SeccompProfilePath is the absolute path of the Localhost profile that the container wants, or "".
func SeccompProfilePath(cfg *cri.ContainerConfig) (string, error) { return "", nil }

// AppArmorProfile is the name of the profile that the container will be under, or "".
func AppArmorProfile(cfg *cri.ContainerConfig, h Host) (string, error) { return "", nil }

// DefaultAppArmorProfile is the name of the RuntimeDefault profile; the caller loads it.
const DefaultAppArmorProfile = "berth-default"

// HostNetwork, HostIPC, HostPID and SharedPID say what namespaces the pod needs.
func HostNetwork(cfg *cri.PodSandboxConfig) bool { return false }
func HostIPC(cfg *cri.PodSandboxConfig) bool     { return false }
func HostPID(cfg *cri.PodSandboxConfig) bool     { return false }
func SharedPID(cfg *cri.PodSandboxConfig) bool   { return false }

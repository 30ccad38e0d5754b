package spec

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func sandboxNamespaces(cfg *cri.PodSandboxConfig) *cri.NamespaceOption {
	return cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// HostNetwork says that the pod is in the node's network and UTS namespaces.
func HostNetwork(cfg *cri.PodSandboxConfig) bool {
	return sandboxNamespaces(cfg).GetNetwork() == cri.NamespaceMode_NODE
}

// HostIPC says that the pod is in the node's IPC namespace and has the node's /dev/shm.
func HostIPC(cfg *cri.PodSandboxConfig) bool {
	return sandboxNamespaces(cfg).GetIpc() == cri.NamespaceMode_NODE
}

// HostPID says that the pod is in the node's PID namespace.
func HostPID(cfg *cri.PodSandboxConfig) bool {
	return sandboxNamespaces(cfg).GetPid() == cri.NamespaceMode_NODE
}

// SharedPID says that the pod has a PID namespace that its containers share, so that something must be its process 1.
func SharedPID(cfg *cri.PodSandboxConfig) bool {
	return sandboxNamespaces(cfg).GetPid() == cri.NamespaceMode_POD
}

// validateNamespaceModes checks the modes that a pod may have.
func validateNamespaceModes(at string, ns *cri.NamespaceOption) error {
	for _, f := range []struct {
		field string
		mode  cri.NamespaceMode
	}{{".network", ns.GetNetwork()}, {".ipc", ns.GetIpc()}} {
		if f.mode != cri.NamespaceMode_POD && f.mode != cri.NamespaceMode_NODE {
			return invalid(at+f.field, f.mode, "is neither POD nor NODE")
		}
	}
	switch ns.GetPid() {
	case cri.NamespaceMode_POD, cri.NamespaceMode_CONTAINER, cri.NamespaceMode_NODE:
		return nil
	default:
		return invalid(at+".pid", ns.GetPid(), "is none of POD, CONTAINER and NODE")
	}
}

// validateContainerNamespaces checks a container's modes against its pod's. POD means what the pod has; the node's
// namespaces are only for pods that have them.
func validateContainerNamespaces(sandbox *cri.PodSandboxConfig, sc *cri.LinuxContainerSecurityContext) error {
	const at = securityContext + ".namespace_options"
	const inPod = "is asked for in a pod that has its own"
	ns := sc.GetNamespaceOptions()
	if ns.GetPid() == cri.NamespaceMode_TARGET {
		if ns.GetTargetId() == "" {
			return missing(at+".target_id", "is empty with pid TARGET")
		}
		if err := plain(at+".target_id", ns.GetTargetId()); err != nil {
			return err
		}
		ns = &cri.NamespaceOption{Network: ns.GetNetwork(), Ipc: ns.GetIpc()}
	}
	if err := validateNamespaceModes(at, ns); err != nil {
		return err
	}
	if ns.GetNetwork() == cri.NamespaceMode_NODE && !HostNetwork(sandbox) {
		return invalid(at+".network", ns.GetNetwork(), inPod)
	}
	if ns.GetIpc() == cri.NamespaceMode_NODE && !HostIPC(sandbox) {
		return invalid(at+".ipc", ns.GetIpc(), inPod)
	}
	if ns.GetPid() == cri.NamespaceMode_NODE && !HostPID(sandbox) {
		return invalid(at+".pid", ns.GetPid(), inPod)
	}
	return nil
}

// namespaces are those that a container joins (with a path) or gets new (without); the node's are left out.
func namespaces(in Input) ([]specs.LinuxNamespace, error) {
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	join := func(kind specs.LinuxNamespaceType, path, why string) error {
		if path == "" {
			return unmet(securityContext+".namespace_options", nil, "the pod has no %s namespace %s", kind, why)
		}
		list = append(list, specs.LinuxNamespace{Type: kind, Path: path})
		return nil
	}
	if _, own := Userns(in.Sandbox); own {
		if err := join(specs.UserNamespace, in.Namespaces.User, "to join"); err != nil {
			return nil, err
		}
	}
	if !HostNetwork(in.Sandbox) {
		if err := join(specs.NetworkNamespace, in.Namespaces.Net, "to join"); err != nil {
			return nil, err
		}
		if err := join(specs.UTSNamespace, in.Namespaces.UTS, "to join"); err != nil {
			return nil, err
		}
	}
	if !HostIPC(in.Sandbox) {
		if err := join(specs.IPCNamespace, in.Namespaces.IPC, "to join"); err != nil {
			return nil, err
		}
	}
	switch mode := in.Container.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid(); mode {
	case cri.NamespaceMode_CONTAINER:
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	case cri.NamespaceMode_TARGET:
		if err := join(specs.PIDNamespace, in.Namespaces.Target, "of the target container"); err != nil {
			return nil, err
		}
	case cri.NamespaceMode_POD:
		if !HostPID(in.Sandbox) {
			if err := join(specs.PIDNamespace, in.Namespaces.PID, "that its containers share"); err != nil {
				return nil, err
			}
		}
	}
	if hasCgroupNamespace(in) {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return list, nil
}

// hasCgroupNamespace: on cgroup v2 a container sees its own cgroup as the root, unless it is privileged. On v1 none does,
// as with containerd: programs there look for their limits under the path that /proc/self/cgroup tells.
func hasCgroupNamespace(in Input) bool {
	return in.Host.CgroupVersion == 2 && !in.Container.GetLinux().GetSecurityContext().GetPrivileged()
}

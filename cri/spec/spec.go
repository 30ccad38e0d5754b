package spec

import (
	"fmt"
	"path"
	"slices"
	"syscall"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Host holds the facts of the node that a specification depends on. They change rarely; the caller reads them once.
type Host struct {
	// CgroupVersion is 1 (also for hybrid) or 2.
	CgroupVersion int
	// CgroupMountOptions are those of nsdelegate and memory_recursiveprot that /sys/fs/cgroup is mounted with (v2 only).
	// A container in the host's cgroup namespace must repeat them, else its mount strips them from the host's.
	CgroupMountOptions []string
	// Devices are all device nodes below /dev for privileged containers, with their host paths; without those of
	// /dev/pts, /dev/shm, /dev/mqueue, and without /dev/console.
	Devices []specs.LinuxDevice
	// Capabilities are those that berth itself may hand on ("CAP_CHOWN", its bounding set); nil means all that exist.
	Capabilities []string
	// Hostname is the node's, the hostname of pods that do not bring one.
	Hostname string
	// SeccompEnabled says that kernel and libcontainer can filter system calls.
	SeccompEnabled bool
	// AppArmorEnabled says that the kernel has AppArmor on.
	AppArmorEnabled bool
	// SELinux is what labels are made from.
	SELinux SELinux
	// RecursiveReadOnly says that the kernel has mount_setattr(AT_RECURSIVE), Linux 5.12.
	RecursiveReadOnly bool
	// SwapController says that memory.memsw.limit_in_bytes (v1) or memory.swap.max (v2) exists.
	SwapController bool
	// HugePageSizes are the sizes that the hugetlb controller knows, as its files write them ("2MB", "1GB"); empty when
	// the controller is missing.
	HugePageSizes []string
	// ArgumentSpace is what arguments and variables of a program may take together ([ArgumentSpace] of the stack limit that
	// containers get); 0 means that of a limit of 8 MiB.
	ArgumentSpace int
	// OOMScoreAdjFloor is the lowest oom_score_adj that berth may give: -1000 with CAP_SYS_RESOURCE, else the daemon's own.
	OOMScoreAdjFloor int
	// Rlimits are the resource limits of every container; those not named are the daemon's.
	Rlimits []specs.POSIXRlimit
}

// Namespaces are paths of the pod's pinned namespaces.
type Namespaces struct {
	// Net, IPC and UTS are needed unless the sandbox configuration says NODE (UTS goes with the network).
	Net, IPC, UTS string
	// User is needed when the pod has a user namespace of its own.
	User string
	// PID is the pod's shared PID namespace, needed when a container joins it (mode POD in a sandbox not of mode NODE).
	PID string
	// Target is the PID namespace of the container that mode TARGET names.
	Target string
}

// PodFiles are host paths of what berth itself binds into every container of the pod, each only where the request
// mounts nothing at the same place. Empty means none.
type PodFiles struct {
	Hosts, Hostname, ResolvConf, Shm string
}

// Source is what the caller found at the host path of a CRI mount.
type Source struct {
	// Path is the host path with symbolic links resolved, or where the image volume (with its sub path) is mounted.
	Path string
	// Shared and Slave say whether the mount that holds Path is in a peer group ("shared:" of mountinfo) or receives
	// propagation ("master:").
	Shared, Slave bool
}

// Input is all that a container's specification is made from.
type Input struct {
	ID        string
	Sandbox   *cri.PodSandboxConfig
	Container *cri.ContainerConfig
	Image     ocispec.ImageConfig
	Host      Host

	Namespaces Namespaces
	RootfsPath string // absolute
	CgroupPath string // absolute below the cgroup root, as package cgroups joins it
	PodFiles   PodFiles

	// Passwd and Group are the contents of the image's own /etc/passwd and /etc/group, nil when absent. The caller reads
	// them inside the root, regular files only, 10 MiB at most (CVE-2026-47262).
	Passwd, Group []byte
	// Sources has one entry for each of Container.Mounts, in order.
	Sources []Source
	// Devices has one entry for each of Container.Devices, in order: the nodes found at its host path (symbolic links
	// resolved), one when it is a node, all below it when it is a directory. LinuxDevice.Path is then the path below that
	// directory, else empty.
	Devices [][]specs.LinuxDevice
	// SeccompProfile is the content of the file that [SeccompProfilePath] names, if it names one.
	SeccompProfile []byte
	// AppArmorLoaded says that the profile that [AppArmorProfile] names, if it names one, is loaded in the kernel.
	AppArmorLoaded bool
	// Labels are those of [ContainerLabels].
	Labels Labels
}

// Output is a container as it should be.
type Output struct {
	Spec *specs.Spec
	// User is what ContainerStatus reports: effective ids, supplemental groups with the primary one.
	User *cri.ContainerUser
	// StopSignal and StopSignalName are what StopContainer sends first; to be kept, for the image may be gone by then.
	StopSignal     syscall.Signal
	StopSignalName string
}

// Container computes the specification of a container. It validates what it is given, so that a caller that has not
// called [ValidateContainer] is safe too.
func Container(in Input) (*Output, error) {
	if err := validateSandbox("sandbox_config", in.Sandbox); err != nil {
		return nil, err
	}
	if err := ValidateContainer(in.Sandbox, in.Container); err != nil {
		return nil, err
	}
	for at, p := range map[string]string{"RootfsPath": in.RootfsPath, "CgroupPath": in.CgroupPath} {
		if !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
			return nil, fmt.Errorf("spec.Input.%s: %q is not a clean absolute path", at, p)
		}
	}
	sc := in.Container.GetLinux().GetSecurityContext()
	if err := validateVolumes(in.Image.Volumes); err != nil {
		return nil, err
	}

	out := &Output{}
	var err error
	if out.StopSignal, out.StopSignalName, err = StopSignal(in.Container, in.Image.StopSignal); err != nil {
		return nil, err
	}
	who, err := resolveIdentity(sc, in.Image.User, in.Passwd, in.Group)
	if err != nil {
		return nil, err
	}
	if err := who.mapped(in); err != nil {
		return nil, err
	}
	out.User = who.containerUser()
	out.Spec = &specs.Spec{Version: specs.Version, Root: &specs.Root{Path: in.RootfsPath, Readonly: sc.GetReadonlyRootfs()}}
	if out.Spec.Process, err = process(in, who); err != nil {
		return nil, err
	}
	if out.Spec.Linux, err = linux(in, out.Spec); err != nil {
		return nil, err
	}
	if out.Spec.Mounts, out.Spec.Linux.RootfsPropagation, err = mounts(in); err != nil {
		return nil, err
	}
	return out, nil
}

// process is the container's first process.
func process(in Input, who identity) (*specs.Process, error) {
	sc := in.Container.GetLinux().GetSecurityContext()
	p := &specs.Process{
		Terminal:        in.Container.GetTty(),
		User:            specs.User{UID: who.uid, GID: who.gid, AdditionalGids: who.groups},
		NoNewPrivileges: sc.GetNoNewPrivs(),
		Rlimits:         slices.Clone(in.Host.Rlimits),
		OOMScoreAdj:     oomScoreAdj(in.Container.GetLinux().GetResources(), in.Host),
	}
	var err error
	if p.Args, err = arguments(in.Container, in.Image); err != nil {
		return nil, err
	}
	if p.Env, err = environment(in.Container, in.Image, Hostname(in.Sandbox, in.Host), who.home); err != nil {
		return nil, err
	}
	if err = executable(p, in.Host.ArgumentSpace); err != nil {
		return nil, err
	}
	if p.Cwd, err = workingDir(in.Container, in.Image); err != nil {
		return nil, err
	}
	if p.Capabilities, err = capabilities(sc, in.Host); err != nil {
		return nil, err
	}
	if p.ApparmorProfile, err = AppArmorProfile(in.Container, in.Host); err != nil {
		return nil, err
	}
	if p.ApparmorProfile != "" && !in.AppArmorLoaded {
		return nil, unmet(apparmorField, p.ApparmorProfile, "is not loaded on this host")
	}
	if !sc.GetPrivileged() { // else the policy says which domain it comes to
		p.SelinuxLabel = in.Labels.Process
	}
	return p, nil
}

// linux is what the kernel keeps a container to. The specification so far has its process: what the default seccomp
// profile opens depends on the capabilities.
func linux(in Input, sofar *specs.Spec) (*specs.Linux, error) {
	sc := in.Container.GetLinux().GetSecurityContext()
	l := &specs.Linux{CgroupsPath: in.CgroupPath, MountLabel: in.Labels.Mount}
	if !sc.GetPrivileged() {
		// Exactly as given: the kubelet sends the paths, and none of them means an unmasked /proc.
		l.MaskedPaths = slices.Clone(sc.GetMaskedPaths())
		l.ReadonlyPaths = slices.Clone(sc.GetReadonlyPaths())
	}
	var err error
	if l.Namespaces, err = namespaces(in); err != nil {
		return nil, err
	}
	if l.Resources, err = Resources(in.Container.GetLinux().GetResources(), in.Host); err != nil {
		return nil, err
	}
	if l.Devices, l.Resources.Devices, err = devices(in.Container, in.Devices, in.Host); err != nil {
		return nil, err
	}
	if l.Seccomp, err = seccompFilter(sc, sofar, in.SeccompProfile, in.Host); err != nil {
		return nil, err
	}
	return l, nil
}

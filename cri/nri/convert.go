package nri

import (
	"maps"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is what a runtime knows of a pod, for [Pod.API].
type Pod struct {
	ID         string
	Config     *cri.PodSandboxConfig
	Handler    string
	Overhead   *cri.LinuxContainerResources // those of now
	Resources  *cri.LinuxContainerResources
	Cgroup     string            // of the sandbox
	Namespaces map[string]string // type: path
	PID        int               // of the process that is the sandbox, 0 if there is none
	IPs        []string
}

// API is the pod as plugins see it.
func (p Pod) API() *api.PodSandbox {
	md, linux := p.Config.GetMetadata(), p.Config.GetLinux()
	out := &api.PodSandbox{
		Id: p.ID, Name: md.GetName(), Uid: md.GetUid(), Namespace: md.GetNamespace(),
		Labels: maps.Clone(p.Config.GetLabels()), Annotations: maps.Clone(p.Config.GetAnnotations()),
		RuntimeHandler: p.Handler, Pid: uint32(max(p.PID, 0)), Ips: p.IPs,
		Linux: &api.LinuxPodSandbox{
			PodOverhead: Resources(p.Overhead), PodResources: Resources(p.Resources),
			CgroupParent: linux.GetCgroupParent(), CgroupsPath: p.Cgroup,
		},
	}
	for _, kind := range namespaceTypes { // in an order that is always the same
		if path, ok := p.Namespaces[string(kind)]; ok {
			out.Linux.Namespaces = append(out.Linux.Namespaces, &api.LinuxNamespace{Type: string(kind), Path: path})
		}
	}
	return out
}

// Container is what a runtime knows of a container, for [Container.API].
type Container struct {
	ID, PodID                    string
	Config                       *cri.ContainerConfig
	ImageName, ImageRef, ImageID string
	State                        cri.ContainerState
	Spec                         *specs.Spec // nil where it is not there any more
	PID                          int
	Created, Started, Finished   time.Time
	ExitCode                     int32
	Reason, Message              string
	Cgroup                       string
	Resources                    *cri.LinuxContainerResources
}

// API is the container as plugins see it.
func (c Container) API() *api.Container {
	out := &api.Container{
		Id: c.ID, PodSandboxId: c.PodID, Name: c.Config.GetMetadata().GetName(), State: state(c.State),
		Labels: maps.Clone(c.Config.GetLabels()), Annotations: maps.Clone(c.Config.GetAnnotations()),
		Pid: uint32(max(c.PID, 0)), CreatedAt: nanos(c.Created), StartedAt: nanos(c.Started), FinishedAt: nanos(c.Finished),
		ExitCode: c.ExitCode, StatusReason: c.Reason, StatusMessage: c.Message,
		Image: &api.Image{Name: c.ImageName, Digest: c.ImageRef, ConfigDigest: c.ImageID},
		Linux: &api.LinuxContainer{CgroupsPath: c.Cgroup},
	}
	for _, d := range c.Config.GetCDIDevices() {
		out.CDIDevices = append(out.CDIDevices, &api.CDIDevice{Name: d.GetName()})
	}
	if s := c.Spec; s != nil {
		describe(out, s)
	}
	if c.Resources != nil { // what holds by now; the specification has what held at first
		now := Resources(c.Resources)
		if was := out.Linux.Resources; was != nil {
			now.Devices, now.Pids = was.Devices, was.Pids
		}
		out.Linux.Resources = now
	}
	return out
}

// describe fills in what the specification says.
func describe(out *api.Container, s *specs.Spec) {
	for k, v := range s.Annotations {
		set(&out.Annotations, k, v)
	}
	out.Mounts = api.FromOCIMounts(s.Mounts)
	out.Hooks = api.FromOCIHooks(s.Hooks)
	if p := s.Process; p != nil {
		out.Args, out.Env = api.DupStringSlice(p.Args), api.DupStringSlice(p.Env)
		out.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: p.User.AdditionalGids}
		for _, l := range p.Rlimits {
			out.Rlimits = append(out.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
		if p.OOMScoreAdj != nil {
			out.Linux.OomScoreAdj = api.Int(*p.OOMScoreAdj)
		}
		out.Linux.IoPriority = api.FromOCILinuxIOPriority(p.IOPriority)
		out.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
	}
	if l := s.Linux; l != nil {
		out.Linux.Namespaces = api.FromOCILinuxNamespaces(l.Namespaces)
		out.Linux.Devices = api.FromOCILinuxDevices(l.Devices)
		out.Linux.Resources = api.FromOCILinuxResources(l.Resources, nil)
		if l.Seccomp != nil {
			out.Linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
		}
		out.Linux.Sysctl = maps.Clone(l.Sysctl)
		out.Linux.NetDevices = api.FromOCILinuxNetDevices(l.NetDevices)
	}
}

func state(s cri.ContainerState) api.ContainerState {
	switch s {
	case cri.ContainerState_CONTAINER_CREATED:
		return api.ContainerState_CONTAINER_CREATED
	case cri.ContainerState_CONTAINER_RUNNING:
		return api.ContainerState_CONTAINER_RUNNING
	case cri.ContainerState_CONTAINER_EXITED:
		return api.ContainerState_CONTAINER_STOPPED
	}
	return api.ContainerState_CONTAINER_UNKNOWN
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

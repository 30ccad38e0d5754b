package cadvisor

import (
	"fmt"
	"strings"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
)

// kindLabel tells sandboxes from containers: cAdvisor reads the network of sandboxes only.
const kindLabel = "io.cri-containerd.kind"

// The specification that containerd keeps. cAdvisor reads the environment in it, and only where its user names variables
// that it should publish; there is none in here, since environments hold passwords.
const (
	specType  = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	emptySpec = `{"ociVersion":"1.3.0","process":{"cwd":"/","env":[]},"root":{"path":"rootfs"}}`
)

func containerOf(c *pods.Container, image string) *containersapi.Container {
	out := record(c.ID, "container", c.Config.GetLabels(), c.CreatedAt)
	out.Image = image
	return out
}

func sandboxOf(s *pods.Sandbox, image string) *containersapi.Container {
	out := record(s.ID, "sandbox", s.Config.GetLabels(), s.CreatedAt)
	out.Image = image
	return out
}

func record(id, kind string, labels map[string]string, created time.Time) *containersapi.Container {
	return &containersapi.Container{
		ID:          id,
		Labels:      known(labels, kind),
		Runtime:     &containersapi.Container_Runtime{Name: "run.berth.v1"},
		Spec:        &anypb.Any{TypeUrl: specType, Value: []byte(emptySpec)},
		Snapshotter: "overlayfs",
		SnapshotKey: id,
		CreatedAt:   timestamppb.New(created),
		UpdatedAt:   timestamppb.New(created),
	}
}

// maxLabel is longer than any name of Kubernetes'.
const maxLabel = 1024

// known keeps the labels that the kubelet gives its containers, by which it finds them again: a pod's own are not among
// them, and could be of any size.
func known(labels map[string]string, kind string) map[string]string {
	out := map[string]string{kindLabel: kind}
	for name, v := range labels {
		if strings.HasPrefix(name, "io.kubernetes.") && len(name)+len(v) <= maxLabel {
			out[name] = v
		}
	}
	return out
}

// taskOf is the process of a container; an error where there is none yet.
func taskOf(c *pods.Container) (*tasktypes.Process, error) {
	p := &tasktypes.Process{ContainerID: c.ID, ID: c.ID, Pid: uint32(c.PID)}
	switch c.State {
	case cri.ContainerState_CONTAINER_EXITED:
		p.Status, p.ExitStatus, p.ExitedAt = tasktypes.Status_STOPPED, uint32(c.ExitCode), timestamppb.New(c.FinishedAt)
		return p, nil
	case cri.ContainerState_CONTAINER_CREATED:
		p.Status = tasktypes.Status_CREATED
	case cri.ContainerState_CONTAINER_RUNNING:
		p.Status = tasktypes.Status_RUNNING
	}
	if c.PID <= 0 {
		return nil, fmt.Errorf("container %s has no process yet", c.ID)
	}
	return p, nil
}

// shimOf is the process of a sandbox: the shim, which is in the pod's namespaces.
func shimOf(s *pods.Sandbox) (*tasktypes.Process, error) {
	if s.ShimPID <= 0 {
		return nil, fmt.Errorf("pod sandbox %s has no process", s.ID)
	}
	// Once the sandbox is stopped it has no process.
	return &tasktypes.Process{ContainerID: s.ID, ID: s.ID, Pid: uint32(s.ShimPID), Status: tasktypes.Status_RUNNING}, nil
}

func taskOrShim(c *pods.Container, s *pods.Sandbox) (*tasktypes.Process, error) {
	if c != nil {
		return taskOf(c)
	}
	return shimOf(s)
}

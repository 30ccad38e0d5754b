package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
)

// CreateContainer makes a container in a ready sandbox, of an image that is there. What the request says of the sandbox is
// what RunPodSandbox was told; the recorded configuration counts.
func (s *Server) CreateContainer(ctx context.Context, req *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	if err := checkID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if req.GetConfig() == nil {
		return nil, missing("config")
	}
	sb, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := spec.ValidateContainer(sb.Config, req.GetConfig()); err != nil {
		return nil, err
	}
	if err := s.checkHandler("config.image.runtime_handler", req.GetConfig().GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	id, err := s.pods.CreateContainer(ctx, sb.ID, req.GetConfig())
	if err != nil {
		return nil, err
	}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

// StartContainer starts a created container. When it cannot, the container is Exited with code 128 and can be removed.
func (s *Server) StartContainer(ctx context.Context, req *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	id, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.StartContainer(ctx, id); err != nil {
		return nil, err
	}
	return &cri.StartContainerResponse{}, nil
}

// StopContainer sends the stop signal, waits for the timeout, then kills. It succeeds for a container that does not run or
// is unknown.
func (s *Server) StopContainer(ctx context.Context, req *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	grace, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	id, err := s.containerOrUnknown(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.StopContainer(ctx, id, grace); err != nil {
		return nil, err
	}
	return &cri.StopContainerResponse{}, nil
}

// RemoveContainer kills the container if it runs, and removes it. It succeeds for one that is unknown. The disk has the space of its
// files back when it returns: a kubelet that is short of disk removes the containers that have ended, looks at once, and evicts a pod
// if that was not enough.
func (s *Server) RemoveContainer(ctx context.Context, req *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	id, err := s.containerOrUnknown(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.RemoveContainer(ctx, id); err != nil {
		return nil, err
	}
	s.images.WaitDeleted(ctx)
	return &cri.RemoveContainerResponse{}, nil
}

// ListContainers lists from memory: the kubelet asks every second.
func (s *Server) ListContainers(_ context.Context, req *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	resp := &cri.ListContainersResponse{}
	for _, c := range s.pods.Containers() {
		if containerMatches(req.GetFilter(), c) {
			resp.Containers = append(resp.Containers, containerItem(c))
		}
	}
	return resp, nil
}

// ContainerStatus tells everything that is known of a container; verbose adds the OCI specification that it runs by.
func (s *Server) ContainerStatus(_ context.Context, req *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	if err := checkID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &cri.ContainerStatusResponse{Status: containerStatus(c, s.images.Image)}
	if req.GetVerbose() {
		runtimeSpec, err := s.pods.Spec(c.ID)
		// A specification lives in the run directory, which a reboot empties; the status is worth telling without it.
		if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
			return nil, fmt.Errorf("container %s: runtime specification: %w", c.ID, err)
		}
		if resp.Info, err = info(newContainerInfo(c, runtimeSpec)); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// UpdateContainerResources changes limits in place. Zero and empty fields keep what is: the kubelet's CPU manager sends
// nothing but the CPU set.
func (s *Server) UpdateContainerResources(ctx context.Context, req *cri.UpdateContainerResourcesRequest) (*cri.UpdateContainerResourcesResponse, error) {
	if req.GetWindows() != nil {
		return nil, invalid("windows", "set", "resources of Windows containers on Linux")
	}
	if req.GetLinux() == nil {
		return nil, missing("linux")
	}
	if err := spec.ValidateResources("linux", req.GetLinux()); err != nil {
		return nil, err
	}
	id, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.UpdateResources(ctx, id, req.GetLinux()); err != nil {
		return nil, err
	}
	return &cri.UpdateContainerResourcesResponse{}, nil
}

// ReopenContainerLog makes the shim write to a new file at the log's path, which the kubelet has renamed before.
func (s *Server) ReopenContainerLog(ctx context.Context, req *cri.ReopenContainerLogRequest) (*cri.ReopenContainerLogResponse, error) {
	id, err := s.container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.ReopenLog(ctx, id); err != nil {
		return nil, err
	}
	return &cri.ReopenContainerLogResponse{}, nil
}

// container completes a prefix to the id of a container.
func (s *Server) container(id string) (string, error) {
	if err := checkID("container_id", id); err != nil {
		return "", err
	}
	c, err := s.pods.Container(id)
	if err != nil {
		return "", err
	}
	return c.ID, nil
}

// containerOrUnknown is container, but passes an unknown id on as it is, for the calls that succeed all the same.
func (s *Server) containerOrUnknown(id string) (string, error) {
	if err := checkID("container_id", id); err != nil {
		return "", err
	}
	c, err := s.pods.Container(id)
	return known(id, err, func() string { return c.ID })
}

// known is the full id of what was looked up, or the id as it was given where nothing has it.
func known(id string, err error, full func() string) (string, error) {
	switch {
	case err == nil:
		return full(), nil
	case errors.Is(err, errdefs.ErrNotFound):
		return id, nil
	}
	return "", err
}

package cri

import (
	"context"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/spec"
)

// RunPodSandbox makes a sandbox that is ready. A failure undoes all of it, its name included: the kubelet retries with
// the same attempt.
func (s *Server) RunPodSandbox(ctx context.Context, req *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	if req.GetConfig() == nil {
		return nil, missing("config")
	}
	if err := spec.ValidateSandbox(req.GetConfig()); err != nil {
		return nil, err
	}
	if err := s.checkHandler("runtime_handler", req.GetRuntimeHandler()); err != nil {
		return nil, err
	}
	id, err := s.pods.RunSandbox(ctx, req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox kills the containers and releases the network. It succeeds for a sandbox that is stopped or unknown: the
// kubelet's garbage collection gives up at any error, NotFound included.
func (s *Server) StopPodSandbox(ctx context.Context, req *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	id, err := s.sandboxID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.StopSandbox(ctx, id); err != nil {
		return nil, err
	}
	return &cri.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox removes the sandbox and its containers. It succeeds for one that is unknown. The disk has their space back then.
func (s *Server) RemovePodSandbox(ctx context.Context, req *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	id, err := s.sandboxID(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := s.pods.RemoveSandbox(ctx, id); err != nil {
		return nil, err
	}
	s.images.WaitDeleted(ctx)
	return &cri.RemovePodSandboxResponse{}, nil
}

// PodSandboxStatus tells the state and the addresses of a sandbox.
func (s *Server) PodSandboxStatus(_ context.Context, req *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	if err := checkID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &cri.PodSandboxStatusResponse{Status: sandboxStatus(sb)}
	if req.GetVerbose() {
		if resp.Info, err = info(newSandboxInfo(sb)); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// UpdatePodSandboxResources takes note of what a pod as a whole may use. The kubelet calls it before it resizes the pod's
// cgroup, which is its own, and gives up the resize on any error.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *cri.UpdatePodSandboxResourcesRequest) (*cri.UpdatePodSandboxResourcesResponse, error) {
	if err := checkID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	for at, r := range map[string]*cri.LinuxContainerResources{"overhead": req.GetOverhead(), "resources": req.GetResources()} {
		if err := spec.ValidateResources(at, r); err != nil {
			return nil, err
		}
	}
	if err := s.pods.UpdateSandboxResources(ctx, sb.ID, req.GetOverhead(), req.GetResources()); err != nil {
		return nil, err
	}
	return &cri.UpdatePodSandboxResourcesResponse{}, nil
}

// ListPodSandbox lists from memory: the kubelet asks every second.
func (s *Server) ListPodSandbox(_ context.Context, req *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	resp := &cri.ListPodSandboxResponse{}
	for _, sb := range s.pods.Sandboxes() {
		if sandboxMatches(req.GetFilter(), sb) {
			resp.Items = append(resp.Items, sandboxItem(sb))
		}
	}
	return resp, nil
}

// sandboxID completes a prefix to the id of a sandbox. An unknown id is passed on as it is, for the calls that succeed
// all the same.
func (s *Server) sandboxID(id string) (string, error) {
	if err := checkID("pod_sandbox_id", id); err != nil {
		return "", err
	}
	sb, err := s.pods.Sandbox(id)
	return known(id, err, func() string { return sb.ID })
}

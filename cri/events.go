package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

var errStopping = fmt.Errorf("berth stops: %w", errdefs.ErrUnavailable)

// GetContainerEvents tells all that happens to containers and sandboxes until its caller goes. A caller that takes the
// events too slowly is ended with ResourceExhausted, since one that was left out would be missed by nobody. The headers
// of the answer say that from now on nothing is missed.
func (s *Server) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	events, err := s.pods.Events()
	if err != nil {
		return err
	}
	defer events.Close()
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	go func() {
		select {
		case <-s.stopping:
			cancel(errStopping)
		case <-ctx.Done():
		}
	}()
	for {
		e, err := events.Next(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(containerEvent(e, s.images.Image)); err != nil {
			return err
		}
	}
}

// containerEvent is an event with the status of the pod and its containers at that instant. The kubelet passes over
// events without the metadata of a sandbox, also of one that has been removed.
func containerEvent(e *pods.Event, find func(string) (*images.Image, error)) *cri.ContainerEventResponse {
	resp := &cri.ContainerEventResponse{
		ContainerId: e.ID, ContainerEventType: e.Type, CreatedAt: nanos(e.At), PodSandboxStatus: sandboxStatus(e.Sandbox),
	}
	for _, c := range e.Containers {
		resp.ContainersStatuses = append(resp.ContainersStatuses, containerStatus(c, find))
	}
	return resp
}

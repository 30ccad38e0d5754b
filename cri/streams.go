package cri

import (
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

// The Stream* calls are the lists of the calls without the prefix, in messages that do not grow with the node (KEP-5825).
// Nothing of a list is held but one message: items are made as they are sent.

// maxBatch is the size of a message, in bytes, unless one item alone has more. It is far from the 16 MiB that the
// kubelet takes, and large enough that messages are few.
const maxBatch = 512 << 10

// streamLists sends items in messages of at most maxBatch bytes: each once, and none in an empty message.
func streamLists[T proto.Message, R any](items iter.Seq[T], message func([]T) *R, stream grpc.ServerStreamingServer[R]) error {
	var batch []T
	size := 0
	for item := range items {
		n := protowire.SizeTag(1) + protowire.SizeBytes(proto.Size(item))
		if len(batch) > 0 && size+n > maxBatch {
			if err := stream.Send(message(batch)); err != nil {
				return err
			}
			batch, size = nil, 0 // the message is the library's from now on
		}
		batch, size = append(batch, item), size+n
	}
	if len(batch) == 0 {
		return nil
	}
	return stream.Send(message(batch))
}

// chosen yields what becomes of those that match.
func chosen[V any, T proto.Message](list []V, matches func(V) bool, item func(V) T) iter.Seq[T] {
	return func(yield func(T) bool) {
		for _, v := range list {
			if matches(v) && !yield(item(v)) {
				return
			}
		}
	}
}

// StreamPodSandboxes is ListPodSandbox in messages of bounded size.
func (s *Server) StreamPodSandboxes(req *cri.StreamPodSandboxesRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxesResponse]) error {
	return streamLists(
		chosen(s.pods.Sandboxes(), func(sb *pods.Sandbox) bool { return sandboxMatches(req.GetFilter(), sb) }, sandboxItem),
		func(batch []*cri.PodSandbox) *cri.StreamPodSandboxesResponse {
			return &cri.StreamPodSandboxesResponse{PodSandboxes: batch}
		}, stream)
}

// StreamContainers is ListContainers in messages of bounded size.
func (s *Server) StreamContainers(req *cri.StreamContainersRequest, stream grpc.ServerStreamingServer[cri.StreamContainersResponse]) error {
	return streamLists(
		chosen(s.pods.Containers(), func(c *pods.Container) bool { return containerMatches(req.GetFilter(), c) }, containerItem),
		func(batch []*cri.Container) *cri.StreamContainersResponse {
			return &cri.StreamContainersResponse{Containers: batch}
		}, stream)
}

// StreamContainerStats is ListContainerStats in messages of bounded size.
func (s *Server) StreamContainerStats(req *cri.StreamContainerStatsRequest, stream grpc.ServerStreamingServer[cri.StreamContainerStatsResponse]) error {
	return streamLists(s.containersStats(stream.Context(), req.GetFilter()),
		func(batch []*cri.ContainerStats) *cri.StreamContainerStatsResponse {
			return &cri.StreamContainerStatsResponse{ContainerStats: batch}
		}, stream)
}

// StreamPodSandboxStats is ListPodSandboxStats in messages of bounded size.
func (s *Server) StreamPodSandboxStats(req *cri.StreamPodSandboxStatsRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxStatsResponse]) error {
	return streamLists(s.podSandboxStats(stream.Context(), req.GetFilter()),
		func(batch []*cri.PodSandboxStats) *cri.StreamPodSandboxStatsResponse {
			return &cri.StreamPodSandboxStatsResponse{PodSandboxStats: batch}
		}, stream)
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in messages of bounded size.
func (s *Server) StreamPodSandboxMetrics(_ *cri.StreamPodSandboxMetricsRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxMetricsResponse]) error {
	return streamLists(s.podSandboxMetrics(stream.Context()),
		func(batch []*cri.PodSandboxMetrics) *cri.StreamPodSandboxMetricsResponse {
			return &cri.StreamPodSandboxMetricsResponse{PodSandboxMetrics: batch}
		}, stream)
}

// StreamImages is ListImages in messages of bounded size.
func (s *Server) StreamImages(req *cri.StreamImagesRequest, stream grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	list, err := s.imagesOf(req.GetFilter())
	if err != nil {
		return err
	}
	return streamLists(chosen(list, func(*images.Image) bool { return true }, image),
		func(batch []*cri.Image) *cri.StreamImagesResponse { return &cri.StreamImagesResponse{Images: batch} }, stream)
}

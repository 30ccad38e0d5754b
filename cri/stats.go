package cri

import (
	"context"
	"errors"
	"iter"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/images"
)

// ContainerStats tells what a container uses. One that does not run uses nothing but its disk.
func (s *Server) ContainerStats(_ context.Context, req *cri.ContainerStatsRequest) (*cri.ContainerStatsResponse, error) {
	if err := checkID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	st, err := s.stats(c)
	if err != nil {
		return nil, err
	}
	return &cri.ContainerStatsResponse{Stats: st}, nil
}

// ListContainerStats tells what the running containers use, asked every ten seconds for evictions. One that cannot be read
// (it has just ended) is left out, so that it does not hide the others.
func (s *Server) ListContainerStats(_ context.Context, req *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	return &cri.ListContainerStatsResponse{Stats: slices.Collect(s.containersStats(req.GetFilter()))}, nil
}

// containersStats yields the stats of the running containers that a filter picks, each read when it is asked for.
func (s *Server) containersStats(filter *cri.ContainerStatsFilter) iter.Seq[*cri.ContainerStats] {
	return func(yield func(*cri.ContainerStats) bool) {
		for _, c := range s.pods.Containers() {
			if c.State != cri.ContainerState_CONTAINER_RUNNING || !statsMatch(filter, c) {
				continue
			}
			st, err := s.stats(c)
			if err != nil {
				if !errors.Is(err, errdefs.ErrNotFound) {
					s.log.Warn("container has no stats", "id", c.ID, "err", err)
				}
				continue
			}
			if !yield(st) {
				return
			}
		}
	}
}

func (s *Server) stats(c *pods.Container) (*cri.ContainerStats, error) {
	var usage *cgroups.Stats
	if c.State == cri.ContainerState_CONTAINER_RUNNING {
		var err error
		if usage, err = s.pods.Stats(c.ID); err != nil {
			return nil, err
		}
	}
	disk, counted := s.images.WritableUsage(c.ID)
	return containerStats(c, usage, disk, counted, time.Now()), nil
}

// containerStats translates. Attributes and their metadata are always there: the kubelet dereferences them. The time is
// that of the reading, since the kubelet derives rates from two of them.
func containerStats(c *pods.Container, usage *cgroups.Stats, disk images.Usage, counted bool, now time.Time) *cri.ContainerStats {
	meta := c.Config.GetMetadata()
	if meta == nil {
		meta = &cri.ContainerMetadata{}
	}
	out := &cri.ContainerStats{Attributes: &cri.ContainerAttributes{
		Id: c.ID, Metadata: meta, Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations(),
	}}
	if counted {
		out.WritableLayer = filesystemUsage(disk, now)
	}
	if usage == nil {
		return out
	}
	at := usage.Time.UnixNano()
	m := usage.Memory
	out.Cpu = &cri.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: u64(usage.CPU.UsageNanos)}
	out.Memory = &cri.MemoryUsage{
		Timestamp:       at,
		WorkingSetBytes: u64(m.WorkingSet),
		AvailableBytes:  u64(m.Available),
		UsageBytes:      u64(m.Usage),
		RssBytes:        u64(m.RSS),
		PageFaults:      u64(m.PageFaults),
		MajorPageFaults: u64(m.MajorPageFaults),
	}
	out.Swap = &cri.SwapUsage{Timestamp: at, SwapUsageBytes: u64(m.SwapUsage), SwapAvailableBytes: u64(m.SwapAvailable)}
	return out
}

// filesystemUsage is never without its numbers: the kubelet dereferences them.
func filesystemUsage(u images.Usage, now time.Time) *cri.FilesystemUsage {
	return &cri.FilesystemUsage{
		Timestamp:  now.UnixNano(),
		FsId:       &cri.FilesystemIdentifier{Mountpoint: u.Mountpoint},
		UsedBytes:  u64(u.Bytes),
		InodesUsed: u64(u.Inodes),
	}
}

func u64(v uint64) *cri.UInt64Value { return &cri.UInt64Value{Value: v} }

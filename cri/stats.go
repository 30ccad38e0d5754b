package cri

import (
	"context"
	"iter"
	"time"

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

// ListContainerStats tells what the running containers use, asked every ten seconds for evictions.
func (s *Server) ListContainerStats(ctx context.Context, req *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	resp := &cri.ListContainerStatsResponse{}
	for st := range s.containersStats(ctx, req.GetFilter()) {
		resp.Stats = append(resp.Stats, st)
	}
	return resp, ctx.Err()
}

// containersStats are the stats of the running containers that match, each read when it is its turn, until ctx ends. One
// that cannot be read (it has just ended) is left out, so that it does not hide the others.
func (s *Server) containersStats(ctx context.Context, f *cri.ContainerStatsFilter) iter.Seq[*cri.ContainerStats] {
	return func(yield func(*cri.ContainerStats) bool) {
		s.recount(ctx)
		all := s.pods.Containers()
		s.rates.keep(len(all), s.exists)
		for _, c := range all {
			if ctx.Err() != nil {
				return
			}
			if !running(c) || !statsMatch(f, c) {
				continue
			}
			if st := s.statsOrNil(c); st != nil && !yield(st) {
				return
			}
		}
	}
}

// recount has statistics know of what was just written, if that does not take long.
func (s *Server) recount(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s.images.Recount(ctx)
}

func running(c *pods.Container) bool { return c.State == cri.ContainerState_CONTAINER_RUNNING }

// exists says whether there is a container or a pod sandbox of that id.
func (s *Server) exists(id string) bool {
	if _, err := s.pods.Container(id); err == nil {
		return true
	}
	_, err := s.pods.Sandbox(id)
	return err == nil
}

func (s *Server) statsOrNil(c *pods.Container) *cri.ContainerStats {
	st, err := s.stats(c)
	if err != nil {
		s.warnUnlessGone("container has no stats", c.ID, err)
	}
	return st
}

func (s *Server) stats(c *pods.Container) (*cri.ContainerStats, error) {
	var usage *cgroups.Stats
	if running(c) {
		var err error
		if usage, err = s.pods.Stats(c.ID); err != nil {
			return nil, err
		}
	}
	disk, counted := s.images.WritableUsage(c.ID)
	out := containerStats(c, usage, disk, counted, time.Now())
	if usage != nil {
		out.Cpu.UsageNanoCores = u64(s.rates.nanoCores(c.ID, c.StartedAt, usage.Time, usage.CPU.UsageNanos))
	}
	return out, nil
}

// containerStats translates. Attributes and their metadata are always there: the kubelet dereferences them.
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
	out.Cpu, out.Memory, out.Io = cpuUsage(usage), memoryUsage(usage), ioUsage(usage)
	m := usage.Memory
	out.Swap = &cri.SwapUsage{
		Timestamp: usage.Time.UnixNano(), SwapUsageBytes: u64(m.SwapUsage), SwapAvailableBytes: left(m.SwapLimit, m.SwapAvailable),
	}
	return out
}

// The time is that of the reading, since the kubelet derives rates from two of them.

func cpuUsage(s *cgroups.Stats) *cri.CpuUsage {
	return &cri.CpuUsage{Timestamp: s.Time.UnixNano(), UsageCoreNanoSeconds: u64(s.CPU.UsageNanos), Psi: psi(s.CPU.Pressure)}
}

func memoryUsage(s *cgroups.Stats) *cri.MemoryUsage {
	m := s.Memory
	return &cri.MemoryUsage{
		Timestamp:       s.Time.UnixNano(),
		WorkingSetBytes: u64(m.WorkingSet),
		AvailableBytes:  left(m.Limit, m.Available),
		UsageBytes:      u64(m.Usage),
		RssBytes:        u64(m.RSS),
		PageFaults:      u64(m.PageFaults),
		MajorPageFaults: u64(m.MajorPageFaults),
		Psi:             psi(m.Pressure),
	}
}

// left is not known where there is no limit, rather than nothing.
func left(limit, available uint64) *cri.UInt64Value {
	if limit == cgroups.Unlimited {
		return nil
	}
	return u64(available)
}

func ioUsage(s *cgroups.Stats) *cri.IoUsage {
	return &cri.IoUsage{Timestamp: s.Time.UnixNano(), Psi: psi(s.IO.Pressure)}
}

func psi(p *cgroups.Pressure) *cri.PsiStats {
	if p == nil {
		return nil
	}
	line := func(s cgroups.Stall) *cri.PsiData {
		return &cri.PsiData{Total: s.TotalNanos, Avg10: s.Avg10, Avg60: s.Avg60, Avg300: s.Avg300}
	}
	return &cri.PsiStats{Some: line(p.Some), Full: line(p.Full)}
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

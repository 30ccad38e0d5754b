package cri

import (
	"context"
	"errors"
	"iter"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
	"github.com/berth-run/berth/network"
)

// PodSandboxStats tells what a pod uses. The kubelet asks for "" at its start, to learn whether the call is there: any
// error but Unimplemented says so.
func (s *Server) PodSandboxStats(_ context.Context, req *cri.PodSandboxStatsRequest) (*cri.PodSandboxStatsResponse, error) {
	if err := checkID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	st, err := s.podStats(sb, s.runningByPod()[sb.ID])
	if err != nil {
		return nil, err
	}
	return &cri.PodSandboxStatsResponse{Stats: st}, nil
}

// ListPodSandboxStats tells what the ready pods use.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *cri.ListPodSandboxStatsRequest) (*cri.ListPodSandboxStatsResponse, error) {
	resp := &cri.ListPodSandboxStatsResponse{}
	for st := range s.podSandboxStats(ctx, req.GetFilter()) {
		resp.Stats = append(resp.Stats, st)
	}
	return resp, ctx.Err()
}

// podSandboxStats are the stats of the ready pods that match, each read when it is its turn, until ctx ends. One that
// cannot be read (it is just being stopped) is left out.
func (s *Server) podSandboxStats(ctx context.Context, f *cri.PodSandboxStatsFilter) iter.Seq[*cri.PodSandboxStats] {
	return func(yield func(*cri.PodSandboxStats) bool) {
		s.recount(ctx)
		containers := s.runningByPod()
		for _, sb := range s.pods.Sandboxes() {
			if ctx.Err() != nil {
				return
			}
			if !sb.Ready || !strings.HasPrefix(sb.ID, f.GetId()) || !labelsMatch(f.GetLabelSelector(), sb.Config.GetLabels()) {
				continue
			}
			st, err := s.podStats(sb, containers[sb.ID])
			if err != nil {
				s.warnUnlessGone("pod sandbox has no stats", sb.ID, err)
				continue
			}
			if !yield(st) {
				return
			}
		}
	}
}

func (s *Server) warnUnlessGone(what, id string, err error) {
	if !errors.Is(err, errdefs.ErrNotFound) {
		s.log.Warn(what, "id", id, "error", err)
	}
}

// runningByPod are the running containers of each pod sandbox.
func (s *Server) runningByPod() map[string][]*pods.Container {
	all := s.pods.Containers()
	s.rates.keep(len(all), s.exists)
	by := map[string][]*pods.Container{}
	for _, c := range all {
		if running(c) {
			by[c.SandboxID] = append(by[c.SandboxID], c)
		}
	}
	return by
}

func (s *Server) podStats(sb *pods.Sandbox, containers []*pods.Container) (*cri.PodSandboxStats, error) {
	out := &cri.PodSandboxStats{
		Attributes: &cri.PodSandboxAttributes{
			Id: sb.ID, Metadata: sb.Config.GetMetadata(), Labels: sb.Config.GetLabels(), Annotations: sb.Config.GetAnnotations(),
		},
		Linux: &cri.LinuxPodSandboxStats{}, // the kubelet dereferences it
	}
	if !sb.Ready {
		return out, nil
	}
	usage, err := s.pods.PodUsage(sb, containers)
	if err != nil {
		return nil, err
	}
	l, at := out.Linux, usage.Time.UnixNano()
	l.Cpu, l.Memory, l.Io = cpuUsage(&usage.Stats), memoryUsage(&usage.Stats), ioUsage(&usage.Stats)
	l.Cpu.UsageNanoCores = u64(s.rates.nanoCores(sb.ID, sb.CreatedAt, usage.Time, usage.CPU.UsageNanos))
	l.Process = &cri.ProcessUsage{Timestamp: at, ProcessCount: u64(usage.Processes)}
	l.Network = networkUsage(usage.Network, usage.NetworkTime)
	for _, c := range containers {
		if st := s.statsOrNil(c); st != nil {
			l.Containers = append(l.Containers, st)
		}
	}
	return out, nil
}

// defaultInterface is the one that a pod reaches others by; the name is a constant of the kubelet's, too.
const defaultInterface = "eth0"

// networkUsage has a default interface always, since the kubelet dereferences it: an empty one where none has its name.
func networkUsage(counters []network.Counters, at time.Time) *cri.NetworkUsage {
	out := &cri.NetworkUsage{Timestamp: at.UnixNano(), DefaultInterface: &cri.NetworkInterfaceUsage{}}
	for _, c := range counters {
		i := &cri.NetworkInterfaceUsage{
			Name:    c.Name,
			RxBytes: u64(c.Rx.Bytes), RxErrors: u64(c.Rx.Errors), TxBytes: u64(c.Tx.Bytes), TxErrors: u64(c.Tx.Errors),
		}
		if c.Name == defaultInterface {
			out.DefaultInterface = i
		} else {
			out.Interfaces = append(out.Interfaces, i)
		}
	}
	return out
}

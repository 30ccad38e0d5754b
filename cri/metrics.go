package cri

import (
	"context"
	"iter"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/pods"
)

// ListMetricDescriptors names the metrics. The kubelet asks once, at its start.
func (s *Server) ListMetricDescriptors(context.Context, *cri.ListMetricDescriptorsRequest) (*cri.ListMetricDescriptorsResponse, error) {
	resp := &cri.ListMetricDescriptorsResponse{}
	for _, m := range metrics {
		resp.Descriptors = append(resp.Descriptors, &cri.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: m.labelKeys()})
	}
	return resp, nil
}

// ListPodSandboxMetrics measures the ready pods for the kubelet's /metrics/cadvisor, when somebody scrapes that.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *cri.ListPodSandboxMetricsRequest) (*cri.ListPodSandboxMetricsResponse, error) {
	resp := &cri.ListPodSandboxMetricsResponse{}
	for m := range s.podSandboxMetrics(ctx) {
		resp.PodMetrics = append(resp.PodMetrics, m)
	}
	return resp, ctx.Err()
}

// podSandboxMetrics are the metrics of the ready pods, each measured when it is its turn, until ctx ends. A pod that is
// just being stopped, and a container that has just ended, are left out.
func (s *Server) podSandboxMetrics(ctx context.Context) iter.Seq[*cri.PodSandboxMetrics] {
	return func(yield func(*cri.PodSandboxMetrics) bool) {
		containers := s.runningByPod()
		disk := s.writableDisk()
		for _, sb := range s.pods.Sandboxes() {
			if ctx.Err() != nil {
				return
			}
			if !sb.Ready {
				continue
			}
			m, err := s.podMetrics(sb, containers[sb.ID], disk)
			if err != nil {
				s.warnUnlessGone("pod sandbox has no metrics", sb.ID, err)
				continue
			}
			if !yield(m) {
				return
			}
		}
	}
}

// podMetrics has what cAdvisor tells of a pod: of the cgroup that the kubelet made for it, of the sandbox, whose network is
// the pod's, and of each container.
func (s *Server) podMetrics(sb *pods.Sandbox, containers []*pods.Container, disk disk) (*cri.PodSandboxMetrics, error) {
	out := &cri.PodSandboxMetrics{PodSandboxId: sb.ID}
	pod := measured{pod: sb.Config.GetMetadata().GetName(), namespace: sb.Config.GetMetadata().GetNamespace(), created: sb.CreatedAt, started: sb.CreatedAt}
	if parent, ok := sb.PodCgroup(); ok {
		whole := pod
		if err := whole.measure(parent); err != nil {
			return nil, err
		}
		out.Metrics = whole.appendTo(out.Metrics)
	}
	sandbox := pod
	sandbox.name, sandbox.image, sandbox.pid = sb.ID, SandboxImage, sb.ShimPID
	if err := sandbox.measure(sb.CgroupPath); err != nil {
		return nil, err
	}
	var err error
	if sandbox.network, _, err = pods.Interfaces(sb); err != nil {
		return nil, err
	}
	out.Metrics = sandbox.appendTo(out.Metrics)
	for _, c := range containers {
		ctr := pod
		ctr.name, ctr.container, ctr.image, ctr.pid = c.ID, c.Config.GetMetadata().GetName(), ImageLabel(s.images, c), c.PID
		ctr.created, ctr.started = c.CreatedAt, c.StartedAt
		if usage, counted := s.images.WritableUsage(c.ID); counted {
			ctr.disk, ctr.diskUsed = &disk, usage.Bytes
		}
		if err := ctr.measure(c.CgroupPath); err != nil {
			s.warnUnlessGone("container has no metrics", c.ID, err)
			continue
		}
		out.ContainerMetrics = append(out.ContainerMetrics, &cri.ContainerMetrics{ContainerId: c.ID, Metrics: ctr.appendTo(nil)})
	}
	return out, nil
}

// measure reads the cgroup and the processes in it.
func (s *measured) measure(p cgroups.Path) error {
	s.id = string(p)
	var err error
	if s.usage, err = cgroups.ReadDetails(p); err != nil {
		return err
	}
	if s.tasks, err = cgroups.ReadTasks(p); err != nil {
		return err
	}
	if s.pid > 0 {
		// A process that has just ended has no limits to tell.
		_ = unix.Prlimit(s.pid, unix.RLIMIT_NOFILE, nil, &s.openFiles)
	}
	return nil
}

// appendTo appends all metrics that there are values of.
func (s *measured) appendTo(list []*cri.Metric) []*cri.Metric {
	base := []string{s.container, s.id, s.image, s.name, s.namespace, s.pod} // in the order of baseLabels
	for _, m := range metrics {
		for _, v := range m.values(s) {
			labels := append(base[:len(base):len(base)], v.labels...)
			list = append(list, &cri.Metric{Name: m.name, MetricType: m.kind, LabelValues: labels, Value: u64(v.value)})
		}
	}
	return list
}

// disk is the file system of writable layers.
type disk struct {
	device string
	unix.Statfs_t
}

func (s *Server) writableDisk() (d disk) {
	root := s.images.WritablesUsage().Mountpoint
	var st unix.Stat_t
	if unix.Stat(root, &st) == nil {
		d.device = cgroups.DeviceName(unix.Major(st.Dev), unix.Minor(st.Dev))
	}
	if d.device == "" {
		d.device = root // no disk of its own, such as an overlay: its place tells it apart
	}
	_ = unix.Statfs(root, &d.Statfs_t) // zeros say that it cannot be told
	return d
}

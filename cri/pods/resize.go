package pods

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/internal/step"
)

// UpdateResources changes limits of a container that is created or runs; zero keeps. It does all of it or nothing.
func (m *Manager) UpdateResources(ctx context.Context, id string, r *cri.LinuxContainerResources) error {
	c, err := m.container(id)
	if err != nil {
		return err
	}
	if err := c.pod.lock.Lock(ctx); err != nil {
		return err
	}
	defer c.pod.lock.Unlock()
	if v := c.view.Load(); v.State == cri.ContainerState_CONTAINER_EXITED {
		return failedPrecondition("container %s has exited", c.rec.ID)
	}
	s := m.stack("UpdateContainerResources", c.rec.ID, nil)
	return c.updateTold(ctx, s, r, func(r *cri.LinuxContainerResources, more *api.LinuxResources) error {
		return c.resize(ctx, s, r, more)
	})
}

// resize changes limits; more has those that NRI has fields for and the CRI has not. One that a plugin asks for out of the
// blue does not wait for the pod, whose call may be what has led to it, so that there is a lock for this alone.
func (c *container) resize(ctx context.Context, s *step.Stack, r *cri.LinuxContainerResources, more *api.LinuxResources) error {
	c.resizing.Lock()
	defer c.resizing.Unlock()
	m := c.m
	if rec := c.record(); !rec.FinishedAt.IsZero() {
		return failedPrecondition("container %s has exited", rec.ID)
	}
	// All of it, not just the update: what swap may be follows from both limits.
	merged := spec.MergeResources(c.record().Resources.M, r)
	if _, err := spec.Resources(merged, m.hostNow()); err != nil {
		return err
	}
	err := s.Run(ctx,
		// On record first: a daemon that dies now finishes it, so that kernel and status never tell different limits.
		step.Step{
			Name: "announce", Timeout: 10 * time.Second,
			Do:   func(context.Context) error { return c.setResizing(merged) },
			Undo: func(context.Context) error { return c.setResizing(nil) },
		},
		step.Step{Name: "limits", Timeout: time.Minute, Do: func(context.Context) error { return c.limit(merged, more) }},
		step.Step{Name: "record", Timeout: 10 * time.Second, Do: func(context.Context) error { return c.resized(merged) }},
	)
	if err != nil {
		if undo := s.Unwind(ctx); undo != nil {
			m.log.Warn("a resize that failed is still on record; it is tried again when berth starts", "id", c.rec.ID, "error", undo)
		}
	}
	return err
}

func (c *container) setResizing(r *cri.LinuxContainerResources) error {
	return c.update(func(rec *containerRecord) { rec.Resizing.M = r })
}

// limit has the kernel hold the container to its resources, or changes nothing.
func (c *container) limit(r *cri.LinuxContainerResources, more *api.LinuxResources) error {
	limits, err := spec.Resources(r, c.m.hostNow())
	if err != nil {
		return err
	}
	if pids := more.GetPids(); pids != nil {
		limits.Pids = &specs.LinuxPids{Limit: &pids.Limit}
	}
	return cgroups.Update(cgroups.Path(c.rec.Cgroup), limits)
}

func (c *container) resized(r *cri.LinuxContainerResources) error {
	return c.update(func(rec *containerRecord) { rec.Resources.M, rec.Resizing.M = r, nil })
}

// finishResize finishes an update that was under way when the daemon ended. One that is refused leaves the limits as they
// were, as it would have done then.
func (c *container) finishResize() {
	rec := c.record()
	if rec.Resizing.M == nil {
		return
	}
	s := c.m.stack("Recover", rec.ID, nil)
	err := s.Run(context.Background(), step.Step{Name: "resize", Timeout: 10 * time.Second, Do: func(context.Context) error {
		err := failedPrecondition("it has exited")
		if rec.FinishedAt.IsZero() {
			err = c.limit(rec.Resizing.M, nil)
		}
		if err != nil {
			return errors.Join(err, c.setResizing(nil))
		}
		return c.resized(rec.Resizing.M)
	}})
	if err != nil {
		c.m.log.Warn("a resize that was under way could not be finished: the limits are as before", "id", rec.ID, "error", err)
	}
}

// UpdateSandboxResources takes note of what a pod as a whole may use; nil keeps. The cgroup that holds it to that is the
// kubelet's.
func (m *Manager) UpdateSandboxResources(ctx context.Context, id string, overhead, resources *cri.LinuxContainerResources) error {
	p, err := m.pod(id)
	if err != nil {
		return err
	}
	if err := p.lock.Lock(ctx); err != nil {
		return err
	}
	defer p.lock.Unlock()
	if v := p.view.Load(); !v.Ready {
		return failedPrecondition("pod sandbox %s is not ready (%s)", p.rec.ID, v.Reason)
	}
	s := m.stack("UpdatePodSandboxResources", p.rec.ID, nil)
	return p.updateTold(ctx, s, overhead, resources, func() error {
		return s.Run(ctx, step.Step{Name: "record", Timeout: 10 * time.Second, Do: func(context.Context) error {
			return p.update(func(r *podRecord) {
				if overhead != nil {
					r.Overhead.M = proto.CloneOf(overhead)
				}
				if resources != nil {
					r.Resources.M = proto.CloneOf(resources)
				}
			})
		}})
	})
}

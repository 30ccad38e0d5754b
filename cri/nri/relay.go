package nri

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
)

// Wishes are what plugins want of other containers in answer to an event.
type Wishes struct {
	Update []*api.ContainerUpdate
	Evict  []*api.ContainerEviction
}

// The calls below relay one event to every plugin, in the order of their indices. They belong between [Runtime.Enter] and
// its end, and are made only where it says that there are plugins.

// RunPodSandbox tells that a pod is about to be ready; an error keeps it from that.
func (r *Runtime) RunPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return r.relay(ctx, "RunPodSandbox", func(ctx context.Context) error {
		return r.library.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: pod})
	})
}

// UpdatePodSandbox tells that the resources of a pod are about to change; an error keeps them.
func (r *Runtime) UpdatePodSandbox(ctx context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	return r.relay(ctx, "UpdatePodSandbox", func(ctx context.Context) error {
		_, err := r.library.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{
			Pod: pod, OverheadLinuxResources: overhead, LinuxResources: resources,
		})
		return err
	})
}

// PostUpdatePodSandbox tells that they have changed.
func (r *Runtime) PostUpdatePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return r.relay(ctx, "PostUpdatePodSandbox", func(ctx context.Context) error {
		return r.library.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: pod})
	})
}

// StopPodSandbox tells that a pod is being stopped and none of its containers runs any more.
func (r *Runtime) StopPodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return r.relay(ctx, "StopPodSandbox", func(ctx context.Context) error {
		return r.library.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod})
	})
}

// RemovePodSandbox tells that a pod is being removed.
func (r *Runtime) RemovePodSandbox(ctx context.Context, pod *api.PodSandbox) error {
	return r.relay(ctx, "RemovePodSandbox", func(ctx context.Context) error {
		return r.library.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod})
	})
}

// CreateContainer tells that a container is about to be made and returns how plugins want it changed. What is returned has
// been checked, see validate.go.
func (r *Runtime) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (adjust *api.ContainerAdjustment, w Wishes, err error) {
	err = r.relay(ctx, "CreateContainer", func(ctx context.Context) error {
		ctx, evict := collectEvictions(ctx)
		before := c.Env
		resp, err := r.library.CreateContainer(ctx, &api.CreateContainerRequest{Pod: pod, Container: c})
		if err != nil {
			return err
		}
		adjust, w = resp.GetAdjust(), Wishes{resp.GetUpdate(), evict.list}
		adjust.Env = append(adjust.Env, gone(before, c.Env)...)
		return nil
	})
	return adjust, w, err
}

// gone are the variables that plugins have taken away. The library leaves them out of its answer, and takes them out of the
// container that it was given.
func gone(before, after []string) (list []*api.KeyValue) {
	names := map[string]bool{}
	for _, kv := range after {
		name, _, _ := strings.Cut(kv, "=")
		names[name] = true
	}
	for _, kv := range before {
		if name, _, _ := strings.Cut(kv, "="); !names[name] {
			list = append(list, &api.KeyValue{Key: api.MarkForRemoval(name)})
		}
	}
	return list
}

// PostCreateContainer tells that a container was made.
func (r *Runtime) PostCreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return r.relay(ctx, "PostCreateContainer", func(ctx context.Context) error {
		return r.library.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: pod, Container: c})
	})
}

// StartContainer tells that a container is about to be started; an error keeps it from that.
func (r *Runtime) StartContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return r.relay(ctx, "StartContainer", func(ctx context.Context) error {
		return r.library.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: c})
	})
}

// PostStartContainer tells that a container was started.
func (r *Runtime) PostStartContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return r.relay(ctx, "PostStartContainer", func(ctx context.Context) error {
		return r.library.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: c})
	})
}

// UpdateContainer tells that the resources of a container are about to change and returns what plugins make of them.
func (r *Runtime) UpdateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container, want *api.LinuxResources) (out *api.LinuxResources, w Wishes, err error) {
	err = r.relay(ctx, "UpdateContainer", func(ctx context.Context) error {
		ctx, evict := collectEvictions(ctx)
		resp, err := r.library.UpdateContainer(ctx, &api.UpdateContainerRequest{Pod: pod, Container: c, LinuxResources: want})
		if err != nil {
			return err
		}
		out, w.Evict = want, evict.list
		for _, u := range resp.GetUpdate() {
			switch {
			case u == nil:
			case u.ContainerId != c.Id:
				w.Update = append(w.Update, u)
			case u.GetLinux().GetResources() != nil:
				out = u.Linux.Resources
			}
		}
		return checkResources(out)
	})
	return out, w, err
}

// PostUpdateContainer tells that they have changed.
func (r *Runtime) PostUpdateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return r.relay(ctx, "PostUpdateContainer", func(ctx context.Context) error {
		return r.library.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: pod, Container: c})
	})
}

// StopContainer tells that a container has ended.
func (r *Runtime) StopContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (w Wishes, err error) {
	err = r.relay(ctx, "StopContainer", func(ctx context.Context) error {
		resp, err := r.library.StopContainer(ctx, &api.StopContainerRequest{Pod: pod, Container: c})
		w.Update = resp.GetUpdate()
		return err
	})
	return w, err
}

// RemoveContainer tells that a container is being removed.
func (r *Runtime) RemoveContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) error {
	return r.relay(ctx, "RemoveContainer", func(ctx context.Context) error {
		return r.library.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: c})
	})
}

// relay makes one call. Of what class an error of a plugin is was the plugin's choice: to a client of the CRI it is a
// precondition that does not hold, since NotFound and others would mean something to it.
func (r *Runtime) relay(ctx context.Context, event string, call func(context.Context) error) error {
	err := r.guard(event, func() error { return call(ctx) })
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", event, context.Cause(ctx))
	}
	return fmt.Errorf("%s: %v: %w", event, err, errdefs.ErrFailedPrecondition)
}

// Grant does what plugins want of other containers. What fails is told in the log: the event has happened.
func (r *Runtime) Grant(ctx context.Context, w Wishes) {
	r.apply(ctx, w.Update)
	if err := r.evict(w.Evict); err != nil {
		r.log.Warn("containers are not evicted as NRI plugins have asked", "error", err)
	}
}

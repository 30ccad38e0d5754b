package pods

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/nri"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/internal/step"
)

// nriTimeout is what all plugins together may take for one event. Each has a bound of its own, after which it is dropped.
const nriTimeout = time.Minute

// toldNRI is how much plugins of NRI know of a pod or a container, or would know if there were any: a plugin that comes is
// told all of which this says that it is known. It is not on record. With a daemon that dies the plugins lose their
// connection, and are told everything anew by the next one.
type toldNRI struct {
	mu    sync.Mutex // held while one event of several is being told, so that they come in order
	stage atomic.Int32
}

const (
	unknown int32 = iota // or gone
	known
	over // and they know that it has ended
)

// recall takes over what an earlier daemon has told.
func (t *toldNRI) recall(p phase, ended bool) {
	switch {
	case p == creating || p == removing:
	case ended:
		t.stage.Store(over)
	default:
		t.stage.Store(known)
	}
}

// tell has one event told to the plugins, if there are any. mark notes first that they know; no plugin comes between that
// and the event.
func (m *Manager) tell(ctx context.Context, s *step.Stack, name string, mark func(), event func(context.Context) error) error {
	leave, plugins := m.nri.Enter()
	defer leave()
	mark()
	if !plugins {
		return nil
	}
	return s.Run(ctx, step.Step{Name: name, Timeout: nriTimeout, Do: event})
}

// notify is tell for what has happened anyway: an error is told in the log, and a caller that gives up changes nothing.
func (m *Manager) notify(ctx context.Context, s *step.Stack, name string, mark func(), event func(context.Context) error) {
	if err := m.tell(context.WithoutCancel(ctx), s, name, mark, event); err != nil {
		m.log.Warn("an NRI plugin does not take an event", "call", s.Call, "id", s.Owner, "error", err)
	}
}

// api is the pod as plugins see it.
func (p *pod) api() *api.PodSandbox {
	rec := p.record()
	n := nri.Pod{
		ID: rec.ID, Config: rec.Config.M, Handler: rec.Handler, Cgroup: rec.Cgroup, PID: rec.ShimPID, Namespaces: map[string]string{},
	}
	if v := p.view.Load(); v != nil {
		n.Overhead, n.Resources = v.Overhead, v.Resources
	}
	for _, ip := range rec.IPs {
		n.IPs = append(n.IPs, ip.String())
	}
	for kind, file := range map[specs.LinuxNamespaceType]string{
		specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts", specs.PIDNamespace: "pid",
	} {
		if _, err := os.Stat(p.nsPath(file)); err == nil {
			n.Namespaces[string(kind)] = p.nsPath(file)
		}
	}
	return n.API()
}

// api is the container as plugins see it. The specification is read where it is not given, and may be gone.
func (c *container) api(s *specs.Spec) *api.Container {
	rec := c.record()
	v := c.view.Load()
	if s == nil {
		if data, err := os.ReadFile(c.dir("config.json")); err == nil {
			s = new(specs.Spec)
			if err := json.Unmarshal(data, s); err != nil {
				s = nil
			}
		}
	}
	n := nri.Container{
		ID: rec.ID, PodID: rec.SandboxID, Config: rec.Config.M, State: v.State, Spec: s, PID: v.PID,
		ImageName: rec.Config.M.GetImage().GetImage(), ImageRef: rec.ImageRef, ImageID: rec.ImageID,
		Created: rec.CreatedAt, Started: rec.StartedAt, Finished: rec.FinishedAt, ExitCode: rec.ExitCode,
		Reason: rec.Reason, Message: rec.Message, Cgroup: rec.Cgroup, Resources: rec.Resources.M,
	}
	if rec.Phase == creating && rec.FinishedAt.IsZero() {
		n.State = cri.ContainerState_CONTAINER_CREATED
	}
	return n.API()
}

// publishTold tells plugins that the pod is about to be ready, and makes it so: publish puts it where everybody sees it.
func (p *pod) publishTold(ctx context.Context, s *step.Stack, publish func() error) error {
	leave, plugins := p.m.nri.Enter()
	defer leave()
	p.told.stage.Store(known)
	if plugins {
		err := s.Run(ctx, step.Step{Name: "nri", Timeout: nriTimeout, Do: func(ctx context.Context) error {
			return p.m.nri.RunPodSandbox(ctx, p.api())
		}})
		if err != nil {
			return err
		}
	}
	return publish()
}

// tellStopped tells plugins, once, that none of the pod's containers runs any more and that it is about to be taken down.
func (p *pod) tellStopped(ctx context.Context, s *step.Stack) {
	p.told.mu.Lock()
	defer p.told.mu.Unlock()
	if p.told.stage.Load() != known {
		return
	}
	p.m.notify(ctx, s, "nri", func() { p.told.stage.Store(over) }, func(ctx context.Context) error {
		return p.m.nri.StopPodSandbox(ctx, p.api())
	})
}

// tellRemoved tells plugins, once, that the pod is about to be gone.
func (p *pod) tellRemoved(ctx context.Context, s *step.Stack) {
	p.tellStopped(ctx, s)
	p.told.mu.Lock()
	defer p.told.mu.Unlock()
	if p.told.stage.Load() == unknown {
		return
	}
	p.m.notify(ctx, s, "nri-gone", func() { p.told.stage.Store(unknown) }, func(ctx context.Context) error {
		return p.m.nri.RemovePodSandbox(ctx, p.api())
	})
}

// updateTold tells plugins that the pod's resources are about to change, has them changed, and tells them that they were.
func (p *pod) updateTold(ctx context.Context, s *step.Stack, overhead, resources *cri.LinuxContainerResources, change func() error) error {
	err := p.m.tell(ctx, s, "nri", func() {}, func(ctx context.Context) error {
		return p.m.nri.UpdatePodSandbox(ctx, p.api(), nri.Resources(overhead), nri.Resources(resources))
	})
	if err != nil {
		return err
	}
	if err := change(); err != nil {
		return err
	}
	p.m.notify(ctx, s, "nri-done", func() {}, func(ctx context.Context) error {
		return p.m.nri.PostUpdatePodSandbox(ctx, p.api())
	})
	return nil
}

// negotiate tells plugins that the container is about to be made, and changes its specification as they want it.
func (b *build) negotiate(ctx context.Context, s *step.Stack) error {
	return b.m.tell(ctx, s, "nri", func() { b.told.stage.Store(known) }, b.adjust)
}

func (b *build) adjust(ctx context.Context) error {
	adjustment, wishes, err := b.m.nri.CreateContainer(ctx, b.pod.api(), b.api(b.out.Spec))
	if err != nil {
		return err
	}
	s := b.out.Spec
	if err := b.m.nri.Adjust(s, adjustment, b.m.hostNow().SwapController); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if adj := s.Process.OOMScoreAdj; adj != nil {
		*adj = b.m.clampOOMScore(*adj)
	}
	if was := b.record().Cgroup; s.Linux.CgroupsPath != was && b.m.opts.Cgroups == cgroups.Systemd {
		return failedPrecondition("CgroupsPath: %q: systemd says where a container's cgroup is, which is %q", s.Linux.CgroupsPath, was)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.dir("config.json"), data, 0o600); err != nil {
		return err
	}
	b.process.Store(s.Process)
	// The status tells what holds, and a later change starts from that.
	limits := spec.MergeResources(b.record().Resources.M, nri.CRIResources(adjustment.GetLinux().GetResources()))
	if err := b.addGroupsOf(adjustment.GetCDIDevices()); err != nil {
		return err
	}
	err = b.update(func(r *containerRecord) {
		r.Cgroup, r.Resources.M, r.User.M = s.Linux.CgroupsPath, limits, b.out.User
	})
	if err != nil {
		return err
	}
	b.m.nri.Grant(ctx, wishes) // now that nothing of its own is refused any more, others make room for it
	return nil
}

// addGroupsOf adds the groups that CDI devices bring to those that the status tells.
func (b *build) addGroupsOf(devices []*api.CDIDevice) error {
	if len(devices) == 0 {
		return nil
	}
	var names []string
	for _, d := range devices {
		names = append(names, d.GetName())
	}
	edits, err := b.m.opts.CDI.Resolve(names)
	if err != nil {
		return err
	}
	b.out.AddGroups(edits.Groups())
	return nil
}

// injectCDI adds CDI devices that plugins ask for.
func (m *Manager) injectCDI(s *specs.Spec, names []string) error {
	edits, err := m.opts.CDI.Resolve(names)
	if err != nil {
		return err
	}
	return edits.Apply(s)
}

// tellCreated tells plugins that the container was made.
func (c *container) tellCreated(ctx context.Context, s *step.Stack) {
	c.m.notify(ctx, s, "nri-done", func() {}, func(ctx context.Context) error {
		return c.m.nri.PostCreateContainer(ctx, c.pod.api(), c.api(nil))
	})
}

// startTold tells plugins that the container is about to be started, has it started, and tells them that it was. They
// are told its end after that, however fast it comes.
func (c *container) startTold(ctx context.Context, s *step.Stack, start func() error) error {
	c.told.mu.Lock()
	defer c.told.mu.Unlock()
	err := c.m.tell(ctx, s, "nri", func() {}, func(ctx context.Context) error {
		return c.m.nri.StartContainer(ctx, c.pod.api(), c.api(nil))
	})
	if err != nil {
		return err
	}
	if err := start(); err != nil {
		return err
	}
	c.m.notify(ctx, s, "nri-done", func() {}, func(ctx context.Context) error {
		return c.m.nri.PostStartContainer(ctx, c.pod.api(), c.api(nil))
	})
	return nil
}

// endsByItself has plugins told of an end that nobody has asked for, without letting whoever saw it wait.
func (c *container) endsByItself() {
	if c.m.nri == nil || c.told.stage.Load() != known {
		return
	}
	c.m.watchers.Go(func() {
		c.tellEnded(context.Background(), c.m.stack("Exit", c.rec.ID, nil))
	})
}

// tellEnded tells plugins, once, that the container has ended, and does what they want of others then.
func (c *container) tellEnded(ctx context.Context, s *step.Stack) {
	c.told.mu.Lock()
	defer c.told.mu.Unlock()
	if c.told.stage.Load() != known {
		return
	}
	c.m.notify(ctx, s, "nri", func() { c.told.stage.Store(over) }, func(ctx context.Context) error {
		wishes, err := c.m.nri.StopContainer(ctx, c.pod.api(), c.api(nil))
		c.m.nri.Grant(ctx, wishes)
		return err
	})
}

// tellRemoved tells plugins, once, that the container is about to be gone.
func (c *container) tellRemoved(ctx context.Context, s *step.Stack) {
	c.tellEnded(ctx, s)
	c.told.mu.Lock()
	defer c.told.mu.Unlock()
	if c.told.stage.Load() == unknown {
		return
	}
	c.m.notify(ctx, s, "nri-gone", func() { c.told.stage.Store(unknown) }, func(ctx context.Context) error {
		return c.m.nri.RemoveContainer(ctx, c.pod.api(), c.api(nil))
	})
}

// updateTold has plugins look at a change of the container's resources, has it made as they want it, and tells them that
// it was. change takes what of it the CRI has fields for, and all of it.
func (c *container) updateTold(ctx context.Context, s *step.Stack, want *cri.LinuxContainerResources, change func(*cri.LinuxContainerResources, *api.LinuxResources) error) error {
	var all *api.LinuxResources
	err := c.m.tell(ctx, s, "nri", func() {}, func(ctx context.Context) error {
		out, wishes, err := c.m.nri.UpdateContainer(ctx, c.pod.api(), c.api(nil), nri.Resources(want))
		if err != nil {
			return err
		}
		c.m.nri.Grant(ctx, wishes)
		score := want.GetOomScoreAdj() // NRI has no field for it here
		want, all = nri.CRIResources(out), out
		want.OomScoreAdj = score
		return nil
	})
	if err != nil {
		return err
	}
	if err := change(want, all); err != nil {
		return err
	}
	c.m.notify(ctx, s, "nri-done", func() {}, func(ctx context.Context) error {
		return c.m.nri.PostUpdateContainer(ctx, c.pod.api(), c.api(nil))
	})
	return nil
}

// nriState is the manager as the interface to plugins uses it.
type nriState struct{ m *Manager }

// Known implements nri.State.
func (n nriState) Known() (pods []*api.PodSandbox, containers []*api.Container) {
	n.m.mu.RLock()
	var ps []*pod
	for _, p := range n.m.pods {
		ps = append(ps, p)
	}
	cs := map[string]*container{}
	for id, c := range n.m.making {
		cs[id] = c
	}
	for id, c := range n.m.containers {
		cs[id] = c
	}
	n.m.mu.RUnlock()
	for _, p := range ps {
		if p.told.stage.Load() != unknown {
			pods = append(pods, p.api())
		}
	}
	for _, c := range cs {
		if c.told.stage.Load() != unknown {
			containers = append(containers, c.api(nil))
		}
	}
	return pods, containers
}

// Update implements nri.State.
func (n nriState) Update(ctx context.Context, id string, r *api.LinuxResources) error {
	c, err := n.m.container(id)
	if err != nil {
		return err
	}
	return c.resize(ctx, n.m.stack("NRIUpdate", c.rec.ID, nil), nri.CRIResources(r), r)
}

// Evict implements nri.State: the container is killed, and its status says why.
func (n nriState) Evict(ctx context.Context, id, reason string) error {
	c, err := n.m.container(id)
	if err != nil {
		return err
	}
	n.m.log.Info("an NRI plugin evicts a container", "id", c.rec.ID, "reason", reason)
	why := "evicted by a plugin of NRI"
	if reason != "" {
		why += ": " + reason
	}
	err = c.update(func(r *containerRecord) {
		if r.FinishedAt.IsZero() {
			r.Message = why
		}
	})
	return errors.Join(err, n.m.StopContainer(ctx, c.rec.ID, 0))
}

package pods

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/internal/step"
)

// pod is a pod sandbox. lock serialises the calls on it and its containers; mu guards rec, which exits change, too.
type pod struct {
	m    *Manager
	lock lock
	view atomic.Pointer[Sandbox]

	mu    sync.Mutex
	rec   podRecord
	gone  bool // forgotten: a call that comes late keeps no record of it
	watch *shim.Watch

	unheard atomic.Bool // whoever made it may not know; see again.go
	life    lifeline    // what is told of it
	told    toldNRI     // to plugins of NRI

	again retry // of what could not be released

	sessions int           // execs and attached clients
	shimGone chan struct{} // closed when the watch has ended, after what follows from it is done
}

func (m *Manager) newPod(rec podRecord) *pod {
	p := &pod{m: m, lock: newLock(), rec: rec}
	p.life.tell = func(types ...cri.ContainerEventType) { m.announce(p, rec.ID, types...) }
	p.told.recall(rec.Phase, rec.Phase == stopped)
	p.publish()
	return p
}

// update changes the record, keeps it, and publishes it.
func (p *pod) update(change func(*podRecord)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.rec)
	p.publish()
	if p.gone {
		return nil
	}
	return p.m.podFiles.save(p.rec.ID, &p.rec)
}

// forget removes the record, for good.
func (p *pod) forget() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	p.m.levels.free(p.rec.ID)
	return p.m.podFiles.remove(p.rec.ID)
}

func (p *pod) saveSteps(begun []string) error {
	return p.update(func(r *podRecord) { r.Steps = begun })
}

// publish hands out the record as it is. The caller holds mu, or is alone.
func (p *pod) publish() {
	r := &p.rec
	s := &Sandbox{
		ID: r.ID, Config: r.Config.M, Handler: r.Handler, Ready: r.Phase == ready, CreatedAt: r.CreatedAt,
		IPs: r.IPs, ShimPID: r.ShimPID, CgroupPath: cgroups.Path(r.Cgroup), Reason: r.Reason, Overhead: r.Overhead.M, Resources: r.Resources.M,
		Waiting: p.again.waiting,
	}
	if s.Overhead == nil {
		s.Overhead = r.Config.M.GetLinux().GetOverhead()
	}
	if s.Resources == nil {
		s.Resources = r.Config.M.GetLinux().GetResources()
	}
	if !spec.HostNetwork(r.Config.M) {
		s.NetNS = p.nsPath("net")
	}
	p.view.Store(s)
}

func (p *pod) record() podRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec
}

func (p *pod) config() *cri.PodSandboxConfig { return p.rec.Config.M } // never changes

func (p *pod) shim() shim.Client { return shim.Client{Socket: p.dir(shim.SocketName)} }

func (p *pod) name() string { return podName(p.config()) }

func podName(cfg *cri.PodSandboxConfig) string {
	md := cfg.GetMetadata()
	return fmt.Sprintf("%s_%s_%s_%d", md.GetName(), md.GetNamespace(), md.GetUid(), md.GetAttempt())
}

// RunSandbox makes a pod sandbox and returns its id. It is ready when RunSandbox returns; on an error nothing is left
// of it, or what could not be undone is listed as not ready, under no name, for StopSandbox to try again.
func (m *Manager) RunSandbox(ctx context.Context, cfg *cri.PodSandboxConfig, handler string) (string, error) {
	if handler != "" {
		return "", fmt.Errorf("runtime_handler %q: no such handler on this node: %w", handler, errdefs.ErrInvalidArgument)
	}
	if cfg.GetMetadata() == nil {
		return "", fmt.Errorf("config.metadata is missing: %w", errdefs.ErrInvalidArgument)
	}
	if err := m.checkUserns(cfg); err != nil {
		return "", err
	}
	name := podName(cfg)
	c, id, err := m.claim(ctx, name)
	if errdefs.IsAlreadyExists(err) {
		if again := m.sandboxAgain(name, cfg); again != "" {
			return again, nil
		}
	}
	if err != nil || id != "" {
		return id, err
	}
	p, err := m.runSandbox(ctx, cfg, handler)
	if err == nil {
		id = p.rec.ID
		p.unheard.Store(mayBeUnheard(ctx))
	}
	m.settle(name, c, id, err)
	return id, err
}

func (m *Manager) runSandbox(ctx context.Context, cfg *cri.PodSandboxConfig, handler string) (*pod, error) {
	id := newID()
	cgroup, err := m.opts.Cgroups.Join(cfg.GetLinux().GetCgroupParent(), id)
	if err != nil {
		return nil, fmt.Errorf("config.linux.cgroup_parent: %w", err)
	}
	labels, err := m.labelPod(id, cfg)
	if err != nil {
		return nil, err
	}
	p := m.newPod(podRecord{
		ID: id, Boot: m.boot, Phase: creating, Handler: handler, CreatedAt: m.createdNow(cfg.GetMetadata().GetUid()),
		Cgroup: string(cgroup), SELinux: labels, Config: message[*cri.PodSandboxConfig]{M: cfg},
	})
	m.mu.Lock()
	m.makingPods[id] = p
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.makingPods, id)
		m.mu.Unlock()
	}()
	if err := p.claimPorts(); err != nil {
		m.levels.free(id)
		return nil, err
	}
	s := m.stack("RunPodSandbox", id, p.saveSteps)
	err = s.Run(ctx, p.steps("dirs", "namespaces", "files", "cgroup")...)
	if err == nil {
		err = s.RunAll(ctx, p.steps("shim", "network")...)
	}
	if err == nil && spec.SharedPID(cfg) {
		err = s.Run(ctx, p.steps("pid-namespace")...)
	}
	if err == nil {
		err = p.publishTold(ctx, s, func() error {
			err := s.Run(ctx, step.Step{Name: "record", Do: func(context.Context) error {
				return p.update(func(r *podRecord) { r.Phase = ready })
			}})
			if err != nil {
				return err
			}
			m.mu.Lock()
			m.pods[id] = p
			m.mu.Unlock()
			return nil
		})
	}
	if err == nil {
		m.watchers.Go(cgroups.ExpectMove) // its first container comes now
		p.life.isCreated()
		p.life.isStarted(true)
		m.log.Debug("pod sandbox is ready", "pod", name(cfg), "id", id, "addresses", p.rec.IPs)
		return p, nil
	}
	p.unwatch()
	p.tellStopped(ctx, s)
	undo := s.Unwind(ctx)
	p.freePorts()
	if undo != nil {
		_ = p.update(func(r *podRecord) {
			r.Phase, r.Reason = stopped, "could not be set up, nor all of it undone: "+undo.Error()
		})
		m.mu.Lock()
		m.pods[id] = p
		m.mu.Unlock()
		m.log.Warn("pod sandbox failed and is not all undone", "pod", name(cfg), "id", id, "error", undo)
		p.tryAgain(undo)
		return nil, err
	}
	p.tellRemoved(ctx, s)
	return nil, errors.Join(err, p.forget())
}

// name is what a person calls the pod.
func name(cfg *cri.PodSandboxConfig) string {
	return cfg.GetMetadata().GetNamespace() + "/" + cfg.GetMetadata().GetName()
}

// StopSandbox kills the pod's containers, and releases its network, namespaces and shim. It can be called again.
// An unknown pod is stopped.
func (m *Manager) StopSandbox(ctx context.Context, id string) error {
	p, err := m.pod(id)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.lock.Lock(ctx); err != nil {
		return err
	}
	defer p.lock.Unlock()
	return p.stop(ctx, "StopPodSandbox", "stopped")
}

// stop does the work of StopSandbox, of the removal and of the recovery. What cannot be released is tried again in the
// background. The caller holds the lock.
func (p *pod) stop(ctx context.Context, call, reason string) error {
	err := p.stopOnce(ctx, call, reason)
	if err != nil {
		p.tryAgain(err)
	} else {
		p.released()
	}
	return err
}

func (p *pod) stopOnce(ctx context.Context, call, reason string) error {
	m := p.m
	rec := p.record()
	s := m.stack(call, rec.ID, p.saveSteps)
	if rec.Phase == ready {
		err := s.Run(ctx, step.Step{Name: "record", Do: func(context.Context) error {
			return p.update(func(r *podRecord) { r.Phase, r.Reason = stopped, reason })
		}})
		if err != nil {
			return err
		}
	}
	err := s.Run(ctx, step.Step{Name: "containers", Do: func(ctx context.Context) error {
		var wg sync.WaitGroup
		list := m.containersOf(rec.ID)
		errs := make([]error, len(list))
		for i, c := range list {
			wg.Go(func() {
				if errs[i] = c.kill(ctx); errs[i] == nil {
					c.tellEnded(ctx, s)
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	}})
	p.life.hasEnded() // after its containers, whatever has become of them
	if err != nil {
		return err
	}
	p.tellStopped(ctx, s)
	for _, c := range m.containersOf(rec.ID) {
		if err := c.leaveSandbox(ctx, call); err != nil {
			return err
		}
	}
	s.Resume(p.steps(rec.Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		return err
	}
	return p.update(func(r *podRecord) { r.ShimPID, r.PausePID = 0, 0 })
}

// RemoveSandbox stops the pod and removes it with its containers. An unknown pod is removed.
func (m *Manager) RemoveSandbox(ctx context.Context, id string) error {
	p, err := m.pod(id)
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := p.lock.Lock(ctx); err != nil {
		return err
	}
	defer p.lock.Unlock()
	return p.remove(ctx)
}

func (p *pod) remove(ctx context.Context) error {
	m := p.m
	rec := p.record()
	s := m.stack("RemovePodSandbox", rec.ID, nil)
	err := s.Run(ctx, step.Step{Name: "record", Do: func(context.Context) error {
		return p.update(func(r *podRecord) {
			if r.Phase == ready {
				r.Reason = "removed"
			}
			r.Phase = removing
		})
	}})
	if err != nil {
		return err
	}
	if err := p.stop(ctx, "RemovePodSandbox", "removed"); err != nil {
		return err
	}
	for _, c := range m.containersOf(rec.ID) {
		if err := c.remove(ctx); err != nil {
			return err
		}
	}
	p.tellRemoved(ctx, s)
	err = s.Run(ctx, step.Step{Name: "forget", Do: func(context.Context) error { return p.forget() }})
	if err != nil {
		return err
	}
	p.freePorts()
	m.mu.Lock()
	delete(m.pods, rec.ID)
	m.mu.Unlock()
	m.freeName(p.name(), rec.ID)
	p.life.isDeleted()
	return nil
}

func (m *Manager) containersOf(podID string) []*container {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var list []*container
	for _, c := range m.containers {
		if c.rec.SandboxID == podID {
			list = append(list, c)
		}
	}
	return list
}

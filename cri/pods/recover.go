package pods

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/network"
)

// recoverAtOnce bounds how many pods are recovered at the same time.
const recoverAtOnce = 16

var errDamaged = errors.New("its record is damaged")

// recover makes of the records what they say, or undoes it: after a daemon that was killed or upgraded, after shims that
// have died meanwhile, and after a reboot.
func (m *Manager) recover(ctx context.Context) error {
	start := time.Now()
	var found []*pod
	damaged, err := m.podFiles.load(m.log, func(id string, data []byte) error {
		rec, err := decodePod(id, data)
		if err != nil {
			return err
		}
		p := m.newPod(*rec)
		p.unheard.Store(true)
		// One that was being stopped may not have been told: better twice, to readers that have to subscribe anew.
		p.life.known(rec.Phase != creating, (rec.Phase == stopped || rec.Phase == removing) && len(rec.Steps) == 0)
		found = append(found, p)
		return nil
	})
	if err != nil {
		return err
	}
	byID := map[string]*pod{}
	for _, p := range found {
		byID[p.rec.ID] = p
		m.pods[p.rec.ID] = p
		m.levels.keep(p.rec.ID, p.rec.SELinux.Level())
		if slices.Contains(p.rec.Steps, "namespaces") {
			m.userns.keep(p.rec.ID, p.config())
		}
		if p.rec.Phase == ready {
			m.own(p.name(), p.rec.ID)
		}
	}
	members := map[string][]*container{}
	var orphans []*container
	_, err = m.ctrFiles.load(m.log, func(id string, data []byte) error {
		rec, err := decodeContainer(id, data)
		if err != nil {
			return err
		}
		p := byID[rec.SandboxID]
		c := m.newContainer(p, *rec)
		c.unheard.Store(true)
		c.life.known(rec.Phase != creating, !rec.FinishedAt.IsZero())
		switch {
		case p == nil:
			orphans = append(orphans, c)
			return nil
		case rec.Phase == creating || rec.Phase == removing:
			// Undone below. Nobody has the id, or wants it, and its name is free for the call that comes again.
			m.making[id] = c
		default:
			m.containers[id] = c
			m.own(containerName(rec.SandboxID, rec.Config.M), id)
		}
		m.levels.keep(id, c.labels().Level())
		members[rec.SandboxID] = append(members[rec.SandboxID], c)
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range orphans {
		// Its pod's record is damaged. A stand-in without a shim serves to undo what is left.
		c.pod = m.newPod(podRecord{ID: c.rec.SandboxID, Phase: stopped})
		if err := m.undoContainer(ctx, c); err != nil {
			m.log.Warn("container without a pod cannot be undone", "id", c.rec.ID, "error", err)
		}
	}
	m.adoptPorts(found)
	m.sweep(ctx)
	for _, id := range damaged {
		// Plugins go by the id, and know its addresses where no result is left that would.
		if err := m.opts.Network.Owe(network.Pod{ID: id}, errDamaged); err != nil {
			m.log.Warn("the network of a pod whose record is damaged is not released", "id", id, "error", err)
		}
	}
	// What can be seen at once is seen before the first call is answered. What takes time, undoing and tearing down,
	// goes on in the background, each under its pod's lock: five hundred stale pods do not keep a node down.
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoverAtOnce)
	for _, p := range found {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			m.recoverPod(p, members[p.rec.ID], slots)
		})
	}
	wg.Wait()
	if left := leftExecs(slices.Collect(maps.Values(m.containers)), ""); len(left) > 0 { // before this daemon has an exec server
		m.watchers.Go(func() {
			for _, dir := range left {
				m.endExec(dir)
			}
		})
	}
	if len(found) > 0 {
		m.log.Info("pods are recovered", "pods", len(found), "took", time.Since(start).Round(time.Millisecond))
	}
	return nil
}

// later finishes a pod in the background. Its lock is taken before the first call can.
func (m *Manager) later(p *pod, slots chan struct{}, finish func(context.Context) error) {
	_ = p.lock.Lock(context.Background()) // nobody else has it yet
	m.watchers.Go(func() {
		defer p.lock.Unlock()
		slots <- struct{}{}
		defer func() { <-slots }()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		if err := finish(ctx); err != nil {
			m.log.Warn("pod is not all recovered", "pod", name(p.config()), "id", p.rec.ID, "error", err)
		}
	})
}

func (m *Manager) recoverPod(p *pod, members []*container, slots chan struct{}) {
	rec := p.record()
	reason, lost, why := rec.Reason, reasonShim, "its pod was being stopped, and its shim ended while the daemon was not there"
	switch {
	case rec.Phase == creating:
		// Nobody has its id: undo it.
		m.mu.Lock()
		delete(m.pods, rec.ID)
		m.mu.Unlock()
		m.later(p, slots, func(ctx context.Context) error { return m.undoPod(ctx, p) })
		return
	case rec.Boot != m.boot:
		reason, lost, why = "the node was restarted", reasonReboot, "the node was restarted while it ran"
	case rec.Phase == ready:
		states, err := p.startWatch()
		if err == nil {
			m.recoverContainers(p, members, states, slots)
			return
		}
		m.log.Warn("the shim of a pod has gone; its containers are killed and the pod is not ready", "pod", name(p.config()), "id", rec.ID, "error", err)
		reason, lost, why = "its shim has ended", reasonShim, "its shim ended while the daemon was not there"
	}
	if rec.Phase != removing {
		_ = p.update(func(r *podRecord) { r.Phase, r.Reason = stopped, reason })
	}
	m.later(p, slots, func(ctx context.Context) error {
		// The shim of a pod that was being stopped may live, and knows the exits; what still runs is killed through it.
		shimLives := rec.Boot == m.boot && rec.Phase != ready && p.resumeWatch()
		for _, c := range members {
			phase := c.record().Phase
			if !shimLives || phase == creating || phase == removing {
				if err := cgroups.Kill(cgroups.Path(c.rec.Cgroup)); err != nil {
					return err
				}
			}
			if phase == creating || phase == removing {
				if err := m.undoContainer(ctx, c); err != nil {
					return err
				}
				continue
			}
			if !shimLives {
				c.lost(lost, why)
			}
		}
		if rec.Phase == removing {
			return p.remove(ctx)
		}
		return p.stop(ctx, "Recover", reason)
	})
}

// resumeWatch watches the shim of a pod that is not ready any more, if it still is there.
func (p *pod) resumeWatch() bool {
	states, err := p.startWatch()
	if err != nil {
		return false
	}
	for _, s := range states {
		p.m.observeState(p, s)
	}
	return true
}

// recoverContainers compares the records of a pod's containers with what its shim says of them.
func (m *Manager) recoverContainers(p *pod, members []*container, states []shim.State, slots chan struct{}) {
	told := map[string]shim.State{}
	for _, s := range states {
		told[s.ID] = s
	}
	var undo []*container
	for _, c := range members {
		rec := c.record()
		s, known := told[c.rec.ID]
		switch {
		case rec.Phase == creating || rec.Phase == removing:
			undo = append(undo, c)
		case !rec.FinishedAt.IsZero():
		case !known:
			c.lost(reasonLost, "its shim does not know it")
		case s.Status == shim.Exited:
			c.exit(s)
		case s.Status == shim.Created && rec.Phase == starting:
			// The call that was to start it had not come to the shim. Whoever made it tries again.
			_ = c.update(func(r *containerRecord) { r.Phase, r.StartedAt = ready, time.Time{} })
		}
		c.finishResize()
		delete(told, rec.ID)
	}
	for id := range told { // their records are damaged: another of the same name is made, and must not run beside it
		cgroup, err := m.opts.Cgroups.Join(p.config().GetLinux().GetCgroupParent(), id)
		if err != nil {
			continue
		}
		m.log.Warn("a container without a record is ended", "id", id, "pod", name(p.config()))
		undo = append(undo, m.newContainer(p, containerRecord{
			ID: id, SandboxID: p.rec.ID, Boot: m.boot, Phase: removing, Cgroup: string(cgroup), Steps: []string{"create"},
			Config: message[*cri.ContainerConfig]{M: &cri.ContainerConfig{}},
		}))
	}
	if len(undo) == 0 {
		return
	}
	m.later(p, slots, func(ctx context.Context) error {
		var errs []error
		for _, c := range undo {
			errs = append(errs, m.undoContainer(ctx, c))
		}
		return errors.Join(errs...)
	})
}

func (m *Manager) undoContainer(ctx context.Context, c *container) error {
	rec := c.record()
	s := m.stack("Recover", rec.ID, c.saveSteps)
	s.Resume(c.steps(nil, rec.Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		c.lost(reasonLost, "could not be undone: "+err.Error())
		m.mu.Lock()
		m.containers[rec.ID] = c // listed, so that it is removed again
		delete(m.making, rec.ID)
		m.mu.Unlock()
		return err
	}
	if err := c.forget(); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.containers, rec.ID)
	delete(m.making, rec.ID)
	m.mu.Unlock()
	m.freeName(containerName(rec.SandboxID, rec.Config.M), rec.ID)
	c.life.isDeleted()
	return nil
}

func (m *Manager) undoPod(ctx context.Context, p *pod) error {
	rec := p.record()
	s := m.stack("Recover", rec.ID, p.saveSteps)
	s.Resume(p.steps(rec.Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		m.mu.Lock()
		m.pods[rec.ID] = p // listed, so that it is stopped again
		m.mu.Unlock()
		p.tryAgain(err)
		return errors.Join(err, p.update(func(r *podRecord) {
			r.Phase, r.Reason = stopped, "could not be set up, nor all of it undone: "+err.Error()
		}))
	}
	p.freePorts()
	return p.forget()
}

// sweep releases what no record names: the remains of a damaged record. It runs before anything new can be made.
func (m *Manager) sweep(ctx context.Context) {
	known := func(id string) bool { return m.containers[id] != nil || m.making[id] != nil }
	for _, key := range m.opts.Images.Keys() {
		if !known(key) {
			_ = m.opts.Images.Unmount(m.runDir("containers", key, "rootfs"))
			if err := m.opts.Images.Release(key); err != nil {
				m.log.Warn("root file system without a container cannot be released", "id", key, "error", err)
			}
		}
	}
	live := make([]string, 0, len(m.pods))
	for id := range m.pods {
		live = append(live, id)
	}
	gc, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := m.opts.Network.GC(gc, live); err != nil {
		m.log.Warn("network of pods that are gone is not all released", "error", err)
	}
	m.endStrays(ctx)
	sweepDir(m.runDir("pods"), func(id string) bool { return m.pods[id] != nil })
	sweepDir(m.runDir("containers"), known)
	sweepDir(m.stateRoot(), known)
}

// endStrays ends the shims of pods whose records are damaged, with what they still run: nobody else ever would.
func (m *Manager) endStrays(ctx context.Context) {
	entries, err := os.ReadDir(m.runDir("pods"))
	if err != nil {
		return
	}
	for _, e := range entries {
		if m.pods[e.Name()] != nil {
			continue
		}
		c := shim.Client{Socket: m.runDir("pods", e.Name(), shim.SocketName)}
		w, states, err := c.Watch()
		if err != nil {
			continue // it has none
		}
		w.Close()
		sctx, cancel := context.WithTimeout(ctx, shimAnswers)
		for _, s := range states {
			_ = c.KillAll(sctx, s.ID)
		}
		var answer *shim.Error
		for err = c.Shutdown(sctx); errors.As(err, &answer) && sctx.Err() == nil; err = c.Shutdown(sctx) {
			time.Sleep(2 * time.Millisecond) // until the exits are told
		}
		cancel()
		m.log.Warn("a pod without a record is ended", "id", e.Name(), "containers", len(states), "error", err)
	}
}

func sweepDir(dir string, keep func(id string) bool) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if keep(e.Name()) {
			continue
		}
		path := dir + "/" + e.Name()
		for _, sub := range []string{"/ns/net", "/ns/ipc", "/ns/uts", "/ns/pid", "/ns/user", "/shm", "/rootfs"} {
			_ = unix.Unmount(path+sub, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		_ = os.RemoveAll(path)
	}
}

package pods

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/shim"
)

// recoverAtOnce bounds how many pods are recovered at the same time.
const recoverAtOnce = 16

// recover makes of the records what they say, or undoes it: after a daemon that was killed or upgraded, after shims that
// have died meanwhile, and after a reboot.
func (m *Manager) recover(ctx context.Context) error {
	start := time.Now()
	var found []*pod
	err := m.podFiles.load(m.log, func(id string, data []byte) error {
		rec, err := decodePod(id, data)
		if err != nil {
			return err
		}
		found = append(found, m.newPod(*rec))
		return nil
	})
	if err != nil {
		return err
	}
	byID := map[string]*pod{}
	for _, p := range found {
		byID[p.rec.ID] = p
		m.pods[p.rec.ID] = p
		if p.rec.Phase == ready {
			m.own(p.name(), p.rec.ID)
		}
	}
	members := map[string][]*container{}
	var orphans []*container
	err = m.ctrFiles.load(m.log, func(id string, data []byte) error {
		rec, err := decodeContainer(id, data)
		if err != nil {
			return err
		}
		p := byID[rec.SandboxID]
		c := m.newContainer(p, *rec)
		m.containers[id] = c
		if p == nil {
			orphans = append(orphans, c)
			return nil
		}
		m.own(containerName(rec.SandboxID, rec.Config.M), id)
		members[rec.SandboxID] = append(members[rec.SandboxID], c)
		return nil
	})
	if err != nil {
		return err
	}
	for _, c := range orphans {
		// Its pod's record is damaged. A stand-in without a shim serves to undo what is left.
		c.pod = m.newPod(podRecord{Version: recordVersion, ID: c.rec.SandboxID, Phase: stopped})
		if err := m.undoContainer(ctx, c); err != nil {
			m.log.Warn("container without a pod cannot be undone", "id", c.rec.ID, "error", err)
		}
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoverAtOnce)
	for _, p := range found {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			if err := m.recoverPod(ctx, p, members[p.rec.ID]); err != nil {
				m.log.Warn("pod is not all recovered; it is tried again when it is stopped", "pod", name(p.config()), "id", p.rec.ID, "error", err)
			}
		})
	}
	wg.Wait()
	m.sweep(ctx)
	if len(found) > 0 {
		m.log.Info("pods are recovered", "pods", len(m.pods), "containers", len(m.containers), "took", time.Since(start).Round(time.Millisecond))
	}
	return nil
}

func (m *Manager) recoverPod(ctx context.Context, p *pod, members []*container) error {
	rec := p.record()
	switch {
	case rec.Phase == creating:
		// Nobody has its id: undo it.
		for _, c := range members {
			if err := m.undoContainer(ctx, c); err != nil {
				return err
			}
		}
		return m.undoPod(ctx, p)
	case rec.Boot != m.boot:
		for _, c := range members {
			c.lost(reasonReboot, "the node was restarted while it ran")
		}
		return m.recoverStopped(ctx, p, members, "the node was restarted")
	case rec.Phase == removing:
		for _, c := range members {
			c.lost(reasonLost, "")
		}
		return p.remove(ctx)
	case rec.Phase == stopped:
		return m.recoverStopped(ctx, p, members, rec.Reason)
	}
	states, err := p.startWatch()
	if err != nil {
		m.log.Warn("the shim of a pod has gone; its containers are killed and the pod is not ready", "pod", name(p.config()), "id", rec.ID, "error", err)
		for _, c := range members {
			_ = cgroups.Kill(cgroups.Path(c.rec.Cgroup))
			c.lost(reasonShim, "its shim ended while the daemon was not there")
		}
		return m.recoverStopped(ctx, p, members, "its shim has ended")
	}
	told := map[string]shim.State{}
	for _, s := range states {
		told[s.ID] = s
	}
	var errs []error
	for _, c := range members {
		s, known := told[c.rec.ID]
		delete(told, c.rec.ID)
		errs = append(errs, m.recoverContainer(ctx, c, s, known))
	}
	return errors.Join(errs...)
}

// recoverStopped finishes what stops a pod.
func (m *Manager) recoverStopped(ctx context.Context, p *pod, members []*container, reason string) error {
	err := p.update(func(r *podRecord) { r.Phase, r.Reason = stopped, reason })
	if err != nil {
		return err
	}
	for _, c := range members {
		switch c.record().Phase {
		case creating, removing:
			if err := m.undoContainer(ctx, c); err != nil {
				return err
			}
		default:
			_ = cgroups.Kill(cgroups.Path(c.rec.Cgroup))
			c.lost(reasonShim, "its pod was stopped while the daemon was not there")
		}
	}
	return p.stop(ctx, "Recover", reason)
}

// recoverContainer compares the record of a container with what the shim says of it.
func (m *Manager) recoverContainer(ctx context.Context, c *container, s shim.State, known bool) error {
	rec := c.record()
	if rec.Phase == creating || rec.Phase == removing {
		return m.undoContainer(ctx, c)
	}
	if !rec.FinishedAt.IsZero() {
		return nil
	}
	switch {
	case !known:
		c.lost(reasonLost, "its shim does not know it")
	case s.Status == shim.Exited:
		c.exit(s)
	case s.Status == shim.Created && rec.Phase == starting:
		// The call that was to start it had not come to the shim. Whoever made it tries again.
		return c.update(func(r *containerRecord) { r.Phase, r.StartedAt = ready, time.Time{} })
	}
	return nil
}

func (m *Manager) undoContainer(ctx context.Context, c *container) error {
	rec := c.record()
	s := m.stack("Recover", rec.ID, c.saveSteps)
	s.Resume(c.steps(nil, rec.Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		c.lost(reasonLost, "could not be undone: "+err.Error())
		return err
	}
	if err := m.ctrFiles.remove(rec.ID); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.containers, rec.ID)
	m.mu.Unlock()
	m.freeName(containerName(rec.SandboxID, rec.Config.M), rec.ID)
	return nil
}

func (m *Manager) undoPod(ctx context.Context, p *pod) error {
	rec := p.record()
	s := m.stack("Recover", rec.ID, p.saveSteps)
	s.Resume(p.steps(rec.Steps...)...)
	if err := s.Unwind(ctx); err != nil {
		return errors.Join(err, p.update(func(r *podRecord) {
			r.Phase, r.Reason = stopped, "could not be set up, nor all of it undone: "+err.Error()
		}))
	}
	if err := m.podFiles.remove(rec.ID); err != nil {
		return err
	}
	m.mu.Lock()
	delete(m.pods, rec.ID)
	m.mu.Unlock()
	return nil
}

// sweep releases what no record names: the remains of a damaged record.
func (m *Manager) sweep(ctx context.Context) {
	for _, key := range m.opts.Images.Keys() {
		if m.containers[key] == nil {
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
	sweepDir(m.runDir("pods"), func(id string) bool { return m.pods[id] != nil })
	sweepDir(m.runDir("containers"), func(id string) bool { return m.containers[id] != nil })
	sweepDir(m.stateRoot(), func(id string) bool { return m.containers[id] != nil })
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
		for _, sub := range []string{"/ns/net", "/ns/ipc", "/ns/uts", "/ns/pid", "/shm", "/rootfs"} {
			_ = unix.Unmount(path+sub, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		_ = os.RemoveAll(path)
	}
}

// Steps tells which steps a pod and its containers have begun, for whoever looks into a stuck one.
func (m *Manager) Steps(id string) ([]string, error) {
	p, err := m.pod(id)
	if err != nil {
		return nil, err
	}
	return p.record().Steps, nil
}

package pods

import (
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/network"
)

// Stats reads what a container has used.
func (m *Manager) Stats(id string) (*cgroups.Stats, error) {
	c, err := m.container(id)
	if err != nil {
		return nil, err
	}
	return cgroups.ReadStats(cgroups.Path(c.rec.Cgroup))
}

// PodUsage is what a pod sandbox and its containers use together.
type PodUsage struct {
	cgroups.Stats
	Processes   uint64 // of its containers: the shim is not the pod's
	NetworkTime time.Time
	Network     []network.Counters // of the host, for a pod on its network
}

// PodUsage reads what a ready pod uses. The error is of the class errdefs.ErrNotFound where it has just ended.
func (m *Manager) PodUsage(s *Sandbox, containers []*Container) (*PodUsage, error) {
	var u PodUsage
	if parent, ok := s.PodCgroup(); ok {
		stats, err := cgroups.ReadStats(parent)
		if err != nil {
			return nil, err
		}
		u.Stats = *stats
	} else {
		for _, p := range append([]cgroups.Path{s.CgroupPath}, paths(containers)...) {
			stats, err := cgroups.ReadStats(p)
			if errors.Is(err, errdefs.ErrNotFound) && p != s.CgroupPath {
				continue // a container that has just ended
			}
			if err != nil {
				return nil, err
			}
			u.Add(stats)
		}
	}
	for _, p := range paths(containers) {
		n, err := cgroups.CountProcesses(p)
		if err != nil {
			return nil, err
		}
		u.Processes += n
	}
	var err error
	u.Network, u.NetworkTime, err = Interfaces(s)
	return &u, err
}

// Interfaces reads the counters of a ready pod's network interfaces. The shim is in the pod's network namespace.
func Interfaces(s *Sandbox) ([]network.Counters, time.Time, error) {
	now := time.Now()
	if s.ShimPID <= 0 {
		return nil, now, nil
	}
	counters, err := network.ReadCounters(s.ShimPID)
	if err != nil {
		return nil, now, fmt.Errorf("network of pod sandbox %s: %w: %w", s.ID, err, errdefs.ErrNotFound)
	}
	return counters, now, nil
}

func paths(containers []*Container) []cgroups.Path {
	list := make([]cgroups.Path, len(containers))
	for i, c := range containers {
		list[i] = c.CgroupPath
	}
	return list
}

// PodCgroup is the cgroup that the kubelet made for the pod; false where the request named none, so that the pod's cgroups
// are among those of others.
func (s *Sandbox) PodCgroup() (cgroups.Path, bool) {
	if s.Config.GetLinux().GetCgroupParent() == "" {
		return "", false
	}
	return cgroups.Path(path.Dir(string(s.CgroupPath))), true
}

// Born are the sandboxes and containers of a node together with those that are still being made: who watches cgroups sees
// a new one before the call that makes it has returned, and may ask only once.
type Born struct{ *Manager }

// Sandbox returns the pod sandbox with that id.
func (b Born) Sandbox(id string) (*Sandbox, error) {
	b.mu.RLock()
	p := b.makingPods[id]
	b.mu.RUnlock()
	if p != nil {
		return p.view.Load(), nil
	}
	return b.Manager.Sandbox(id)
}

// Container returns the container with that id.
func (b Born) Container(id string) (*Container, error) {
	b.mu.RLock()
	c := b.making[id]
	b.mu.RUnlock()
	if c != nil {
		return c.view.Load(), nil
	}
	return b.Manager.Container(id)
}

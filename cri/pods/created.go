package pods

import "time"

// createdNow is when a sandbox or a container of a pod is created now: by the clock, and later than all sandboxes and containers that
// this pod has. The kubelet takes for the present one of several which was created last; on a node whose clock was set back that would be
// one that has exited, and it would start another beside the one that runs, again and again.
func (m *Manager) createdNow(podUID string) time.Time {
	at := time.Now().Round(0) // by the wall clock: with their monotonic readings two times are compared by these
	if podUID == "" {
		return at // whose it is is not known, and no kubelet's
	}
	after := func(p *pod, earlier time.Time) {
		if p.config().GetMetadata().GetUid() == podUID && !earlier.Before(at) {
			at = earlier.Add(1)
		}
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, p := range m.pods {
		after(p, p.rec.CreatedAt)
	}
	for _, c := range m.containers {
		after(c.pod, c.rec.CreatedAt)
	}
	return at
}

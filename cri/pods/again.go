package pods

import (
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A daemon can die between the last step of a call and its answer. Whoever made the call repeats it, as it was, and is
// then given what is there: otherwise a name would be blocked by something whose id nobody knows. This holds only for
// what was taken over from an earlier daemon, and only while it is as the call left it; to everybody else a name that is
// taken is an error.

// sandboxAgain returns the id of the pod that a repeated RunPodSandbox asks for, or "".
func (m *Manager) sandboxAgain(name string, cfg *cri.PodSandboxConfig) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := m.names[name]
	if c == nil {
		return ""
	}
	p := m.pods[c.id]
	if p == nil || !p.recovered || !p.view.Load().Ready || !proto.Equal(p.config(), cfg) {
		return ""
	}
	for _, c := range m.containers {
		if c.rec.SandboxID == p.rec.ID {
			return "" // then its caller knows the pod
		}
	}
	return p.rec.ID
}

// containerAgain returns the id of the container that a repeated CreateContainer asks for, or "".
func (m *Manager) containerAgain(name string, cfg *cri.ContainerConfig) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := m.names[name]
	if c == nil {
		return ""
	}
	ctr := m.containers[c.id]
	if ctr == nil || !ctr.recovered.Load() || ctr.view.Load().State != cri.ContainerState_CONTAINER_CREATED || !proto.Equal(ctr.view.Load().Config, cfg) {
		return ""
	}
	return ctr.rec.ID
}

// startedAgain tells, once, whether a StartContainer may be one that has been done already. The caller holds the pod's
// lock.
func (c *container) startedAgain() bool {
	return c.recovered.Swap(false) && c.view.Load().State == cri.ContainerState_CONTAINER_RUNNING
}

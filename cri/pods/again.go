package pods

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A daemon can die between the last step of a call and its answer, or whoever made the call give up there. It is repeated,
// as it was, and is then given what is there: otherwise a name would be blocked by something whose id nobody knows. This
// holds only for what was taken over from an earlier daemon or was finished for nobody, and only while it is as the call
// left it; to everybody else a name that is taken is an error.

// onTheWay is what an answer may take to whoever made the call, on a node that is busy.
const onTheWay = time.Second

// mayBeUnheard tells, at the end of a call, whether whoever made it may have given up before the answer is there.
func mayBeUnheard(ctx context.Context) bool {
	deadline, ok := ctx.Deadline()
	return ctx.Err() != nil || ok && time.Until(deadline) < onTheWay
}

// sandboxAgain returns the id of the pod that a repeated RunPodSandbox asks for, or "".
func (m *Manager) sandboxAgain(name string, cfg *cri.PodSandboxConfig) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := m.names[name]
	if c == nil {
		return ""
	}
	p := m.pods[c.id]
	if p == nil || !p.unheard.Load() || !p.view.Load().Ready || !proto.Equal(p.config(), cfg) {
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
	if ctr == nil || !ctr.unheard.Load() || ctr.view.Load().State != cri.ContainerState_CONTAINER_CREATED || !proto.Equal(ctr.view.Load().Config, cfg) {
		return ""
	}
	return ctr.rec.ID
}

// startedAgain tells, once, whether a StartContainer may be one that has been done already. The caller holds the pod's
// lock.
func (c *container) startedAgain() bool {
	return c.unheard.Swap(false) && c.view.Load().State == cri.ContainerState_CONTAINER_RUNNING
}

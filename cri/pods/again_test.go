package pods

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A client's deadline passes between the last step of its call and the answer. Its retries found the name taken, for ever.
func TestRetryAfterAnAnswerThatNobodyHeard(t *testing.T) {
	m := bare(t)
	p := m.newPod(*somePod(podA))
	m.pods[podA] = p
	m.own(p.name(), podA)
	late, cancel := context.WithTimeout(t.Context(), onTheWay/2)
	defer cancel()
	early, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	other := proto.Clone(p.config()).(*cri.PodSandboxConfig)
	other.Hostname = "another"
	for name, tc := range map[string]struct {
		call context.Context
		cfg  *cri.PodSandboxConfig
		want string
	}{
		"its caller has gone":          {gone, p.config(), podA},
		"its caller is about to go":    {late, p.config(), podA},
		"another pod of the same name": {late, other, ""},
		"its caller has time":          {early, p.config(), ""},
		"its caller waits for ever":    {t.Context(), p.config(), ""},
	} {
		p.unheard.Store(mayBeUnheard(tc.call))
		id, err := m.RunSandbox(t.Context(), tc.cfg, "")
		if id != tc.want || (tc.want == "") != errors.Is(err, errdefs.ErrAlreadyExists) {
			t.Errorf("%s: the next call gets %q, %v; want %q", name, id, err, tc.want)
		}
	}
	p.unheard.Store(true)
	c := m.newContainer(p, *someContainer(ctrA, podA))
	m.containers[ctrA] = c
	if id, err := m.RunSandbox(t.Context(), p.config(), ""); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a pod that has a container, and so is known: %q, %v", id, err)
	}
	c.rec.Phase = ready
	c.publish()
	m.own(containerName(podA, c.rec.Config.M), ctrA)
	for _, unheard := range []bool{false, true} {
		c.unheard.Store(unheard)
		id, err := m.CreateContainer(t.Context(), podA, c.rec.Config.M)
		if (id == ctrA) != unheard || errors.Is(err, errdefs.ErrAlreadyExists) == unheard {
			t.Errorf("container, unheard %v: %q, %v", unheard, id, err)
		}
	}
}

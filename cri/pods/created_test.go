package pods

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestNewestIsTheNewestWhenTheClockIsSetBack(t *testing.T) {
	m := bare(t)
	soon := time.Now().Add(time.Hour) // by the clock before it was set back
	add := func(id, uid string) *pod {
		rec := somePod(id)
		rec.Config.M = proto.Clone(rec.Config.M).(*cri.PodSandboxConfig)
		rec.Config.M.Metadata.Uid, rec.CreatedAt = uid, soon
		m.pods[id] = m.newPod(*rec)
		return m.pods[id]
	}
	p := add(podA, "a")
	add(podB, "b")
	ctr := someContainer(ctrA, podA)
	ctr.CreatedAt = soon.Add(time.Second)
	m.containers[ctrA] = m.newContainer(p, *ctr)
	for uid, after := range map[string]time.Time{"a": ctr.CreatedAt, "b": soon} {
		if at := m.createdNow(uid); !at.After(after) || at.Sub(after) > time.Second {
			t.Errorf("created in pod %s: %s, want right after %s", uid, at, after)
		}
	}
	for _, uid := range []string{"c", ""} {
		if at := m.createdNow(uid); !at.Before(soon) {
			t.Errorf("created in another pod (%q): %s, in the future", uid, at)
		}
	}
	if at := m.createdNow("c"); at != at.Round(0) {
		t.Errorf("%s has a monotonic reading, by which it is later than what was created before the clock was set back", at)
	}
	p.rec.CreatedAt, m.containers[ctrA].rec.CreatedAt = soon.Add(-2*time.Hour), soon.Add(-2*time.Hour)
	if before, at := time.Now().Round(0), m.createdNow("a"); at.Before(before) {
		t.Errorf("by a clock that is right: %s, before %s", at, before)
	}
}

package pods

import (
	"math/rand/v2"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// lifeSteps is everything that can be noted of a life, by name.
func lifeSteps(l *lifeline) map[string]func() {
	return map[string]func(){
		"create": l.isCreated, "start": l.starting, "started": func() { l.isStarted(true) }, "failed": func() { l.isStarted(false) },
		"end": l.hasEnded, "delete": l.isDeleted,
		"known": func() { l.known(true, false) }, "known-ended": func() { l.known(true, true) }, "known-unheard": func() { l.known(false, true) },
	}
}

func told(names ...string) string {
	var out []string
	l := &lifeline{}
	l.tell = func(types ...cri.ContainerEventType) {
		for _, t := range types {
			out = append(out, strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(t.String(), "CONTAINER_"), "_EVENT")))
		}
	}
	steps := lifeSteps(l)
	for _, n := range names {
		steps[n]()
	}
	return strings.Join(out, " ")
}

func TestEventsOfALifeAreInItsOrder(t *testing.T) {
	for _, tc := range []struct{ name, life, want string }{
		{"a life", "create start started end delete", "created started stopped deleted"},
		{"its end is seen before StartContainer knows", "create start end started delete", "created started stopped deleted"},
		{"its end is seen twice", "create start started end end", "created started stopped"},
		{"its init is killed before CreateContainer is done", "end create delete", "created stopped deleted"},
		{"it cannot be started", "create start end failed delete", "created stopped deleted"},
		{"it is never started", "create end delete", "created stopped deleted"},
		{"it cannot be created", "end delete", ""},
		{"it is removed twice", "create delete delete", "created deleted"},
		{"it ends while the daemon is away", "known end delete", "stopped deleted"},
		{"an earlier daemon has told its end", "known-ended end delete", "deleted"},
		{"an earlier daemon had not finished it", "known-unheard end delete", ""},
	} {
		if got := told(strings.Fields(tc.life)...); got != tc.want {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
}

// Whatever comes in whatever order: nothing is told twice, nor out of the order of a life.
func TestEventsOfAnyLifeAreInOrder(t *testing.T) {
	names := []string{"start", "started", "failed", "end", "delete"}
	order := map[string]int{"created": 0, "started": 1, "stopped": 2, "deleted": 3}
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		life := []string{"create"}
		if r.IntN(2) == 0 {
			life = []string{"end", "create"}
		}
		for range r.IntN(8) {
			n := names[r.IntN(len(names))]
			life = append(life, n)
		}
		last := -1
		for _, e := range strings.Fields(told(life...)) {
			if order[e] <= last {
				t.Fatalf("%v tells %q", life, told(life...))
			}
			last = order[e]
		}
	}
}

package cri

import (
	"fmt"
	"testing"
	"time"
)

func TestRateIsThatOfTheLastWindow(t *testing.T) {
	var r rates
	born := time.Unix(1000, 0)
	for _, step := range []struct {
		name  string
		after time.Duration
		used  uint64
		want  uint64
	}{
		{"of the life so far", 10 * time.Second, 5e9, 5e8},
		{"asked again at once", 10*time.Second + time.Millisecond, 5e9 + 1e6, 5e8},
		{"of two seconds", 12 * time.Second, 9e9, 2e9},
		{"idle since", 22 * time.Second, 9e9, 0},
		{"a clock that goes back", 21 * time.Second, 9e9 + 5, 0},
		{"a cgroup that is a new one", 30 * time.Second, 3e9, 1e8},
	} {
		if got := r.nanoCores("c", born, born.Add(step.after), step.used); got != step.want {
			t.Errorf("%s: %d, want %d", step.name, got, step.want)
		}
	}
	if got := r.nanoCores("new", born, born, 7); got != 0 {
		t.Errorf("in the moment of birth: %d", got)
	}
}

func TestRatesOfWhatIsGoneAreForgotten(t *testing.T) {
	var r rates
	now := time.Now()
	for i := range 1000 {
		r.nanoCores(fmt.Sprint(i), now, now, 1)
		r.keep(10, func(id string) bool { return len(id) == 1 })
	}
	if n := len(r.all); n > 100 {
		t.Errorf("%d are kept for 10", n)
	}
	if r.all["5"] == nil {
		t.Error("one that exists was forgotten")
	}
}

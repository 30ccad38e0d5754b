package cri

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/cri/pods"
)

var (
	idA = strings.Repeat("a1", 32)
	idB = "a1" + strings.Repeat("b2", 31)
)

func TestContainerFiltersAreANDed(t *testing.T) {
	c := &pods.Container{
		ID: idA, SandboxID: idB, State: cri.ContainerState_CONTAINER_RUNNING,
		Config: &cri.ContainerConfig{Labels: map[string]string{"app": "web", "tier": ""}},
	}
	state := func(s cri.ContainerState) *cri.ContainerStateValue { return &cri.ContainerStateValue{State: s} }
	for _, tc := range []struct {
		name string
		f    *cri.ContainerFilter
		want bool
	}{
		{"nil matches all", nil, true},
		{"empty matches all", &cri.ContainerFilter{}, true},
		{"id", &cri.ContainerFilter{Id: idA}, true},
		{"prefix of id", &cri.ContainerFilter{Id: idA[:13]}, true},
		{"other id", &cri.ContainerFilter{Id: idB}, false},
		{"longer than any id", &cri.ContainerFilter{Id: idA + "0"}, false},
		{"state", &cri.ContainerFilter{State: state(cri.ContainerState_CONTAINER_RUNNING)}, true},
		{"state 0 is a state", &cri.ContainerFilter{State: state(cri.ContainerState_CONTAINER_CREATED)}, false},
		{"pod", &cri.ContainerFilter{PodSandboxId: idB[:6]}, true},
		{"other pod", &cri.ContainerFilter{PodSandboxId: idA}, false},
		{"label", &cri.ContainerFilter{LabelSelector: map[string]string{"app": "web"}}, true},
		{"empty value is a value", &cri.ContainerFilter{LabelSelector: map[string]string{"tier": ""}}, true},
		{"absent label is not an empty one", &cri.ContainerFilter{LabelSelector: map[string]string{"none": ""}}, false},
		{"one of two labels", &cri.ContainerFilter{LabelSelector: map[string]string{"app": "web", "x": "y"}}, false},
		{"all", &cri.ContainerFilter{Id: idA, PodSandboxId: idB, State: state(cri.ContainerState_CONTAINER_RUNNING), LabelSelector: map[string]string{"app": "web"}}, true},
		{"all but the state", &cri.ContainerFilter{Id: idA, PodSandboxId: idB, State: state(cri.ContainerState_CONTAINER_EXITED), LabelSelector: map[string]string{"app": "web"}}, false},
	} {
		if got := containerMatches(tc.f, c); got != tc.want {
			t.Errorf("%s: %t, want %t", tc.name, got, tc.want)
		}
	}
	if !statsMatch(&cri.ContainerStatsFilter{Id: idA[:4], PodSandboxId: idB, LabelSelector: map[string]string{"app": "web"}}, c) ||
		statsMatch(&cri.ContainerStatsFilter{Id: idA, PodSandboxId: idA}, c) || !statsMatch(nil, c) ||
		statsMatch(&cri.ContainerStatsFilter{LabelSelector: map[string]string{"app": "db"}}, c) {
		t.Error("filters of stats differ from those of lists")
	}
}

func TestSandboxFiltersAreANDed(t *testing.T) {
	sb := &pods.Sandbox{ID: idA, Ready: false, Config: &cri.PodSandboxConfig{Labels: map[string]string{"app": "web"}}}
	state := func(s cri.PodSandboxState) *cri.PodSandboxStateValue { return &cri.PodSandboxStateValue{State: s} }
	for _, tc := range []struct {
		name string
		f    *cri.PodSandboxFilter
		want bool
	}{
		{"nil", nil, true},
		{"prefix", &cri.PodSandboxFilter{Id: "a1"}, true},
		{"not a prefix", &cri.PodSandboxFilter{Id: "1a"}, false},
		{"ready (0) is a state", &cri.PodSandboxFilter{State: state(cri.PodSandboxState_SANDBOX_READY)}, false},
		{"not ready", &cri.PodSandboxFilter{State: state(cri.PodSandboxState_SANDBOX_NOTREADY)}, true},
		{"not ready, other label", &cri.PodSandboxFilter{State: state(cri.PodSandboxState_SANDBOX_NOTREADY), LabelSelector: map[string]string{"app": "db"}}, false},
	} {
		if got := sandboxMatches(tc.f, sb); got != tc.want {
			t.Errorf("%s: %t, want %t", tc.name, got, tc.want)
		}
	}
}

func FuzzFilterIDPrefix(f *testing.F) {
	for _, s := range []string{"", "a", "a1a1", idA, idA + "0", "\x00", "*", "a1%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, id string) {
		a := &pods.Container{ID: idA, SandboxID: idB, Config: &cri.ContainerConfig{}}
		b := &pods.Container{ID: idB, SandboxID: idA, Config: &cri.ContainerConfig{}}
		inA, inB := containerMatches(&cri.ContainerFilter{Id: id}, a), containerMatches(&cri.ContainerFilter{Id: id}, b)
		if id == "" && (!inA || !inB) {
			t.Error("no id must match all")
		}
		if len(id) >= 64 && inA && inB {
			t.Errorf("%q is a full id and matches two", id)
		}
		if inA && !strings.HasPrefix(idA, id) || len(id) > 64 && inA {
			t.Errorf("%q matches %s", id, idA)
		}
		if err := checkID("container_id", id); err == nil && (id == "" || strings.ContainsAny(id, "/\x00 \n")) {
			t.Errorf("%q passes for an id", id)
		}
	})
}

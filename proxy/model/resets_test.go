package model

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func withResets(text string) serviceOption {
	return func(s *corev1.Service) {
		if s.Annotations == nil {
			s.Annotations = map[string]string{}
		}
		s.Annotations[ResetAnnotation] = text
	}
}

// Whether connections are reset is the Service's to say, and the proxy's where it says nothing; only TCP's are.
func TestResetsAreAskedFor(t *testing.T) {
	off, on, cannot := testConfig, testConfig, testConfig
	on.Resets, cannot.Resets, cannot.NoResets = true, true, true
	for _, tc := range []struct {
		config   Config
		text     string // - is no annotation
		want     bool
		problems string
	}{
		{off, "-", false, ""}, {on, "-", true, ""}, {cannot, "-", false, ""},
		{off, "true", true, ""}, {on, " true ", true, ""}, {cannot, "true", false, "cannot reset"},
		{off, "false", false, ""}, {on, "false", false, ""}, {cannot, "false", false, ""},
		{off, "yes", false, "neither true nor false"}, {on, "", true, "neither true nor false"}, {cannot, "1", false, "neither true nor false"},
	} {
		var options []serviceOption
		if tc.text != "-" {
			options = append(options, withResets(tc.text))
		}
		m := modelOf(t, tc.config, web(options...), slice1("web", here))
		for svc := range m.State().Services() {
			for _, p := range svc.Ports {
				if p.Resets != (tc.want && p.Protocol == TCP) || p.Resets != (len(p.Members) > 0) {
					t.Errorf("%+v %q: %s %v %v", tc.config, tc.text, p.Protocol, p.Resets, p.Members)
				}
			}
		}
		found := m.Problems()
		if (tc.problems == "") != (len(found) == 0) || len(found) > 0 && !strings.Contains(found[0].Reason, tc.problems) {
			t.Errorf("%q: %v", tc.text, found)
		}
	}
}

// Members are all endpoints, whatever is said of them.
func TestMembersAreAllEndpoints(t *testing.T) {
	m := modelOf(t, web(withResets("true")), slice1("web", here, "10.1.0.2:8080 notready", "10.2.0.1:8080 far dying", "10.2.0.2:8080 far dead"))
	var got []string
	for svc := range m.State().Services() {
		for _, p := range svc.Ports {
			for _, e := range p.Members {
				got = append(got, e.Addr.String())
			}
		}
	}
	slices.Sort(got)
	if strings.Join(got, " ") != "10.1.0.1 10.1.0.2 10.2.0.1 10.2.0.2" {
		t.Errorf("%v", got)
	}
}

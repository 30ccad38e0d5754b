package program

import (
	"testing"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

func TestScopesHavePortsOfServices(t *testing.T) {
	web, other := types.NamespacedName{Namespace: "default", Name: "web"}, types.NamespacedName{Namespace: "default", Name: "other"}
	s := &model.Service{Name: web, Ports: []model.Port{
		{Family: model.IPv4, Protocol: model.TCP, Name: "dns"}, {Family: model.IPv4, Protocol: model.UDP, Name: "dns"},
		{Family: model.IPv4, Protocol: model.TCP, Name: "http"}, {Family: model.IPv6, Protocol: model.TCP, Name: "dns"},
	}}
	for _, c := range []struct {
		scope Scope
		want  int // ports; -1 for no Service
	}{
		{Scope{}, 4},
		{Scope{Services: []types.NamespacedName{other}}, -1},
		{Scope{At: []Place{{}}}, -1},
		{Scope{Services: []types.NamespacedName{web}}, 4},
		{Scope{Services: []types.NamespacedName{other, web}, Ports: []Port{{other, "http", model.TCP}}}, 4},
		{Scope{Services: []types.NamespacedName{web}, Ports: []Port{{web, "dns", model.TCP}}}, 2},
		{Scope{Services: []types.NamespacedName{web}, Ports: []Port{{web, "dns", model.UDP}, {web, "http", model.TCP}}}, 2},
		{Scope{Services: []types.NamespacedName{web}, Ports: []Port{{web, "none", model.TCP}}}, 0},
	} {
		got := -1
		if part := c.scope.Part(s); part != nil {
			got = len(part.Ports)
		}
		if got != c.want || len(s.Ports) != 4 {
			t.Errorf("%+v: %d ports, want %d", c.scope, got, c.want)
		}
	}
}

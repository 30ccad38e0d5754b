package nft

import (
	"iter"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// state is a State of a test's own making.
type state struct {
	services []*model.Service
	hairpins []model.Hairpin
	globals  model.Globals
}

func (s *state) Services() iter.Seq[*model.Service] { return slices.Values(s.services) }
func (s *state) Hairpins() []model.Hairpin          { return s.hairpins }
func (s *state) Globals() *model.Globals            { return &s.globals }

// newState has both families, node ports at all addresses, and pods of 10.1.0.0/16 and fd01::/48.
func newState(services ...*model.Service) *state {
	s := &state{services: services}
	for f, p := range [model.Families][3]string{{"10.1.0.0/16", "0.0.0.0/0", "10.96.0.0/12"}, {"fd01::/48", "::/0", "fd96::/108"}} {
		s.globals.Family[f] = model.FamilyGlobals{
			Enabled: true, Detector: model.Detector{CIDR: netip.MustParsePrefix(p[0])},
			NodePorts:    model.NodePortAddresses{Prefixes: []netip.Prefix{netip.MustParsePrefix(p[1])}},
			ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix(p[2])},
		}
	}
	return s
}

// portOf is a Port with endpoints for all frontends.
func portOf(p model.Protocol, backends []string, frontends ...model.Frontend) model.Port {
	port := model.Port{Protocol: p, Name: "p", Frontends: frontends}
	for _, b := range backends {
		local := b[len(b)-1] == '*'
		if local {
			b = b[:len(b)-1]
		}
		a := netip.MustParseAddrPort(b)
		e := model.Endpoint{Addr: a.Addr(), Port: a.Port(), Local: local}
		port.Cluster = append(port.Cluster, e)
		if local {
			port.Local = append(port.Local, e)
		}
	}
	if frontends[0].Addr.Addr().Is6() {
		port.Family = model.IPv6
	}
	return port
}

func clusterIP(at string) model.Frontend {
	return model.Frontend{Kind: model.ClusterIP, Addr: netip.MustParseAddrPort(at), Action: model.Forward, Masquerade: model.OffCluster}
}

func serviceOf(name string, ports ...model.Port) *model.Service {
	s := &model.Service{Name: types.NamespacedName{Namespace: "test", Name: name}, Ports: ports}
	for i := range ports {
		for _, f := range ports[i].Frontends {
			if f.Kind == model.ClusterIP && !slices.Contains(s.ClusterIPs, f.Addr.Addr()) {
				s.ClusterIPs = append(s.ClusterIPs, f.Addr.Addr())
			}
		}
	}
	return s
}

// delta changes a state, and tells what is different.
func (s *state) delta(old, next *model.Service) *model.Delta {
	c := model.Change{Old: old, New: next}
	if old != nil {
		c.Name = old.Name
		s.services = slices.DeleteFunc(s.services, func(o *model.Service) bool { return o == old })
	}
	if next != nil {
		c.Name = next.Name
		s.services = append(s.services, next)
	}
	return &model.Delta{Services: []model.Change{c}}
}

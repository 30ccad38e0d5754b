package nodetest

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// Sticky is a Port with session affinity.
func Sticky(d time.Duration, p model.Port) model.Port {
	p.Affinity = d
	return p
}

// Crowd is a State of so many Services, with so many endpoints each.
func Crowd(n, endpoints int) *State {
	s := NewState()
	for i := range n {
		a := netip.AddrFrom4([4]byte{10, byte(100 + i>>16), byte(i >> 8), byte(i)})
		var backends []string
		for j := range endpoints {
			backends = append(backends, fmt.Sprintf("10.1.%d.%d:80", (i+j)>>8&255, (i+j)&255))
		}
		s.ServiceList = append(s.ServiceList, ServiceOf(fmt.Sprintf("s%d", i), PortOf(model.TCP, backends, ClusterIP(netip.AddrPortFrom(a, 80).String()))))
	}
	return s
}

// HairpinOf is the Hairpin of an endpoint.
func HairpinOf(p model.Protocol, at string) model.Hairpin {
	return model.Hairpin{Protocol: p, Endpoint: netip.MustParseAddrPort(at)}
}

// State is a State of a test's own making.
type State struct {
	ServiceList []*model.Service
	HairpinList []model.Hairpin
	All         model.Globals
}

// Services are those of ServiceList.
func (s *State) Services() iter.Seq[*model.Service] { return slices.Values(s.ServiceList) }

// Hairpins are those of HairpinList.
func (s *State) Hairpins() []model.Hairpin { return s.HairpinList }

// Globals are All.
func (s *State) Globals() *model.Globals { return &s.All }

// NewState has both families, node ports at all addresses, and pods of 10.1.0.0/16 and fd01::/48.
func NewState(services ...*model.Service) *State {
	s := &State{ServiceList: services}
	for f, p := range [model.Families][3]string{{"10.1.0.0/16", "0.0.0.0/0", "10.96.0.0/12"}, {"fd01::/48", "::/0", "fd96::/108"}} {
		s.All.Family[f] = model.FamilyGlobals{
			Enabled: true, Detector: model.Detector{CIDR: netip.MustParsePrefix(p[0])},
			NodePorts:    model.NodePortAddresses{Prefixes: []netip.Prefix{netip.MustParsePrefix(p[1])}},
			ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix(p[2])},
		}
	}
	return s
}

// PortOf is a Port with endpoints for all frontends.
func PortOf(p model.Protocol, backends []string, frontends ...model.Frontend) model.Port {
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

// ClusterIP is a frontend at a cluster IP, masqueraded for who is off the cluster.
func ClusterIP(at string) model.Frontend {
	return model.Frontend{Kind: model.ClusterIP, Addr: netip.MustParseAddrPort(at), Action: model.Forward, Masquerade: model.OffCluster}
}

// ServiceOf is a Service in namespace test.
func ServiceOf(name string, ports ...model.Port) *model.Service {
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

// Delta changes a state, and tells what is different.
func (s *State) Delta(old, next *model.Service) *model.Delta {
	c := model.Change{Old: old, New: next}
	if old != nil {
		c.Name = old.Name
		s.ServiceList = slices.DeleteFunc(s.ServiceList, func(o *model.Service) bool { return o == old })
	}
	if next != nil {
		c.Name = next.Name
		s.ServiceList = append(s.ServiceList, next)
	}
	return &model.Delta{Services: []model.Change{c}}
}

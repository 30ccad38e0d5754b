package nft

import (
	"hash/fnv"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// groupOf names a list of endpoints that clients are remembered for, or that a range of ports leads to: that of a Port under a
// policy.
type groupOf struct {
	service  types.NamespacedName
	port     string
	family   model.Family
	protocol model.Protocol
	policy   model.Policy
}

// groups gives lists of endpoints the numbers by which the kernel remembers clients. A number is made of the name, so that
// it is the same after a restart; only where two of the node's would have the same, the one that comes later has another.
type groups struct {
	number map[groupOf]uint32
	taken  map[uint32]groupOf
}

func newGroups() *groups {
	return &groups{number: map[groupOf]uint32{}, taken: map[uint32]groupOf{}}
}

// firstGroup keeps the numbers small that programs give to their packets as priorities away from groups.
const firstGroup = 1 << 16

func (g *groups) of(s *model.Service, p *model.Port, policy model.Policy) uint32 {
	name := groupOf{s.Name, p.Name, p.Family, p.Protocol, policy}
	if n, ok := g.number[name]; ok {
		return n
	}
	h := fnv.New32a()
	for _, part := range []string{s.Name.Namespace, s.Name.Name, p.Name} {
		h.Write([]byte(part))
		h.Write([]byte{0})
	}
	h.Write([]byte{byte(p.Family), byte(p.Protocol), byte(policy)})
	n := h.Sum32()
	for {
		if _, ok := g.taken[n]; !ok && n >= firstGroup {
			break
		}
		n++
	}
	g.number[name], g.taken[n] = n, name
	return n
}

// forget gives the numbers of a Service back that it has no Port for any more.
func (g *groups) forget(s *model.Service, now *model.Service) {
	for i := range s.Ports {
		p := &s.Ports[i]
		if !hasGroups(p) || now != nil && hasGroupsLike(now, p) {
			continue
		}
		for _, policy := range []model.Policy{model.Cluster, model.Local} {
			name := groupOf{s.Name, p.Name, p.Family, p.Protocol, policy}
			if n, ok := g.number[name]; ok {
				delete(g.number, name)
				delete(g.taken, n)
			}
		}
	}
}

// hasGroups is whether its lists of endpoints have numbers: for session affinity, or for ranges of ports.
func hasGroups(p *model.Port) bool { return p.Affinity > 0 || len(p.Ranges) > 0 }

func hasGroupsLike(s *model.Service, like *model.Port) bool {
	for i := range s.Ports {
		if p := &s.Ports[i]; hasGroups(p) && p.Name == like.Name && p.Family == like.Family && p.Protocol == like.Protocol {
			return true
		}
	}
	return false
}

package pods

import (
	"fmt"
	"slices"

	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/network"
)

// Two pods with the same port of the node: the rules of one would be before those of the other, without a word, and stay
// there after a DEL that was lost. So the second is refused, whatever plugins the node has. The kubelet tries again, and the
// pod that it replaces gives its ports back when its network is torn down.

// claimPorts takes the ports of the node that a pod asks for, before anything of it is made.
func (p *pod) claimPorts() error {
	if spec.HostNetwork(p.config()) {
		return nil
	}
	if err := p.m.opts.Network.ClaimPorts(p.network()); err != nil {
		return fmt.Errorf("config.port_mappings: %w", err)
	}
	return nil
}

// freePorts gives them back where a pod has no network (any more); a network that is torn down has done so itself.
func (p *pod) freePorts() {
	if !p.holds("network") {
		p.m.opts.Network.FreePorts(p.rec.ID)
	}
}

// adoptPorts hands the network the ports that pods have, as their records say. Those of another boot have none any more, and
// to one that is being torn down none leads.
func (m *Manager) adoptPorts(found []*pod) {
	slices.SortFunc(found, func(a, b *pod) int { return a.rec.CreatedAt.Compare(b.rec.CreatedAt) })
	var all []network.Connected
	for _, p := range found {
		rec := p.record()
		if rec.Boot != m.boot || !p.holds("network") || spec.HostNetwork(p.config()) {
			continue
		}
		c := network.Connected{Pod: p.network()}
		if rec.Phase == ready {
			c.IPs = rec.IPs
		}
		all = append(all, c)
	}
	if err := m.opts.Network.AdoptPorts(all); err != nil {
		m.log.Warn("host ports of pods may lead elsewhere, or nowhere", "error", err)
	}
}

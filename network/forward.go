package network

import (
	"time"

	"github.com/berth-run/berth/network/cni"
)

// legacyAgain is how often the firewall is looked at where that takes a process.
const legacyAgain = 30 * time.Second

// letThrough has the node's firewall let through what is for pods of the default network and from them, where it drops what is
// forwarded: as it does on a node with Docker. It is looked at with each round of the watch, since it may come to that at any
// time, and others may take the rules away.
func (m *Manager) letThrough(legacy bool) {
	m.mu.Lock()
	c, ready := m.conflist, m.notReady == nil
	m.mu.Unlock()
	if !ready || !c.byDefault() { // an operator's network has the rules that he wants
		return
	}
	if m.shut != "" && !legacy { // it failed just now
		return
	}
	opened, err := cni.LetThrough(c.cidrs, legacy)
	if len(opened) > 0 {
		m.log.Info("the node's firewall drops what is forwarded (policy DROP of iptables' chain FORWARD, as Docker sets it); it has got rules that let through what is for pods, and from them",
			"ranges", joinCIDRs(opened))
	}
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	if reason != "" && reason != m.shut {
		m.log.Warn("pods cannot be reached", "reason", reason)
	}
	m.shut = reason
}

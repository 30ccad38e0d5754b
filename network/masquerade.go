package network

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// keepMasqueraded makes the rules again that masquerade what pods of the default network send to the rest of the world, where
// somebody has taken them away: a firewall that is loaded anew begins with `flush ruleset`, and pods would be without any answer until
// they are made anew. It is looked at with each round of the watch.
func (m *Manager) keepMasqueraded() {
	m.mu.Lock()
	c, ready := m.conflist, m.notReady == nil
	m.mu.Unlock()
	if !ready || !c.byDefault() {
		return
	}
	if file, _ := findProgram("bridge", m.opts.BinDirs); !m.plugins.answers("bridge", file) { // none is needed
		return
	}
	again, err := m.masqueradeAgain(c)
	if again > 0 {
		m.log.Warn("rules that masquerade what pods send were taken away by somebody else, and are there again", "network", c.Name, "pods", again)
	}
	reason := ""
	if err != nil {
		reason = err.Error()
	}
	if reason != "" && reason != m.bare {
		m.log.Warn("what pods send to the rest of the world is not masqueraded", "network", c.Name, "reason", reason)
	}
	m.bare = reason
}

// masqueradeAgain says for how many pods it has made rules.
func (m *Manager) masqueradeAgain(c *conflist) (again int, err error) {
	names, err := namesIn(m.resultsDir())
	if err != nil {
		return 0, err
	}
	var ids []string
	for _, name := range names {
		if network, id, ok := splitCacheName(name); ok && network == c.Name {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return 0, nil
	}
	var families []bool
	for _, r := range c.cidrs {
		families = append(families, r.Addr().Is6())
	}
	has, known, err := m.plugins.inProcess.Masqueraded(c.Name, IfName, ids, families)
	if err != nil || !known {
		return 0, err
	}
	for _, id := range slices.Sorted(slices.Values(ids)) {
		if has[id] {
			continue
		}
		made, err := m.masqueradePod(c, id)
		if err != nil {
			return again, fmt.Errorf("pod %s: %w", id, err)
		}
		if made {
			again++
		}
	}
	return again, nil
}

// masqueradePod makes the rules of a pod, unless it is being set up or torn down, or is no more.
func (m *Manager) masqueradePod(c *conflist, id string) (made bool, err error) {
	done, err := m.tryAlone(id)
	if err != nil || done == nil {
		return false, err
	}
	defer done()
	if _, err := os.Lstat(filepath.Join(m.resultsDir(), c.Name+"-"+id+"-"+IfName)); err != nil {
		return false, nil //nolint:nilerr // torn down meanwhile
	}
	cached, err := m.cni.GetNetworkListCachedResult(c.NetworkConfigList, &libcni.RuntimeConf{ContainerID: id, IfName: IfName})
	if err != nil || cached == nil {
		return false, nil //nolint:nilerr // torn: its teardown does without
	}
	result, err := types100.NewResultFromResult(cached)
	if err != nil {
		return false, err
	}
	var nets []*net.IPNet
	for _, ip := range result.IPs {
		nets = append(nets, &ip.Address)
	}
	// The pod may be of a time when the network had one family: what it has not is not missing.
	has, _, err := m.plugins.inProcess.Masqueraded(c.Name, IfName, []string{id}, familiesOf(nets))
	if err != nil || has[id] {
		return false, err
	}
	return true, m.plugins.inProcess.Masquerade(nets, c.Name, IfName, id)
}

func familiesOf(nets []*net.IPNet) []bool {
	var all []bool
	for _, n := range nets {
		if v6 := n.IP.To4() == nil; !slices.Contains(all, v6) {
			all = append(all, v6)
		}
	}
	return all
}

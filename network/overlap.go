package network

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
)

// Two networks of a node that have the same addresses work for the pods of one of them at best: host-local keeps the addresses
// of each network apart, and so gives an address of a pod to another one; and of two bridges with routes to the same range the
// kernel takes the first. Nothing tells: pods are ready, and packets go elsewhere. It comes about where a configuration is put
// on a node whose default network has pods, or where one is renamed, or given another bridge.
//
// So a network is not ready as long as pods of another one have addresses of its range, as far as its configuration tells what
// that is; where it does not, ADD is refused that gives such an address.

// pool is what a configuration says of the addresses that its pods get.
type pool struct {
	ranges []netip.Prefix
	bridge string // that has the gateway's address; "" where there is none
}

// poolOf reads it off the first plugin, whose addresses are those of the pod; it is empty where these are not host-local's.
func poolOf(c *conflist) pool {
	var conf struct {
		Type, Bridge                string
		IsGateway, IsDefaultGateway bool
		IPAM                        struct {
			Type, Subnet string
			Ranges       [][]struct{ Subnet string }
		}
	}
	if json.Unmarshal(c.Plugins[0].Bytes, &conf) != nil || conf.IPAM.Type != "host-local" {
		return pool{}
	}
	var p pool
	subnets := []string{conf.IPAM.Subnet}
	for _, set := range conf.IPAM.Ranges {
		for _, r := range set {
			subnets = append(subnets, r.Subnet)
		}
	}
	for _, s := range subnets {
		if cidr, err := netip.ParsePrefix(s); err == nil {
			p.ranges = append(p.ranges, cidr.Masked())
		}
	}
	if conf.Type == "bridge" && (conf.IsGateway || conf.IsDefaultGateway) {
		p.bridge = cmp.Or(conf.Bridge, "cni0")
	}
	return p
}

// podAddress is an address of a pod on another network than the current one, with the length of its range.
type podAddress struct {
	netip.Prefix
	network string
}

// addressesElsewhere are those of pods on other networks than this one, as far as results tell.
func (m *Manager) addressesElsewhere(name string) []podAddress {
	entries, _ := os.ReadDir(m.resultsDir()) // not there: no pod yet
	var all []podAddress
	for _, e := range entries {
		network, id, ok := splitCacheName(e.Name())
		if !ok || network == name || m.owes(id) {
			continue
		}
		for _, p := range cachedAddresses(filepath.Join(m.resultsDir(), e.Name())) {
			all = append(all, podAddress{p, network})
		}
	}
	return all
}

// cachedAddresses are the addresses of a cached result, none if it is torn.
func cachedAddresses(file string) (all []netip.Prefix) {
	data, err := readBounded(file)
	if err != nil {
		return nil
	}
	var c struct {
		Result struct {
			IPs []struct{ Address netip.Prefix }
		}
	}
	if json.Unmarshal(data, &c) != nil {
		return nil
	}
	for _, ip := range c.Result.IPs {
		all = append(all, ip.Address)
	}
	return all
}

// overlaps says why a network cannot have pods beside those that are there on others.
func (m *Manager) overlaps(c *conflist, others []podAddress) error {
	p := poolOf(c)
	for _, r := range p.ranges {
		i := slices.IndexFunc(others, func(o podAddress) bool { return r.Contains(o.Addr()) })
		if i >= 0 {
			return fmt.Errorf("network %s (%s): pods on network %s have addresses of its range %s, and no two networks of a node can have the same: "+
				"remove these pods (drain the node), and it is ready; or give it another range", c.Name, c.from(), others[i].network, r)
		}
	}
	if p.bridge == "" {
		return nil
	}
	t, err := linkWith(p.ranges, func(l netlink.Link) bool { return l.Type() == "bridge" && l.Attrs().Name != p.bridge }, m.log)
	if err != nil || t == nil {
		return err
	}
	return fmt.Errorf("network %s (%s): bridge %s has %s of its range %s: packets to its pods would go there; remove what uses that bridge, and the bridge (ip link delete %s)",
		c.Name, c.from(), t.link, t.ip, t.cidr, t.link)
}

var errAddressTaken = errors.New("no two networks of a node can have the same addresses")

// checkAddresses refuses addresses that a pod was given which are those of a pod on another network, or of the range of a default
// network that has pods: whose bridge is never that of another network.
func (m *Manager) checkAddresses(name string, ips []netip.Addr) error {
	m.mu.Lock()
	others := m.others
	m.mu.Unlock()
	for _, ip := range ips {
		for _, o := range others {
			switch {
			case o.network == name:
			case o.Addr() == ip:
				return fmt.Errorf("address %s is that of a pod on network %s: %w", ip, o.network, errAddressTaken)
			case isDefaultName(o.network) && o.Contains(ip):
				return fmt.Errorf("address %s is of the range %s, which pods on the default network %s have: %w; remove these pods (drain the node)",
					ip, o.Masked(), o.network, errAddressTaken)
			}
		}
	}
	return nil
}

package network

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/berth-run/berth/internal/file"
)

// The default network is the node's where it has no configuration: a bridge of its own for the pod CIDRs. Its
// configuration is computed, from what is on record and what the kernel says, and written nowhere but to the records of
// pods and beside their results, from which they are torn down whatever the node has by then.

// DefaultPrefix begins the names of default networks and of their bridges.
const DefaultPrefix = "berth-"

// isDefaultName says whether a network of that name is a default one.
func isDefaultName(name string) bool {
	sum, ok := strings.CutPrefix(name, DefaultPrefix)
	raw, err := hex.DecodeString(sum)
	return ok && err == nil && len(raw) == nameBytes
}

// nameBytes is how much of a range's sum is in the name: names of links have 15 bytes.
const nameBytes = 4

// defaultName names the default network and its bridge by the range of IPv4, or of IPv6 where that is all. When it changes,
// pods on the bridge of the former one go on working there: a bridge has one range of each family (a second makes the
// bridge plugin fail), while one of IPv6 that comes later is added to the same.
func defaultName(cidrs []netip.Prefix) string {
	first := cidrs[0]
	if i := slices.IndexFunc(cidrs, func(p netip.Prefix) bool { return p.Addr().Is4() }); i >= 0 {
		first = cidrs[i]
	}
	sum := sha256.Sum256([]byte(first.String()))
	return DefaultPrefix + hex.EncodeToString(sum[:nameBytes])
}

// defaultConflist is the configuration for ranges that checkPodCIDRs finds nothing wrong with. Leases is the directory of
// the addresses that are handed out, mtu the largest packet that leaves the node whole, 0 if nothing is known of it. Host ports
// are made by package hostports if byTable, else by the plugin portmap.
func defaultConflist(cidrs []netip.Prefix, mtu int, leases string, byTable bool) (*conflist, error) {
	type object map[string]any
	var ranges [][]object
	for _, p := range cidrs {
		ranges = append(ranges, []object{{"subnet": p.String()}})
	}
	name := defaultName(cidrs)
	bridge := object{
		"type": "bridge", "bridge": name, "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
		"ipam": object{"type": "host-local", "dataDir": leases, "ranges": ranges},
	}
	if mtu > 0 {
		bridge["mtu"] = mtu
	}
	list := object{"cniVersion": "1.0.0", "name": name}
	portmap := object{"type": "portmap", "capabilities": object{"portMappings": true}}
	bandwidth := object{"type": "bandwidth", "capabilities": object{"bandwidth": true}}
	if byTable {
		list["plugins"] = []object{bridge, bandwidth}
		list[hostPortsKey] = tablePorts{Link: name}
	} else {
		list["plugins"] = []object{bridge, portmap, bandwidth}
	}
	data, err := json.Marshal(list)
	if err != nil {
		return nil, err
	}
	return parseConflist(data, nil)
}

// defaultNetwork makes the node's network of its pod CIDRs. none says that there is no other.
func (m *Manager) defaultNetwork(none error) (*conflist, error) {
	if m.opts.NoDefault {
		return nil, none
	}
	cidrs := m.cidrs.get()
	if len(cidrs) == 0 {
		return nil, fmt.Errorf("%w, and no pod CIDR from the kubelet to make one of (on a node without a kubelet --pod-cidr gives one)", none)
	}
	if had := m.configuredOnce(); had != "" && len(m.opts.PodCIDRs) == 0 {
		return nil, fmt.Errorf("%w, where %s was: whoever put it there may bring it back, so that pods get no other network meanwhile (to make one of pod CIDR %s from now on, remove %s)",
			none, had, joinCIDRs(cidrs), m.configuredFile())
	}
	if err := checkPodCIDRs(cidrs); err != nil {
		return nil, err
	}
	if err := takenElsewhere(cidrs, defaultName(cidrs), m.log, m.opts.NodeLinks...); err != nil {
		return nil, err
	}
	if err := m.ownBridge(defaultName(cidrs)); err != nil {
		return nil, fmt.Errorf("pod CIDR %s: %w", joinCIDRs(cidrs), err)
	}
	if slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		if err := keepAdvertised(m.log); err != nil {
			return nil, err
		}
	}
	c, err := defaultConflist(cidrs, m.podMTU(cidrs), m.leasesDir(), m.portsByTable())
	if err != nil {
		return nil, err
	}
	c.cidrs = cidrs
	return c, nil
}

// configuredFile is there when the node has had a network configuration. Add-ons take theirs away while they are replaced
// (Cilium does), so that no pod starts then, and no pod must get the default network instead.
func (m *Manager) configuredFile() string { return filepath.Join(m.opts.CacheDir, "configured") }

func (m *Manager) configuredOnce() string {
	data, err := readBounded(m.configuredFile())
	if err != nil {
		return ""
	}
	return string(data)
}

func (m *Manager) noteConfigured(conf string) {
	if m.configuredOnce() == conf {
		return
	}
	err := os.MkdirAll(m.opts.CacheDir, 0o700)
	if err == nil {
		err = file.Replace(m.configuredFile(), []byte(conf))
	}
	if err != nil {
		m.log.Debug("that the node has a network configuration cannot be kept over a restart", "error", err)
	}
}

package network

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"

	"github.com/berth-run/berth/network/hostports"
)

// hostPortsKey is where the default network's configuration says, to the pods that were made with it, too, that a table leads
// host ports to them (package hostports) and no plugin.
const hostPortsKey = "berthHostPorts"

// tablePorts is what is there.
type tablePorts struct {
	Link string `json:"link"` // on which the pods are
}

// tableName is the table's. Daemons side by side, which have directories of their own, have tables of their own.
func tableName(cacheDir string) string {
	const name = "berth-hostports"
	if cacheDir == DefaultCacheDir {
		return name
	}
	sum := sha256.Sum256([]byte(cacheDir))
	return name + "-" + hex.EncodeToString(sum[:4])
}

// portsByTable says whether the default network has its host ports from the table: not where the kernel does not take it, nor
// where the node's operator has decided about the plugin portmap.
func (m *Manager) portsByTable() bool {
	file, _ := findProgram("portmap", m.opts.BinDirs) // none is needed
	if !m.plugins.answers("portmap", file) {
		return false
	}
	m.probe.Do(func() {
		if m.noTable = hostports.Supported(); m.noTable != nil {
			m.log.Info("host ports are made by plugin portmap: this kernel has not all of nf_tables (nf_tables, nft_nat, nft_masq, nft_fib_inet, nf_conntrack)",
				"reason", m.noTable)
		}
	})
	return m.noTable == nil
}

// portsByPlugin says whether a plugin makes the host ports of a network.
func portsByPlugin(c *conflist) bool { return c.ports == nil }

// ClaimPorts gives a pod its host ports before its Setup, whoever makes them. The error, of class
// errdefs.ErrFailedPrecondition, names the pod that has one of them. They are given back by a Teardown that succeeds, or by
// FreePorts.
func (m *Manager) ClaimPorts(p Pod) error {
	ports, err := claimed(p)
	if err != nil {
		return err
	}
	return m.claims.Take(ports)
}

// FreePorts takes the host ports of a pod back that was not set up, or is no more. They stay its own while its teardown is
// owed, since they lead to where it was until then.
func (m *Manager) FreePorts(id string) {
	if !m.owes(id) {
		m.claims.Free(id)
	}
}

// Connected is a pod that was set up, with its addresses.
type Connected struct {
	Pod
	IPs []netip.Addr
}

// AdoptPorts takes over the host ports of all pods that were set up since the node was started, in the order in which that was;
// to a pod without addresses none lead. Ports that lead elsewhere go. From then on the table is watched, and so are the rules that
// masquerade pods of the default network. Call it once, before the first Setup.
func (m *Manager) AdoptPorts(pods []Connected) error {
	err := m.adoptPorts(pods)
	m.stopped.Go(func() { m.table.Watch(m.stop) })
	m.adopted.Store(true)
	return err
}

func (m *Manager) adoptPorts(pods []Connected) error {
	var targets []hostports.Target
	for _, p := range pods {
		ports, err := claimed(p.Pod)
		if err != nil || len(ports.Ports) == 0 {
			continue // such a pod was not set up
		}
		m.claims.Keep(ports)
		c, err := parseConflist(p.Conflist, nil)
		if err != nil || portsByPlugin(c) || len(p.IPs) == 0 {
			continue
		}
		targets = append(targets, hostports.Target{Pod: ports, Addrs: p.IPs, Link: c.ports.Link})
	}
	err := m.table.Adopt(targets)
	if err != nil && len(targets) == 0 && hostports.Supported() != nil {
		return nil // there can be no table
	}
	return err
}

// keepPorts has nobody else get ports that rules of plugins still lead to where a pod was.
func (m *Manager) keepPorts(p Pod) {
	if ports, err := claimed(p); err == nil {
		m.claims.Keep(ports)
	}
}

// leadPorts leads a pod's host ports to its addresses, if the table does that in its network.
func (m *Manager) leadPorts(p Pod, c *conflist, ips []netip.Addr) error {
	if portsByPlugin(c) {
		return nil
	}
	ports, err := claimed(p)
	if err != nil || len(ports.Ports) == 0 {
		return err
	}
	return m.table.Set(hostports.Target{Pod: ports, Addrs: ips, Link: c.ports.Link})
}

// claimed is a pod with its host ports.
func claimed(p Pod) (hostports.Pod, error) {
	maps, err := portMaps(p.PortMappings)
	if err != nil {
		return hostports.Pod{}, err
	}
	out := hostports.Pod{ID: p.ID, Name: p.Namespace + "/" + p.Name}
	for _, m := range maps {
		port := hostports.Port{Protocol: protocols[m.Protocol], Host: uint16(m.HostPort), To: uint16(m.ContainerPort)}
		if m.HostIP != "" {
			if port.At, err = netip.ParseAddr(m.HostIP); err != nil {
				return hostports.Pod{}, fmt.Errorf("host IP %q: %w", m.HostIP, err)
			}
			port.At = port.At.Unmap().WithZone("")
		}
		out.Ports = append(out.Ports, port)
	}
	return out, nil
}

var protocols = map[string]hostports.Protocol{"tcp": hostports.TCP, "udp": hostports.UDP, "sctp": hostports.SCTP}

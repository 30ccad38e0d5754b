package model

import (
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
)

// nodeFacts is what the model needs of the Node.
type nodeFacts struct {
	zone string
	ips  [Families]netip.Addr
	// all are all its addresses, each between spaces.
	all      string
	podCIDRs [Families]netip.Prefix
}

// reduceNode reads the Node; nil is one that nothing is known of.
func reduceNode(n *corev1.Node) (nodeFacts, []Problem) {
	var f nodeFacts
	if n == nil {
		return f, nil
	}
	bad := problems{kind: "Node", object: types.NamespacedName{Name: n.Name}}
	f.zone = n.Labels[corev1.LabelTopologyZone]
	// Internal addresses precede external ones, and the first of a family is the node's, as for kube-proxy and pods' host IPs.
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, a := range n.Status.Addresses {
			if a.Type != kind {
				continue
			}
			ip, ok := parseAddr(a.Address)
			if !ok {
				bad.at("status.addresses", i, ".address", a.Address, "is no IP address; it is left out")
				continue
			}
			f.all += " " + ip.String() + " "
			if !f.ips[FamilyOf(ip)].IsValid() {
				f.ips[FamilyOf(ip)] = ip
			}
		}
	}
	for i, s := range n.Spec.PodCIDRs {
		p, ok := parsePrefix(s)
		if !ok {
			bad.at("spec.podCIDRs", i, "", s, "is no CIDR; it is left out")
		} else if !f.podCIDRs[FamilyOf(p.Addr())].IsValid() {
			f.podCIDRs[FamilyOf(p.Addr())] = p
		}
	}
	return f, bad.list
}

// reduceServiceCIDR reads the CIDRs of a ServiceCIDR.
func reduceServiceCIDR(c *networkingv1.ServiceCIDR) ([]netip.Prefix, []Problem) {
	bad := problems{kind: "ServiceCIDR", object: types.NamespacedName{Name: c.Name}}
	var out []netip.Prefix
	for i, s := range c.Spec.CIDRs {
		p, ok := parsePrefix(s)
		switch {
		case !ok:
			bad.at("spec.cidrs", i, "", s, "is no CIDR; it is left out")
		case whole(p):
			// It would have the node drop all that it forwards. The API server asks for a /64 or longer, or any IPv4 one.
			bad.at("spec.cidrs", i, "", s, "is all there is of its family; it is left out")
		default:
			out = append(out, p)
		}
	}
	return out, bad.list
}

// rules is a Config that has been read.
type rules struct {
	enabled      [Families]bool
	clusterCIDRs [Families]netip.Prefix
	// nodePorts is nil for the keyword primary.
	nodePorts []*netip.Prefix
	bind      netip.Addr
}

// readConfig checks a Config; an error names field and value.
func readConfig(c *Config) (rules, error) {
	r := rules{enabled: [Families]bool{c.IPv4, c.IPv6}}
	if c.NodeName == "" {
		return r, fmt.Errorf("NodeName is empty: no endpoint could be told to be local")
	}
	if a := c.BindAddress.Unmap(); a.IsValid() && !a.IsUnspecified() {
		r.bind = a
	}
	if err := c.checkMode(); err != nil {
		return r, err
	}
	for i, s := range c.ClusterCIDRs {
		p, ok := parsePrefix(strings.TrimSpace(s))
		if !ok {
			return r, fmt.Errorf("ClusterCIDRs[%d]: %q is no CIDR", i, s)
		}
		if f := FamilyOf(p.Addr()); !r.clusterCIDRs[f].IsValid() {
			r.clusterCIDRs[f] = p
		}
	}
	for i, s := range c.NodePortAddresses {
		switch s {
		case "primary":
			r.nodePorts = append(r.nodePorts, nil)
			continue
		case "localhost":
			r.addNodePorts("127.0.0.0/8", "::1/128")
			continue
		case "all":
			r.addNodePorts("0.0.0.0/0", "::/0")
			continue
		}
		if _, ok := parsePrefix(s); !ok {
			return r, fmt.Errorf("NodePortAddresses[%d]: %q is no CIDR, and neither primary, localhost nor all", i, s)
		}
		r.addNodePorts(s)
	}
	return r, nil
}

// addNodePorts adds prefixes that can be read.
func (r *rules) addNodePorts(list ...string) {
	for _, s := range list {
		p, _ := parsePrefix(s)
		r.nodePorts = append(r.nodePorts, &p)
	}
}

// checkMode checks what tells pods' packets.
func (c *Config) checkMode() error {
	switch c.DetectLocal {
	case ModeNone, ModeClusterCIDR, ModeNodeCIDR:
	case ModeBridgeInterface:
		if c.BridgeInterface == "" {
			return fmt.Errorf("BridgeInterface is empty, with DetectLocal %s", c.DetectLocal)
		}
	case ModeInterfaceNamePrefix:
		if c.InterfaceNamePrefix == "" {
			return fmt.Errorf("InterfaceNamePrefix is empty, with DetectLocal %s", c.DetectLocal)
		}
	default:
		return fmt.Errorf("DetectLocal: %q is none of %s, %s, %s, %s", c.DetectLocal,
			ModeClusterCIDR, ModeNodeCIDR, ModeBridgeInterface, ModeInterfaceNamePrefix)
	}
	return nil
}

// nodeIP is the address that the node has for itself; loopback where none is known, as in kube-proxy.
func (r *rules) nodeIP(n *nodeFacts, f Family) netip.Addr {
	switch {
	case r.bind.IsValid() && FamilyOf(r.bind) == f:
		return r.bind
	case n.ips[f].IsValid():
		return n.ips[f]
	case f == IPv4:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// globals is what goes for all Services.
func globals(c *Config, r *rules, n *nodeFacts, cidrs []netip.Prefix) Globals {
	var g Globals
	for f := range Family(Families) {
		if !r.enabled[f] {
			continue
		}
		g.Family[f] = FamilyGlobals{
			Enabled:   true,
			Detector:  c.detector(r, n, f),
			NodePorts: c.nodePorts(r, n, f),
		}
		for _, p := range cidrs {
			if FamilyOf(p.Addr()) == f {
				g.Family[f].ServiceCIDRs = append(g.Family[f].ServiceCIDRs, p)
			}
		}
		g.Family[f].ServiceCIDRs = tidy(g.Family[f].ServiceCIDRs)
	}
	return g
}

// detector is what tells pods' packets in a family.
func (c *Config) detector(r *rules, n *nodeFacts, f Family) Detector {
	switch c.DetectLocal {
	case ModeClusterCIDR:
		return Detector{CIDR: r.clusterCIDRs[f]}
	case ModeNodeCIDR:
		return Detector{CIDR: n.podCIDRs[f]}
	case ModeBridgeInterface:
		return Detector{Interface: c.BridgeInterface}
	case ModeInterfaceNamePrefix:
		return Detector{InterfacePrefix: c.InterfaceNamePrefix}
	}
	return Detector{}
}

// Implemented is whether it can tell packets at all.
func (d Detector) Implemented() bool { return d != Detector{} }

// Pod is whether a packet is taken for a pod's: its source, and the interface it came in by (none for the node's own).
func (d Detector) Pod(src netip.Addr, iface string) bool {
	switch {
	case d.CIDR.IsValid():
		return d.CIDR.Contains(src)
	case d.Interface != "":
		return iface == d.Interface
	case d.InterfacePrefix != "":
		return strings.HasPrefix(iface, d.InterfacePrefix)
	}
	return false
}

// nodePorts is where node ports are served in a family.
func (c *Config) nodePorts(r *rules, n *nodeFacts, f Family) NodePortAddresses {
	var list []netip.Prefix
	for _, p := range r.nodePorts {
		if p == nil {
			ip := r.nodeIP(n, f)
			if ip.IsLoopback() {
				continue
			}
			list = append(list, netip.PrefixFrom(ip, ip.BitLen()))
		} else if FamilyOf(p.Addr()) == f {
			list = append(list, *p)
		}
	}
	all := netip.PrefixFrom(unspecified(f), 0)
	for _, p := range list {
		if whole(p) {
			list = nil
			break
		}
	}
	if len(list) == 0 {
		list = []netip.Prefix{all}
	}
	a := NodePortAddresses{Prefixes: tidy(list)}
	if c.LoopbackNodePorts && f == IPv4 {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 0})
		for _, p := range list {
			a.Loopback = a.Loopback || p.Addr().IsLoopback() || p.Contains(loopback)
		}
	}
	return a
}

// Match is whether node ports are served at an address that the node has.
func (a NodePortAddresses) Match(ip netip.Addr) bool {
	return within(a.Prefixes, ip) && (a.Loopback || !ip.IsLoopback())
}

package nodetest

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/berth-run/berth/proxy/model"
)

// Family is what a test needs to say the same about IPv4 and IPv6.
type Family struct {
	Name                   string
	Of                     model.Family
	TCP, UDP               string
	Pod                    func(int) string
	PodIP                  func(int) string
	Node, Client           string // addresses
	Cluster, Other, LoadIP string // a cluster IP, one that no Service has, and an address of a load balancer
	Wide, Narrow           string // a prefix with the client, and one without
}

// Families are both.
var Families = []Family{
	{"IPv4", model.IPv4, "tcp4", "udp4", Pod4, PodIP4, NodeIP4, ClientIP4, "10.96.0.1", "10.96.9.9", "203.0.113.1", "192.0.2.0/24", "198.51.100.0/24"},
	{"IPv6", model.IPv6, "tcp6", "udp6", Pod6, PodIP6, NodeIP6, ClientIP6, "fd96::1", "fd96::9", "fd03::1", "fd02::/64", "fd04::/64"},
}

// At joins an address and a port.
func At(ip string, port int) string { return net.JoinHostPort(ip, fmt.Sprint(port)) }

// NodePort is a frontend at a port of the node.
func (f Family) NodePort(port int) model.Frontend {
	any := netip.IPv4Unspecified()
	if f.Of == model.IPv6 {
		any = netip.IPv6Unspecified()
	}
	return model.Frontend{Kind: model.NodePort, Addr: netip.AddrPortFrom(any, uint16(port)), Action: model.Forward, Masquerade: model.Always}
}

// LoadBalancer is a frontend at LoadIP.
func (f Family) LoadBalancer(port int) model.Frontend {
	return model.Frontend{Kind: model.LoadBalancer, Addr: netip.MustParseAddrPort(At(f.LoadIP, port)), Action: model.Forward, Masquerade: model.Always}
}

// LocalPolicy is a frontend with externalTrafficPolicy Local.
func LocalPolicy(f model.Frontend) model.Frontend {
	f.Policy, f.Masquerade, f.ShortCircuit = model.Local, model.Never, true
	return f
}

// Pods are endpoints for PortOf.
func (f Family) Pods(n ...int) (all []string) {
	for _, i := range n {
		all = append(all, f.Pod(i))
	}
	return all
}

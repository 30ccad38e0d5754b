//go:build integration

package model

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// What is asked of kube-proxy, in integration/tools/kubernetes/kubeproxy: this file is compiled there, too, and talks of strings, since
// that knows nothing of berth. One JSON object asks, one answers.

// clusterQuestion is what a cluster is like now, and packets whose fate there is asked for.
type clusterQuestion struct {
	// Config is what kube-proxy was started with; one that differs from that of the last question starts another.
	Config kubeProxyConfig
	// Node is the node's; nil for none.
	Node *corev1.Node
	// NodeIPs are all addresses that the node has.
	NodeIPs []string
	// Services and Slices are all that the API server has, with those that kube-proxy does not look after. Those that are as in the
	// last question are not told again.
	Services     []*corev1.Service
	Slices       []*discoveryv1.EndpointSlice
	ServiceCIDRs []string
	Packets      []packetQuestion
}

// kubeProxyConfig is kube-proxy's configuration, as far as rules depend on it.
type kubeProxyConfig struct {
	NodeName                             string
	IPv4, IPv6                           bool
	BindAddress                          string
	MasqueradeAll                        bool
	DetectLocal                          string
	ClusterCIDRs                         []string
	BridgeInterface, InterfaceNamePrefix string
	NodePortAddresses                    []string
	NoExternalIPs                        bool
}

// packetQuestion is the first packet of a connection.
type packetQuestion struct {
	Src, Dst string
	Protocol string // tcp, udp, sctp
	Port     uint16
	// Interface is what it came in by; empty for what the node itself sends.
	Interface string
	// Pinned is an endpoint that session affinity has sent this client to before, whichever Service that was.
	Pinned string
}

// clusterAnswer is what becomes of each packet.
type clusterAnswer struct {
	Fates []packetFate
	// Error is why there is none: kube-proxy's rules could not be made, or followed.
	Error string
}

// packetFate is what becomes of a packet.
type packetFate struct {
	// Action is pass, forward, reject or drop; forward has Endpoints, sorted, as often as they are in kube-proxy's rules.
	Action    string
	Endpoints []endpointFate
	// Affinity is the timeout of its session affinity in seconds; 0 without.
	Affinity int
	// Rules are those that matched.
	Rules []string
}

// endpointFate is where a packet goes, and whether it does so with another source address.
type endpointFate struct {
	Endpoint   string
	Masquerade bool
}

// flowTable is one of the tables of kube-proxy's own tests, with what its proxier was told of.
type flowTable struct {
	Test string
	// Bare is whether there was no proxier: the tracer alone is tested, with rules that were written for that.
	Bare               bool
	IPv6               bool
	NodeName, NodeIP   string
	NodeIPs            []string
	MasqueradeAll      bool
	LocalhostNodePorts bool
	// NodePortAddresses is a list as Go prints it.
	NodePortAddresses string
	// ServiceCIDRs are joined by commas.
	ServiceCIDRs string
	// Local is the match for pods' packets in nft's words; none if there is no detector.
	Local    []string
	Labels   map[string]string
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	Cases    []flowCase
}

// flowCase is a packet, and endpoints joined by commas, or REJECT, DROP, or nothing.
type flowCase struct {
	Name, Src, Protocol, Dst string
	Port                     uint16
	Output                   string
	Masquerade               bool
}

// endpointFacts is what kube-proxy knows of an endpoint.
type endpointFacts struct {
	Endpoint                           string
	Local, Ready, Serving, Terminating bool
	Zones, Nodes                       []string
}

// choice is a question of CategorizeEndpoints in kube-proxy's own tests, and its answer: which of a port's endpoints are used.
type choice struct {
	NodeName, Zone                          string
	InternalLocal, ExternalLocal, Reachable bool
	UsesCluster, UsesLocal                  bool
	// NodeHints is whether hints for nodes are followed (the feature gate PreferSameTrafficDistribution).
	NodeHints      bool
	Endpoints      []endpointFacts
	Cluster, Local []string
	Any            bool
}

// joined is what kube-proxy's own tests have it make of a Service's slices: endpoints by port's name and protocol, joined by a slash.
type joined struct {
	NodeName  string
	Slices    []*discoveryv1.EndpointSlice
	Endpoints map[string][]endpointFacts
}

// proxyTable is one of the two.
type proxyTable struct {
	Choice *choice
	Joined *joined
}

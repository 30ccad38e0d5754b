package kubeproxy

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// ClusterQuestion is what a cluster is like now, and packets whose fate there is asked for.
type ClusterQuestion struct {
	// Config is what kube-proxy was started with; one that differs from that of the last question starts another.
	Config ProxyConfig
	// Node is the node's; nil for none.
	Node *corev1.Node
	// NodeIPs are all addresses that the node has.
	NodeIPs []string
	// Services and Slices are all that the API server has, with those that kube-proxy does not look after. Those that are as in the
	// last question are not told again.
	Services     []*corev1.Service
	Slices       []*discoveryv1.EndpointSlice
	ServiceCIDRs []string
	Packets      []PacketQuestion
	// Rules asks for the rules, too.
	Rules bool
}

// ProxyConfig is kube-proxy's configuration, as far as rules depend on it, in the words of model.Config.
type ProxyConfig struct {
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

// PacketQuestion is the first packet of a connection.
type PacketQuestion struct {
	Src, Dst string
	Protocol string // tcp, udp, sctp
	Port     uint16
	// Interface is what it came in by; empty for what the node itself sends.
	Interface string
	// Pinned is an endpoint that session affinity has sent this client to before, whichever Service that was.
	Pinned string
}

// ClusterAnswer is what becomes of each packet.
type ClusterAnswer struct {
	Fates []PacketFate
	// Rules are all of kube-proxy's tables, as nft reads them; in mode iptables as iptables-restore does, those of each family after
	// a line that is its name in a comment.
	Rules string
	// Error is why there is none: kube-proxy's rules could not be made, or followed.
	Error string
}

// PacketFate is what becomes of a packet.
type PacketFate struct {
	// Action is pass, forward, reject or drop; forward has Endpoints, sorted, as often as they are in kube-proxy's rules.
	Action    string
	Endpoints []EndpointFate
	// Affinity is the timeout of its session affinity in seconds; 0 without.
	Affinity int
	// Rules are those that matched.
	Rules []string
}

// EndpointFate is where a packet goes, and whether it does so with another source address.
type EndpointFate struct {
	Endpoint   string
	Masquerade bool
}

// FlowTable is one of the tables of kube-proxy's own tests, with what its proxier was told of.
type FlowTable struct {
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
	// ServiceCIDRs are Joined by commas.
	ServiceCIDRs string
	// Local is the match for pods' packets in nft's words; none if there is no detector.
	Local    []string
	Labels   map[string]string
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	Cases    []FlowCase
}

// FlowCase is a packet, and endpoints Joined by commas, or REJECT, DROP, or nothing.
type FlowCase struct {
	Name, Src, Protocol, Dst string
	Port                     uint16
	Output                   string
	Masquerade               bool
}

// EndpointFacts is what kube-proxy knows of an endpoint.
type EndpointFacts struct {
	Endpoint                           string
	Local, Ready, Serving, Terminating bool
	Zones, Nodes                       []string
}

// Choice is a question of CategorizeEndpoints in kube-proxy's own tests, and its answer: which of a port's endpoints are used.
type Choice struct {
	NodeName, Zone                          string
	InternalLocal, ExternalLocal, Reachable bool
	UsesCluster, UsesLocal                  bool
	// NodeHints is whether hints for nodes are followed (the feature gate PreferSameTrafficDistribution).
	NodeHints      bool
	Endpoints      []EndpointFacts
	Cluster, Local []string
	Any            bool
}

// Joined is what kube-proxy's own tests have it make of a Service's slices: endpoints by port's name and protocol, Joined by a slash.
type Joined struct {
	NodeName  string
	Slices    []*discoveryv1.EndpointSlice
	Endpoints map[string][]EndpointFacts
}

// ProxyTable is one of the two.
type ProxyTable struct {
	Choice *Choice
	Joined *Joined
}

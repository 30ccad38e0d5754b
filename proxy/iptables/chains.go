package iptables

import (
	"crypto/sha256"
	"encoding/base32"
	"slices"
	"strings"

	"github.com/berth-run/berth/proxy/model"
)

// table is a table of the kernel. They are committed in this order: what rejects is there before nothing else is.
type table uint8

const (
	mangle table = iota // has the canary alone
	filter
	nat
	tables = 3
)

func (t table) String() string { return [tables]string{"mangle", "filter", "nat"}[t] }

// chain is a chain of a table, by name.
type chain struct {
	table table
	name  string
}

// Chains that all Services share. Their names are kube-proxy's, but for clusterIPs and rejects.
const (
	services         = "KUBE-SERVICES"
	externalServices = "KUBE-EXTERNAL-SERVICES"
	nodePorts        = "KUBE-NODEPORTS"
	postrouting      = "KUBE-POSTROUTING"
	markMasq         = "KUBE-MARK-MASQ"
	forward          = "KUBE-FORWARD"
	proxyFirewall    = "KUBE-PROXY-FIREWALL"
	clusterIPs       = "KUBE-CLUSTER-IPS"
	rejects          = "KUBE-REJECT"
	canary           = "KUBE-PROXY-CANARY"
	// kubeletFirewall is the kubelet's. It has one rule, which the proxy puts there, too.
	kubeletFirewall = "KUBE-FIREWALL"
	kubeletCanary   = "KUBE-KUBELET-CANARY"
)

// What names of chains of a Service's port begin with: its endpoints under each policy, what comes from outside, who may send to
// a load balancer, and an endpoint.
const (
	clusterChain  = "KUBE-SVC-"
	localChain    = "KUBE-SVL-"
	externalChain = "KUBE-EXT-"
	firewallChain = "KUBE-FW-"
	endpointChain = "KUBE-SEP-"
)

// hash is the end of the name of a chain: such a name has 28 characters at most.
func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "")))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// portName is what a port of a Service is called.
func portName(s *model.Service, p *model.Port) string {
	if p.Name == "" {
		return s.Name.String()
	}
	return s.Name.String() + ":" + p.Name
}

func protocolName(p model.Protocol) string {
	switch p {
	case model.UDP:
		return "udp"
	case model.SCTP:
		return "sctp"
	}
	return "tcp"
}

// isService tells chains of single Services, also those of former versions of kube-proxy.
func isService(name string) bool {
	return slices.ContainsFunc([]string{clusterChain, localChain, externalChain, firewallChain, endpointChain, "KUBE-XLB-"},
		func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// isProxys tells the chains of a proxy, berth's or kube-proxy's in modes iptables and ipvs, from the kubelet's (KUBE-FIREWALL,
// KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT, KUBE-MARK-DROP) and those of others.
func isProxys(name string) bool {
	switch name {
	case services, externalServices, nodePorts, postrouting, markMasq, forward, proxyFirewall, clusterIPs, rejects, canary,
		"KUBE-LOAD-BALANCER", "KUBE-NODE-PORT", "KUBE-SOURCE-RANGES-FIREWALL", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER":
		return true
	}
	return isService(name)
}

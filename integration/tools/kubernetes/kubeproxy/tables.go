package nftables

import (
	"sync"
	"testing"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"sigs.k8s.io/knftables"
)

// What their tests are about: kubeproxy.sh has given the functions theirs_ names, so that these here are called in their place.

var tables struct {
	sync.Mutex
	clusters map[*Proxier]*tableCluster
	proxiers map[*knftables.Fake]*Proxier
}

// tableCluster is what a proxier of a test was told of.
type tableCluster struct {
	services map[string]*v1.Service
	slices   map[string]*discovery.EndpointSlice
}

func NewFakeProxier(family v1.IPFamily) (*knftables.Fake, *Proxier) {
	nft, p := theirs_NewFakeProxier(family)
	tables.Lock()
	defer tables.Unlock()
	if tables.clusters == nil {
		tables.clusters, tables.proxiers = map[*Proxier]*tableCluster{}, map[*knftables.Fake]*Proxier{}
	}
	tables.clusters[p] = &tableCluster{map[string]*v1.Service{}, map[string]*discovery.EndpointSlice{}}
	tables.proxiers[nft] = p
	return nft, p
}

func note(p *Proxier, do func(*tableCluster)) {
	tables.Lock()
	defer tables.Unlock()
	if c := tables.clusters[p]; c != nil {
		do(c)
	}
}

func (proxier *Proxier) OnServiceUpdate(old, now *v1.Service) {
	proxier.theirs_OnServiceUpdate(old, now)
	note(proxier, func(c *tableCluster) {
		if old != nil {
			delete(c.services, old.Namespace+"/"+old.Name)
		}
		if now != nil {
			c.services[now.Namespace+"/"+now.Name] = now.DeepCopy()
		}
	})
}

func (proxier *Proxier) OnEndpointSliceAdd(s *discovery.EndpointSlice) {
	proxier.theirs_OnEndpointSliceAdd(s)
	note(proxier, func(c *tableCluster) { c.slices[s.Namespace+"/"+s.Name] = s.DeepCopy() })
}

func (proxier *Proxier) OnEndpointSliceUpdate(old, s *discovery.EndpointSlice) {
	proxier.theirs_OnEndpointSliceUpdate(old, s)
	note(proxier, func(c *tableCluster) { c.slices[s.Namespace+"/"+s.Name] = s.DeepCopy() })
}

func (proxier *Proxier) OnEndpointSliceDelete(s *discovery.EndpointSlice) {
	proxier.theirs_OnEndpointSliceDelete(s)
	note(proxier, func(c *tableCluster) { delete(c.slices, s.Namespace+"/"+s.Name) })
}

// runPacketFlowTests notes a table of theirs with the cluster that it is about, one JSON object a line, in the file that
// BERTH_TABLES names.
func runPacketFlowTests(t *testing.T, line string, nft *knftables.Fake, nodeIPs []string, cases []packetFlowTest) {
	theirs_runPacketFlowTests(t, line, nft, nodeIPs, cases)
	tables.Lock()
	defer tables.Unlock()
	table := FlowTable{Test: t.Name(), Bare: true}
	if p := tables.proxiers[nft]; p != nil {
		table = tables.clusters[p].table(p)
		table.Test, table.NodeIPs = t.Name(), nodeIPs
	}
	for _, tc := range cases {
		table.Cases = append(table.Cases, FlowCase{
			Name: tc.name, Src: tc.sourceIP, Protocol: string(tc.protocol), Dst: tc.destIP, Port: uint16(tc.destPort), Output: tc.output, Masquerade: tc.masq,
		})
	}
	writeTable(table)
}

func (c *tableCluster) table(p *Proxier) FlowTable {
	table := FlowTable{
		IPv6: p.ipFamily == v1.IPv6Protocol, NodeName: p.nodeName, NodeIP: p.nodeIP.String(), MasqueradeAll: p.masqueradeAll,
		NodePortAddresses: p.nodePortAddresses.String(), ServiceCIDRs: p.serviceCIDRs, Labels: p.topologyLabels,
		LocalhostNodePorts: p.localhostNodePortsEnabled,
	}
	if p.localDetector.IsImplemented() {
		table.Local = p.localDetector.IfLocalNFT()
	}
	for _, s := range c.services {
		table.Services = append(table.Services, s)
	}
	for _, s := range c.slices {
		table.Slices = append(table.Slices, s)
	}
	return table
}

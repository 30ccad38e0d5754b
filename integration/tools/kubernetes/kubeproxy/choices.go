package nftables

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/kubernetes/pkg/features"
)

// This file is for kube-proxy's package proxy: what its tests ask two of its functions, and what those answer. That the answers are right
// is what these tests see to.

func facts(list []Endpoint) []EndpointFacts {
	var out []EndpointFacts
	for _, e := range list {
		out = append(out, EndpointFacts{
			Endpoint: e.String(), Local: e.IsLocal(), Ready: e.IsReady(), Serving: e.IsServing(), Terminating: e.IsTerminating(),
			Zones: e.ZoneHints().UnsortedList(), Nodes: e.NodeHints().UnsortedList(),
		})
	}
	return out
}

func names(list []Endpoint) []string {
	out := make([]string, len(list))
	for i, e := range list {
		out[i] = e.String()
	}
	return out
}

func CategorizeEndpoints(endpoints []Endpoint, service ServicePort, node string, labels map[string]string) (cluster, local, all []Endpoint, some bool) {
	cluster, local, all, some = theirs_CategorizeEndpoints(endpoints, service, node, labels)
	writeTable(ProxyTable{Choice: &Choice{
		NodeName: node, Zone: labels[v1.LabelTopologyZone], InternalLocal: service.InternalPolicyLocal(), ExternalLocal: service.ExternalPolicyLocal(),
		Reachable: service.ExternallyAccessible(), UsesCluster: service.UsesClusterEndpoints(), UsesLocal: service.UsesLocalEndpoints(),
		NodeHints: utilfeature.DefaultFeatureGate.Enabled(features.PreferSameTrafficDistribution),
		Endpoints: facts(endpoints), Cluster: names(cluster), Local: names(local), Any: some,
	}})
	return cluster, local, all, some
}

func (cache *EndpointSliceCache) endpointInfoByServicePort(service types.NamespacedName, data endpointSliceDataByName) spToEndpointMap {
	out := cache.theirs_endpointInfoByServicePort(service, data)
	table := Joined{NodeName: cache.nodeName, Endpoints: map[string][]EndpointFacts{}}
	for _, d := range data {
		table.Slices = append(table.Slices, d.endpointSlice)
	}
	for port, endpoints := range out {
		for _, e := range endpoints {
			key := port.Port + "/" + string(port.Protocol)
			table.Endpoints[key] = append(table.Endpoints[key], facts([]Endpoint{e})...)
		}
	}
	writeTable(ProxyTable{Joined: &table})
	return out
}

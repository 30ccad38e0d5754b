//go:build integration

package integration

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// backend is an endpoint of a Service: a place, ready unless something else is said.
type backend struct {
	at     string // the name of a place
	port   int    // 0: 8080
	state  string // "", notReady, ending (serves while it terminates) or ended (does not)
	zones  string // hints
	onNode string // a hint, too
}

// service is a Service as users make it: of both families unless it says otherwise, with the ports tcp, udp and sctp, which are 80 of the
// Service and 8080 of its endpoints, and its number in all its addresses and ports.
type service struct {
	name     string
	number   int
	spec     map[string]any // beside or instead of what is the same for all
	labels   map[string]any
	ports    []map[string]any
	backends []backend
	proxied  bool // by its load balancer, which sends to node ports
}

type apiObject = map[string]any

// clusterIP and others are where a Service is reached.
func (s *service) clusterIP(family int) string {
	return fmt.Sprint([]string{"10.93.0.", "fd93::"}[family], s.number)
}

func (s *service) loadIP(family int) string {
	return fmt.Sprint([]string{"203.0.113.", "fd03::"}[family], s.number)
}

func (s *service) externalIP(family int) string {
	return fmt.Sprint([]string{"198.51.100.", "fd05::"}[family], s.number)
}
func (s *service) nodePort() int  { return 30000 + s.number }
func (s *service) checkPort() int { return 31000 + s.number }

// protocols are the ports of a Service that has no others. Nodeport is 0 for none.
func protocols(nodePort int) (ports []map[string]any) {
	for _, p := range []string{"tcp", "udp", "sctp"} {
		port := apiObject{"name": p, "protocol": strings.ToUpper(p), "port": 80, "targetPort": 8080}
		if nodePort != 0 {
			port["nodePort"] = nodePort
		}
		ports = append(ports, port)
	}
	return ports
}

// manifest is the Service's object.
func (s *service) manifest() apiObject {
	spec := apiObject{
		"ipFamilyPolicy": "RequireDualStack", "ipFamilies": []string{"IPv4", "IPv6"},
		"clusterIP": s.clusterIP(0), "clusterIPs": []string{s.clusterIP(0), s.clusterIP(1)},
	}
	maps.Copy(spec, s.spec)
	if s.ports == nil {
		nodePort := 0
		if t := spec["type"]; t != nil && spec["allocateLoadBalancerNodePorts"] != false {
			nodePort = s.nodePort()
		}
		s.ports = protocols(nodePort)
	}
	spec["ports"] = s.ports
	return apiObject{"apiVersion": "v1", "kind": "Service", "metadata": apiObject{"name": s.name, "labels": s.labels}, "spec": spec}
}

// slice is what the slice controller makes of a Service's pods, in a family.
func (w *proxyWorld) slice(s *service, family int) apiObject {
	var ports, endpoints []apiObject
	target := 0
	for _, p := range s.ports {
		target = p["targetPort"].(int)
		if len(s.backends) > 0 && s.backends[0].port != 0 {
			target = s.backends[0].port
		}
		ports = append(ports, apiObject{"name": p["name"], "protocol": p["protocol"], "port": target})
	}
	for _, b := range s.backends {
		e := apiObject{
			"addresses":  []string{w.places[b.at].addr[family]},
			"conditions": apiObject{"ready": b.state == "", "serving": b.state == "" || b.state == "ending", "terminating": b.state == "ending" || b.state == "ended"},
		}
		hints := apiObject{}
		if b.zones != "" {
			hints["forZones"] = []apiObject{{"name": b.zones}}
		}
		if b.onNode != "" {
			hints["forNodes"] = []apiObject{{"name": b.onNode}}
		}
		if len(hints) > 0 {
			e["hints"] = hints
		}
		node := w.nodeOf(b.at)
		e["nodeName"], e["zone"] = node.name, node.zone
		endpoints = append(endpoints, e)
	}
	labels := apiObject{"kubernetes.io/service-name": s.name}
	if s.spec["clusterIP"] == "None" {
		labels["service.kubernetes.io/headless"] = ""
	}
	return apiObject{
		"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": []string{"IPv4", "IPv6"}[family],
		"metadata": apiObject{"name": fmt.Sprintf("%s-%d", s.name, family), "labels": labels}, "ports": ports, "endpoints": endpoints,
	}
}

// nodeOf is the node that a pod is on; a node is on itself.
func (w *proxyWorld) nodeOf(place string) *worldNode {
	if strings.HasPrefix(place, "b") || place == "node-2" {
		return w.nodes[1]
	}
	return w.nodes[0]
}

// families are those of a Service.
func (s *service) families() []int {
	switch f, _ := s.spec["ipFamilies"].([]string); {
	case slices.Equal(f, []string{"IPv4"}):
		return []int{0}
	case slices.Equal(f, []string{"IPv6"}):
		return []int{1}
	}
	return []int{0, 1}
}

// serve makes a Service with its slices, and gives it the addresses of a load balancer.
func (w *proxyWorld) serve(s *service) {
	w.t.Helper()
	w.create(servicesPath, s.manifest())
	for _, f := range s.families() {
		w.create(slicesPath, w.slice(s, f))
	}
	if s.spec["type"] == "LoadBalancer" {
		mode := "VIP"
		if s.proxied {
			mode = "Proxy"
		}
		w.patch(servicesPath+"/"+s.name+"/status", apiObject{"status": apiObject{"loadBalancer": apiObject{"ingress": []apiObject{
			{"ip": s.loadIP(0), "ipMode": mode}, {"ip": s.loadIP(1), "ipMode": mode},
		}}}})
	}
}

// move gives a Service other endpoints.
func (w *proxyWorld) move(s *service, backends ...backend) {
	w.t.Helper()
	s.backends = backends
	for _, f := range s.families() {
		w.send(http.MethodPut, fmt.Sprintf("%s/%s-%d", slicesPath, s.name, f), "application/json", w.slice(s, f))
	}
}

// pods are backends that are ready.
func pods(names string) (all []backend) {
	for _, name := range strings.Fields(names) {
		all = append(all, backend{at: name})
	}
	return all
}

package model

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unique"

	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// slice is what the model keeps of an EndpointSlice.
type slice struct {
	name      string
	service   types.NamespacedName
	family    Family
	ports     []slicePort
	endpoints []sliceEndpoint
	// weight is that of its endpoints (WeightAnnotation).
	weight uint16
}

// slicePort is a port that all endpoints of a slice have.
type slicePort struct {
	name     unique.Handle[string]
	port     uint16
	protocol Protocol
}

// sliceEndpoint is one address of a slice. Which node it is on, and which nodes it is for, is kept for this node alone.
type sliceEndpoint struct {
	addr netip.Addr
	// zones are the zones it is for, each between two NULs, if hasZones is among the conditions.
	zones      unique.Handle[string]
	conditions conditions
	origin     origin
}

// conditions are the bits of an endpoint.
type conditions uint8

const (
	isLocal conditions = 1 << iota
	isReady
	isServing
	isTerminating
	// hasZones and hasNodes are hints for any zone or node, forNode is one for this node.
	hasZones
	hasNodes
	forNode
)

func (c conditions) all(of conditions) bool { return c&of == of }

// ends is whether an endpoint still serves while it terminates (KEP-1669).
func (c conditions) ends() bool { return c.all(isServing | isTerminating) }

// reduceSlice reads an EndpointSlice as the node of that name sees it; it is nil where there is nothing in it for a proxy.
func reduceSlice(s *discoveryv1.EndpointSlice, node string) (*slice, []Problem) {
	if _, headless := s.Labels[HeadlessLabel]; headless {
		return nil, nil
	}
	bad := problems{kind: "EndpointSlice", object: types.NamespacedName{Namespace: s.Namespace, Name: s.Name}}
	out := &slice{name: s.Name, service: types.NamespacedName{Namespace: s.Namespace, Name: s.Labels[discoveryv1.LabelServiceName]}, weight: 1}
	if out.service.Name == "" {
		// Slices may be made for other purposes than Services.
		return nil, nil
	}
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4:
	case discoveryv1.AddressTypeIPv6:
		out.family = IPv6
	case discoveryv1.AddressTypeFQDN:
		return nil, nil
	default:
		bad.add("addressType", string(s.AddressType), "is none of IPv4, IPv6, FQDN; the slice is left out")
		return nil, bad.list
	}
	if text, ok := s.Annotations[WeightAnnotation]; ok {
		if w, err := readWeight(text); err != nil {
			bad.add(annotation(WeightAnnotation), text, err.Error()+"; it is taken for 1")
		} else {
			out.weight = w
		}
	}
	out.readPorts(s, &bad)
	out.readEndpoints(s, node, &bad)
	return out, bad.list
}

func (out *slice) readPorts(s *discoveryv1.EndpointSlice, bad *problems) {
	out.ports = make([]slicePort, 0, len(s.Ports))
	for i, p := range s.Ports {
		if p.Name == nil || p.Port == nil {
			// No port is any port, which no Service can be served by.
			bad.at("ports", i, "", "", "has no name or no port; it is left out")
			continue
		}
		proto, ok := TCP, true
		if p.Protocol != nil {
			proto, ok = parseProtocol(*p.Protocol)
		}
		switch {
		case !ok:
			bad.at("ports", i, ".protocol", string(*p.Protocol), "is none of TCP, UDP, SCTP; the port is left out")
		case *p.Port < 1 || *p.Port > 65535:
			bad.at("ports", i, ".port", strconv.Itoa(int(*p.Port)), "is not between 1 and 65535; the port is left out")
		default:
			out.ports = append(out.ports, slicePort{unique.Make(*p.Name), uint16(*p.Port), proto})
		}
	}
}

func (out *slice) readEndpoints(s *discoveryv1.EndpointSlice, node string, bad *problems) {
	out.endpoints = make([]sliceEndpoint, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if len(e.Addresses) == 0 {
			bad.at("endpoints", i, ".addresses", "", "is empty; the endpoint is left out")
			continue
		}
		// More addresses than one have no meaning (discovery/v1).
		ip, ok := parseAddr(e.Addresses[0])
		switch {
		case !ok:
			bad.at("endpoints", i, ".addresses[0]", e.Addresses[0], "is no IP address; the endpoint is left out")
			continue
		case FamilyOf(ip) != out.family:
			bad.at("endpoints", i, ".addresses[0]", e.Addresses[0], "is no "+out.family.String()+" address; the endpoint is left out")
			continue
		case special(ip) != "":
			bad.at("endpoints", i, ".addresses[0]", e.Addresses[0], special(ip)+"; the endpoint is left out")
			continue
		}
		se := sliceEndpoint{addr: ip, conditions: readConditions(e, node), origin: originOf(e)}
		if zones := readZones(e, i, bad); zones != "" {
			se.zones, se.conditions = unique.Make(zones), se.conditions|hasZones
		}
		out.endpoints = append(out.endpoints, se)
	}
}

// readConditions reads what is not said as discovery/v1 has it: ready, and serving, and not terminating.
func readConditions(e *discoveryv1.Endpoint, node string) conditions {
	var c conditions
	set := func(bit conditions, v bool) {
		if v {
			c |= bit
		}
	}
	set(isLocal, e.NodeName != nil && *e.NodeName == node)
	set(isReady, e.Conditions.Ready == nil || *e.Conditions.Ready)
	set(isServing, e.Conditions.Serving == nil || *e.Conditions.Serving)
	set(isTerminating, e.Conditions.Terminating != nil && *e.Conditions.Terminating)
	if e.Hints != nil {
		set(hasNodes, len(e.Hints.ForNodes) > 0)
		set(forNode, slices.ContainsFunc(e.Hints.ForNodes, func(n discoveryv1.ForNode) bool { return n.Name == node }))
	}
	return c
}

// readZones joins the zones that an endpoint is for; none is the empty string.
func readZones(e *discoveryv1.Endpoint, index int, bad *problems) string {
	if e.Hints == nil || len(e.Hints.ForZones) == 0 {
		return ""
	}
	var b strings.Builder
	for _, z := range e.Hints.ForZones {
		if strings.Contains(z.Name, "\x00") || len(z.Name) > 63 {
			bad.at("endpoints", index, ".hints.forZones", z.Name, "is no name of a zone; it is left out")
			continue
		}
		b.WriteString("\x00" + z.Name + "\x00")
	}
	return b.String()
}

// inZone is whether a hint names the zone.
func (e *sliceEndpoint) inZone(zone string) bool {
	return e.conditions.all(hasZones) && strings.Contains(e.zones.Value(), "\x00"+zone+"\x00")
}

// equal is whether two slices are the same to the model.
func (out *slice) equal(o *slice) bool {
	if out == nil || o == nil {
		return out == o
	}
	return out.service == o.service && out.family == o.family && out.weight == o.weight &&
		slices.Equal(out.ports, o.ports) && slices.Equal(out.endpoints, o.endpoints)
}

//go:build integration

package model

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/integration/kubeproxy"
)

// The node's addresses in these worlds: its own, and some of load balancers, external IPs and the range of cluster IPs.
var worldNodeIPs = []string{
	"127.0.0.1", "::1", "192.168.0.1", "192.168.0.2", "192.168.9.9", "10.9.9.9", "fd00::1", "fd09::9", "5.5.5.5", "1.1.1.1", "fd99::5",
	"172.30.0.22", "172.30.7.7", "fd30::22",
}

// tidied is the world with nothing in it that kube-proxy decides by chance: no address and port that two ports or Services claim, and none
// that is twice in a Service's slices. All else stays.
func (o *objects) tidied() *objects {
	out := newObjects(o.config)
	out.node, out.cidrs = o.node, o.cidrs
	for i, name := range slices.SortedFunc(maps.Keys(o.services), compareNames) {
		s := o.services[name].DeepCopy()
		own := func(ip string) string {
			// The last part of the address becomes the Service's own.
			if cut := strings.LastIndexAny(ip, ".:"); cut >= 0 && !strings.HasPrefix(ip, "192.168.") {
				return ip[:cut+1] + strconv.Itoa(i*20+int(ip[len(ip)-1]-'0'))
			}
			return ip
		}
		s.Spec.ClusterIP = own(s.Spec.ClusterIP)
		for _, list := range [][]string{s.Spec.ClusterIPs, s.Spec.ExternalIPs} {
			for j := range list {
				list[j] = own(list[j])
			}
		}
		var in []corev1.LoadBalancerIngress
		for _, lb := range s.Status.LoadBalancer.Ingress {
			if lb.IP = own(lb.IP); !strings.HasPrefix(lb.IP, "192.168.") || i == 0 {
				in = append(in, lb)
			}
		}
		s.Status.LoadBalancer.Ingress = in
		for j := range s.Spec.Ports {
			p := &s.Spec.Ports[j]
			p.Port += int32(j)
			if p.NodePort != 0 {
				p.NodePort = int32(30000 + 10*i + j)
			}
		}
		out.services[name] = s
	}
	for name, s := range o.slices {
		s = s.DeepCopy()
		seen := map[string]bool{}
		var list []discoveryv1.Endpoint
		for _, e := range s.Endpoints {
			// Each slice has addresses of its own: 10.1.2.7, fd10:1::207.
			host := e.Addresses[0][len(e.Addresses[0])-1:]
			if s.AddressType == discoveryv1.AddressTypeIPv4 {
				e.Addresses = []string{"10.1." + name.Name[len(name.Name)-1:] + "." + host}
			} else {
				e.Addresses = []string{"fd10:1::" + name.Name[len(name.Name)-1:] + "0" + host}
			}
			if !seen[host] {
				seen[host] = true
				list = append(list, e)
			}
		}
		s.Endpoints = list
		out.slices[name] = s
	}
	return out
}

// valid is the world without what no API server or controller does: Services' ports that are there twice, a slice's endpoints of the other
// family, a slice that becomes one of the other family, and one that becomes another Service's, which kube-proxy leaves with the first one
// until it is deleted; and without annotations, by which berth does what kube-proxy does not.
func (o *objects) valid() *objects {
	out := newObjects(o.config)
	out.node, out.cidrs = o.node, maps.Clone(o.cidrs)
	for name, s := range o.slices {
		s = s.DeepCopy()
		s.Annotations = nil
		s.Endpoints = slices.DeleteFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool {
			return strings.Contains(e.Addresses[0], ":") != (s.AddressType == discoveryv1.AddressTypeIPv6)
		})
		if s.Labels[discoveryv1.LabelServiceName] == "dns" {
			// Of one Service none is ready, so that those that end are asked for.
			for i := range s.Endpoints {
				s.Endpoints[i].Conditions.Ready = ptr(false)
			}
		}
		s.Name = s.Labels[discoveryv1.LabelServiceName] + "." + strings.ToLower(string(s.AddressType)) + "." + s.Name
		out.slices[types.NamespacedName{Namespace: name.Namespace, Name: s.Name}] = s
	}
	for name, s := range o.services {
		s = s.DeepCopy()
		s.Annotations = nil
		seen := map[string]bool{}
		s.Spec.Ports = slices.DeleteFunc(s.Spec.Ports, func(p corev1.ServicePort) bool {
			keys := []string{p.Name, string(p.Protocol) + strconv.Itoa(int(p.Port)), string(p.Protocol) + strconv.Itoa(int(p.NodePort))}
			if p.NodePort == 0 {
				keys = keys[:2]
			}
			twice := slices.ContainsFunc(keys, func(k string) bool { return seen[k] })
			for _, k := range keys {
				seen[k] = seen[k] || !twice
			}
			return twice
		})
		out.services[name] = s
	}
	return out
}

// tell brings a model from one world to another.
func tell(m *Model, from, to *objects) error {
	if err := m.SetConfig(to.config); err != nil {
		return err
	}
	m.SetNode(to.node)
	for name := range from.cidrs {
		if to.cidrs[name] == nil {
			m.DeleteServiceCIDR(name)
		}
	}
	for name := range from.services {
		if to.services[name] == nil {
			m.DeleteService(name)
		}
	}
	for name := range from.slices {
		if to.slices[name] == nil {
			m.DeleteSlice(name)
		}
	}
	for _, c := range to.cidrs {
		m.SetServiceCIDR(c)
	}
	for _, s := range to.services {
		m.SetService(s)
	}
	for _, s := range to.slices {
		m.SetSlice(s)
	}
	return nil
}

// question is the world in kube-proxy's words.
func (o *objects) question() (*kubeproxy.ClusterQuestion, error) {
	c, err := kubeproxy.ConfigOf(o.config)
	if err != nil {
		return nil, err
	}
	q := &kubeproxy.ClusterQuestion{Config: c, Node: o.node, NodeIPs: worldNodeIPs}
	for _, name := range slices.SortedFunc(maps.Keys(o.services), compareNames) {
		q.Services = append(q.Services, o.services[name])
	}
	for _, name := range slices.SortedFunc(maps.Keys(o.slices), compareNames) {
		q.Slices = append(q.Slices, o.slices[name])
	}
	for _, name := range slices.Sorted(maps.Keys(o.cidrs)) {
		q.ServiceCIDRs = append(q.ServiceCIDRs, o.cidrs[name].Spec.CIDRs...)
	}
	return q, nil
}

// destinations are addresses and ports that somebody may have something to do with, each once.
func (o *objects) destinations() []place {
	all := map[place]bool{}
	add := func(ip string, port int32, p Protocol) {
		if a, ok := parseAddr(ip); ok {
			all[place{a, uint16(port), p}] = true
		}
	}
	for _, s := range o.services {
		ips := slices.Concat(s.Spec.ClusterIPs, s.Spec.ExternalIPs, []string{s.Spec.ClusterIP})
		for _, in := range s.Status.LoadBalancer.Ingress {
			ips = append(ips, in.IP)
		}
		for _, p := range s.Spec.Ports {
			proto, _ := parseProtocol(p.Protocol)
			for _, ip := range ips {
				add(ip, p.Port, proto)
				add(ip, 9, proto)
				add(ip, p.NodePort, proto)
			}
			for _, ip := range worldNodeIPs {
				add(ip, p.NodePort, proto)
				add(ip, p.Port, proto)
			}
		}
	}
	for _, ip := range []string{"172.30.7.7", "172.31.0.7", "fd30::777", "10.1.1.1", "fd10:1::101", "203.0.113.9", "127.0.0.5"} {
		for _, p := range []Protocol{TCP, UDP, SCTP} {
			add(ip, int32(53), p)
			add(ip, 80, p)
		}
	}
	return slices.SortedFunc(maps.Keys(all), func(a, b place) int {
		if c := a.addr.Compare(b.addr); c != 0 {
			return c
		}
		return (int(a.port)-int(b.port))*1000 + int(a.protocol) - int(b.protocol)
	})
}

// from is a packet from somewhere.
func (r chance) from(to place) Packet {
	p := Packet{Dst: to.addr, Port: to.port, Protocol: to.protocol, DstLocal: slices.Contains(worldNodeIPs, to.addr.String())}
	var src string
	slice, host := 1+r.IntN(3), 1+r.IntN(9)
	if to.addr.Is4() {
		src = one(r, fmt.Sprintf("10.1.%d.%d", slice, host), fmt.Sprintf("10.1.0.%d", host), "10.2.0.5", "198.51.100.7", "192.168.0.77",
			one(r, "192.168.0.1", "10.9.9.9", "5.5.5.5", "127.0.0.1"))
	} else {
		src = one(r, fmt.Sprintf("fd10:1::%d0%d", slice, host), fmt.Sprintf("fd10:1::%d", host), "fd10:2::5", "2001:db8::7", "fd00::77",
			one(r, "fd00::1", "fd09::9", "fd99::5", "::1"))
	}
	p.Src = netip.MustParseAddr(src)
	if p.SrcLocal = slices.Contains(worldNodeIPs, src); !p.SrcLocal {
		p.Interface = one(r, "eth0", "cni0", "veth12")
	}
	return p
}

// plainConfig is a configuration of kube-proxy's nftables mode.
func (r chance) plainConfig() Config {
	c := r.config()
	c.LoopbackNodePorts = false
	return c
}

// change is a step of the world alone.
func (o *objects) change(r chance) error {
	m, err := New(o.config)
	if err != nil {
		return err
	}
	o.step(nil, r, m)
	o.config.LoopbackNodePorts = false
	return nil
}

// slicesOf are a Service's slices and the node's labels, for people.
func (o *objects) slicesOf(service types.NamespacedName) string {
	var b bytes.Buffer
	if o.node != nil {
		fmt.Fprintf(&b, "node labels %v\n", o.node.Labels)
	}
	for _, name := range slices.SortedFunc(maps.Keys(o.slices), compareNames) {
		if s := o.slices[name]; s.Namespace == service.Namespace && s.Labels[discoveryv1.LabelServiceName] == service.Name {
			_ = json.NewEncoder(&b).Encode(s)
		}
	}
	return b.String()
}

// ends is whether the first endpoint of a verdict is one that is not ready: none is then.
func (o *objects) ends(v *Verdict) bool {
	if len(v.Endpoints) == 0 {
		return false
	}
	for _, s := range o.slices {
		if s.Namespace == v.Service.Namespace && s.Labels[discoveryv1.LabelServiceName] == v.Service.Name {
			for _, e := range s.Endpoints {
				if e.Addresses[0] == v.Endpoints[0].Addr.String() {
					return e.Conditions.Ready != nil && !*e.Conditions.Ready
				}
			}
		}
	}
	return false
}

// scattered is whether an address is an endpoint of this node in one slice, and none in another.
func (o *objects) scattered(a netip.Addr) bool {
	var here, elsewhere bool
	for _, s := range o.slices {
		for _, e := range s.Endpoints {
			if e.Addresses[0] == a.String() {
				local := e.NodeName != nil && *e.NodeName == o.config.NodeName
				here, elsewhere = here || local, elsewhere || !local
			}
		}
	}
	return here && elsewhere
}

// ambiguous is whether an address is in a Service's slices more than once.
func (o *objects) ambiguous(service types.NamespacedName) bool {
	seen := map[string]bool{}
	for _, s := range o.slices {
		if s.Namespace != service.Namespace || s.Labels[discoveryv1.LabelServiceName] != service.Name {
			continue
		}
		for _, e := range s.Endpoints {
			if seen[e.Addresses[0]] {
				return true
			}
			seen[e.Addresses[0]] = true
		}
	}
	return false
}

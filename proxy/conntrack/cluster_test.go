package conntrack

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// cluster is a model, and a Cleaner that is told of it.
type cluster struct {
	t *testing.T
	*model.Model
	c *Cleaner
	// port is that of endpoints, protocol that of all.
	port     int32
	protocol corev1.Protocol
	// program, if it is set, has a kernel do what has changed.
	program func(*model.Delta)
}

func newCluster(t *testing.T, c *Cleaner) *cluster {
	t.Helper()
	m, err := model.New(model.Config{NodeName: "node1", IPv4: true, IPv6: true, NodePortAddresses: []string{"192.0.2.0/24", "fd02::/64"}})
	if err != nil {
		t.Fatal(err)
	}
	m.SetServiceCIDR(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd96::/112"}}})
	return &cluster{t: t, Model: m, c: c, port: 53, protocol: corev1.ProtocolUDP}
}

// service sets one at port 53, by its cluster IPs.
func (k *cluster) service(name string, edit func(*corev1.Service), ips ...string) {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "test", Name: name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: ips[0], ClusterIPs: ips,
			Ports: []corev1.ServicePort{{Name: "p", Protocol: k.protocol, Port: 53}},
		},
	}
	for _, ip := range ips {
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, map[bool]corev1.IPFamily{false: corev1.IPv4Protocol, true: corev1.IPv6Protocol}[strings.Contains(ip, ":")])
	}
	if edit != nil {
		edit(s)
	}
	k.SetService(s)
}

// nodePort has it served at the node's addresses, too.
func nodePort(port int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeNodePort
		s.Spec.Ports[0].NodePort = port
	}
}

// slice sets endpoints of one family. Those with a dash behind serve and end, those with a minus are published
// although they do not serve.
func (k *cluster) slice(service, name string, ips ...string) {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "test", Name: service + "-" + name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new("p"), Protocol: new(k.protocol), Port: new(k.port)}},
	}
	for _, ip := range ips {
		e := discoveryv1.Endpoint{Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)}}
		switch ip[len(ip)-1] {
		case '~':
			e.Conditions.Ready, e.Conditions.Terminating = new(false), new(true)
		case '-':
			e.Conditions.Serving = new(false)
		}
		ip = strings.TrimRight(ip, "~-")
		if strings.Contains(ip, ":") {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
		e.Addresses = []string{ip}
		s.Endpoints = append(s.Endpoints, e)
	}
	k.SetSlice(s)
}

func (k *cluster) delete(service string) {
	k.DeleteService(types.NamespacedName{Namespace: "test", Name: service})
}

// all has the kernel have all, the first time; commit what has changed.
func (k *cluster) all() {
	k.t.Helper()
	k.Commit()
	k.c.WillAll(k.State())
	k.c.Done()
}

func (k *cluster) commit() {
	k.t.Helper()
	d := k.Commit()
	k.c.Will(&d)
	if k.program != nil {
		k.program(&d)
	}
	k.c.Done()
}

package model

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// What contradicts the API's validation loses its bad part, is told by object, field and value, and touches nothing else.
func TestBadPartsOfServices(t *testing.T) {
	for name, c := range map[string]struct {
		spoil        serviceOption
		field, value string
		// What packets to its cluster IP and to its external IP get.
		inside, outside string
	}{
		"cluster IP": {
			func(s *corev1.Service) { s.Spec.ClusterIPs[0] = "172.30.0" }, "spec.clusterIPs[0]", "172.30.0", "pass", "pass",
		},
		"cluster IP of another family": {
			func(s *corev1.Service) { s.Spec.ClusterIPs[0] = "fd30::1" }, "spec.clusterIPs[0]", "fd30::1", "pass", "pass",
		},
		"loopback cluster IP": {
			func(s *corev1.Service) { s.Spec.ClusterIPs[0] = "127.0.0.1" }, "spec.clusterIPs[0]", "127.0.0.1", "pass", "pass",
		},
		"unspecified cluster IP": {
			func(s *corev1.Service) { s.Spec.ClusterIPs[0] = "0.0.0.0" }, "spec.clusterIPs[0]", "0.0.0.0", "pass", "pass",
		},
		"protocol": {
			func(s *corev1.Service) { s.Spec.Ports[0].Protocol = "DCCP" }, "spec.ports[0].protocol", "DCCP", "pass", "pass",
		},
		"port 0": {func(s *corev1.Service) { s.Spec.Ports[0].Port = 0 }, "spec.ports[0].port", "0", "pass", "pass"},
		"port 65536": {
			func(s *corev1.Service) { s.Spec.Ports[0].Port = 65536 + 80 }, "spec.ports[0].port", "65616", "pass", "pass",
		},
		"second port": {
			func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "x", Port: -1}) },
			"spec.ports[1].port", "-1", here, here,
		},
		"node port": {
			func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 1 << 20 }, "spec.ports[0].nodePort", "1048576", here, here,
		},
		"name twice": {
			func(s *corev1.Service) {
				s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "http", Port: 81})
			},
			"spec.ports[1].name", "http", here, here,
		},
		"external IP": {
			func(s *corev1.Service) { s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, "1.2.3.4.5") }, "spec.externalIPs[1]", "1.2.3.4.5", here, here,
		},
		"blank external IP": {
			func(s *corev1.Service) { s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, "") }, "spec.externalIPs[1]", "", here, here,
		},
		"load balancer": {
			func(s *corev1.Service) {
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "x"}}
			}, "status.loadBalancer.ingress[0].ip", "x", here, here,
		},
		"loopback load balancer": {
			func(s *corev1.Service) {
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "127.0.0.1"}}
			}, "status.loadBalancer.ingress[0].ip", "127.0.0.1", here, here,
		},
		"mode of a load balancer": {
			func(s *corev1.Service) {
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lbIP, IPMode: ptr(corev1.LoadBalancerIPMode("DSR"))}}
			}, "status.loadBalancer.ingress[0].ipMode", "DSR", here, here,
		},
		"source range": {withSources("10/8"), "spec.loadBalancerSourceRanges[0]", "10/8", here, here},
		"affinity": {
			func(s *corev1.Service) { s.Spec.SessionAffinity = "Cookie" }, "spec.sessionAffinity", "Cookie", here, here,
		},
		"affinity without a timeout": {
			func(s *corev1.Service) { s.Spec.SessionAffinity = "ClientIP" }, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "", here, here,
		},
		"timeout": {
			func(s *corev1.Service) {
				s.Spec.SessionAffinity = "ClientIP"
				s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(-1))}}
			}, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "-1", here, here,
		},
		"internal policy": {
			func(s *corev1.Service) {
				s.Spec.InternalTrafficPolicy = ptr(corev1.ServiceInternalTrafficPolicy("Zone"))
			}, "spec.internalTrafficPolicy", "Zone", here, here,
		},
		"external policy": {
			func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Zone" }, "spec.externalTrafficPolicy", "Zone", here, here,
		},
		"type": {func(s *corev1.Service) { s.Spec.Type = "Gateway" }, "spec.type", "Gateway", here, here},
		"health check": {
			func(s *corev1.Service) {
				s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = "LoadBalancer", "Local", 1<<16+1
			}, "spec.healthCheckNodePort", "65537", here, here,
		},
	} {
		t.Run(name, func(t *testing.T) {
			canary := service("canary", "172.30.0.99", withExternalIPs("203.0.113.99"))
			bad := web(withExternalIPs(externalIP), c.spoil)
			m := modelOf(t, bad, canary, slice1("web", here), slice1("canary", far+" far"))
			masq := c.outside
			if masq == here && bad.Spec.ExternalTrafficPolicy != "Local" {
				masq += " masq"
			}
			check(t, m, flow{podFar, webIP + ":80", c.inside}, flow{outside, externalIP + ":80", masq},
				flow{podFar, "172.30.0.99:80", far}, flow{outside, "203.0.113.99:80", far + " masq"})
			p := m.Problems()
			if len(p) != 1 || p[0].Kind != "Service" || p[0].Object.Name != "web" || p[0].Field != c.field || p[0].Value != c.value || p[0].Reason == "" {
				t.Errorf("problems %v, want %s: %q", p, c.field, c.value)
			}
			// It is told once, and once more if it comes back.
			m.SetService(bad)
			if d := m.Commit(); len(d.Problems) > 0 || !d.Empty() {
				t.Errorf("once more: %+v", d)
			}
			m.SetService(web(withExternalIPs(externalIP)))
			m.Commit()
			check(t, m, flow{podFar, webIP + ":80", here})
			if len(m.Problems()) > 0 {
				t.Errorf("mended: %v", m.Problems())
			}
			m.SetService(bad)
			if d := m.Commit(); len(d.Problems) != 1 {
				t.Errorf("again: %v", d.Problems)
			}
		})
	}
}

func TestBadPartsOfSlices(t *testing.T) {
	for name, c := range map[string]struct {
		spoil        func(*discoveryv1.EndpointSlice)
		field, value string
		want         string
	}{
		"address type": {func(s *discoveryv1.EndpointSlice) { s.AddressType = "MAC" }, "addressType", "MAC", "reject"},
		"no address": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses = nil }, "endpoints[0].addresses", "", far,
		},
		"address": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses[0] = "10.1.0" }, "endpoints[0].addresses[0]", "10.1.0", far,
		},
		"address of another family": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses[0] = "fd10::1" }, "endpoints[0].addresses[0]", "fd10::1", far,
		},
		"loopback": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses[0] = "127.0.0.1" }, "endpoints[0].addresses[0]", "127.0.0.1", far,
		},
		"link-local": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses[0] = "169.254.169.254" },
			"endpoints[0].addresses[0]", "169.254.169.254", far,
		},
		"unspecified": {
			func(s *discoveryv1.EndpointSlice) { s.Endpoints[0].Addresses[0] = "0.0.0.0" }, "endpoints[0].addresses[0]", "0.0.0.0", far,
		},
		"port":    {func(s *discoveryv1.EndpointSlice) { s.Ports[0].Port = ptr(int32(65536)) }, "ports[0].port", "65536", "reject"},
		"no name": {func(s *discoveryv1.EndpointSlice) { s.Ports[0].Name = nil }, "ports[0]", "", "reject"},
		"protocol": {
			func(s *discoveryv1.EndpointSlice) { s.Ports[0].Protocol = ptr(corev1.Protocol("DCCP")) }, "ports[0].protocol", "DCCP", "reject",
		},
		"zone": {
			func(s *discoveryv1.EndpointSlice) {
				s.Endpoints[0].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: "a\x00"}}}
			}, "endpoints[0].hints.forZones", "a\x00", here + ", " + far,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := slice1("web", here, far+" far")
			c.spoil(s)
			m := modelOf(t, web(), s, service("canary", "172.30.0.99"), slice1("canary", far+" far"))
			check(t, m, flow{podFar, webIP + ":80", c.want}, flow{podFar, "172.30.0.99:80", far})
			p := m.Problems()
			if len(p) != 1 || p[0].Kind != "EndpointSlice" || p[0].Object.Name != "web-1" || p[0].Field != c.field || p[0].Value != c.value {
				t.Errorf("problems %v", p)
			}
			m.DeleteSlice(types.NamespacedName{Namespace: "default", Name: "web-1"})
			m.Commit()
			if len(m.Problems()) > 0 {
				t.Errorf("deleted: %v", m.Problems())
			}
		})
	}
}

func TestBadNodeAndServiceCIDR(t *testing.T) {
	n := testNode()
	n.Spec.PodCIDRs = []string{"x", "10.1.0.0/16"}
	n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "node1"})
	m := modelOf(t, n, serviceCIDR("kubernetes", "172.30.0.0/16", "172.30/16", "::/0"))
	got := map[string]bool{}
	for _, p := range m.Problems() {
		got[p.Kind+" "+p.Field+" "+p.Value] = true
	}
	for _, want := range []string{"Node spec.podCIDRs[0] x", "Node status.addresses[3].address node1", "ServiceCIDR spec.cidrs[1] 172.30/16", "ServiceCIDR spec.cidrs[2] ::/0"} {
		if !got[want] {
			t.Errorf("not told: %s", want)
		}
	}
	check(t, m, flow{podHere, "172.30.1.1:80", "drop"}, flow{"fd10:1::5", "[2001:db8::1]:80", "pass"})
}

func TestProblemsAreBounded(t *testing.T) {
	s := web()
	for range 1000 {
		s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, strings.Repeat("x", 10000))
	}
	m := modelOf(t, s, slice1("web", here))
	p := m.Problems()
	if len(p) != maxProblems {
		t.Errorf("%d problems", len(p))
	}
	for _, p := range p {
		if len(p.Value) > maxValue+3 {
			t.Errorf("a value of %d bytes", len(p.Value))
		}
	}
	check(t, m, flow{podFar, webIP + ":80", here})
}

// What an object of the size that an API server takes could ask for is more than a node has memory for.
func TestServicesThatAreTooLarge(t *testing.T) {
	s := web()
	s.Spec.Ports = nil
	for i := range int32(20000) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", i), Port: 1 + i, Protocol: corev1.ProtocolTCP})
	}
	for i := range 30000 {
		s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, fmt.Sprintf("100.64.%d.%d", i/250, i%250))
	}
	m := modelOf(t, s, service("canary", "172.30.0.99"), slice1("canary", far+" far"))
	check(t, m, flow{podFar, webIP + ":80", "pass"}, flow{podFar, "172.30.0.99:80", far})
	if p := m.Problems(); len(p) != 1 || p[0].Field != "spec.ports" {
		t.Errorf("problems %v", p)
	}

	s.Spec.ExternalIPs = nil
	of := slice1("web")
	of.Ports = nil
	for i := range int32(20000) {
		of.Ports = append(of.Ports, discoveryv1.EndpointPort{Name: ptr(fmt.Sprintf("p%d", i)), Port: ptr(1 + i)})
	}
	for i := range 1000 {
		of.Endpoints = append(of.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)}})
	}
	m.SetService(s)
	m.SetSlice(of)
	m.Commit()
	check(t, m, flow{podFar, webIP + ":80", "pass"}, flow{podFar, "172.30.0.99:80", far})
	if p := m.Problems(); len(p) != 1 || p[0].Field != "spec.ports" {
		t.Errorf("problems %v", p)
	}
	of.Endpoints = of.Endpoints[:2]
	m.SetSlice(of)
	m.Commit()
	if len(m.Problems()) > 0 || m.State().Counts().Ports != 20001 {
		t.Errorf("problems %v, counts %+v", m.Problems(), m.State().Counts())
	}
}

func TestBadConfigs(t *testing.T) {
	for want, change := range map[string]func(*Config){
		"NodeName":             func(c *Config) { c.NodeName = "" },
		"ClusterCIDRs[1]":      func(c *Config) { c.ClusterCIDRs = []string{"10.0.0.0/8", "x"} },
		"NodePortAddresses[0]": func(c *Config) { c.NodePortAddresses = []string{"eth0"} },
		"DetectLocal":          func(c *Config) { c.DetectLocal = "Magic" },
		"BridgeInterface":      func(c *Config) { c.DetectLocal = ModeBridgeInterface },
		"InterfaceNamePrefix":  func(c *Config) { c.DetectLocal = ModeInterfaceNamePrefix },
	} {
		c := testConfig
		change(&c)
		if _, err := New(c); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
		m := modelOf(t, web(), slice1("web", far+" far"))
		if err := m.SetConfig(c); err == nil {
			t.Errorf("%s: taken", want)
		}
		if d := m.Commit(); !d.Empty() {
			t.Errorf("%s: %+v", want, d)
		}
	}
	other := testConfig
	other.NodeName = "node2"
	if err := modelOf(t).SetConfig(other); err == nil {
		t.Error("another NodeName is taken")
	}
}

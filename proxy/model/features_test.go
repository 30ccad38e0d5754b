package model

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestClusterIPForwardsToAllEndpoints(t *testing.T) {
	for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
		t.Run(string(p), func(t *testing.T) {
			to := strings.ToLower(string(p)) + " " + webIP + ":80"
			m := modelOf(t, web(withProtocol(p)), sliceProtocol(slice1("web", here, far+" far"), p))
			check(t, m,
				flow{podFar, strings.TrimPrefix(to, "tcp "), here + ", " + far},
				flow{outside, strings.TrimPrefix(to, "tcp "), here + " masq, " + far + " masq"},
				// The same address with another port or protocol is the Service's as well, and has nothing there.
				flow{podFar, webIP + ":81", "reject"},
			)
			for _, other := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
				if other != p {
					to := strings.TrimPrefix(strings.ToLower(string(other))+" "+webIP+":80", "tcp ")
					check(t, m, flow{podFar, to, "reject"})
				}
			}
		})
	}
}

func TestDualStackServesBothFamilies(t *testing.T) {
	both := web(withNodePort, withExternalIPs(externalIP, "fd99::60"), func(s *corev1.Service) {
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd30::10")
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPv6Protocol)
	})
	flows := []flow{
		{podHere, webIP + ":80", far},
		{"fd10:1::5", "[fd30::10]:80", "[fd10:2::1]:8080"},
		{outside, externalIP + ":80", far + " masq"},
		{"2001:db8::7", "[fd99::60]:80", "[fd10:2::1]:8080 masq"},
		{outside, nodeSelf + ":30080", far + " masq"},
		{"2001:db8::7", "[fd00::1]:30080", "[fd10:2::1]:8080 masq"},
	}
	list := []any{both, slice1("web", far+" far"), slice1("web", "[fd10:2::1]:8080 far")}
	check(t, modelOf(t, list...), flows...)

	// On a node with one family the other is nobody's.
	only4 := testConfig
	only4.IPv6 = false
	flows[1].want, flows[3].want, flows[5].want = "pass", "pass", "pass"
	check(t, modelOf(t, append(list, only4)...), flows...)

	// A Service of one family takes no notice of the other's addresses.
	check(t, modelOf(t, web(withExternalIPs("fd99::60")), slice1("web", far+" far"), slice1("web", "[fd10:2::1]:8080")),
		flow{"2001:db8::7", "[fd99::60]:80", "pass"})
}

// Services from before dual stack have no ipFamilies.
func TestClusterIPWithoutFamilies(t *testing.T) {
	old := func(s *corev1.Service) { s.Spec.IPFamilies, s.Spec.ClusterIPs = nil, nil }
	check(t, modelOf(t, web(old), slice1("web", far+" far")), flow{podHere, webIP + ":80", far})
	check(t, modelOf(t, service("web", "fd30::10", old), slice1("web", "[fd10:2::1]:8080 far")),
		flow{"fd10:1::5", "[fd30::10]:80", "[fd10:2::1]:8080"})
}

func TestServicesThatAreNotForThisProxy(t *testing.T) {
	ports := func(s *corev1.Service) { s.Spec.Ports = nil }
	for name, change := range map[string]serviceOption{
		"headless":      func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} },
		"no cluster IP": func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "", nil },
		"ExternalName":  func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName },
		"other proxy":   func(s *corev1.Service) { s.Labels = map[string]string{ServiceProxyNameLabel: ""} },
		"no ports":      ports,
	} {
		t.Run(name, func(t *testing.T) {
			m := modelOf(t, web(withNodePort, withExternalIPs(externalIP), change), slice1("web", far+" far"))
			check(t, m, flow{podHere, webIP + ":80", "pass"}, flow{outside, externalIP + ":80", "pass"}, flow{outside, nodeSelf + ":30080", "pass"})
			if c := m.State().Counts(); c != (Counts{}) {
				t.Errorf("counts %+v", c)
			}
			// It becomes one of ours, and ceases to be.
			m.SetService(web())
			m.Commit()
			check(t, m, flow{podHere, webIP + ":80", far})
			m.SetService(web(change))
			if d := m.Commit(); len(d.Services) != 1 || d.Services[0].New != nil {
				t.Errorf("delta %+v", d)
			}
			check(t, m, flow{podHere, webIP + ":80", "pass"})
		})
	}
}

func TestSlicesThatAreNotForProxies(t *testing.T) {
	for name, change := range map[string]func(*discoveryv1.EndpointSlice){
		"headless":     func(s *discoveryv1.EndpointSlice) { s.Labels[HeadlessLabel] = "" },
		"no Service":   func(s *discoveryv1.EndpointSlice) { s.Labels = nil },
		"FQDN":         func(s *discoveryv1.EndpointSlice) { s.AddressType = discoveryv1.AddressTypeFQDN },
		"other port":   func(s *discoveryv1.EndpointSlice) { s.Ports[0].Name = ptr("other") },
		"any port":     func(s *discoveryv1.EndpointSlice) { s.Ports[0].Port = nil },
		"no protocol":  func(s *discoveryv1.EndpointSlice) { s.Ports[0].Protocol = ptr(corev1.ProtocolSCTP) },
		"other's name": func(s *discoveryv1.EndpointSlice) { s.Namespace = "other" },
	} {
		t.Run(name, func(t *testing.T) {
			s := slice1("web", here)
			change(s)
			check(t, modelOf(t, web(), s), flow{podFar, webIP + ":80", "reject"})
		})
	}
}

func TestNoEndpointsAtAllIsRejected(t *testing.T) {
	for name, options := range map[string][]serviceOption{
		"Cluster": nil, "Local": {externalLocal}, "internal Local": {internalLocal}, "both Local": {internalLocal, externalLocal},
	} {
		for what, s := range map[string]*discoveryv1.EndpointSlice{
			"no slice": slice1("other"), "empty slice": slice1("web"), "not ready": slice1("web", here+" notready", far+" far dead"),
		} {
			t.Run(name+"/"+what, func(t *testing.T) {
				m := modelOf(t, web(append(options, withLB(lbIP), withExternalIPs(externalIP))...), s)
				for _, src := range []string{podHere, podFar, nodeSelf, outside} {
					check(t, m, flow{src, webIP + ":80", "reject"}, flow{src, lbIP + ":80", "reject"},
						flow{src, externalIP + ":80", "reject"}, flow{src, nodeSelf + ":30080", "reject"})
				}
			})
		}
	}
}

func TestUnallocatedClusterIPsAreDropped(t *testing.T) {
	m := modelOf(t, web(), slice1("web", here), serviceCIDR("kubernetes", "172.30.0.0/16", "fd30::/108"), serviceCIDR("more", "172.31.0.0/24"))
	check(t, m,
		flow{podHere, "172.30.9.9:80", "drop"}, flow{podHere, "172.31.0.9:80", "drop"}, flow{"fd10:1::5", "[fd30::9]:80", "drop"},
		flow{nodeSelf, "172.30.9.9:80", "drop"}, flow{outside, "172.30.9.9:80", "drop"},
		flow{podHere, "172.31.1.9:80", "pass"}, flow{podHere, webIP + ":81", "reject"}, flow{podHere, webIP + ":80", here},
	)
	// What comes in for the node itself is never looked at.
	p := packet(t, outside, "172.30.9.9:80")
	p.DstLocal = true
	if v := Decide(m.State(), p); v.Action != Pass {
		t.Errorf("local: %s", v.Action)
	}
	// Any protocol.
	p = packet(t, outside, webIP+":80")
	p.Protocol, p.Port = 1, 0
	if v := Decide(m.State(), p); v.Action != Reject || v.Reason != UnknownPort {
		t.Errorf("ICMP: %s", v.Action)
	}
	m.DeleteServiceCIDR("more")
	if d := m.Commit(); d.Globals == nil || len(d.Services) > 0 {
		t.Errorf("delta %+v", d)
	}
	check(t, m, flow{podHere, "172.31.0.9:80", "pass"})
}

func TestExternalIPs(t *testing.T) {
	m := modelOf(t, web(withExternalIPs(externalIP, externalIP, "203.0.113.61", "203.0.113.061")), slice1("web", here, far+" far"))
	for _, src := range []string{podFar, nodeSelf, outside} {
		for _, dst := range []string{externalIP, "203.0.113.61"} {
			check(t, m, flow{src, dst + ":80", here + " masq, " + far + " masq"})
		}
	}
	check(t, m, flow{outside, externalIP + ":81", "pass"})
	off := testConfig
	off.NoExternalIPs = true
	check(t, modelOf(t, web(withExternalIPs(externalIP)), slice1("web", here), off), flow{outside, externalIP + ":80", "pass"},
		flow{podFar, webIP + ":80", here})
}

// External IPs are what a user of a namespace may write down.
func TestCVE_2020_8554_ExternalIPsAreNeverLoopbackOrLinkLocal(t *testing.T) {
	for _, ip := range []string{"127.0.0.1", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "::", "224.0.0.1"} {
		family := web
		if strings.Contains(ip, ":") {
			family = func(o ...serviceOption) *corev1.Service { return service("web", "fd30::10", o...) }
		}
		m := modelOf(t, family(withExternalIPs(ip, externalIP, "fd99::60")), slice1("web", here), slice1("web", "[fd10:1::1]:8080"))
		if v := Decide(m.State(), Packet{Src: netip.MustParseAddr(ip), Dst: netip.MustParseAddr(ip), Protocol: TCP, Port: 80}); v.Action != Pass {
			t.Errorf("%s: %s", ip, v.Action)
		}
		if p := m.Problems(); len(p) != 1 || p[0].Field != "spec.externalIPs[0]" || p[0].Value != ip || p[0].Object.Name != "web" {
			t.Errorf("%s: problems %v", ip, p)
		}
		if c := m.State().Counts(); c.Frontends != 2 {
			t.Errorf("%s: %d frontends", ip, c.Frontends)
		}
	}
	// The feature gate AllowServiceExternalIPs turns them all off.
	off := testConfig
	off.NoExternalIPs = true
	if c := modelOf(t, web(withExternalIPs(externalIP)), slice1("web", here), off).State().Counts(); c.Frontends != 1 {
		t.Errorf("turned off: %d frontends", c.Frontends)
	}
}

func TestLoadBalancersByMode(t *testing.T) {
	proxy, vip := corev1.LoadBalancerIPModeProxy, corev1.LoadBalancerIPModeVIP
	m := modelOf(t, web(withLB(lbIP, "203.0.113.51", "203.0.113.52"), func(s *corev1.Service) {
		s.Status.LoadBalancer.Ingress[1].IPMode, s.Status.LoadBalancer.Ingress[2].IPMode = &vip, &proxy
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{Hostname: "lb.example"})
	}), slice1("web", far+" far"))
	check(t, m, flow{outside, lbIP + ":80", far + " masq"}, flow{outside, "203.0.113.51:80", far + " masq"},
		flow{outside, "203.0.113.52:80", "pass"}, flow{outside, nodeSelf + ":30080", far + " masq"})
	if len(m.Problems()) > 0 {
		t.Error(m.Problems())
	}
	// Without a node port (allocateLoadBalancerNodePorts false).
	m = modelOf(t, web(withLB(lbIP), func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 0 }), slice1("web", far+" far"))
	check(t, m, flow{outside, lbIP + ":80", far + " masq"}, flow{outside, nodeSelf + ":30080", "pass"})
}

func TestLoadBalancerSourceRanges(t *testing.T) {
	const open, shut = far + " masq", "drop"
	for name, c := range map[string]struct {
		ranges                  []string
		outside, pod, node, vip string
		problems                int
	}{
		"none":           {nil, open, open, open, open, 0},
		"blank":          {[]string{"", " "}, open, open, open, open, 0},
		"one":            {[]string{"198.51.100.0/24"}, open, shut, shut, shut, 0},
		"padded":         {[]string{" 198.51.100.0/24\n"}, open, shut, shut, shut, 0},
		"host bits":      {[]string{"198.51.100.77/24"}, open, shut, shut, shut, 0},
		"of the node":    {[]string{"192.168.0.0/24"}, shut, shut, open, open, 0},
		"two":            {[]string{"10.0.0.0/8", "198.51.100.7/32"}, open, open, shut, shut, 0},
		"all":            {[]string{"203.0.0.0/8", "0.0.0.0/0"}, open, open, open, open, 0},
		"other family":   {[]string{"fd00::/8"}, open, open, open, open, 0},
		"none readable":  {[]string{"198.51.100.0"}, shut, shut, shut, shut, 1},
		"one readable":   {[]string{"198.51.100.0/24", "x/8"}, open, shut, shut, shut, 1},
		"other and none": {[]string{"fd00::/8", "198.51.100.0/33"}, shut, shut, shut, shut, 1},
	} {
		t.Run(name, func(t *testing.T) {
			m := modelOf(t, web(withLB(lbIP), withSources(c.ranges...), withExternalIPs(externalIP)), slice1("web", far+" far"))
			check(t, m, flow{outside, lbIP + ":80", c.outside}, flow{podHere, lbIP + ":80", c.pod}, flow{nodeSelf, lbIP + ":80", c.node},
				// Where the address is bound to the node, its packets have that source.
				flow{lbIP, lbIP + ":80", c.vip},
				// They are for load balancers alone.
				flow{podFar, nodeSelf + ":30080", open}, flow{podFar, externalIP + ":80", open}, flow{podFar, webIP + ":80", far})
			if n := len(m.Problems()); n != c.problems {
				t.Errorf("problems %v", m.Problems())
			}
			// Who may not is told nothing, not even that there are no endpoints.
			empty := modelOf(t, web(withLB(lbIP), withSources(c.ranges...)))
			want := "reject"
			if c.outside == shut {
				want = "drop"
			}
			check(t, empty, flow{outside, lbIP + ":80", want})
		})
	}
}

func TestNodePortAddresses(t *testing.T) {
	const open = far + " masq"
	for name, c := range map[string]struct {
		addresses                       []string
		bind                            string
		iptables                        bool
		internal, external, other, loop string
	}{
		"default":           {nil, "", false, open, open, open, "pass"},
		"primary":           {[]string{"primary"}, "", false, open, "pass", "pass", "pass"},
		"primary by bind":   {[]string{"primary"}, "203.0.113.1", false, "pass", open, "pass", "pass"},
		"bind to all":       {[]string{"primary"}, "0.0.0.0", false, open, "pass", "pass", "pass"},
		"all":               {[]string{"all"}, "", false, open, open, open, "pass"},
		"all and more":      {[]string{"192.168.0.0/24", "all"}, "", false, open, open, open, "pass"},
		"CIDR":              {[]string{"192.168.7.0/24"}, "", false, "pass", "pass", open, "pass"},
		"CIDRs":             {[]string{"192.168.7.0/24", "203.0.113.1/32"}, "", false, "pass", open, open, "pass"},
		"localhost":         {[]string{"localhost"}, "", false, "pass", "pass", "pass", "pass"},
		"other family only": {[]string{"fd00::/8"}, "", false, open, open, open, "pass"},
		"iptables, all":     {[]string{"all"}, "", true, open, open, open, open},
		"iptables, CIDR":    {[]string{"192.168.0.0/24"}, "", true, open, "pass", "pass", "pass"},
		"iptables, local":   {[]string{"127.0.0.0/8"}, "", true, "pass", "pass", "pass", open},
	} {
		t.Run(name, func(t *testing.T) {
			config := testConfig
			config.NodePortAddresses, config.LoopbackNodePorts = c.addresses, c.iptables
			if c.bind != "" {
				config.BindAddress = netip.MustParseAddr(c.bind)
			}
			m := modelOf(t, config, web(withNodePort), slice1("web", far+" far"))
			for _, src := range []string{outside, podHere, nodeSelf} {
				check(t, m, flow{src, nodeSelf + ":30080", c.internal}, flow{src, "203.0.113.1:30080", c.external},
					flow{src, "192.168.7.7:30080", c.other}, flow{src, "127.0.0.1:30080", c.loop},
					flow{src, nodeSelf + ":30081", "pass"}, flow{src, "udp " + nodeSelf + ":30080", "pass"},
					// An address that is not the node's.
					flow{src, "192.168.0.99:30080", "pass"})
			}
		})
	}
}

func TestNodePortsOfANodeWithoutAddresses(t *testing.T) {
	// kube-proxy: primary is nothing where none is known, and nothing is all.
	m := modelOf(t, web(withNodePort), slice1("web", far+" far"), &corev1.Node{})
	check(t, m, flow{outside, nodeSelf + ":30080", far + " masq"}, flow{outside, "127.0.0.1:30080", "pass"})
	m.SetNode(testNode())
	if d := m.Commit(); d.Globals == nil {
		t.Error("no change of the globals")
	}
	check(t, m, flow{outside, "203.0.113.1:30080", "pass"})
}

func TestAffinityLasts(t *testing.T) {
	for _, seconds := range []int32{1, 10800, 86400} {
		m := modelOf(t, web(withNodePort, func(s *corev1.Service) {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
		}), slice1("web", here))
		// One memory for the port, whichever of its addresses a client takes.
		for _, dst := range []string{webIP + ":80", nodeSelf + ":30080"} {
			v := Decide(m.State(), packet(t, outside, dst))
			if v.Port == nil || v.Port.Affinity != time.Duration(seconds)*time.Second || v.Port != Decide(m.State(), packet(t, outside, webIP+":80")).Port {
				t.Errorf("%s: %+v", dst, v.Port)
			}
		}
	}
	if v := Decide(modelOf(t, web(), slice1("web", here)).State(), packet(t, outside, webIP+":80")); v.Port.Affinity != 0 {
		t.Errorf("without: %s", v.Port.Affinity)
	}
}

func TestInternalTrafficPolicyLocal(t *testing.T) {
	both := modelOf(t, web(internalLocal, withNodePort), slice1("web", here, far+" far"))
	onlyFar := modelOf(t, web(internalLocal, withNodePort), slice1("web", far+" far"))
	for _, src := range []string{podHere, podFar} {
		check(t, both, flow{src, webIP + ":80", here})
		check(t, onlyFar, flow{src, webIP + ":80", "drop"})
	}
	// No short circuit: the node's packets are dropped as well. Masquerading is as ever.
	check(t, both, flow{nodeSelf, webIP + ":80", here + " masq"}, flow{outside, webIP + ":80", here + " masq"})
	check(t, onlyFar, flow{nodeSelf, webIP + ":80", "drop"})
	// Packets from outside have the other policy.
	check(t, both, flow{outside, nodeSelf + ":30080", here + " masq, " + far + " masq"})
	check(t, onlyFar, flow{outside, nodeSelf + ":30080", far + " masq"})
	if c := onlyFar.State().Counts().NoLocal[IPv4]; c.Internal != 1 || c.External != 0 {
		t.Errorf("counts %+v", c)
	}
}

func TestExternalTrafficPolicyLocal(t *testing.T) {
	all := []serviceOption{withLB(lbIP), withExternalIPs(externalIP), externalLocal}
	both := modelOf(t, web(all...), slice1("web", here, far+" far"))
	onlyFar := modelOf(t, web(all...), slice1("web", far+" far"))
	for _, dst := range []string{lbIP + ":80", externalIP + ":80", nodeSelf + ":30080"} {
		// From outside: local endpoints, with the client's address.
		check(t, both, flow{outside, dst, here})
		check(t, onlyFar, flow{outside, dst, "drop"})
		// From pods, of any node for this detector: as if it came in from outside to a node that has an endpoint.
		check(t, both, flow{podHere, dst, here + ", " + far}, flow{podFar, dst, here + ", " + far})
		check(t, onlyFar, flow{podHere, dst, far})
		// From the node: the same, but its address may be the load balancer's.
		check(t, both, flow{nodeSelf, dst, here + " masq, " + far + " masq"})
		check(t, onlyFar, flow{nodeSelf, dst, far + " masq"})
	}
	check(t, both, flow{podHere, webIP + ":80", here + ", " + far})
	if c := onlyFar.State().Counts().NoLocal[IPv4]; c.Internal != 0 || c.External != 1 {
		t.Errorf("counts %+v", c)
	}
	// Without a detector pods are outside.
	none := testConfig
	none.DetectLocal = ModeNone
	check(t, modelOf(t, none, web(all...), slice1("web", here, far+" far")), flow{podHere, lbIP + ":80", here},
		flow{nodeSelf, lbIP + ":80", here + " masq, " + far + " masq"})
	// Local where nothing outside leads to the Service means nothing.
	check(t, modelOf(t, web(externalLocal), slice1("web", far+" far")), flow{podHere, webIP + ":80", far})
	// Both policies.
	check(t, modelOf(t, web(append(all, internalLocal)...), slice1("web", far+" far")), flow{podHere, webIP + ":80", "drop"},
		flow{podHere, lbIP + ":80", far}, flow{outside, lbIP + ":80", "drop"})
	// Source ranges go before the short circuit.
	check(t, modelOf(t, web(append(all, withSources("198.51.100.0/24"))...), slice1("web", far+" far")), flow{podHere, lbIP + ":80", "drop"},
		flow{podHere, nodeSelf + ":30080", far})
}

func TestTrafficDistribution(t *testing.T) {
	a, b, c := "10.1.0.1:80", "10.2.0.1:80", "10.3.0.1:80"
	for name, x := range map[string]struct {
		endpoints []string
		want      string
	}{
		"no hints":                        {[]string{a, b + " far"}, a + ", " + b},
		"zones":                           {[]string{a + " zone=zone1", b + " far zone=zone1", c + " far zone=zone2"}, a + ", " + b},
		"zones, far ones":                 {[]string{a + " zone=zone2", b + " far zone=zone1"}, b},
		"several zones":                   {[]string{a + " zone=zone2 zone=zone1", b + " far zone=zone2 zone=zone3"}, a},
		"one without":                     {[]string{a + " zone=zone1", b + " far"}, a + ", " + b},
		"other zones only":                {[]string{a + " zone=zone2", b + " far zone=zone3"}, a + ", " + b},
		"one without is not ready":        {[]string{a + " zone=zone1", b + " far zone=zone2", c + " far notready"}, a},
		"only one of the zone not ready":  {[]string{a + " notready zone=zone1", b + " far zone=zone2"}, b},
		"nodes":                           {[]string{a + " node=node1", b + " far node=node2"}, a},
		"nodes, far":                      {[]string{a + " node=node2", b + " far node=node1"}, b},
		"nodes before zones":              {[]string{a + " node=node1 zone=zone2", b + " far node=node2 zone=zone1"}, a},
		"zones where no node":             {[]string{a + " node=node3 zone=zone2", b + " far node=node2 zone=zone1"}, b},
		"zones where one is without node": {[]string{a + " node=node1 zone=zone2", b + " far zone=zone1"}, b},
		"neither":                         {[]string{a + " node=node3 zone=zone2", b + " far node=node2 zone=zone2"}, a + ", " + b},
		"ending ones have no say":         {[]string{a + " dying zone=zone1", b + " far dying zone=zone2"}, a + ", " + b},
		"zone that begins so":             {[]string{a + " zone=zone11", b + " far zone=zone"}, a + ", " + b},
	} {
		t.Run(name, func(t *testing.T) {
			m := modelOf(t, web(withNodePort), slice1("web", x.endpoints...))
			check(t, m, flow{podHere, webIP + ":80", x.want})
			// Hints are for policy Cluster; those of Local are near enough.
			local := modelOf(t, web(internalLocal), slice1("web", x.endpoints...))
			want := "drop"
			if e, _ := endpoint(x.endpoints[0]); *e.Conditions.Serving {
				want = a
			}
			check(t, local, flow{podHere, webIP + ":80", want})
		})
	}
}

func TestZoneOfTheNodeChanges(t *testing.T) {
	list := []any{web(), slice1("web", "10.1.0.1:80 zone=zone1", "10.2.0.1:80 far zone=zone2"), service("plain", "172.30.0.11"), slice1("plain", far)}
	m := modelOf(t, list...)
	check(t, m, flow{podHere, webIP + ":80", "10.1.0.1:80"})
	n := testNode()
	for zone, want := range map[string]string{"zone2": "10.2.0.1:80", "zone1": "10.1.0.1:80", "zone3": "10.1.0.1:80, 10.2.0.1:80", "": "10.1.0.1:80, 10.2.0.1:80"} {
		n.Labels[corev1.LabelTopologyZone] = zone
		m.SetNode(n)
		d := m.Commit()
		check(t, m, flow{podHere, webIP + ":80", want})
		for _, c := range d.Services {
			if c.Name.Name != "web" || d.Globals != nil {
				t.Errorf("delta has %s, globals %v", c.Name, d.Globals)
			}
		}
	}
	// Another label is nothing to us.
	n.Labels["x"] = "y"
	m.SetNode(n)
	if d := m.Commit(); !d.Empty() {
		t.Errorf("delta %+v", d)
	}
}

func TestTerminatingEndpoints(t *testing.T) {
	a, b, c := "10.1.0.1:80", "10.2.0.1:80", "10.1.0.3:80"
	for name, x := range map[string]struct {
		endpoints                []string
		cluster, local, internal string
	}{
		"ready ones only":      {[]string{a + " dying", b + " far", c}, c + ", " + b, c, c},
		"no ready one":         {[]string{a + " dying", b + " far dying", c + " dead"}, a + ", " + b, a, a},
		"ready one far":        {[]string{a + " dying", b + " far"}, b, a, a},
		"ready one here":       {[]string{a, b + " far dying"}, a, a, a},
		"not serving":          {[]string{a + " dead", b + " far dead"}, "reject", "reject", "reject"},
		"ends far":             {[]string{a + " dead", b + " far dying"}, b, "drop", "drop"},
		"not ready, not ended": {[]string{a + " notready", b + " far dying"}, b, "drop", "drop"},
	} {
		t.Run(name, func(t *testing.T) {
			m := modelOf(t, web(withNodePort, externalLocal, withExternalIPs(externalIP)), slice1("web", x.endpoints...))
			check(t, m, flow{podFar, webIP + ":80", x.cluster}, flow{outside, externalIP + ":80", x.local}, flow{podFar, externalIP + ":80", x.cluster})
			check(t, modelOf(t, web(internalLocal), slice1("web", x.endpoints...)), flow{podFar, webIP + ":80", x.internal})
		})
	}
}

// publishNotReadyAddresses has the controller say ready for all; so a proxy has nothing to do, and a pod that ends is ready.
func TestPublishNotReadyAddressesIsTheSlicesConcern(t *testing.T) {
	s := slice1("web", here, far+" far")
	for i := range s.Endpoints {
		s.Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: ptr(true), Serving: ptr(false), Terminating: ptr(i == 0)}
	}
	published := func(s *corev1.Service) { s.Spec.PublishNotReadyAddresses = true }
	check(t, modelOf(t, web(published), s), flow{podFar, webIP + ":80", here + ", " + far})
	check(t, modelOf(t, web(published), slice1("web", here+" notready")), flow{podFar, webIP + ":80", "reject"})
}

func TestConditionsThatAreNotSaid(t *testing.T) {
	s := slice1("web", here)
	s.Endpoints[0].Conditions = discoveryv1.EndpointConditions{}
	check(t, modelOf(t, web(), s), flow{podFar, webIP + ":80", here})
	s.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: ptr(false), Terminating: ptr(true)}
	check(t, modelOf(t, web(), s), flow{podFar, webIP + ":80", here})
	s.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: ptr(false)}
	check(t, modelOf(t, web(), s), flow{podFar, webIP + ":80", "reject"})
}

// An informer tells the same again and again: that must not even be looked at twice.
func TestTheSameAgainIsNoChange(t *testing.T) {
	m := modelOf(t, web(withLB(lbIP), withSources("10.0.0.0/8")), slice1("web", here+" zone=zone1", far+" far zone=zone2"), serviceCIDR("kubernetes", "172.30.0.0/16"))
	s, e := web(withLB(lbIP), withSources("10.0.0.0/8")), slice1("web", here+" zone=zone1", far+" far zone=zone2")
	s.Annotations, e.Annotations = map[string]string{"a": "b"}, map[string]string{corev1.EndpointsLastChangeTriggerTime: "now"}
	m.SetService(s)
	m.SetSlice(e)
	m.SetNode(testNode())
	m.SetServiceCIDR(serviceCIDR("kubernetes", "172.30.0.0/16"))
	if len(m.dirty) > 0 || m.stale {
		t.Errorf("%d to be computed, all: %t", len(m.dirty), m.stale)
	}
}

// Whatever of a Service changes comes out.
func TestEachFieldOfAServiceIsNoticed(t *testing.T) {
	base := []serviceOption{withLB(lbIP), withExternalIPs(externalIP), withSources("198.51.100.0/24")}
	for name, change := range map[string]serviceOption{
		"cluster IP":     func(s *corev1.Service) { s.Spec.ClusterIPs[0] = "172.30.0.11" },
		"family":         func(s *corev1.Service) { s.Spec.IPFamilies[0], s.Spec.ClusterIPs[0] = "IPv6", "fd30::10" },
		"external IP":    withExternalIPs("203.0.113.61"),
		"load balancer":  func(s *corev1.Service) { s.Status.LoadBalancer.Ingress[0].IP = "203.0.113.51" },
		"mode":           func(s *corev1.Service) { s.Status.LoadBalancer.Ingress[0].IPMode = ptr(corev1.LoadBalancerIPModeProxy) },
		"sources":        withSources("198.51.101.0/24"),
		"no sources":     withSources(),
		"all sources":    withSources("0.0.0.0/0"),
		"bad sources":    withSources("198.51.100.0"),
		"port":           func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 },
		"port's name":    func(s *corev1.Service) { s.Spec.Ports[0].Name = "web" },
		"protocol":       withProtocol(corev1.ProtocolUDP),
		"node port":      func(s *corev1.Service) { s.Spec.Ports[0].NodePort++ },
		"internal":       internalLocal,
		"external":       externalLocal,
		"affinity":       func(s *corev1.Service) { s.Spec.SessionAffinity = "ClientIP" },
		"external name":  func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName },
		"another proxy":  func(s *corev1.Service) { s.Labels = map[string]string{ServiceProxyNameLabel: "x"} },
		"one port more":  func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "x", Port: 99}) },
		"no longer any":  func(s *corev1.Service) { s.Spec.Ports = nil },
		"no more inside": func(s *corev1.Service) { s.Spec.ClusterIP = "None" },
	} {
		t.Run(name, func(t *testing.T) {
			m := modelOf(t, web(base...), slice1("web", here))
			changed := web(append(base, change)...)
			m.SetService(changed)
			if d := m.Commit(); len(d.Services) != 1 {
				t.Errorf("delta %+v", d)
			}
			if diff := m.State().diff(modelOf(t, changed, slice1("web", here)).State()); diff != "" {
				t.Error(diff)
			}
			m.SetService(web(base...))
			if d := m.Commit(); len(d.Services) != 1 || m.State().diff(modelOf(t, web(base...), slice1("web", here)).State()) != "" {
				t.Errorf("back: %+v", d)
			}
		})
	}
	if f := modelOf(t, web(withLB(lbIP), withSources("10.0.0.0/8", "0.0.0.0/0"))).State().Service(named(web())).Ports[0].Frontends[1]; f.Restricted {
		t.Errorf("all may, and yet: %s", f)
	}
}

func TestMasquerade(t *testing.T) {
	v6 := service("six", "fd30::10", withExternalIPs("fd99::60"))
	list := []any{web(withExternalIPs(externalIP)), slice1("web", far+" far"), v6, slice1("six", "[fd10:2::1]:80 far")}
	for name, c := range map[string]struct {
		config func(*Config)
		// Who of these is masqueraded to a cluster IP: a pod here, a pod of another node, the node, somebody outside.
		pod, podFar, node, outside, pod6, outside6 bool
	}{
		"none":        {func(c *Config) { c.DetectLocal = ModeNone }, false, false, false, false, false, false},
		"all":         {func(c *Config) { c.MasqueradeAll = true }, true, true, true, true, true, true},
		"ClusterCIDR": {func(*Config) {}, false, false, true, true, false, true},
		"ClusterCIDR of one family": {
			func(c *Config) { c.ClusterCIDRs = []string{"10.0.0.0/8"} }, false, false, true, true, false, false,
		},
		"ClusterCIDR, the first counts": {
			func(c *Config) { c.ClusterCIDRs = []string{"10.2.0.0/16", "10.1.0.0/16"} }, true, false, true, true, false, false,
		},
		"NodeCIDR": {func(c *Config) { c.DetectLocal = ModeNodeCIDR }, false, true, true, true, false, true},
		"BridgeInterface": {
			func(c *Config) { c.DetectLocal, c.BridgeInterface = ModeBridgeInterface, "cni0" }, false, true, true, true, false, true,
		},
		"another bridge": {
			func(c *Config) { c.DetectLocal, c.BridgeInterface = ModeBridgeInterface, "cni" }, true, true, true, true, true, true,
		},
		"InterfaceNamePrefix": {
			func(c *Config) { c.DetectLocal, c.InterfaceNamePrefix = ModeInterfaceNamePrefix, "cni" }, false, true, true, true, false, true,
		},
		"another prefix": {
			func(c *Config) { c.DetectLocal, c.InterfaceNamePrefix = ModeInterfaceNamePrefix, "veth" }, true, true, true, true, true, true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			config := testConfig
			c.config(&config)
			m := modelOf(t, append(list, config)...)
			to := func(endpoint string, masq bool) string {
				if masq {
					return endpoint + " masq"
				}
				return endpoint
			}
			check(t, m,
				flow{podHere, webIP + ":80", to(far, c.pod)}, flow{podFar, webIP + ":80", to(far, c.podFar)},
				flow{nodeSelf, webIP + ":80", to(far, c.node)}, flow{outside, webIP + ":80", to(far, c.outside)},
				flow{"fd10:1::5", "[fd30::10]:80", to("[fd10:2::1]:80", c.pod6)},
				flow{"2001:db8::7", "[fd30::10]:80", to("[fd10:2::1]:80", c.outside6)},
				// What comes to an external address may leave to another node: always.
				flow{podHere, externalIP + ":80", far + " masq"}, flow{outside, externalIP + ":80", far + " masq"},
			)
		})
	}
}

func TestDetectorFollowsTheNode(t *testing.T) {
	config := testConfig
	config.DetectLocal = ModeNodeCIDR
	m := modelOf(t, config, web(), slice1("web", far+" far"))
	check(t, m, flow{podHere, webIP + ":80", far}, flow{"10.7.0.5", webIP + ":80", far + " masq"})
	n := testNode()
	n.Spec.PodCIDRs = []string{"10.7.0.0/16"}
	m.SetNode(n)
	if d := m.Commit(); d.Globals == nil || len(d.Services) > 0 {
		t.Errorf("another CIDR: %+v", d)
	}
	check(t, m, flow{podHere, webIP + ":80", far + " masq"}, flow{"10.7.0.5", webIP + ":80", far})
	n.Spec.PodCIDRs = nil
	m.SetNode(n)
	if d := m.Commit(); d.Globals == nil || len(d.Services) != 1 {
		t.Errorf("no CIDR: %+v", d)
	}
	check(t, m, flow{outside, webIP + ":80", far})
}

func TestHairpin(t *testing.T) {
	m := modelOf(t, web(), slice1("web", here, far+" far"), service("also", "172.30.0.11"), slice1("also", here))
	check(t, m, flow{"10.1.0.1", webIP + ":80", here + " masq, " + far})
	// The other node's own concern.
	check(t, m, flow{"10.2.0.1", webIP + ":80", here + ", " + far})
	want := Hairpin{TCP, netip.MustParseAddrPort(here)}
	if h := m.State().Hairpins(); len(h) != 1 || h[0] != want {
		t.Errorf("hairpins %v", h)
	}
	// It goes with the last Service that has it.
	m.DeleteService(types.NamespacedName{Namespace: "default", Name: "also"})
	if d := m.Commit(); len(d.HairpinRemoved) > 0 {
		t.Errorf("removed %v", d.HairpinRemoved)
	}
	m.SetSlice(slice1("web", far+" far"))
	if d := m.Commit(); len(d.HairpinRemoved) != 1 || d.HairpinRemoved[0] != want || len(d.HairpinAdded) > 0 {
		t.Errorf("delta %+v", d)
	}
	m.SetSlice(slice1("web", here))
	if d := m.Commit(); len(d.HairpinAdded) != 1 || d.HairpinAdded[0] != want || len(d.HairpinRemoved) > 0 {
		t.Errorf("delta %+v", d)
	}
}

// A pod that slices of two Services place on different nodes is this node's for both: hairpins go by address.
func TestHairpinOfAnotherServicesSlice(t *testing.T) {
	m := modelOf(t, web(), slice1("web", here+" far"), service("also", "172.30.0.11"), slice1("also", here))
	check(t, m, flow{"10.1.0.1", webIP + ":80", here + " masq"})
	m.DeleteService(types.NamespacedName{Namespace: "default", Name: "also"})
	m.Commit()
	check(t, m, flow{"10.1.0.1", webIP + ":80", here})
}

func TestSlicesOfAService(t *testing.T) {
	named := func(name string, endpoints ...string) *discoveryv1.EndpointSlice {
		s := slice1("web", endpoints...)
		s.Name = name
		return s
	}
	m := modelOf(t, web(), named("a", here), named("b", far+" far"), named("c"))
	check(t, m, flow{podFar, webIP + ":80", here + ", " + far})

	// While an endpoint moves it is in two slices, and is served once.
	m.SetSlice(named("c", here))
	if d := m.Commit(); !d.Empty() {
		t.Errorf("moving: %+v", d)
	}
	m.SetSlice(named("a"))
	if d := m.Commit(); !d.Empty() {
		t.Errorf("moved: %+v", d)
	}
	m.DeleteSlice(types.NamespacedName{Namespace: "default", Name: "c"})
	m.Commit()
	check(t, m, flow{podFar, webIP + ":80", far})

	// The address of a pod that ends is a new pod's: wherever that is, it precedes.
	for _, order := range [][2]string{{"a", "b"}, {"b", "a"}} {
		m := modelOf(t, web(), named(order[0], here+" dead"), named(order[1], here))
		check(t, m, flow{podFar, webIP + ":80", here})
	}
	one := slice1("web", here+" dead", here)
	check(t, modelOf(t, web(), one), flow{podFar, webIP + ":80", here})
	one.Endpoints[0], one.Endpoints[1] = one.Endpoints[1], one.Endpoints[0]
	check(t, modelOf(t, web(), one), flow{podFar, webIP + ":80", here})

	// A slice comes to belong to another Service.
	other := named("b", far+" far")
	other.Labels[discoveryv1.LabelServiceName] = "other"
	m.SetService(service("other", "172.30.0.11"))
	m.SetSlice(other)
	m.Commit()
	check(t, m, flow{podFar, webIP + ":80", "reject"}, flow{podFar, "172.30.0.11:80", far})

	// Slices before their Service, and after it.
	m.DeleteService(types.NamespacedName{Namespace: "default", Name: "other"})
	m.Commit()
	check(t, m, flow{podFar, "172.30.0.11:80", "pass"})
	m.SetService(service("other", "172.30.0.11"))
	m.Commit()
	check(t, m, flow{podFar, "172.30.0.11:80", far})
}

// Slices that differ in the number of a named port: pods of two versions. And one name with two numbers.
func TestNamedPorts(t *testing.T) {
	old, now := slice1("web", "10.1.0.1:8080"), slice1("web", "10.1.0.2:9090")
	now.Name = "web-2"
	now.Ports = append(now.Ports, discoveryv1.EndpointPort{Name: ptr("http"), Port: ptr(int32(9091)), Protocol: ptr(corev1.ProtocolTCP)},
		discoveryv1.EndpointPort{Name: ptr("metrics"), Port: ptr(int32(9999))})
	s := web(func(s *corev1.Service) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "metrics", Port: 9000, Protocol: corev1.ProtocolTCP},
			corev1.ServicePort{Name: "none", Port: 9001, Protocol: corev1.ProtocolTCP})
	})
	check(t, modelOf(t, s, old, now), flow{podFar, webIP + ":80", "10.1.0.1:8080, 10.1.0.2:9090, 10.1.0.2:9091"},
		flow{podFar, webIP + ":9000", "10.1.0.2:9999"}, flow{podFar, webIP + ":9001", "reject"})
	// A single port needs no name.
	unnamed, of := web(func(s *corev1.Service) { s.Spec.Ports[0].Name = "" }), slice1("web", here)
	of.Ports[0].Name = ptr("")
	check(t, modelOf(t, unnamed, of), flow{podFar, webIP + ":80", here})
}

func TestManyPortsAreMatchedByName(t *testing.T) {
	s, of := web(), slice1("web", here)
	s.Spec.Ports, of.Ports = nil, nil
	for i := range int32(100) {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", i), Port: 1000 + i, Protocol: corev1.ProtocolTCP})
		of.Ports = append(of.Ports, discoveryv1.EndpointPort{Name: ptr(fmt.Sprintf("p%d", 99-i)), Port: ptr(2099 - i)})
	}
	m := modelOf(t, s, of)
	for i := range 100 {
		check(t, m, flow{podFar, fmt.Sprintf("%s:%d", webIP, 1000+i), fmt.Sprintf("10.1.0.1:%d", 2000+i)})
	}
	old := m.State().Service(types.NamespacedName{Namespace: "default", Name: "web"})
	of.Ports[0].Port = ptr(int32(9999))
	m.SetSlice(of)
	d := m.Commit()
	if len(d.Services) != 1 || d.Services[0].Old != old {
		t.Fatalf("delta %+v", d)
	}
	for i := range 99 {
		if &d.Services[0].New.Ports[i].Cluster[0] != &old.Ports[i].Cluster[0] {
			t.Errorf("port %d has its endpoints anew", i)
		}
	}
}

func TestHealthCheck(t *testing.T) {
	two := slice1("web", here, "10.1.0.2:8080", far+" far", "10.1.0.3:8080 notready", "10.1.0.4:8080 dying")
	two.Ports = append(two.Ports, discoveryv1.EndpointPort{Name: ptr("more"), Port: ptr(int32(9))})
	name := types.NamespacedName{Namespace: "default", Name: "web"}
	for what, c := range map[string]struct {
		options []serviceOption
		want    HealthCheck
	}{
		"load balancer, Local":   {[]serviceOption{withLB(lbIP), externalLocal}, HealthCheck{31234, [2]int{2, 0}}},
		"load balancer, Cluster": {[]serviceOption{withLB(lbIP)}, HealthCheck{}},
		"node port, Local":       {[]serviceOption{withNodePort, externalLocal}, HealthCheck{}},
		"no address yet":         {[]serviceOption{withLB(), externalLocal}, HealthCheck{31234, [2]int{2, 0}}},
	} {
		t.Run(what, func(t *testing.T) {
			m := modelOf(t, web(c.options...), two)
			if got := m.State().Service(name).HealthCheck; got != c.want {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
	m := modelOf(t, web(withLB(lbIP), externalLocal), two, slice1("web", "[fd10:1::1]:8080"))
	m.SetSlice(slice1("web", far+" far"))
	if d := m.Commit(); len(d.Services) != 1 || d.Services[0].New.HealthCheck.Endpoints[IPv4] != 0 {
		t.Errorf("delta %+v", d)
	}
}

func TestServingForConntrack(t *testing.T) {
	udp := sliceProtocol(slice1("web", here, far+" far", "10.1.0.3:8080 dying", "10.1.0.4:8080 dead", "10.1.0.5:8080 notready"), corev1.ProtocolUDP)
	m := modelOf(t, web(withProtocol(corev1.ProtocolUDP), internalLocal), udp)
	p := &m.State().Service(types.NamespacedName{Namespace: "default", Name: "web"}).Ports[0]
	if got := fmt.Sprint(p.Serving); got != "[10.1.0.1:8080* 10.1.0.3:8080* 10.2.0.1:8080]" {
		t.Errorf("serving %s", got)
	}
	if got := fmt.Sprint(p.Local); got != "[10.1.0.1:8080*]" {
		t.Errorf("local %s", got)
	}
}

func TestASecondAddressOfTheSameKind(t *testing.T) {
	// One address in several roles of one port: it is external, with the load balancer's sources.
	m := modelOf(t, web(withLB(lbIP, lbIP, webIP), withExternalIPs(lbIP, webIP), withSources("198.51.100.0/24")), slice1("web", far+" far"))
	check(t, m, flow{outside, lbIP + ":80", far + " masq"}, flow{podHere, lbIP + ":80", "drop"},
		flow{outside, webIP + ":80", far + " masq"}, flow{podHere, webIP + ":80", "drop"})
	if len(m.Problems()) > 0 || m.State().Counts().Frontends != 3 {
		t.Errorf("%v\n%s", m.Problems(), m.State())
	}
	// What goes for cluster IPs goes for it, too.
	all := testConfig
	all.MasqueradeAll = true
	m = modelOf(t, all, web(withExternalIPs(webIP), externalLocal), slice1("web", "10.1.0.1:8080"))
	check(t, m, flow{outside, webIP + ":80", here + " masq"}, flow{podFar, webIP + ":80", here + " masq"})
}

func TestEachEndpointThatChangesIsNoticed(t *testing.T) {
	ips := []string{"10.1.0.1:80", "10.1.0.3:80", "10.1.0.5:80"}
	for i := range ips {
		m := modelOf(t, web(), slice1("web", ips...))
		changed := append([]string{}, ips...)
		changed[i] = fmt.Sprintf("10.1.0.%d:80", 2*i+2)
		m.SetSlice(slice1("web", changed...))
		m.Commit()
		check(t, m, flow{podFar, webIP + ":80", strings.Join(changed, ", ")})
		// The same address, but on another node.
		changed[i] += " far"
		m.SetSlice(slice1("web", changed...))
		if d := m.Commit(); len(d.Services) != 1 || len(d.HairpinRemoved) != 1 {
			t.Errorf("%d: delta %+v", i, d)
		}
	}
}

//go:build integration

package model

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/integration/kubeproxy"
)

// kubeProxyPrograms is the directory of integration/tools/kubeproxy.sh's programs.
func kubeProxyPrograms(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("BERTH_KUBEPROXY")
	if dir == "" {
		t.Fatal("BERTH_KUBEPROXY is not set: make test-proxy-differential does so, or the directory that `integration/tools/build.sh kubeproxy-tests` prints")
	}
	return dir
}

func startKubeProxy(t testing.TB) *kubeproxy.Oracle {
	t.Helper()
	o, err := kubeproxy.Start(kubeProxyPrograms(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := o.Close(); err != nil {
			t.Error(err)
		}
	})
	return o
}

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

// compared counts what was compared.
type compared struct {
	clusters, states, packets, pinned int
	fates                             map[string]int
	reasons                           map[string]int
	list                              []string
	// timeouts are those of session affinity that a cluster's Services have had, in seconds.
	timeouts map[types.NamespacedName][]int
}

func newCompared() compared {
	return compared{fates: map[string]int{}, reasons: map[string]int{}, timeouts: map[types.NamespacedName][]int{}}
}

// differs notes a difference; only some are kept.
func (c *compared) differs(format string, args ...any) {
	c.reasons[""]++
	if len(c.list) < 5 {
		c.list = append(c.list, fmt.Sprintf(format, args...))
	}
}

// TestKubeProxyDoesTheSame has kube-proxy's own proxier make rules of random clusters, through changes, and follows packets through them
// with the tracer of its own tests: what becomes of each is what the model says, but for what has a reason.
func TestKubeProxyDoesTheSame(t *testing.T) {
	clusters, first := 150, 0
	if s := os.Getenv("BERTH_CLUSTERS"); s != "" {
		if _, err := fmt.Sscan(s, &clusters); err != nil {
			t.Fatalf("BERTH_CLUSTERS=%s: %v", s, err)
		}
	}
	if s := os.Getenv("BERTH_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &first); err != nil {
			t.Fatalf("BERTH_SEED=%s: %v", s, err)
		}
	}
	total := newCompared()
	var mu sync.Mutex
	var wg sync.WaitGroup
	seeds := make(chan int)
	for range runtime.GOMAXPROCS(0) {
		k := startKubeProxy(t)
		wg.Go(func() {
			for seed := range seeds {
				c, err := compareCluster(k, seed)
				mu.Lock()
				total.add(c)
				stop := err != nil
				if stop {
					t.Errorf("seed %d: %v", seed, err)
				}
				mu.Unlock()
				if stop {
					break
				}
			}
			for range seeds {
			}
		})
	}
	for seed := range clusters {
		seeds <- first + seed
	}
	close(seeds)
	wg.Wait()
	t.Log(total.String())
	for _, d := range total.list {
		t.Errorf("%s", d)
	}
	for _, fate := range []string{"forward", "reject", "drop", "pass", "masquerade", "hairpin", "affinity", "short circuit", "restricted"} {
		if total.fates[fate] < total.states {
			t.Errorf("%d packets had to do with %s: too few", total.fates[fate], fate)
		}
	}
}

func (c *compared) add(o compared) {
	c.clusters += o.clusters
	c.states += o.states
	c.packets += o.packets
	c.pinned += o.pinned
	for k, n := range o.fates {
		c.fates[k] += n
	}
	for k, n := range o.reasons {
		c.reasons[k] += n
	}
	if len(c.list) < 5 {
		c.list = append(c.list, o.list...)
	}
}

func (c *compared) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d clusters, %d states of them, %d packets (%d of a client that was at an endpoint before): %d differences without a reason",
		c.clusters, c.states, c.packets, c.pinned, c.reasons[""])
	for _, k := range slices.Sorted(maps.Keys(c.reasons)) {
		if k != "" {
			fmt.Fprintf(&b, "\n  %d: %s", c.reasons[k], k)
		}
	}
	b.WriteString("\nfates:")
	for _, k := range slices.Sorted(maps.Keys(c.fates)) {
		fmt.Fprintf(&b, " %s %d", k, c.fates[k])
	}
	return b.String()
}

// compareCluster compares the states of one random cluster. An error is one of the comparison itself.
func compareCluster(k *kubeproxy.Oracle, seed int) (compared, error) {
	c := newCompared()
	c.clusters = 1
	r := chance{rand.New(rand.NewPCG(uint64(seed), 11)), false}
	o := newObjects(r.plainConfig())
	o.node = r.node()
	if s := r.serviceCIDR(); !r.in(4) {
		o.cidrs[s.Name] = s
	}
	// Of four clusters one keeps what two Services claim.
	tidy := seed%4 != 0
	m, err := New(o.config)
	if err != nil {
		return c, err
	}
	told := newObjects(o.config)
	steps := 30
	for range 4 {
		for range steps {
			if err := o.change(r); err != nil {
				return c, err
			}
		}
		steps = 1 + r.IntN(8)
		now := o.valid()
		if tidy {
			now = now.tidied()
		}
		if err := tell(m, told, now); err != nil {
			return c, err
		}
		told = now
		m.Commit()
		if err := c.compare(k, r, m.State(), now, seed); err != nil {
			return c, err
		}
	}
	return c, nil
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

// compare compares one state of a cluster.
func (c *compared) compare(k *kubeproxy.Oracle, r chance, s *State, world *objects, seed int) error {
	c.states++
	q, err := world.question()
	if err != nil {
		return err
	}
	type asked struct {
		Packet
		pinned string
	}
	var packets []asked
	for svc := range s.Services() {
		for _, p := range svc.Ports {
			c.timeouts[svc.Name] = append(c.timeouts[svc.Name], int(p.Affinity.Seconds()))
		}
	}
	for _, to := range world.destinations() {
		n := 6
		if _, _, f := s.Lookup(to.protocol, netip.AddrPortFrom(to.addr, to.port)); f == nil && !(slices.Contains(worldNodeIPs, to.addr.String()) && to.port >= 30000) {
			n = 1 - r.IntN(2)
		}
		for range n {
			p := r.from(to)
			packets = append(packets, asked{p, ""})
			v := Decide(s, p)
			if v.Action == Forward && r.in(3) {
				// An endpoint's own.
				back := p
				back.Src, back.SrcLocal, back.Interface = v.Endpoints[r.IntN(len(v.Endpoints))].Addr, false, one(r, "cni0", "veth12")
				packets = append(packets, asked{back, ""})
			}
			if v.Action == Forward && v.Port.Affinity > 0 && r.in(2) {
				// The client was sent to an endpoint before, by the same port of the Service, at whichever address.
				all := slices.Concat(v.Port.Cluster, v.Port.Local)
				packets = append(packets, asked{p, all[r.IntN(len(all))].AddrPort().String()})
			}
		}
	}
	for _, p := range packets {
		q.Packets = append(q.Packets, kubeproxy.PacketQuestion{
			Src: p.Src.String(), Dst: p.Dst.String(), Protocol: p.Protocol.String(), Port: p.Port, Interface: p.Interface, Pinned: p.pinned,
		})
	}
	answer, err := k.Ask(q)
	if err != nil {
		return err
	}
	fates := answer.Fates
	for i, p := range packets {
		v := Decide(s, p.Packet)
		ours, theirs := sayVerdict(&v, p.pinned), fates[i].String()
		c.packets++
		if p.pinned != "" {
			c.pinned++
		}
		c.count(&v)
		if ours == theirs {
			continue
		}
		why := byDesign(s, world, p.Packet, &v)
		if other := fates[i]; v.Action == Forward && v.Port.Affinity > 0 && slices.Contains(c.timeouts[v.Service], other.Affinity) {
			if other.Affinity = int(v.Port.Affinity.Seconds()); other.String() == ours {
				why = "another timeout of session affinity, which kube-proxy only takes for endpoints that come later"
			}
		}
		if why != "" {
			c.reasons[why]++
			continue
		}
		c.differs("seed %d, state %d: %s %s by %q -> %s:%d, pinned %q: %s (%s), kube-proxy: %s by %q\n%v\n%s\n%s", seed, c.states, p.Protocol, p.Src, p.Interface,
			p.Dst, p.Port, p.pinned, ours, v.Reason, theirs, slices.Compact(fates[i].Rules), world.config, s.Service(v.Service), world.slicesOf(v.Service))
	}
	return nil
}

// count notes what a packet had to do with.
func (c *compared) count(v *Verdict) {
	c.fates[v.Action.String()]++
	if v.Frontend == nil {
		return
	}
	f := v.Frontend
	if f.Restricted {
		c.fates["restricted"]++
	}
	if v.Action != Forward {
		return
	}
	if v.Masquerade {
		c.fates["masquerade"]++
	}
	if v.Port.Affinity > 0 {
		c.fates["affinity"]++
	}
	if f.ShortCircuit && v.Reason != ByPolicy {
		c.fates["short circuit"]++
	}
	for _, e := range v.Endpoints {
		if !v.Masquerade && v.Masquerades(e) {
			c.fates["hairpin"]++
		}
	}
}

// sayVerdict is a verdict in a line.
func sayVerdict(v *Verdict, pinned string) string {
	fate := kubeproxy.PacketFate{Action: v.Action.String()}
	if v.Action == Forward {
		fate.Affinity = int(v.Port.Affinity.Seconds())
	}
	for _, e := range v.Endpoints {
		fate.Endpoints = append(fate.Endpoints, kubeproxy.EndpointFate{Endpoint: e.AddrPort().String(), Masquerade: v.Masquerades(e)})
	}
	if i := slices.IndexFunc(fate.Endpoints, func(e kubeproxy.EndpointFate) bool { return e.Endpoint == pinned }); i >= 0 && fate.Affinity > 0 {
		fate.Endpoints = fate.Endpoints[i : i+1]
	}
	return fate.String()
}

// byDesign is why a packet may fare otherwise on kube-proxy: what docs/architecture.md has a table of.
func byDesign(s *State, world *objects, p Packet, v *Verdict) string {
	at := place{p.Dst, p.Port, p.Protocol}
	if v.Frontend != nil {
		at = v.Frontend.place(p.Protocol)
	}
	if len(s.claims.contested[at]) > 0 || len(s.claims.contested[place{addr: p.Dst}]) > 0 {
		return "an address and port that two ports or Services claim: on kube-proxy by chance either's"
	}
	if v.Frontend != nil && v.Frontend.Kind != ClusterIP && s.IsClusterIP(p.Dst) && v.Action == Forward {
		return "an external address that is another Service's cluster IP: masqueraded like that one, too, on kube-proxy"
	}
	if p.Interface == "" && p.DstLocal && v.Frontend != nil && v.Frontend.Kind == NodePort && v.Action != Forward &&
		(s.IsClusterIP(p.Dst) || within(s.globals.Family[familyOf(p.Dst)].ServiceCIDRs, p.Dst)) {
		return "the node's own packet to an address of its own among those of Services, at a node port that leads nowhere: kube-proxy asks about the address first"
	}
	if v.Port != nil && world.ambiguous(v.Service) {
		return "an endpoint that is more than once in a Service's slices: on kube-proxy by chance any of them"
	}
	if v.Action == Forward && world.scattered(p.Src) {
		return "a source that slices place on several nodes: whether it is a hairpin is by chance on kube-proxy"
	}
	return ""
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

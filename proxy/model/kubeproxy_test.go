//go:build integration

package model

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

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
	for _, fate := range []string{"forward", "reject", "drop", "pass", "masquerade", "hairpin", "affinity", "short circuit", "restricted", "ending"} {
		if total.fates[fate] < total.states/4 {
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
			if len(v.Endpoints) > 0 && r.in(3) {
				// An endpoint's own.
				back := p
				back.Src, back.SrcLocal, back.Interface = v.Endpoints[r.IntN(len(v.Endpoints))].Addr, false, one(r, "cni0", "veth12")
				packets = append(packets, asked{back, ""})
			}
			if len(v.Endpoints) > 0 && v.Port.Affinity > 0 && r.in(2) {
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
		c.count(&v, world.ends(&v))
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
func (c *compared) count(v *Verdict, ends bool) {
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
	if ends {
		c.fates["ending"]++
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
		(s.IsClusterIP(p.Dst) || within(s.globals.Family[FamilyOf(p.Dst)].ServiceCIDRs, p.Dst)) {
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

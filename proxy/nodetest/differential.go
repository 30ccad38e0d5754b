package nodetest

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// DoesWhatTheModelSays tests that what becomes of packets is what the model says, for random Services, slices and
// configurations, at first and after changes. BERTH_WORLDS is how many there are, if it is set.
func DoesWhatTheModelSays(t *testing.T, open Open, worlds int) {
	l := newBench(t, open, 4)
	InWorlds(t, l.Lab, Worlds{
		Number: WorldsWanted(worlds),
		Limit:  program.AbilitiesOf(l.programmer).Limit,
		Program: func(c *Cluster) error {
			var err error
			if c.Changed {
				_, err = l.programmer.Apply(&c.Delta)
			} else {
				_, err = l.programmer.Sync(c.Model.State())
			}
			if err != nil {
				return err
			}
			if r, err := l.programmer.Verify(); err != nil || r.Elements != 0 {
				return fmt.Errorf("the kernel has not what it should: %+v, %w", r, err)
			}
			return nil
		},
	})
}

// WorldsWanted is BERTH_WORLDS, or else so many.
func WorldsWanted(n int) int {
	if wanted, err := strconv.Atoi(os.Getenv("BERTH_WORLDS")); err == nil {
		return wanted
	}
	return n
}

// Worlds are random clusters, and who programs the kernel for them.
type Worlds struct {
	Number int
	// Limit leaves out of a configuration what Program cannot do; nil leaves nothing out.
	Limit func(*model.Config)
	// Plain is without annotations, by which berth does what others do not.
	Plain bool
	// Program is called at first and after changes.
	Program func(*Cluster) error
	// Skip is whether a packet is none for it; nil skips none.
	Skip func(*Cluster, Try) bool
}

// Cluster is what a model was told, and what it makes of it.
type Cluster struct {
	Config model.Config
	Node   *corev1.Node
	CIDR   *networkingv1.ServiceCIDR
	// Services and Slices are by name.
	Services map[string]*corev1.Service
	Slices   map[string]*discoveryv1.EndpointSlice
	Model    *model.Model
	// Delta is the last one; Changed is whether there was one before it.
	Delta   model.Delta
	Changed bool
}

// ServiceList are the Services by name.
func (c *Cluster) ServiceList() []*corev1.Service { return byName(c.Services) }

// SliceList are the slices by name.
func (c *Cluster) SliceList() []*discoveryv1.EndpointSlice { return byName(c.Slices) }

func byName[T any](m map[string]T) []T {
	var list []T
	for _, name := range slices.Sorted(maps.Keys(m)) {
		list = append(list, m[name])
	}
	return list
}

// InWorlds sends packets in a lab of four pods, and tests that what becomes of them is what the model says.
func InWorlds(t *testing.T, l *Lab, w Worlds) {
	packets := 0
	for seed := range w.Number {
		r := NewWorld(seed)
		c := newCluster(t, r, w.Limit)
		for step := range 3 {
			c.change(r, w.Plain, step > 0)
			if err := w.Program(c); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
			// Another package looks after what conntrack remembers of UDP.
			if err := l.Node.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
				t.Fatal(err)
			}
			packets += c.judge(t, l.Tries(c.Model), w.Skip, fmt.Sprintf("seed %d, step %d", seed, step))
			if t.Failed() {
				t.Fatalf("seed %d, step %d:\n%s", seed, step, c.Model.State())
			}
		}
	}
	t.Logf("%d packets in %d worlds", packets, w.Number)
}

func newCluster(t *testing.T, r World, limit func(*model.Config)) *Cluster {
	c := &Cluster{Config: r.Config(), Services: map[string]*corev1.Service{}, Slices: map[string]*discoveryv1.EndpointSlice{}}
	if limit != nil {
		limit(&c.Config)
	}
	var err error
	if c.Model, err = model.New(c.Config); err != nil {
		t.Fatal(err)
	}
	c.Node = &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "here"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: NodeIP4},
		{Type: corev1.NodeInternalIP, Address: NodeIP6},
	}}}
	c.CIDR = &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd96::/108"}}}
	c.Model.SetNode(c.Node)
	c.Model.SetServiceCIDR(c.CIDR)
	return c
}

// change makes all Services and slices anew, or some of them.
func (c *Cluster) change(r World, plain, some bool) {
	for n := range 4 {
		if some && !r.In(3) {
			continue
		}
		s := r.Service(n)
		if plain {
			s.Annotations = nil
		}
		c.Services[s.Name] = s
		c.Model.SetService(s)
		for _, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
			e := r.Slice(n, 4, kind)
			if plain {
				e.Annotations = nil
			}
			c.Slices[e.Name] = e
			c.Model.SetSlice(e)
		}
	}
	c.Delta, c.Changed = c.Model.Commit(), some
}

// judge sends packets, many at once, and says how many.
func (c *Cluster) judge(t *testing.T, tries []Try, skip func(*Cluster, Try) bool, where string) int {
	var wait sync.WaitGroup
	turn, sent := make(chan struct{}, 64), 0
	for _, y := range tries {
		if skip != nil && skip(c, y) {
			continue
		}
		sent++
		wait.Add(1)
		turn <- struct{}{}
		go func() {
			defer func() { <-turn; wait.Done() }()
			if bad := y.Judge(c.Model.State()); bad != "" {
				t.Errorf("%s: %s %s to %s: %s", where, y.From.Name, y.Network, netip.AddrPortFrom(y.Packet.Dst, y.Packet.Port), bad)
			}
		}()
	}
	wait.Wait()
	return sent
}

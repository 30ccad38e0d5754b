package nodetest

import (
	"net/netip"
	"os"
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
// configurations, at first and after changes. BERTH_WORLDS is how many there are; 6 if it is not set.
func DoesWhatTheModelSays(t *testing.T, open Open) {
	worlds := 6
	if n, err := strconv.Atoi(os.Getenv("BERTH_WORLDS")); err == nil {
		worlds = n
	}
	l := newBench(t, open, 4)
	packets := 0
	for seed := range worlds {
		r := NewWorld(seed)
		config := r.Config()
		program.AbilitiesOf(l.programmer).Limit(&config)
		m, err := model.New(config)
		if err != nil {
			t.Fatal(err)
		}
		m.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "here"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: NodeIP4},
			{Type: corev1.NodeInternalIP, Address: NodeIP6},
		}}})
		m.SetServiceCIDR(&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12", "fd96::/108"}}})
		for step := range 3 {
			for n := range 4 {
				if step > 0 && !r.In(3) {
					continue
				}
				m.SetService(r.Service(n))
				m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv4))
				m.SetSlice(r.Slice(n, 4, discoveryv1.AddressTypeIPv6))
			}
			d := m.Commit()
			if step == 0 {
				_, err = l.programmer.Sync(m.State())
			} else {
				_, err = l.programmer.Apply(&d)
			}
			if err != nil {
				t.Fatal(err)
			}
			if r, err := l.programmer.Verify(); err != nil || r.Elements != 0 {
				t.Fatalf("seed %d, step %d: the kernel has not what it should: %+v, %v", seed, step, r, err)
			}
			// Another package looks after what conntrack remembers of UDP.
			if err := l.Node.Do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) }); err != nil {
				t.Fatal(err)
			}
			tries := l.Tries(m)
			packets += len(tries)
			var wait sync.WaitGroup
			turn := make(chan struct{}, 64)
			for _, y := range tries {
				wait.Add(1)
				turn <- struct{}{}
				go func() {
					defer func() { <-turn; wait.Done() }()
					if bad := y.Judge(m.State()); bad != "" {
						t.Errorf("seed %d, step %d: %s %s to %s: %s", seed, step, y.From.Name, y.Network, netip.AddrPortFrom(y.Packet.Dst, y.Packet.Port), bad)
					}
				}()
			}
			wait.Wait()
			if t.Failed() {
				t.Fatalf("seed %d, step %d:\n%s", seed, step, m.State())
			}
		}
	}
	t.Logf("%d packets in %d worlds", packets, worlds)
}

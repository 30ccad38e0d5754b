package cni

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// longLists are the chains with more than one rule that are listed meanwhile. No test that runs at the same time may list any.
func longLists(f func() error) (chains []string, err error) {
	was := listed
	listed = func(chain string, rules int) {
		if rules > 1 {
			chains = append(chains, fmt.Sprintf("%s (%d rules)", chain, rules))
		}
	}
	defer func() { listed = was }()
	err = f()
	return chains, err
}

// rulesOfPod makes and unmakes masquerading and a host port for a pod, in either way.
type rulesOfPod struct {
	up, down func(n int) error
}

func podAddress(n int) *net.IPNet {
	return &net.IPNet{IP: net.IPv4(10, 88, byte(n>>8), byte(n)).To4(), Mask: net.CIDRMask(16, 32)}
}

func podPorts(n int) (*portmapConf, netip.Prefix) {
	conf := &portmapConf{}
	conf.Name = "net"
	conf.RuntimeConfig.PortMaps = []portMapping{{HostPort: 8000 + n, ContainerPort: 80, Protocol: "tcp"}}
	prefix, _ := toPrefix(podAddress(n))
	return conf, prefix
}

func backends(p *Plugins) map[string]rulesOfPod {
	id := func(n int) string { return fmt.Sprintf("pod%d", n) }
	pods := func(ports portMapper, masq, unmasq func(n int) error) rulesOfPod {
		return rulesOfPod{
			up: func(n int) error {
				conf, pod := podPorts(n)
				return errors.Join(masq(n), ports.forward(conf, id(n), pod))
			},
			down: func(n int) error {
				conf, _ := podPorts(n)
				return errors.Join(ports.unforward(conf, id(n)), unmasq(n))
			},
		}
	}
	return map[string]rulesOfPod{
		"nftables": pods(nftPorts{},
			func(n int) error { return masqueradeNFT([]*net.IPNet{podAddress(n)}, "net", "eth0", id(n)) },
			func(n int) error { return unmasqueradeNFT("net", "eth0", id(n)) }),
		"iptables": pods(xtPorts{p},
			func(n int) error {
				prefix, _ := toPrefix(podAddress(n))
				return masqueradeFamily(false, []netip.Prefix{prefix}, "CNI-"+id(n), id(n))
			},
			func(n int) error { return unmasqueradeFamily(false, "CNI-"+id(n)) }),
		"firewall": {
			up:   func(n int) error { return xtGate{}.open(podFirewall(n)) },
			down: func(n int) error { return xtGate{}.shut(podFirewall(n)) },
		},
	}
}

func podFirewall(n int) *firewallConf {
	return &firewallConf{IptablesAdminChainName: chainAdmin, result: &types100.Result{IPs: []*types100.IPConfig{{Address: *podAddress(n)}}}}
}

// No chain is listed that has a rule for each pod: neither for a new pod nor for one that goes.
func TestRulesOfOtherPodsAreNotListed(t *testing.T) {
	p := newPlugins(t)
	p.Prepare("bridge") // it lists the rules of a sample
	for backend, pod := range backends(p) {
		t.Run(backend, func(t *testing.T) {
			inNamespace(t, func() error {
				for n := range 20 {
					if err := pod.up(n); err != nil {
						return err
					}
				}
				lists, err := longLists(func() error { return pod.up(20) })
				if err != nil || lists != nil {
					t.Errorf("listed for a new pod: %q, %v", lists, err)
				}
				lists, err = longLists(func() error { return pod.down(7) })
				if lists != nil {
					t.Errorf("listed for a pod that goes: %q", lists)
				}
				return err
			})
		})
	}
}

// countRules counts the rules of the chains of that name in all tables.
func countRules(t *testing.T, chain string) (n int) {
	t.Helper()
	all, err := RuleSet(func(string) bool { return false })
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range all {
		if strings.Contains(line, " "+chain+" rule ") {
			n++
		}
	}
	return n
}

// What is remembered of rules is asked for, not relied on: a table that others have made anew, in which the numbers are those
// of other rules, loses nothing but what is to go, and all of that.
func TestRememberedRulesAreComparedFirst(t *testing.T) {
	for backend, pod := range backends(newPlugins(t)) {
		t.Run(backend, func(t *testing.T) {
			inNamespace(t, func() error {
				remember := func(from, to int) error {
					for n := from; n < to; n++ {
						if err := pod.up(n); err != nil {
							return err
						}
					}
					return nil
				}
				if err := remember(0, 6); err != nil {
					return err
				}
				if err := dropTables(); err != nil {
					return err
				}
				if err := elsewhere(func() error { return remember(3, 9) }); err != nil {
					return err
				}
				before, err := RuleSet(func(string) bool { return false })
				if err != nil {
					return err
				}
				for _, n := range []int{0, 1, 2} { // of which the first process remembers the numbers
					if err := pod.down(n); err != nil {
						return err
					}
				}
				if after, err := RuleSet(func(string) bool { return false }); err != nil || strings.Join(after, "\n") != strings.Join(before, "\n") {
					t.Errorf("rules of other pods have gone, %v", err)
				}
				for n := 3; n < 9; n++ {
					if err := pod.down(n); err != nil {
						return err
					}
				}
				return noRulesOfPods(t)
			})
		})
	}
}

// Rules that another process has made for a pod are found, too: those that an ADD finds, and those that a DEL has to delete.
func TestRulesThatAreNotRememberedAreFound(t *testing.T) {
	for backend, pod := range backends(newPlugins(t)) {
		t.Run(backend, func(t *testing.T) {
			inNamespace(t, func() error {
				if err := pod.up(0); err != nil {
					return err
				}
				if err := errors.Join(elsewhere(func() error { return pod.up(1) }), pod.up(1)); err != nil {
					return err
				}
				if n := countRules(t, masqChecks); backend == "nftables" && n != 2 {
					t.Errorf("%d rules of 2 pods", n)
				}
				if n := countRules(t, chainForward); backend == "firewall" && n != 5 {
					t.Errorf("%d rules of 2 pods", n)
				}
				return elsewhere(func() error { return errors.Join(pod.down(1), pod.down(0), noRulesOfPods(t)) })
			})
		})
	}
}

// elsewhere runs f as another process would, which remembers other rules.
func elsewhere(f func() error) error {
	here := known.handles
	known.handles = nil
	defer func() { known.handles = here }()
	return f()
}

func dropTables() error {
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET} {
		for _, name := range []string{tableNAT, tableFilter, masqTable, portTable} {
			t, err := openNFTTable(family, name)
			if err != nil {
				return err
			}
			t.remove()
			err = t.apply()
			t.close()
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
	return nil
}

func noRulesOfPods(t *testing.T) error {
	t.Helper()
	all, err := RuleSet(func(string) bool { return false })
	for _, line := range all {
		if strings.Contains(line, "pod") {
			t.Errorf("left: %s", line)
		}
	}
	if n := countRules(t, chainForward); n > 1 {
		t.Errorf("left: %d rules", n)
	}
	return err
}

// Where too much is remembered, nothing is remembered of half a pod: its DEL would leave the other half.
func TestRulesAreRememberedOfWholePods(t *testing.T) {
	was := mostKnown
	defer func() { mostKnown = was }()
	for backend, pod := range backends(newPlugins(t)) {
		for mostKnown = 1; mostKnown < 12; mostKnown++ {
			inNamespace(t, func() error {
				return elsewhere(func() error {
					for n := range 3 {
						if err := pod.up(n); err != nil {
							return err
						}
					}
					for n := range 3 {
						if err := pod.down(n); err != nil {
							return err
						}
					}
					return noRulesOfPods(t)
				})
			})
			if t.Failed() {
				t.Fatalf("%s, at most %d are remembered", backend, mostKnown)
			}
		}
	}
}

// While an ADD looks through the rules of all pods, a DEL of one of them deletes all of its rules.
func TestRulesGoWhileOthersAreListed(t *testing.T) {
	was := listed
	defer func() { listed = was }()
	inNamespace(t, func() error {
		netns, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return err
		}
		defer netns.Close() //nolint:errcheck // opened for reading
		var many []*net.IPNet
		for n := range 200 {
			many = append(many, podAddress(100+n))
		}
		for range 10 {
			if err := masqueradeNFT(many, "net", "eth0", "goes"); err != nil {
				return err
			}
			looks := make(chan struct{})
			var once sync.Once
			listed = func(string, int) { once.Do(func() { close(looks) }) }
			gone := make(chan error, 1)
			go func() {
				gone <- thread.Throwaway(func() error {
					if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
						return err
					}
					<-looks
					return unmasqueradeNFT("net", "eth0", "goes")
				})
			}()
			known.Lock()
			maps.DeleteFunc(known.handles, func(k knownRules, _ []uint64) bool { return k.what == "last" }) // as if others had made a rule
			known.Unlock()
			err := errors.Join(masqueradeNFT([]*net.IPNet{podAddress(1)}, "net", "eth0", "comes"), <-gone, unmasqueradeNFT("net", "eth0", "comes"))
			if err != nil {
				return err
			}
			listed = was
			if n := countRules(t, masqChecks); n > 0 {
				t.Errorf("%d rules are left", n)
				return nil
			}
		}
		return nil
	})
}

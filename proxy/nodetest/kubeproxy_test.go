//go:build integration

package nodetest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/berth-run/berth/integration/kubeproxy"
	"github.com/berth-run/berth/proxy/model"
)

// TestKubeProxyRulesInTheKernel has the kernel do what kube-proxy's own proxier has in its fake of nf_tables, and sends packets through
// namespaces: what becomes of them is what the model says. So the tracer that the model is compared with elsewhere is right, too.
func TestKubeProxyRulesInTheKernel(t *testing.T) {
	inTheKernel(t, kubeproxy.Start, func(l *Lab, rules string) error {
		// Its own tables take the place of those before, in one transaction.
		script := ""
		for _, family := range []string{"ip", "ip6"} {
			script += fmt.Sprintf("add table %s kube-proxy\ndelete table %s kube-proxy\n", family, family)
		}
		if out, err := l.Node.Input(script+rules, "nft", "-f", "-"); err != nil {
			return fmt.Errorf("nft: %w\n%s", err, out)
		}
		return nil
	}, nil)
}

// TestKubeProxyIPTablesInTheKernel is the same of its proxier of mode iptables: so what packets fare by the rules of proxy/iptables, which are
// compared with the model in the same way, is what they fare by kube-proxy's, but for what has a reason.
func TestKubeProxyIPTablesInTheKernel(t *testing.T) {
	inTheKernel(t, kubeproxy.StartIPTables, func(l *Lab, rules string) error {
		for _, of := range strings.Split(rules, "# IPv")[1:] {
			program := "iptables-restore"
			if of[0] == '6' {
				program = "ip6tables-restore"
			}
			if out, err := l.Node.Input(of[1:], program); err != nil {
				return fmt.Errorf("%s: %w\n%s", program, err, out)
			}
		}
		return nil
	}, func(y Try, v *model.Verdict) bool {
		switch {
		case v.Reason == model.UnknownPort, v.Reason == model.Unallocated:
			return true // are left to the network
		case v.Frontend != nil && v.Frontend.Kind != model.ClusterIP && y.Packet.SrcLocal && (v.Action == model.Reject || v.Action == model.Drop):
			return true // what programs of the node send to other addresses than cluster IPs is not refused
		case v.Reason == model.SourceRanges && v.Frontend.Action == model.Reject:
			return true // without endpoints all are rejected, whoever may send
		}
		return false
	})
}

// inTheKernel has the kernel do what a kube-proxy says, but for packets that fare otherwise by design.
func inTheKernel(t *testing.T, start func(dir string) (*kubeproxy.Oracle, error), load func(l *Lab, rules string) error, otherwise func(Try, *model.Verdict) bool) {
	t.Helper()
	dir := os.Getenv("BERTH_KUBEPROXY")
	if dir == "" {
		t.Fatal("BERTH_KUBEPROXY is not set: make test-proxy-differential does so, or the directory that `integration/tools/build.sh kubeproxy-tests` prints")
	}
	k, err := start(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	l := New(t, 4)
	nodeIPs := l.addresses()
	InWorlds(t, l, Worlds{
		Number: WorldsWanted(2), Plain: true,
		Program: func(c *Cluster) error {
			config, err := kubeproxy.ConfigOf(c.Config)
			if err != nil {
				return err
			}
			answer, err := k.Ask(&kubeproxy.ClusterQuestion{
				Config: config, Node: c.Node, NodeIPs: nodeIPs, Services: c.ServiceList(), Slices: c.SliceList(),
				ServiceCIDRs: c.CIDR.Spec.CIDRs, Rules: true,
			})
			if err != nil {
				return err
			}
			return load(l, answer.Rules)
		},
		// Who has a contested address is by chance on kube-proxy. It rejects TCP by ICMP, which Linux's TCP takes for a refusal in IPv4 alone.
		Skip: func(c *Cluster, y Try) bool {
			v := model.Decide(c.Model.State(), y.Packet)
			return v.Action == model.Reject && y.Network == "tcp" && y.Packet.Dst.Is6() || len(c.Model.State().Claimants(y.Packet.Protocol, netip.AddrPortFrom(y.Packet.Dst, y.Packet.Port))) > 1 ||
				otherwise != nil && otherwise(y, &v)
		},
	})
}

// addresses are all that the node has.
func (l *Lab) addresses() []string {
	var list []string
	err := l.Node.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			if ip, ok := a.(*net.IPNet); ok {
				list = append(list, ip.IP.String())
			}
		}
		return err
	})
	if err != nil {
		l.T.Fatal(err)
	}
	return list
}

package nftables

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	utiliptables "k8s.io/kubernetes/pkg/util/iptables"
	iptablestest "k8s.io/kubernetes/pkg/util/iptables/testing"
)

// kernel is a fake of iptables.
type kernel struct{ *iptablestest.FakeIPTables }

func newKernel(ipFamily v1.IPFamily) (kernel, *Proxier) {
	k := kernel{iptablestest.NewFake()}
	if ipFamily == v1.IPv6Protocol {
		k.FakeIPTables = iptablestest.NewIPv6Fake()
	}
	p := NewFakeProxier(quoting{k.FakeIPTables})
	// Node ports at 127.0.0.1 are asked for elsewhere, and a kernel without its accounting objects takes no rules that name them.
	p.localhostNodePorts, p.nfAcctCounters = false, nil
	return k, p
}

// quoting keeps words together that are one: the fake joins them by spaces.
type quoting struct{ *iptablestest.FakeIPTables }

func (q quoting) EnsureRule(at utiliptables.RulePosition, table utiliptables.Table, chain utiliptables.Chain, args ...string) (bool, error) {
	args = slices.Clone(args)
	for i, a := range args {
		if strings.Contains(a, " ") {
			args[i] = strconv.Quote(a)
		}
	}
	return q.FakeIPTables.EnsureRule(at, table, chain, args...)
}

// dump is what iptables-restore reads, after a comment with the family.
func (k *kernel) dump() string {
	var b bytes.Buffer
	b.WriteString("# IPv4\n")
	if k.IsIPv6() {
		b.Reset()
		b.WriteString("# IPv6\n")
	}
	if err := k.SaveInto("", &b); err != nil {
		panic(err) // it is in memory
	}
	return b.String()
}

func (k *kernel) forget() {}

// trace is none: these rules are followed by a kernel.
func (k *kernel) trace(t *testing.T, _ *PacketQuestion, _ []string) (fate PacketFate) {
	t.Error("packets are followed by the kernel")
	return fate
}

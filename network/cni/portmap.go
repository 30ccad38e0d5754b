package cni

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/utils"
	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/internal/conntrack"
)

func init() {
	plugins["portmap"] = plugin{versions: version.All, add: portmapAdd, del: portmapDel, check: portmapCheck}
}

// The chains of the portmap plugin that all pods share; the reference plugin has the same.
const (
	chainDNAT    = "CNI-HOSTPORT-DNAT"
	chainSetMark = "CNI-HOSTPORT-SETMARK"
	chainMasq    = "CNI-HOSTPORT-MASQ"
	chainOldSNAT = "CNI-HOSTPORT-SNAT" // of versions before 0.8
)

// portMapper makes host ports with one of two backends.
type portMapper interface {
	// usable says why it cannot make rules of a family here.
	usable(v6 bool) error
	forward(conf *portmapConf, id string, pod netip.Prefix) error
	unforward(conf *portmapConf, id string) error
	check(conf *portmapConf, id string, pod netip.Prefix) error
}

func (p *Plugins) portMapper(conf *portmapConf) portMapper {
	if p.backend(conf.Backend) == backendNFTables {
		return nftPorts{}
	}
	return xtPorts{p}
}

// allUsable says whether a mapper makes the rules of all families that a pod has.
func allUsable(m portMapper, conf *portmapConf) error {
	for v6 := range conf.pods {
		if err := m.usable(v6); err != nil {
			return err
		}
	}
	return nil
}

var errNotPlain = fmt.Errorf("%w: another backend, conditions, externalSetMarkChain, or a port mapping of another kind", ErrProgram)

func portmapAdd(c *call) error {
	conf, err := loadPortmapConf(c.config, c.ifName)
	switch {
	case err != nil:
		return configError{fmt.Errorf("failed to parse config: %w", err)}
	case conf.PrevResult == nil:
		return errors.New("must be called as chained plugin")
	case len(conf.RuntimeConfig.PortMaps) == 0:
		return c.print(conf.PrevResult, conf.CNIVersion)
	}
	m := c.portMapper(conf)
	if err := allUsable(m, conf); err != nil {
		return err
	}
	for _, v6 := range []bool{false, true} {
		pod, ok := conf.pods[v6]
		if !ok {
			continue
		}
		if err := m.forward(conf, c.containerID, pod); err != nil {
			return err
		}
		c.forgetConnections(conf, v6)
		if v6 || !conf.snat() {
			continue
		}
		if err := routeLocalnet(pod.Addr()); err != nil {
			return err
		}
	}
	return c.print(conf.PrevResult, conf.CNIVersion)
}

// xtPorts makes host ports with iptables.
type xtPorts struct{ *Plugins }

func (p xtPorts) usable(v6 bool) error {
	if err := p.iptablesDiffers(tableNAT, v6); err != nil {
		return fmt.Errorf("%w: %w", ErrProgram, err)
	}
	return nil
}

func (xtPorts) forward(conf *portmapConf, id string, pod netip.Prefix) error {
	if err := changeXT(tableNAT, pod.Addr().Is6(), func(t *xtTable) error { return addPortChains(t, conf, id, pod) }); err != nil {
		return fmt.Errorf("unable to setup DNAT: %v", err)
	}
	return nil
}

func addPortChains(t *xtTable, conf *portmapConf, id string, pod netip.Prefix) error {
	if conf.snat() {
		if err := ensureMasquerading(t, 1<<conf.markBit()); err != nil {
			return err
		}
	}
	if err := t.ensureChain(chainDNAT); err != nil {
		return err
	}
	for _, from := range []string{"PREROUTING", "OUTPUT"} {
		if err := t.ensureRule(from, false, xtRule{toLocal: true, target: xtTo{chain: chainDNAT}}); err != nil {
			return err
		}
	}
	chain, rules, entries := portRules(conf, id, pod)
	if err := t.ensureChain(chain); err != nil {
		return err
	}
	for _, r := range rules {
		if err := t.ensureRule(chain, false, r); err != nil {
			return err
		}
	}
	for _, r := range entries {
		r.target = xtTo{chain: chain}
		if err := t.ensureRule(chainDNAT, false, r); err != nil {
			return err
		}
	}
	return nil
}

// ensureMasquerading has packets with a mark masqueraded. Its jump is the first in POSTROUTING: others end there.
func ensureMasquerading(t *xtTable, mark uint32) error {
	return errors.Join(
		t.ensureRule(chainSetMark, false, xtRule{comment: "CNI portfwd masquerade mark", target: xtTo{mark: mark}}),
		t.ensureRule(chainMasq, false, xtRule{mark: mark, target: xtTo{masquerade: true}}),
		t.ensureRule("POSTROUTING", true, xtRule{comment: "CNI portfwd requiring masquerade", target: xtTo{chain: chainMasq}}),
	)
}

// portRules are the rules of an address of the pod: a chain, what is in it, and what leads to it from the chain of all pods.
func portRules(conf *portmapConf, id string, pod netip.Prefix) (chain string, rules, entries []xtRule) {
	v6 := pod.Addr().Is6()
	chain = utils.MustFormatChainNameWithPrefix(conf.Name, id, "DN-")
	comment := fmt.Sprintf(`dnat name: "%s" id: "%s"`, conf.Name, id)
	if len(comment) >= commentSize {
		comment = comment[:commentSize-3] + "..."
	}
	ports := map[string][]uint16{}
	for _, m := range conf.RuntimeConfig.PortMaps {
		ports[m.Protocol] = append(ports[m.Protocol], uint16(m.HostPort))
	}
	for _, proto := range slices.Sorted(maps.Keys(ports)) {
		for some := range slices.Chunk(ports[proto], maxPorts) {
			entries = append(entries, xtRule{comment: comment, proto: proto, dports: some})
		}
	}
	own, loopback := pod, single(netip.MustParseAddr("127.0.0.1"))
	if conf.MasqAll {
		own = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if v6 {
			own = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
	}
	for _, m := range conf.RuntimeConfig.PortMaps {
		to, ok := m.forFamily(v6)
		if !ok {
			continue
		}
		r := xtRule{proto: m.Protocol, dport: uint16(m.HostPort)}
		if to.IsValid() {
			r.dst = single(to)
		}
		marked := r
		marked.target = xtTo{chain: chainSetMark}
		if conf.snat() {
			marked.src = own
			rules = append(rules, marked)
		}
		if conf.snat() && !v6 && !conf.MasqAll {
			marked.src = loopback
			rules = append(rules, marked)
		}
		r.target = xtTo{dnat: netip.AddrPortFrom(pod.Addr(), uint16(m.ContainerPort))}
		rules = append(rules, r)
	}
	return chain, rules, entries
}

// forgetConnections has the kernel forget UDP connections to the ports: they would go on to where the port led before.
func (c *call) forgetConnections(conf *portmapConf, v6 bool) {
	ports := map[uint16]bool{}
	for _, m := range conf.RuntimeConfig.PortMaps {
		if m.Protocol == "udp" {
			ports[uint16(m.HostPort)] = true
		}
	}
	if len(ports) == 0 {
		return
	}
	conn, err := conntrack.Open()
	if err == nil {
		defer conn.Close()
		err = conn.ForgetUDP(v6, slices.Sorted(maps.Keys(ports)), func(e *conntrack.Entry) bool { return ports[e.Original.Dst.Port()] })
	}
	if err != nil {
		c.log.Warn("cni plugin portmap: connections to ports stay", "pod", c.containerID, "error", err)
	}
}

// routeLocalnet lets packets from the node's loopback address out of the interface that leads to an address.
func routeLocalnet(to netip.Addr) error {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil {
		return nil //nolint:nilerr // no way there, nothing to let out
	}
	for _, r := range routes {
		l, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			continue
		}
		if err := setSysctl("ipv4/conf/"+l.Attrs().Name+"/route_localnet", "1"); err != nil {
			return fmt.Errorf("unable to enable route_localnet: %v", err)
		}
		return nil
	}
	return nil
}

func portmapDel(c *call) error {
	conf, err := loadPortmapConf(c.config, c.ifName)
	switch {
	case err != nil:
		return configError{fmt.Errorf("failed to parse config: %w", err)}
	case len(conf.RuntimeConfig.PortMaps) == 0:
		return nil
	}
	return c.portMapper(conf).unforward(conf, c.containerID)
}

// unforward deletes the rules of a pod in both families: nobody knows any more which it had. A node that has iptables for one
// alone has made rules for that one.
func (p xtPorts) unforward(conf *portmapConf, id string) error {
	var families []bool
	for _, v6 := range []bool{false, true} {
		switch err := p.usable(v6); {
		case err == nil:
			families = append(families, v6)
		case !errors.Is(err, errNoIPTables):
			return err
		}
	}
	if len(families) == 0 {
		return p.usable(false)
	}
	for _, v6 := range families {
		if err := removePortChains(v6, conf.Name, id); err != nil {
			return err
		}
	}
	return nil
}

func removePortChains(v6 bool, network, id string) error {
	chains := map[string]string{}
	for prefix, from := range map[string]string{"DN-": chainDNAT, "SN-": chainOldSNAT} {
		chains[utils.MustFormatChainNameWithPrefix(network, id, prefix)] = from
	}
	if err := changeXT(tableNAT, v6, func(t *xtTable) error { return t.removeChains(chains) }); err != nil {
		return fmt.Errorf("could not teardown dnat: %v", err)
	}
	return nil
}

func portmapCheck(c *call) error {
	conf, err := loadPortmapConf(c.config, c.ifName)
	if err != nil {
		return configError{err}
	}
	if conf.PrevResult == nil {
		return errors.New("Required prevResult missing")
	}
	if len(conf.RuntimeConfig.PortMaps) == 0 {
		return nil
	}
	m := c.portMapper(conf)
	if err := allUsable(m, conf); err != nil {
		return err
	}
	for _, v6 := range []bool{false, true} {
		if pod, ok := conf.pods[v6]; ok {
			if err := m.check(conf, c.containerID, pod); err != nil {
				return err
			}
		}
	}
	return nil
}

func (xtPorts) check(conf *portmapConf, id string, pod netip.Prefix) error {
	family := "ipv4"
	if pod.Addr().Is6() {
		family = "ipv6"
	}
	if err := checkPortChains(conf, id, pod); err != nil {
		return fmt.Errorf("could not check %s dnat: %v", family, err)
	}
	return nil
}

func checkPortChains(conf *portmapConf, id string, pod netip.Prefix) error {
	t, err := openXT(tableNAT, pod.Addr().Is6())
	if err != nil {
		return err
	}
	defer t.close()
	chain, rules, entries := portRules(conf, id, pod)
	there, err := t.hasChain(chain)
	if err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("chain %s not found in iptables table nat", chain)
	}
	for _, r := range rules {
		if there, err := t.contains(chain, r.exprs(t.v6)); err != nil || !there {
			return fmt.Errorf("rule %s in chain %s not found in table nat", argsOf(rules), chain)
		}
	}
	for _, r := range entries {
		toPod := r
		toPod.target = xtTo{chain: chain}
		if there, err := t.contains(chainDNAT, toPod.exprs(t.v6)); err != nil || !there {
			return fmt.Errorf("rule %s in chain %s not found in table nat", argsOf(entries), chainDNAT)
		}
	}
	return nil
}

func argsOf(rules []xtRule) [][]string {
	var all [][]string
	for _, r := range rules {
		all = append(all, r.args())
	}
	return all
}

package cni

import (
	"errors"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/utils"
)

const (
	backendIPTables = "iptables"
	backendNFTables = "nftables"
)

// backend says which of both a configuration that does not say is for: iptables, unless the node has none that works.
func (p *Plugins) backend(configured *string) string {
	if configured != nil {
		return *configured
	}
	switch differs := p.iptablesDiffers(tableNAT, false); {
	case differs == nil:
		return backendIPTables
	case errors.Is(differs, errNoIPTables), !utils.SupportsIPTables() && utils.SupportsNFTables():
		return backendNFTables
	}
	return backendIPTables
}

// masquerade has what a pod sends to the outside of its subnets masqueraded. An iptables whose rules are not made here is left
// to the reference project's functions, which run it.
func (p *Plugins) masquerade(backend *string, nets []*net.IPNet, network, ifName, id string) error {
	use := p.backend(backend)
	comment := utils.FormatComment(network, id)
	switch {
	case use == backendNFTables:
		return masqueradeNFT(nets, network, ifName, id)
	case use != backendIPTables || !p.madeHere(nets) || len(comment) >= commentSize:
		return ip.SetupIPMasqForNetworks(&use, nets, network, ifName, id)
	}
	chain := utils.FormatChainName(network, id)
	for v6, nets := range byFamily(nets) {
		if err := masqueradeFamily(v6, nets, chain, comment); err != nil {
			return err
		}
	}
	return nil
}

// madeHere says whether rules of iptables are made here for all of these families.
func (p *Plugins) madeHere(nets []*net.IPNet) bool {
	for v6 := range byFamily(nets) {
		if p.iptablesDiffers(tableNAT, v6) != nil {
			return false
		}
	}
	return true
}

// byFamily sorts networks, as prefixes with their host bits, by whether they are of IPv6.
func byFamily(nets []*net.IPNet) map[bool][]netip.Prefix {
	families := map[bool][]netip.Prefix{}
	for _, n := range nets {
		if p, ok := toPrefix(n); ok {
			families[p.Addr().Is6()] = append(families[p.Addr().Is6()], p)
		}
	}
	return families
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, size := n.Mask.Size()
	addr = addr.Unmap()
	return netip.PrefixFrom(addr, ones-size+addr.BitLen()), ok && size > 0
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func masqueradeFamily(v6 bool, nets []netip.Prefix, chain, comment string) error {
	multicast := netip.MustParsePrefix("224.0.0.0/4")
	if v6 {
		multicast = netip.MustParsePrefix("ff00::/8")
	}
	return changeXT(tableNAT, v6, func(t *xtTable) error {
		for _, n := range nets {
			if err := errors.Join(
				t.ensureRule(chain, false, xtRule{dst: n, comment: comment, target: xtTo{chain: "ACCEPT"}}),
				t.ensureRule(chain, false, xtRule{dst: multicast, notDst: true, comment: comment, target: xtTo{masquerade: true}}),
				t.ensureRule("POSTROUTING", false, xtRule{src: single(n.Addr()), comment: comment, target: xtTo{chain: chain}}),
			); err != nil {
				return err
			}
		}
		return nil
	})
}

// unmasquerade undoes masquerade, also where nobody knows the addresses any more, or which of both made the rules.
func (p *Plugins) unmasquerade(nets []*net.IPNet, network, ifName, id string) error {
	here := true
	for _, v6 := range []bool{false, true} {
		switch differs := p.iptablesDiffers(tableNAT, v6); {
		case differs == nil:
			if err := unmasqueradeFamily(v6, utils.FormatChainName(network, id)); err != nil {
				return err
			}
		case !errors.Is(differs, errNoIPTables):
			here = false
		}
	}
	if !here {
		return ip.TeardownIPMasqForNetworks(nets, network, ifName, id)
	}
	return unmasqueradeNFT(network, ifName, id)
}

func unmasqueradeFamily(v6 bool, chain string) error {
	return changeXT(tableNAT, v6, func(t *xtTable) error { return t.removeChains(map[string]string{chain: "POSTROUTING"}) })
}

package cni

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"

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

// Masqueraded says which of a network's pods, by their container IDs, have the rules that masquerade does for a bridge whose
// configuration names no backend, or those of the other one, from when the node had that. Families are those that have ranges in the
// network, IPv6 or not. known is false where the rules are not made here, and nobody knows.
func (p *Plugins) Masqueraded(network, ifName string, ids []string, families []bool) (has map[string]bool, known bool, err error) {
	if has, err = masqueradedNFT(network, ifName, ids); err != nil {
		return nil, false, err
	}
	use := p.backend(nil)
	ends := make([]map[string]bool, 0, len(families))
	for _, v6 := range families {
		if use != backendNFTables && p.iptablesDiffers(tableNAT, v6) != nil {
			return nil, false, nil
		}
		of, err := lastOf("POSTROUTING", v6)
		if err != nil {
			return nil, false, err
		}
		ends = append(ends, of)
	}
	for _, id := range ids {
		to := string(jump(utils.FormatChainName(network, id)))
		has[id] = has[id] || !slices.ContainsFunc(ends, func(of map[string]bool) bool { return !of[to] })
	}
	return has, true, nil
}

// lastOf are the last expressions of the rules in a chain of iptables' table nat: where they lead.
func lastOf(chain string, v6 bool) (map[string]bool, error) {
	t, err := openXT(tableNAT, v6)
	if err != nil {
		return nil, err
	}
	defer t.close()
	rules, err := t.rules(chain)
	all := map[string]bool{}
	for _, r := range rules {
		if len(r.exprs) > 0 {
			all[string(r.exprs[len(r.exprs)-1])] = true
		}
	}
	return all, err
}

func masqueradedNFT(network, ifName string, ids []string) (map[string]bool, error) {
	t, err := openMasqTable()
	if err != nil {
		return nil, err
	}
	defer t.close()
	rules, err := t.rules(masqChecks)
	if err != nil {
		return nil, err
	}
	owners := map[string]bool{}
	for _, r := range rules {
		owner, _, _ := strings.Cut(r.comment(), ",")
		owners[owner] = true
	}
	has := map[string]bool{}
	for _, id := range ids {
		has[id] = owners[masqOwner(network, ifName, id)]
	}
	return has, nil
}

// Masquerade makes the rules anew of a pod with these addresses, for a bridge whose configuration names no backend.
func (p *Plugins) Masquerade(nets []*net.IPNet, network, ifName, id string) error {
	return p.masquerade(nil, nets, network, ifName, id)
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

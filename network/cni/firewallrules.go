package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"strings"
)

// The chains of the firewall plugin that all pods share; the reference plugin has the same.
const (
	chainForward = "CNI-FORWARD"
	chainAdmin   = "CNI-ADMIN"             // the node's operator's, unless named otherwise
	chainStage1  = "CNI-ISOLATION-STAGE-1" // what comes from a bridge
	chainStage2  = "CNI-ISOLATION-STAGE-2" // what goes from one bridge to another
	hookForward  = "FORWARD"
)

// xtGate opens with iptables.
type xtGate struct{}

func (xtGate) close() {}

// plainChain is a name that iptables takes, whatever extensions it has: theirs have no dash. None of its own chains is.
var plainChain = regexp.MustCompile(`^[A-Za-z0-9]+(-[A-Za-z0-9]+)+$`)

const longestChain = 28 // XT_EXTENSION_MAXNAMELEN, with its end

// xtGate says why a pod's rules are not made here. The reference wants the programs of both families, whichever the pod has.
func (c *call) xtGate(conf *firewallConf) (gate, error) {
	for n, name := range []string{"iptables", "ip6tables"} {
		if _, err := exec.LookPath(name); err != nil {
			return nil, fmt.Errorf("could not initialize iptables protocol %d: %v", n, err)
		}
	}
	admin := conf.IptablesAdminChainName
	if !plainChain.MatchString(admin) || len(admin) > longestChain || strings.HasPrefix(admin, "CNI-") && admin != chainAdmin {
		return nil, fmt.Errorf("%w: iptablesAdminChainName %q", ErrProgram, admin)
	}
	pods, err := conf.pods()
	if err != nil {
		return nil, err
	}
	return xtGate{}, c.madeInFilter(pods)
}

// pods are the addresses of the pod, by whether they are of IPv6.
func (c *firewallConf) pods() (map[bool][]netip.Addr, error) {
	all := map[bool][]netip.Addr{}
	for _, ipc := range c.result.IPs {
		a, ok := netip.AddrFromSlice(ipc.Address.IP)
		if !ok {
			return nil, fmt.Errorf("%w: address %v", ErrProgram, ipc.Address)
		}
		a = a.Unmap()
		all[a.Is6()] = append(all[a.Is6()], a)
	}
	return all, nil
}

func (p *Plugins) madeInFilter(pods map[bool][]netip.Addr) error {
	for v6 := range pods {
		if err := p.iptablesDiffers(tableFilter, v6); err != nil {
			return fmt.Errorf("%w: %w", ErrProgram, err)
		}
	}
	return nil
}

// eachFamily changes table filter of the families that the pod has.
func (c *firewallConf) eachFamily(f func(t *xtTable, pods []netip.Addr) error) error {
	pods, err := c.pods()
	if err != nil {
		return err
	}
	for _, v6 := range []bool{false, true} {
		if len(pods[v6]) == 0 {
			continue
		}
		if err := changeXT(tableFilter, v6, func(t *xtTable) error { return f(t, pods[v6]) }); err != nil {
			return err
		}
	}
	return nil
}

// openingRules lead what is forwarded to the chain of all pods, and from there to that of the node's operator first.
func (c *firewallConf) openingRules() (toPods, toAdmin xtRule) {
	return xtRule{comment: "CNI firewall plugin rules", target: xtTo{chain: chainForward}},
		xtRule{comment: "CNI firewall plugin admin overrides", target: xtTo{chain: c.IptablesAdminChainName}}
}

// podRules let through what belongs to connections of a pod, and what it sends.
func podRules(pods []netip.Addr) []xtRule {
	var all []xtRule
	for _, pod := range pods {
		all = append(all,
			xtRule{dst: single(pod), established: true, target: xtTo{chain: "ACCEPT"}},
			xtRule{src: single(pod), target: xtTo{chain: "ACCEPT"}})
	}
	return all
}

func (xtGate) open(conf *firewallConf) error {
	toPods, toAdmin := conf.openingRules()
	return conf.eachFamily(func(t *xtTable, pods []netip.Addr) error {
		if err := t.ensureChains(chainForward, conf.IptablesAdminChainName); err != nil {
			return err
		}
		if err := errors.Join(t.ensureRule(hookForward, true, toPods), t.ensureRule(chainForward, true, toAdmin)); err != nil {
			return err
		}
		return t.ensureOfMany(chainForward, podRules(pods))
	})
}

func (xtGate) shut(conf *firewallConf) error {
	return conf.eachFamily(func(t *xtTable, pods []netip.Addr) error { return t.removeRules(chainForward, podRules(pods)) })
}

// check makes chains that are missing, as the reference does.
func (xtGate) check(conf *firewallConf) error {
	if err := conf.eachFamily(func(t *xtTable, _ []netip.Addr) error {
		return t.ensureChains(chainForward, conf.IptablesAdminChainName)
	}); err != nil {
		return err
	}
	toPods, toAdmin := conf.openingRules()
	return conf.eachFamily(func(t *xtTable, pods []netip.Addr) error {
		if err := t.expect(hookForward, toPods, hookForward+" rule"); err != nil {
			return err
		}
		if err := t.expect(chainForward, toAdmin, chainForward+" rule"); err != nil {
			return err
		}
		for _, r := range podRules(pods) {
			if err := t.expect(chainForward, r, "rule"); err != nil {
				return err
			}
		}
		return nil
	})
}

// expect is an error unless a chain has a rule, which the error calls as the reference does: with the lengths of addresses.
func (t *xtTable) expect(chain string, r xtRule, called string) error {
	there, err := t.contains(chain, r.exprs(t.v6))
	if err != nil || there {
		return err
	}
	args := r.args()
	for i, a := range args {
		if addr, err := netip.ParseAddr(a); err == nil {
			args[i] = single(addr).String()
		}
	}
	return fmt.Errorf("expected %s %s not found", called, args)
}

// canRestrict returns ErrProgram where the rules that restrict a bridge are not made here.
func (c *call) canRestrict(conf *firewallConf) error {
	bridge, err := conf.bridge()
	if err != nil {
		return nil //nolint:nilerr // restrict tells it, once the gate is open
	}
	if !plainInterface.MatchString(bridge) {
		return fmt.Errorf("%w: interface %q", ErrProgram, bridge)
	}
	pods, err := conf.pods()
	if err != nil {
		return err
	}
	return c.madeInFilter(pods)
}

// plainInterface is the name of one interface, which iptables takes as it is.
var plainInterface = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`)

// restrict keeps away from a bridge what comes from other bridges, or from other ports of the same as well. It is done before
// CNI-FORWARD lets anything through. What is for one bridge comes before what lets others go on.
func restrict(conf *firewallConf) error {
	bridge, err := conf.bridge()
	if err != nil {
		return err
	}
	const all = "CNI firewall plugin rules (ingressPolicy: same-bridge|isolated)"
	own := fmt.Sprintf("CNI firewall plugin rules (ingressPolicy: %s)", conf.IngressPolicy)
	return conf.eachFamily(func(t *xtTable, _ []netip.Addr) error {
		if err := t.ensureChains(chainStage1, chainStage2); err != nil {
			return err
		}
		errs := []error{
			t.ensureRule(hookForward, true, xtRule{comment: all, target: xtTo{chain: chainStage1}}),
			t.ensureRule(chainStage1, true, xtRule{in: bridge, out: bridge, notOut: true, comment: own, target: xtTo{chain: chainStage2}}),
		}
		if conf.IngressPolicy == ingressIsolated {
			errs = append(errs, t.ensureRule(chainStage1, true, xtRule{in: bridge, out: bridge, comment: own, target: xtTo{chain: "DROP"}}))
		}
		return errors.Join(append(errs,
			t.ensureRule(chainStage1, false, xtRule{comment: all, target: xtTo{chain: "RETURN"}}),
			t.ensureRule(chainStage2, true, xtRule{out: bridge, comment: all, target: xtTo{chain: "DROP"}}),
			t.ensureRule(chainStage2, false, xtRule{comment: all, target: xtTo{chain: "RETURN"}}),
		)...)
	})
}

package cni

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

func init() {
	plugins["firewall"] = plugin{versions: version.VersionsStartingFrom("0.4.0"), add: firewallAdd, del: firewallDel, check: firewallCheck}
}

const backendFirewalld = "firewalld"

// firewallConf is the configuration of the firewall plugin.
type firewallConf struct {
	types.PluginConf
	Backend                string `json:"backend"`
	IptablesAdminChainName string `json:"iptablesAdminChainName"`
	FirewalldZone          string `json:"firewalldZone"`
	IngressPolicy          string `json:"ingressPolicy"`

	result *types100.Result // of the plugins before; an empty one if there is none
}

// What may come to pods from elsewhere.
const (
	ingressOpen       = "open"        // everything
	ingressSameBridge = "same-bridge" // nothing from other bridges
	ingressIsolated   = "isolated"    // nothing from other pods of the bridge either
)

func loadFirewallConf(data []byte) (*firewallConf, error) {
	c := &firewallConf{result: &types100.Result{}}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to load netconf: %v", err)
	}
	if c.FirewalldZone == "" {
		c.FirewalldZone = "trusted"
	}
	if c.IptablesAdminChainName == "" {
		c.IptablesAdminChainName = chainAdmin
	}
	if c.RawPrevResult == nil {
		return c, nil
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, fmt.Errorf("could not parse prevResult: %v", err)
	}
	var err error
	if c.result, err = types100.NewResultFromResult(c.PrevResult); err != nil {
		return nil, fmt.Errorf("could not convert result to current version: %v", err)
	}
	return c, nil
}

// restricts says whether there are rules that keep something away from pods.
func (c *firewallConf) restricts() (bool, error) {
	switch c.IngressPolicy {
	case "", ingressOpen:
		return false, nil
	case ingressSameBridge, ingressIsolated:
		return true, nil
	}
	return false, fmt.Errorf("unknown ingress policy: %q", c.IngressPolicy)
}

// bridge is what the first of the plugins has named first.
func (c *firewallConf) bridge() (string, error) {
	switch all := c.result.Interfaces; {
	case len(all) == 0:
		return "", fmt.Errorf("interface needs to be set for ingress policy %q, make sure to chain \"firewall\" plugin with \"bridge\"", c.IngressPolicy)
	case all[0] == nil:
		return "", errors.New("got nil interface")
	case all[0].Name == "":
		return "", errors.New("got empty bridge name")
	default:
		return all[0].Name, nil
	}
}

// gate lets through what comes from a pod, and what answers it.
type gate interface {
	open(conf *firewallConf) error
	shut(conf *firewallConf) error
	check(conf *firewallConf) error
	close()
}

// gate is that of the backend that is configured. It returns ErrProgram where the rules are not made here, before anything was
// done.
func (c *call) gate(conf *firewallConf) (gate, error) {
	switch conf.Backend {
	case backendIPTables:
		return c.xtGate(conf)
	case backendFirewalld:
		return openFirewalld(c.ctx)
	}
	// Nothing, or anything else, is for what the node has.
	if g, err := openFirewalld(c.ctx); err == nil {
		if g.running() {
			return g, nil
		}
		g.close()
	}
	if err := c.ctx.Err(); err != nil { // nobody has said that it has no firewalld
		return nil, err
	}
	return c.xtGate(conf)
}

func firewallAdd(c *call) error {
	conf, g, err := c.firewall()
	if err != nil {
		return err
	}
	defer g.close()
	restricts, unknown := conf.restricts()
	if restricts {
		if err := c.canRestrict(conf); err != nil {
			return err
		}
	}
	if err := g.open(conf); err != nil {
		return err
	}
	if unknown != nil {
		return unknown
	}
	if restricts {
		if err := restrict(conf); err != nil {
			return err
		}
	}
	return c.print(conf.result, conf.CNIVersion)
}

// firewall is what ADD and CHECK begin with.
func (c *call) firewall() (*firewallConf, gate, error) {
	conf, err := loadFirewallConf(c.config)
	if err != nil {
		return nil, nil, configError{err}
	}
	if conf.PrevResult == nil {
		return nil, nil, errors.New("missing prevResult from earlier plugin")
	}
	g, err := c.gate(conf)
	return conf, g, err
}

// firewallDel shuts what was open for a pod. What restricts a bridge stays, for other pods.
func firewallDel(c *call) error {
	conf, err := loadFirewallConf(c.config)
	if err != nil {
		return configError{err}
	}
	g, err := c.gate(conf)
	if err != nil {
		return err
	}
	defer g.close()
	if err := g.shut(conf); err != nil {
		return err
	}
	_, err = conf.restricts()
	return err
}

func firewallCheck(c *call) error {
	conf, g, err := c.firewall()
	if err != nil {
		return err
	}
	defer g.close()
	return g.check(conf)
}

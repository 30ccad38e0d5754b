package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

func init() {
	plugins["static"] = plugin{versions: version.All, add: staticAdd, del: func(*call) error { return nil }, check: staticCheck}
}

// staticConf is the configuration of the static plugin, and of the one that delegates to it.
type staticConf struct {
	types.PluginConf
	IPAM *struct {
		Routes    []*types.Route   `json:"routes"`
		Addresses []*staticAddress `json:"addresses"`
		DNS       types.DNS        `json:"dns"`
	} `json:"ipam"`
	RuntimeConfig struct {
		IPs []string `json:"ips"`
	} `json:"runtimeConfig"`
	Args struct {
		CNI struct {
			IPs []string `json:"ips"`
		} `json:"cni"`
	} `json:"args"`
}

type staticAddress struct {
	Address string `json:"address"`
	Gateway net.IP `json:"gateway"`

	net net.IPNet
}

func loadStaticConf(data []byte, args string) (*staticConf, error) {
	c := &staticConf{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, err
	}
	if c.IPAM == nil {
		return nil, errors.New("IPAM config missing 'ipam' key")
	}
	if err := c.addArgs(args); err != nil {
		return nil, err
	}
	for _, instead := range [][]string{c.Args.CNI.IPs, c.RuntimeConfig.IPs} {
		if len(instead) == 0 {
			continue
		}
		c.IPAM.Addresses = nil
		for _, s := range instead {
			a, ok := parseStatic(s)
			if !ok {
				return nil, fmt.Errorf("an entry in the 'ips' field is NOT in CIDR notation, got: '%s'", s)
			}
			c.IPAM.Addresses = append(c.IPAM.Addresses, a)
		}
	}
	return c, c.validate()
}

// addArgs adds the addresses and sets the gateways that CNI_ARGS have.
func (c *staticConf) addArgs(args string) error {
	var env struct {
		types.CommonArgs
		IP, GATEWAY types.UnmarshallableString
	}
	if err := types.LoadArgs(args, &env); err != nil {
		return err
	}
	for s := range list(string(env.IP)) {
		s = strings.TrimSpace(s)
		a, ok := parseStatic(s)
		if !ok {
			return fmt.Errorf("the 'ip' field is expected to be in CIDR notation, got: '%s'", s)
		}
		c.IPAM.Addresses = append(c.IPAM.Addresses, a)
	}
	for s := range list(string(env.GATEWAY)) {
		gw := net.ParseIP(strings.TrimSpace(s))
		if gw == nil {
			return fmt.Errorf("invalid gateway address: %s", s)
		}
		for _, a := range c.IPAM.Addresses {
			if a.net.Contains(gw) {
				a.Gateway = gw
			}
		}
	}
	return nil
}

// list is what a text has between commas; nothing if it is empty.
func list(s string) func(func(string) bool) {
	if s == "" {
		return func(func(string) bool) {}
	}
	return strings.SplitSeq(s, ",")
}

func parseStatic(s string) (*staticAddress, bool) {
	ip, subnet, err := net.ParseCIDR(s)
	if err != nil {
		return nil, false
	}
	return &staticAddress{Address: s, net: net.IPNet{IP: ip, Mask: subnet.Mask}}, true
}

func (c *staticConf) validate() error {
	families := map[bool]int{}
	for _, a := range c.IPAM.Addresses {
		if a.net.IP == nil {
			parsed, ok := parseStatic(a.Address)
			if !ok {
				return fmt.Errorf("the 'address' field is expected to be in CIDR notation, got: '%s'", a.Address)
			}
			a.net = parsed.net
		}
		if v4 := a.net.IP.To4(); v4 != nil {
			a.net.IP = v4
		}
		families[len(a.net.IP) == net.IPv4len]++
	}
	if families[true] > 1 || families[false] > 1 {
		if several, _ := version.GreaterThanOrEqualTo(c.CNIVersion, "0.3.0"); !several {
			return fmt.Errorf("CNI version %v does not support more than 1 address per family", c.CNIVersion)
		}
	}
	return nil
}

func staticAdd(c *call) error {
	conf, err := loadStaticConf(c.config, c.args)
	if err != nil {
		return err
	}
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, DNS: conf.IPAM.DNS, Routes: conf.IPAM.Routes}
	for _, a := range conf.IPAM.Addresses {
		result.IPs = append(result.IPs, &types100.IPConfig{Address: a.net, Gateway: a.Gateway})
	}
	return c.print(result, conf.CNIVersion)
}

func staticCheck(c *call) error {
	conf, err := loadStaticConf(c.config, c.args)
	if err != nil {
		return err
	}
	result, err := previous(&conf.PluginConf, "")
	if err != nil {
		return err
	}
	for _, want := range conf.IPAM.Addresses {
		for _, is := range result.IPs {
			if !want.net.IP.Equal(is.Address.IP) {
				continue
			}
			if want.Gateway != nil && !want.Gateway.Equal(is.Gateway) {
				return fmt.Errorf("static: Failed to match addr %v on interface %v", is.Address.IP, c.ifName)
			}
			break
		}
	}
	return nil
}

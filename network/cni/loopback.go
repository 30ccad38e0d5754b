package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
)

func init() {
	plugins["loopback"] = plugin{versions: version.All, add: loopbackAdd, del: loopbackDel, check: loopbackCheck}
}

// lo is the interface of the loopback plugin, whatever CNI_IFNAME says.
const lo = "lo"

func loopbackAdd(c *call) error {
	conf := types.PluginConf{}
	if err := json.Unmarshal(c.config, &conf); err != nil {
		return fmt.Errorf("failed to parse network config: %v", err)
	}
	if conf.RawPrevResult != nil {
		if err := version.ParsePrevResult(&conf); err != nil {
			return fmt.Errorf("failed to parse prevResult: %v", err)
		}
		if _, err := types100.NewResultFromResult(conf.PrevResult); err != nil {
			return fmt.Errorf("failed to convert result to current version: %v", err)
		}
	}
	var addrs []*net.IPNet
	if err := insidePath(c.netns, func() (err error) {
		addrs, err = loopbackUp()
		return err
	}); err != nil {
		return err
	}
	if conf.PrevResult != nil {
		return c.print(conf.PrevResult, conf.CNIVersion)
	}
	r := &types100.Result{
		CNIVersion: conf.CNIVersion,
		Interfaces: []*types100.Interface{{Name: lo, Mac: "00:00:00:00:00:00", Sandbox: c.netns}},
	}
	for _, a := range addrs {
		r.IPs = append(r.IPs, &types100.IPConfig{Interface: types100.Int(0), Address: *a})
	}
	return c.print(r, conf.CNIVersion)
}

// loopbackUp sets the interface up and returns its first address of each family.
func loopbackUp() ([]*net.IPNet, error) {
	link, err := netlinksafe.LinkByName(lo)
	if err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, err
	}
	var first []*net.IPNet
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		addrs, err := netlinksafe.AddrList(link, family)
		if err != nil {
			return nil, err
		}
		for i, a := range addrs {
			if !a.IP.IsLoopback() {
				return nil, fmt.Errorf("loopback interface found with non-loopback address %q", a.IP)
			}
			if i == 0 {
				first = append(first, a.IPNet)
			}
		}
	}
	return first, nil
}

func loopbackDel(c *call) error {
	if c.netns == "" {
		return nil
	}
	err := insidePath(c.netns, func() error {
		link, err := netlinksafe.LinkByName(lo)
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	})
	if gone(err) {
		return nil
	}
	return err
}

func loopbackCheck(c *call) error {
	return insidePath(c.netns, func() error {
		link, err := netlinksafe.LinkByName(lo)
		if err != nil {
			return err
		}
		if link.Attrs().Flags&net.FlagUp == 0 {
			return errors.New("loopback interface is down")
		}
		return nil
	})
}

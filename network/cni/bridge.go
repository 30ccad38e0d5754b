package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/ipam"
	"github.com/containernetworking/plugins/pkg/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

func init() {
	plugins["bridge"] = plugin{versions: version.All, add: bridgeAdd, del: bridgeDel, check: bridgeCheck, status: bridgeStatus}
}

// bridgeAttachment is one pod that is being attached to a bridge.
type bridgeAttachment struct {
	*call
	conf  *bridgeConf
	netns ns.NetNS

	bridge                  *netlink.Bridge
	onBridge, onHost, inPod *types100.Interface
	result                  *types100.Result
	undo                    []func()
}

func bridgeAdd(c *call) (err error) {
	conf, err := loadBridgeConf(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	if err := conf.validateAdd(); err != nil {
		return err
	}
	a := &bridgeAttachment{call: c, conf: conf}
	defer func() {
		if err != nil {
			for _, undo := range a.undo {
				undo()
			}
		}
	}()
	if a.bridge, err = ensureBridge(conf); err != nil {
		return fmt.Errorf("failed to create bridge %q: %v", conf.BrName, err)
	}
	a.onBridge = &types100.Interface{Name: a.bridge.Name, Mac: a.bridge.HardwareAddr.String()}
	if a.netns, err = c.podNamespace(); err != nil {
		return err
	}
	defer a.netns.Close() //nolint:errcheck // opened for reading
	port := bridgePort{name: c.ifName, mtu: conf.MTU, mac: conf.mac, hairpin: conf.HairpinMode, isolated: conf.PortIsolation, vlan: conf.Vlan, trunk: conf.trunk, keepDefaultVlan: conf.PreserveDefaultVlan}
	if a.onHost, a.inPod, err = port.attach(a.netns, a.bridge); err != nil {
		return err
	}
	a.result = &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Interfaces: []*types100.Interface{a.onBridge, a.onHost, a.inPod}}
	if err := a.checkSpoofing(); err != nil {
		return err
	}
	switch {
	case conf.IPAM.Type != "":
		err = a.addresses()
	case !conf.DisableContainerInterface:
		err = inside(a.netns, func() error { return setUp(c.ifName) })
	}
	if err != nil {
		return err
	}
	if err := a.finish(); err != nil {
		return err
	}
	return c.print(a.result, conf.CNIVersion)
}

// setUp sets an interface up that gets no addresses.
func setUp(name string) error {
	l, err := netlinksafe.LinkByName(name)
	if err != nil {
		return fmt.Errorf("failed to retrieve link: %v", err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("failed to set %q up: %v", name, err)
	}
	return nil
}

// checkSpoofing has the bridge drop what the pod sends from another MAC address. The reference project does it with the nft
// program.
func (a *bridgeAttachment) checkSpoofing() error {
	if !a.conf.MacSpoofChk {
		return nil
	}
	check := link.NewSpoofChecker(a.onHost.Name, a.inPod.Mac, a.containerID+"-"+a.ifName)
	if err := check.Setup(); err != nil {
		return err
	}
	a.undo = append(a.undo, func() { _ = check.Teardown() }) // the error that matters is another
	return nil
}

// addresses gets addresses for the pod, and sets them up on both sides.
func (a *bridgeAttachment) addresses() error {
	conf := a.conf
	given, err := a.delegateAdd(conf.IPAM.Type)
	if err != nil {
		return err
	}
	a.undo = append([]func(){func() { _ = a.delegate(conf.IPAM.Type, "DEL") }}, a.undo...)
	from, err := types100.NewResultFromResult(given)
	if err != nil {
		return err
	}
	a.result.IPs, a.result.Routes, a.result.DNS = from.IPs, from.Routes, from.DNS
	if len(a.result.IPs) == 0 {
		return errors.New("IPAM plugin returned missing IP config")
	}
	gateways, err := conf.gateways(a.result)
	if err != nil {
		return err
	}
	if err := inside(a.netns, func() error { return a.configure() }); err != nil {
		return err
	}
	if conf.IsGW {
		if err := a.beGateway(gateways); err != nil {
			return err
		}
	}
	if !conf.IPMasq {
		return nil
	}
	return a.masquerade(conf.IPMasqBackend, netsOf(a.result), conf.Name, a.ifName, a.containerID)
}

// configure runs in the pod's namespace. A kernel that lacks one of the settings does without.
func (a *bridgeAttachment) configure() error {
	dad := "0"
	if a.conf.EnableDad {
		dad = "1"
		_ = setSysctl("ipv6/conf/"+a.ifName+"/enhanced_dad", "1")
	}
	_ = setSysctl("ipv6/conf/"+a.ifName+"/accept_dad", dad)
	_ = setSysctl("ipv4/conf/"+a.ifName+"/arp_notify", "1")
	return ipam.ConfigureIface(a.ifName, a.result)
}

// beGateway gives the bridge, or its interface in the pod's VLAN, the addresses of the gateways, and has the node forward.
func (a *bridgeAttachment) beGateway(gateways map[int][]net.IPNet) error {
	var vlan netlink.Link
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		for _, gw := range gateways[family] {
			if a.conf.Vlan == 0 {
				if err := ensureAddr(a.bridge, family, &gw, a.conf.ForceAddress); err != nil {
					return fmt.Errorf("failed to set bridge addr: %v", err)
				}
				continue
			}
			if vlan == nil {
				var err error
				if vlan, err = ensureVlanInterface(a.bridge, a.conf); err != nil {
					return fmt.Errorf("failed to create vlan interface: %v", err)
				}
				a.result.Interfaces = append(a.result.Interfaces, &types100.Interface{Name: vlan.Attrs().Name, Mac: vlan.Attrs().HardwareAddr.String()})
			}
			if err := ensureAddr(vlan, family, &gw, a.conf.ForceAddress); err != nil {
				return fmt.Errorf("failed to set vlan interface for bridge with addr: %v", err)
			}
		}
		if len(gateways[family]) > 0 {
			if err := forward(family); err != nil {
				return fmt.Errorf("failed to enable forwarding: %v", err)
			}
		}
	}
	return nil
}

func forward(family int) error {
	if family == netlink.FAMILY_V4 {
		return ip.EnableIP4Forward()
	}
	return ip.EnableIP6Forward()
}

// finish waits until the port works, and tells what has changed meanwhile: the bridge has the MAC address of a port until it
// has one of its own.
func (a *bridgeAttachment) finish() error {
	if !a.conf.DisableContainerInterface {
		if err := waitForPort(a.ctx, a.onHost.Name); err != nil {
			return err
		}
	}
	l, err := netlinksafe.LinkByName(a.onHost.Name)
	if err != nil {
		return err
	}
	a.onHost.Mac = l.Attrs().HardwareAddr.String()
	br, err := bridgeByName(a.conf.BrName)
	if err != nil {
		return err
	}
	a.onBridge.Mac = br.HardwareAddr.String()
	if hasDNS(a.conf.DNS) {
		a.result.DNS = a.conf.DNS
	}
	return nil
}

// hasDNS says whether a configuration has settings, be they empty lists.
func hasDNS(d types.DNS) bool {
	return d.Nameservers != nil || d.Search != nil || d.Options != nil || d.Domain != ""
}

func bridgeDel(c *call) error {
	conf, err := loadBridgeConf(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	nets, err := c.deleteInside(c.netns, c.ifName)
	if err != nil {
		return err
	}
	if conf.IPAM.Type != "" {
		if err := c.delegate(conf.IPAM.Type, "DEL"); err != nil {
			return err
		}
	}
	if conf.MacSpoofChk {
		if err := link.NewSpoofChecker("", "", c.containerID+"-"+c.ifName).Teardown(); err != nil {
			c.log.Warn("cni plugin bridge: rules against spoofing stay", "pod", c.containerID, "error", err)
		}
	}
	if conf.IPAM.Type != "" && conf.IPMasq {
		return c.unmasquerade(nets, conf.Name, c.ifName, c.containerID)
	}
	return nil
}

func bridgeStatus(c *call) error {
	var conf bridgeConf
	if err := json.Unmarshal(c.config, &conf); err != nil {
		return fmt.Errorf("failed to load netconf: %w", err)
	}
	if conf.IPAM.Type == "" {
		return nil
	}
	return c.delegate(conf.IPAM.Type, "STATUS")
}

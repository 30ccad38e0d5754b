package cni

import (
	"errors"
	"fmt"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
)

func bridgeCheck(c *call) error {
	conf, err := loadBridgeConf(c.config, c.args)
	if err != nil {
		return err
	}
	netns, err := c.podNamespace()
	if err != nil {
		return err
	}
	defer netns.Close() //nolint:errcheck // opened for reading
	if err := c.delegate(conf.IPAM.Type, "CHECK"); err != nil {
		return err
	}
	result, err := previous(&conf.PluginConf, "")
	if err != nil {
		return err
	}
	if err := c.checkBridgeLinks(conf, netns, result); err != nil {
		return err
	}
	return inside(netns, func() error {
		if err := ip.ValidateExpectedInterfaceIPs(c.ifName, result.IPs); err != nil {
			return err
		}
		return ip.ValidateExpectedRoute(result.Routes)
	})
}

// checkBridgeLinks checks the interfaces of a result: bridge, pod's interface, and the port that connects both.
func (c *call) checkBridgeLinks(conf *bridgeConf, netns ns.NetNS, result *types100.Result) error {
	var onBridge, inPod types100.Interface
	for _, i := range result.Interfaces {
		switch {
		case i.Name == conf.BrName:
			onBridge = *i
		case i.Name == c.ifName && i.Sandbox == c.netns:
			inPod = *i
		}
	}
	br, err := checkBridge(onBridge, conf)
	if err != nil {
		return err
	}
	if inPod.Sandbox != c.netns {
		return fmt.Errorf("Sandbox in prevResult %s doesn't match configured netns: %s", inPod.Sandbox, c.netns)
	}
	var pod netlink.Link
	var peer int
	if err := inside(netns, func() (err error) {
		pod, peer, err = checkInPod(inPod)
		return err
	}); err != nil {
		return err
	}
	for _, i := range result.Interfaces {
		if i.Name == onBridge.Name || i.Name == inPod.Name {
			continue
		}
		if found, err := isPort(*i, br, pod, peer); err != nil || found {
			return err
		}
	}
	return fmt.Errorf("CNI veth created for bridge %s was not found", conf.BrName)
}

// checkLink finds an interface of a result, which is in a pod or is not.
func checkLink(i types100.Interface, pod bool) (netlink.Link, error) {
	if i.Name == "" {
		return nil, errors.New("Interface name missing ")
	}
	l, err := netlinksafe.LinkByName(i.Name)
	switch {
	case err != nil:
		return nil, fmt.Errorf("Interface name %s not found", i.Name)
	case pod && i.Sandbox == "":
		return nil, fmt.Errorf("Interface %s is expected to be in a sandbox", i.Name)
	case !pod && i.Sandbox != "":
		return nil, fmt.Errorf("Interface %s should not be in sandbox", i.Name)
	}
	return l, nil
}

func sameMac(i types100.Interface, l netlink.Link) bool {
	return i.Mac == "" || i.Mac == l.Attrs().HardwareAddr.String()
}

func checkBridge(i types100.Interface, conf *bridgeConf) (netlink.Link, error) {
	l, err := checkLink(i, false)
	if err != nil {
		return nil, err
	}
	if _, ok := l.(*netlink.Bridge); !ok {
		return nil, fmt.Errorf("Interface %s does not have link type of bridge", i.Name)
	}
	if !sameMac(i, l) {
		return nil, fmt.Errorf("Bridge interface %s Mac doesn't match: %s", i.Name, i.Mac)
	}
	if promisc := l.Attrs().Promisc != 0; promisc != conf.PromiscMode {
		return nil, fmt.Errorf("Bridge interface %s configured Promisc Mode %v doesn't match current state: %v ", i.Name, conf.PromiscMode, promisc)
	}
	return l, nil
}

// checkInPod returns the pod's interface and the index of the other end.
func checkInPod(i types100.Interface) (netlink.Link, int, error) {
	l, err := checkLink(i, true)
	if err != nil {
		return nil, 0, err
	}
	if _, ok := l.(*netlink.Veth); !ok {
		return nil, 0, fmt.Errorf("Error: Container interface %s not of type veth", i.Name)
	}
	_, peer, err := ip.GetVethPeerIfindex(i.Name)
	if err != nil {
		return nil, 0, fmt.Errorf("Unable to obtain veth peer index for veth %s", i.Name)
	}
	if !sameMac(i, l) {
		return nil, 0, fmt.Errorf("Interface %s Mac %s doesn't match container Mac: %s", i.Name, i.Mac, l.Attrs().HardwareAddr)
	}
	return l, peer, nil
}

// isPort says whether an interface is the port that connects the pod's with the bridge.
func isPort(i types100.Interface, br, pod netlink.Link, podPeer int) (bool, error) {
	l, err := checkLink(i, false)
	if err != nil {
		return false, err
	}
	if _, ok := l.(*netlink.Veth); !ok {
		return false, nil
	}
	_, peer, err := ip.GetVethPeerIfindex(i.Name)
	if err != nil {
		return false, fmt.Errorf("Unable to obtain veth peer index for veth %s", i.Name)
	}
	if l.Attrs().Index != podPeer || peer != pod.Attrs().Index || l.Attrs().MasterIndex != br.Attrs().Index {
		return false, nil
	}
	if !sameMac(i, l) {
		return false, fmt.Errorf("Interface %s Mac doesn't match: %s not found", i.Name, i.Mac)
	}
	return true, nil
}

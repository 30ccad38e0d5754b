package cni

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func bridgeByName(name string) (*netlink.Bridge, error) {
	l, err := netlinksafe.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("could not lookup %q: %v", name, err)
	}
	br, ok := l.(*netlink.Bridge)
	if !ok {
		return nil, fmt.Errorf("%q already exists but is not a bridge", name)
	}
	return br, nil
}

// ensureBridge makes the bridge, if it is not there, and sets it up.
func ensureBridge(conf *bridgeConf) (*netlink.Bridge, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = conf.BrName, conf.MTU
	br := &netlink.Bridge{LinkAttrs: attrs}
	if filter := conf.Vlan != 0 || conf.VlanTrunk != nil; filter {
		br.VlanFiltering = &filter
	}
	if err := netlink.LinkAdd(br); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("could not add %q: %v", conf.BrName, err)
	}
	if conf.PromiscMode {
		if err := netlink.SetPromiscOn(br); err != nil {
			return nil, fmt.Errorf("could not set promiscuous mode on %q: %v", conf.BrName, err)
		}
	}
	br, err := bridgeByName(conf.BrName)
	if err != nil {
		return nil, err
	}
	ownRoutes(conf.BrName)
	if err := netlink.LinkSetUp(br); err != nil {
		return nil, err
	}
	return br, nil
}

// ownRoutes has the kernel take no routes from router advertisements. Without IPv6 there are none.
func ownRoutes(ifName string) { _ = setSysctl("ipv6/conf/"+ifName+"/accept_ra", "0") }

// ensureVlanInterface makes the interface that has the addresses of the gateways in a VLAN: one end of a pair on the node, of
// which the other is a port of the bridge.
func ensureVlanInterface(br *netlink.Bridge, conf *bridgeConf) (netlink.Link, error) {
	name := br.Name + "." + strconv.Itoa(conf.Vlan)
	l, err := netlinksafe.LinkByName(name)
	var notFound netlink.LinkNotFoundError
	switch {
	case err == nil:
		return l, nil
	case !errors.As(err, &notFound):
		return nil, fmt.Errorf("failed to find interface %q: %v", name, err)
	}
	here, err := ns.GetCurrentNS()
	if err != nil {
		return nil, fmt.Errorf("faild to find host namespace: %v", err)
	}
	defer here.Close() //nolint:errcheck // opened for reading
	port := bridgePort{name: name, mtu: br.MTU, vlan: conf.Vlan, keepDefaultVlan: conf.PreserveDefaultVlan}
	_, made, err := port.attach(here, br)
	if err != nil {
		return nil, fmt.Errorf("faild to create vlan gateway %q: %v", name, err)
	}
	if l, err = netlinksafe.LinkByName(made.Name); err != nil {
		return nil, fmt.Errorf("failed to lookup %q: %v", made.Name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return nil, fmt.Errorf("failed to up %q: %v", made.Name, err)
	}
	return l, nil
}

// bridgePort is a pair of interfaces of which one end is a port of a bridge.
type bridgePort struct {
	name              string // of the other end
	mtu               int
	mac               string
	hairpin, isolated bool
	vlan              int
	trunk             []int
	keepDefaultVlan   bool
}

// attach makes the pair and returns both ends, the port first.
func (p bridgePort) attach(netns ns.NetNS, br *netlink.Bridge) (onHost, inPod *types100.Interface, err error) {
	here, err := ns.GetCurrentNS()
	if err != nil {
		return nil, nil, err
	}
	defer here.Close() //nolint:errcheck // opened for reading
	var port, pod net.Interface
	if err := inside(netns, func() (err error) {
		port, pod, err = ip.SetupVeth(p.name, p.mtu, p.mac, here)
		return err
	}); err != nil {
		return nil, nil, err
	}
	l, err := netlinksafe.LinkByName(port.Name)
	if err != nil {
		return nil, nil, fmt.Errorf("failed to lookup %q: %v", port.Name, err)
	}
	if err := netlink.LinkSetMaster(l, br); err != nil {
		return nil, nil, fmt.Errorf("failed to connect %q to bridge %v: %v", port.Name, br.Name, err)
	}
	if err := netlink.LinkSetHairpin(l, p.hairpin); err != nil {
		return nil, nil, fmt.Errorf("failed to setup hairpin mode for %v: %v", port.Name, err)
	}
	if err := netlink.LinkSetIsolated(l, p.isolated); err != nil {
		return nil, nil, fmt.Errorf("failed to set isolated on for %v: %v", port.Name, err)
	}
	if err := p.setVlans(l); err != nil {
		return nil, nil, err
	}
	return &types100.Interface{Name: port.Name, Mac: l.Attrs().HardwareAddr.String()},
		&types100.Interface{Name: pod.Name, Mac: pod.HardwareAddr.String(), Sandbox: netns.Path()}, nil
}

// setVlans sets the VLANs of a port: its own untagged, or VLAN 1 where there is a trunk alone, and the trunk's tagged.
func (p bridgePort) setVlans(l netlink.Link) error {
	name := l.Attrs().Name
	if p.vlan == 0 && len(p.trunk) == 0 {
		return nil
	}
	if !p.keepDefaultVlan {
		if err := removeVlans(l); err != nil {
			return fmt.Errorf("failed to remove default vlan on interface %q: %v", name, err)
		}
	}
	if p.vlan != 0 {
		if err := netlink.BridgeVlanAdd(l, uint16(p.vlan), true, true, false, true); err != nil {
			return fmt.Errorf("failed to setup vlan tag on interface %q: %v", name, err)
		}
	}
	for _, id := range p.trunk {
		if err := netlink.BridgeVlanAdd(l, uint16(id), false, false, false, true); err != nil {
			return fmt.Errorf("failed to setup vlan tag on interface %q: %w", name, err)
		}
	}
	if p.vlan == 0 {
		if err := netlink.BridgeVlanAdd(l, 1, true, true, false, true); err != nil {
			return fmt.Errorf("failed to setup default native vlan tag on interface %q: %v", name, err)
		}
	}
	return nil
}

func removeVlans(l netlink.Link) error {
	all, err := netlinksafe.BridgeVlanList()
	if err != nil {
		return err
	}
	for _, v := range all[int32(l.Attrs().Index)] {
		if err := netlink.BridgeVlanDel(l, v.Vid, false, false, false, true); err != nil {
			return err
		}
	}
	return nil
}

// ensureAddr gives an interface an address. It may have others, but of IPv4 none, and of IPv6 none in a subnet that overlaps:
// those are removed if force says so.
func ensureAddr(l netlink.Link, family int, want *net.IPNet, force bool) error {
	name := l.Attrs().Name
	addrs, err := netlinksafe.AddrList(l, family)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("could not get list of IP addresses: %v", err)
	}
	for _, a := range addrs {
		switch {
		case a.IPNet.String() == want.String():
			return nil
		case family != netlink.FAMILY_V4 && !a.Contains(want.IP) && !want.Contains(a.IP):
		case !force:
			return fmt.Errorf("%q already has an IP address different from %v", name, want)
		default:
			if err := netlink.AddrDel(l, &netlink.Addr{IPNet: a.IPNet}); err != nil {
				return fmt.Errorf("could not remove IP address from %q: %v", name, err)
			}
		}
	}
	// Without a MAC address of its own a bridge has the lowest of its ports', which come and go. It gets it first: one with an
	// address is left as it is by the next ADD, should this one be killed.
	if err := netlink.LinkSetHardwareAddr(l, ownMAC(l)); err != nil {
		return fmt.Errorf("could not set bridge's mac: %v", err)
	}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: want}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("could not add IP address %s to %q: %v", want, name, err)
	}
	return nil
}

// ownMAC is the MAC address that an interface has, or a new one: a bridge that was left by a kill before it got one of its own,
// and has lost its only port, has none, and the kernel does not take that.
func ownMAC(l netlink.Link) net.HardwareAddr {
	if mac := l.Attrs().HardwareAddr; len(mac) > 0 { // one of zeros is told as none
		return mac
	}
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac)        // never fails (crypto/rand)
	mac[0] = mac[0]&^0x01 | 0x02 // of one station, administered locally
	return mac
}

// portTime is how long a port may take to be up: what the reference plugin's tries add up to.
const portTime = 2550 * time.Millisecond

// waitForPort waits until an interface is up. It listens before it looks.
func waitForPort(ctx context.Context, name string) error {
	l, err := netlinksafe.LinkByName(name)
	if err != nil || l.Attrs().OperState == netlink.OperUp {
		return err
	}
	news, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return err
	}
	defer news.Close()
	deadline := time.Now().Add(portTime)
	for {
		if l, err = netlinksafe.LinkByName(name); err != nil || l.Attrs().OperState == netlink.OperUp {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("bridge port in error state: %s", l.Attrs().OperState)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		timeout := unix.NsecToTimeval(left.Nanoseconds())
		if err := news.SetReceiveTimeout(&timeout); err != nil {
			return err
		}
		if _, _, err := news.Receive(); err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Pods of a node are on one bridge, and what one sends to another goes there directly. Where it is an answer to what came by
// way of a Service or a host port, the node's netfilter has to see it, which gives it the address that was asked: a client
// refuses an answer from elsewhere. That is what br_netfilter is for (https://ebtables.netfilter.org/documentation/bridge-nf.html).
// It is a module that nothing loads by itself, and on many nodes net.bridge.bridge-nf-call-iptables is 0 for the bridges of virtual
// machines. So the bridge of the default network asks for it itself.

// bridgeSettings is there where br_netfilter is.
const bridgeSettings = "/proc/sys/net/bridge"

// seeBridged has the node's netfilter see what pods of the default network send to each other. It does so once for a bridge.
func (m *Manager) seeBridged(bridge netlink.Link) error {
	index := int64(bridge.Attrs().Index)
	if m.seen.Load() == index {
		return nil
	}
	if err := callIPTables(bridge); err != nil {
		return fmt.Errorf("bridge %s: have its packets seen by netfilter: %w", bridge.Attrs().Name, err)
	}
	if err := loadBridgeNetfilter(); err != nil {
		m.log.Warn("pods do not reach Services whose pods are on the same node: netfilter does not see what passes the bridge",
			"bridge", bridge.Attrs().Name, "error", err, "remedy", "modprobe br_netfilter, and a line br_netfilter in /etc/modules-load.d/berth.conf")
	}
	m.seen.Store(index)
	return nil
}

// callIPTables sets nf_call_iptables and nf_call_ip6tables of a bridge (ip-link(8)), which also hold for nf_tables.
func callIPTables(bridge netlink.Link) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(bridge.Attrs().Index)
	req.AddData(msg)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_NF_CALL_IPTABLES, []byte{1})
	data.AddRtAttr(nl.IFLA_BR_NF_CALL_IP6TABLES, []byte{1})
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// loadBridgeNetfilter loads the module where the kernel has it neither built in nor loaded.
func loadBridgeNetfilter() error {
	_, err := os.Stat(bridgeSettings)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if out, err := exec.Command("modprobe", "br_netfilter").CombinedOutput(); err != nil {
		return fmt.Errorf("modprobe br_netfilter: %w: %s", err, out)
	}
	_, err = os.Stat(bridgeSettings)
	return err
}

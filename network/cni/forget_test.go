package cni

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What a node tracks of UDP to the host ports of a pod is forgotten, and nothing else.
func TestForgetConnections(t *testing.T) {
	addrs := map[bool]string{false: "192.0.2.1", true: "2001:db8::1"}
	for _, v6 := range []bool{false, true} {
		t.Run(fmt.Sprintf("IPv6 %v", v6), func(t *testing.T) {
			inNamespace(t, func() error {
				client, node := net.ParseIP("198.51.100.1").To4(), net.ParseIP(addrs[v6]).To4()
				family := netlink.InetFamily(unix.AF_INET)
				if v6 {
					client, node, family = net.ParseIP("2001:db8:1::1"), net.ParseIP(addrs[v6]), unix.AF_INET6
				}
				for i, what := range []struct {
					protocol uint8
					port     uint16
				}{{unix.IPPROTO_UDP, 53}, {unix.IPPROTO_UDP, 53}, {unix.IPPROTO_UDP, 54}, {unix.IPPROTO_UDP, 55}, {unix.IPPROTO_TCP, 53}} {
					there := netlink.IPTuple{SrcIP: client, DstIP: node, SrcPort: uint16(1000 + i), DstPort: what.port, Protocol: what.protocol}
					back := netlink.IPTuple{SrcIP: node, DstIP: client, SrcPort: what.port, DstPort: there.SrcPort, Protocol: what.protocol}
					flow := &netlink.ConntrackFlow{FamilyType: uint8(family), TimeOut: 600, Forward: there, Reverse: back}
					if what.protocol == unix.IPPROTO_TCP {
						flow.ProtoInfo = &netlink.ProtoInfoTCP{State: 3}
					}
					if err := netlink.ConntrackCreate(netlink.ConntrackTable, family, flow); err != nil {
						return err
					}
				}
				conf := &portmapConf{}
				conf.RuntimeConfig.PortMaps = []portMapping{{HostPort: 53, Protocol: "udp"}, {HostPort: 53, Protocol: "tcp"}, {HostPort: 55, Protocol: "udp"}}
				(&call{Plugins: newPlugins(t)}).forgetConnections(conf, v6)
				left, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil {
					return err
				}
				var got []string
				for _, f := range left {
					got = append(got, fmt.Sprintf("%d/%d", f.Forward.Protocol, f.Forward.DstPort))
				}
				slices.Sort(got)
				if want := []string{"17/54", "6/53"}; !slices.Equal(got, want) {
					t.Errorf("left are %v, want %v", got, want)
				}
				return nil
			})
		})
	}
}

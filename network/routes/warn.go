package routes

import (
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/network"
)

// warning is of something on the node that keeps packets of pods from other nodes, which is not ours to change.
type warning struct{ what, remedy string }

func warnings(p *Plan) (all []warning) {
	if len(p.Routes) == 0 {
		return nil
	}
	for _, own := range p.Own {
		setting := "net.ipv4.ip_forward"
		if own.Addr().Is6() {
			setting = "net.ipv6.conf.all.forwarding"
		}
		// With the first pod the default network turns it on: before that there is nothing to forward.
		if hasBridge() && sysctl(setting) == "0" {
			all = append(all, warning{setting + " is 0: nothing that pods send leaves the node", "sysctl -w " + setting + "=1, and there where it is turned off (/etc/sysctl.d)"})
		}
	}
	drops, err := dropsForwarded()
	if err != nil {
		return all // the table is told of if it cannot be made
	}
	for _, chain := range drops {
		if strings.HasSuffix(chain, " filter FORWARD") {
			continue // that of iptables: the default network lets its range through there (network/forward.go)
		}
		for _, own := range p.Own {
			family := "ip"
			if own.Addr().Is6() {
				family = "ip6"
			}
			if !strings.HasPrefix(chain, family+" ") && !strings.HasPrefix(chain, "inet ") {
				continue
			}
			all = append(all, warning{
				fmt.Sprintf("nftables chain %q drops what the node forwards for pods %s, unless a rule of it accepts that", chain, own),
				fmt.Sprintf("nft insert rule %s %s saddr %s accept, and the same with daddr; where Docker makes the chain, in DOCKER-USER", chain, family, own),
			})
		}
	}
	return all
}

func hasBridge() bool {
	links, err := untorn(netlink.LinkList)
	if err != nil {
		return false
	}
	for _, l := range links {
		if network.IsDefaultBridge(l.Attrs().Name) {
			return true
		}
	}
	return false
}

func sysctl(name string) string {
	value, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(value))
}

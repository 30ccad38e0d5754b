package ipvs

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/proxy/model"
)

// link has the addresses of all Services in mode ipvs.
const link = "kube-ipvs0"

// Remove removes what there is, and says what it has removed. A failure does not keep it from the rest.
func Remove() ([]string, error) {
	var removed []string
	var errs []error
	dummy, addrs, err := kubeLink()
	errs = append(errs, err)
	sets, err := kubeSets()
	errs = append(errs, err)
	if dummy != nil || len(sets) > 0 { // else there is nothing by which to know its virtual servers
		n, err := removeServers(addrs, nodePorts(sets))
		if n > 0 {
			removed = append(removed, fmt.Sprintf("%d virtual servers of IPVS", n))
		}
		errs = append(errs, err)
	}
	if dummy != nil {
		if err := netlink.LinkDel(dummy); err != nil {
			errs = append(errs, fmt.Errorf("remove link %s: %w", link, err))
		} else {
			removed = append(removed, "link "+link)
		}
	}
	gone := 0
	for _, s := range sets {
		if err := netlink.IpsetDestroy(s.SetName); err != nil {
			errs = append(errs, fmt.Errorf("remove ipset %s: %w", s.SetName, err))
		} else {
			gone++
		}
	}
	if gone > 0 {
		removed = append(removed, fmt.Sprintf("%d ipsets", gone))
	}
	return removed, errors.Join(errs...)
}

// kubeLink is kube-proxy's link with its addresses; nil if there is none.
func kubeLink() (netlink.Link, map[netip.Addr]bool, error) {
	l, err := netlink.LinkByName(link)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("link %s: %w", link, err)
	}
	if l.Type() != "dummy" {
		return nil, nil, fmt.Errorf("link %s is a %s and not kube-proxy's; it stays", link, l.Type())
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, nil, fmt.Errorf("addresses of link %s: %w", link, err)
	}
	addrs := map[netip.Addr]bool{}
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			addrs[ip.Unmap()] = true
		}
	}
	return l, addrs, nil
}

// kubeSets are the ipsets of kube-proxy.
func kubeSets() ([]netlink.IPSetResult, error) {
	if _, err := os.Stat("/sys/module/ip_set"); err != nil {
		return nil, nil // to ask would load it
	}
	all, err := netlink.IpsetListAll()
	if err != nil {
		return nil, fmt.Errorf("list ipsets: %w", err)
	}
	var out []netlink.IPSetResult
	for _, s := range all {
		if isKubeSet(s.SetName) {
			out = append(out, s)
		}
	}
	return out, nil
}

// isKubeSet is whether a set is one of kube-proxy's (pkg/proxy/ipvs/ipset.go); those of IPv6 begin with KUBE-6-.
func isKubeSet(name string) bool {
	rest, ok := strings.CutPrefix(name, "KUBE-")
	rest = strings.TrimPrefix(rest, "6-")
	switch rest {
	case "LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER", "LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW",
		"LOAD-BALANCER-SOURCE-IP", "LOAD-BALANCER-SOURCE-CIDR", "HEALTH-CHECK-NODE-PORT", "IPVS-IPS":
		return ok
	}
	return ok && strings.HasPrefix(rest, "NODE-PORT-")
}

// portKey is a node port.
type portKey struct {
	protocol model.Protocol
	port     uint16
}

// nodePorts are those that sets name.
func nodePorts(sets []netlink.IPSetResult) map[portKey]bool {
	out := map[portKey]bool{}
	for _, s := range sets {
		for suffix, protocol := range map[string]model.Protocol{"-TCP": model.TCP, "-UDP": model.UDP, "-SCTP-HASH": model.SCTP} {
			if !strings.Contains(s.SetName, "NODE-PORT-") || !strings.HasSuffix(s.SetName, suffix) {
				continue
			}
			for _, e := range s.Entries {
				if e.Port != nil {
					out[portKey{protocol, *e.Port}] = true
				}
			}
		}
	}
	return out
}

// kubeProxys is whether a virtual server is kube-proxy's.
func (s *server) kubeProxys(addrs map[netip.Addr]bool, ports map[portKey]bool) bool {
	return s.mark == 0 && (addrs[s.addr] || ports[portKey{model.Protocol(s.protocol), s.port}] && isLocal(s.addr))
}

// isLocal is whether an address is one of this network namespace's.
func isLocal(a netip.Addr) bool {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, x := range all {
		if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr().Unmap() == a {
			return true
		}
	}
	return false
}

// removeServers removes kube-proxy's virtual servers, and says how many.
func removeServers(addrs map[netip.Addr]bool, ports map[portKey]bool) (int, error) {
	family, err := netlink.GenlFamilyGet(genlName)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil // the kernel has no IPVS, or has not loaded it
	}
	if err != nil {
		return 0, fmt.Errorf("IPVS: %w", err)
	}
	all, err := listServers(family.ID)
	if err != nil {
		return 0, fmt.Errorf("list virtual servers of IPVS: %w", err)
	}
	n := 0
	var errs []error
	for i := range all {
		if !all[i].kubeProxys(addrs, ports) {
			continue
		}
		if err := all[i].remove(family.ID); err != nil {
			errs = append(errs, fmt.Errorf("remove the virtual server %s of IPVS: %w", netip.AddrPortFrom(all[i].addr, all[i].port), err))
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

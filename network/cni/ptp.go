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
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func init() {
	plugins["ptp"] = plugin{versions: version.All, add: ptpAdd, del: ptpDel, check: ptpCheck, status: ptpStatus}
}

// ptpConf is the configuration of the ptp plugin.
type ptpConf struct {
	types.PluginConf
	IPMasq        bool    `json:"ipMasq"`
	IPMasqBackend *string `json:"ipMasqBackend"`
	MTU           int     `json:"mtu"`
}

func loadPtpConf(data []byte) (*ptpConf, error) {
	c := &ptpConf{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to load netconf: %w", err)
	}
	return c, nil
}

func ptpAdd(c *call) (err error) {
	conf, err := loadPtpConf(c.config)
	if err != nil {
		return configError{err}
	}
	given, err := c.delegateAdd(conf.IPAM.Type)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = c.delegate(conf.IPAM.Type, "DEL") // the error that matters is another
		}
	}()
	result, err := types100.NewResultFromResult(given)
	if err != nil {
		return err
	}
	if len(result.IPs) == 0 {
		return errors.New("IPAM plugin returned missing IP config")
	}
	if err := ip.EnableForward(result.IPs); err != nil {
		return fmt.Errorf("Could not enable IP forwarding: %v", err)
	}
	netns, err := c.podNamespace()
	if err != nil {
		return err
	}
	defer netns.Close() //nolint:errcheck // opened for reading
	if err := c.connect(netns, conf.MTU, result); err != nil {
		return err
	}
	if conf.IPMasq {
		if err := c.masquerade(conf.IPMasqBackend, netsOf(result), conf.Name, c.ifName, c.containerID); err != nil {
			return err
		}
	}
	if hasDNS(conf.DNS) {
		result.DNS = conf.DNS
	}
	return c.print(result, conf.CNIVersion)
}

// netsOf are the addresses of a result.
func netsOf(r *types100.Result) []*net.IPNet {
	var nets []*net.IPNet
	for _, ip := range r.IPs {
		nets = append(nets, &ip.Address)
	}
	return nets
}

// connect makes the pair of interfaces, and addresses and routes on both sides.
func (c *call) connect(netns ns.NetNS, mtu int, result *types100.Result) error {
	here, err := ns.GetCurrentNS()
	if err != nil {
		return err
	}
	defer here.Close() //nolint:errcheck // opened for reading
	var onHost string
	if err := inside(netns, func() error {
		host, pod, err := ip.SetupVeth(c.ifName, mtu, "", here)
		if err != nil {
			return err
		}
		onHost = host.Name
		for _, ipc := range result.IPs {
			ipc.Interface = types100.Int(1) // the pod's
		}
		result.Interfaces = []*types100.Interface{
			{Name: host.Name, Mac: host.HardwareAddr.String()},
			{Name: pod.Name, Mac: pod.HardwareAddr.String(), Sandbox: netns.Path()},
		}
		return configurePointToPoint(c.ifName, result)
	}); err != nil {
		return err
	}
	return routeToPod(onHost, result)
}

// configurePointToPoint gives the pod's interface its addresses. All goes to the gateway, for nobody else of the subnet is on
// this link: the kernel's route to the subnet is replaced by one through the gateway.
func configurePointToPoint(ifName string, result *types100.Result) error {
	if err := ipam.ConfigureIface(ifName, result); err != nil {
		return err
	}
	l, err := net.InterfaceByName(ifName)
	if err != nil {
		return fmt.Errorf("failed to look up %q: %v", ifName, err)
	}
	for _, ipc := range result.IPs {
		subnet := &net.IPNet{IP: ipc.Address.IP.Mask(ipc.Address.Mask), Mask: ipc.Address.Mask}
		own := netlink.Route{LinkIndex: l.Index, Dst: subnet, Scope: netlink.SCOPE_NOWHERE}
		if err := netlink.RouteDel(&own); err != nil {
			return fmt.Errorf("failed to delete route %v: %v", own, err)
		}
		for _, r := range []netlink.Route{
			{LinkIndex: l.Index, Dst: alone(ipc.Gateway, ipc), Scope: netlink.SCOPE_LINK, Src: ipc.Address.IP},
			{LinkIndex: l.Index, Dst: subnet, Scope: netlink.SCOPE_UNIVERSE, Gw: ipc.Gateway, Src: ipc.Address.IP},
		} {
			if err := netlink.RouteAdd(&r); err != nil {
				return fmt.Errorf("failed to add route %v: %v", r, err)
			}
		}
	}
	return nil
}

// alone is an address by itself, of the family of another.
func alone(addr net.IP, of *types100.IPConfig) *net.IPNet {
	bits := 8 * net.IPv6len
	if of.Address.IP.To4() != nil {
		bits = 8 * net.IPv4len
	}
	return &net.IPNet{IP: addr, Mask: net.CIDRMask(bits, bits)}
}

// routeToPod gives the node's end the addresses of the gateways, and leads what is for the pod there.
func routeToPod(onHost string, result *types100.Result) error {
	l, err := netlinksafe.LinkByName(onHost)
	if err != nil {
		return fmt.Errorf("failed to lookup %q: %v", onHost, err)
	}
	for _, ipc := range result.IPs {
		gw := alone(ipc.Gateway, ipc)
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: gw}); err != nil {
			return fmt.Errorf("failed to add IP addr (%#v) to veth: %v", gw, err)
		}
		if err := ip.AddHostRoute(alone(ipc.Address.IP, ipc), nil, l); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("failed to add route on host: %v", err)
		}
	}
	return nil
}

func ptpDel(c *call) error {
	conf, err := loadPtpConf(c.config)
	if err != nil {
		return configError{err}
	}
	if err := c.delegate(conf.IPAM.Type, "DEL"); err != nil {
		return err
	}
	nets, err := c.deleteInside(c.netns, c.ifName)
	if err != nil {
		return err
	}
	if conf.IPMasq {
		return c.unmasquerade(nets, conf.Name, c.ifName, c.containerID)
	}
	return nil
}

func ptpCheck(c *call) error {
	conf, err := loadPtpConf(c.config)
	if err != nil {
		return configError{err}
	}
	netns, err := c.podNamespace()
	if err != nil {
		return err
	}
	defer netns.Close() //nolint:errcheck // opened for reading
	if err := c.delegate(conf.IPAM.Type, "CHECK"); err != nil {
		return err
	}
	result, err := previous(&conf.PluginConf, "ptp: ")
	if err != nil {
		return err
	}
	var inPod types100.Interface
	for _, i := range result.Interfaces {
		if i.Name == c.ifName && i.Sandbox == c.netns {
			inPod = *i
		}
	}
	if inPod.Sandbox != c.netns {
		return fmt.Errorf("Sandbox in prevResult %s doesn't match configured netns: %s", inPod.Sandbox, c.netns)
	}
	return inside(netns, func() error {
		if err := checkPointToPoint(inPod); err != nil {
			return err
		}
		if err := ip.ValidateExpectedInterfaceIPs(c.ifName, result.IPs); err != nil {
			return err
		}
		return ip.ValidateExpectedRoute(result.Routes)
	})
}

func checkPointToPoint(i types100.Interface) error {
	l, err := netlinksafe.LinkByName(i.Name)
	if err != nil {
		return fmt.Errorf("ptp: Container Interface name in prevResult: %s not found", i.Name)
	}
	if _, ok := l.(*netlink.Veth); !ok {
		return fmt.Errorf("Error: Container interface %s not of type veth/p2p", i.Name)
	}
	if !sameMac(i, l) {
		return fmt.Errorf("ptp: Interface %s Mac %s doesn't match container Mac: %s", i.Name, i.Mac, l.Attrs().HardwareAddr)
	}
	return nil
}

func ptpStatus(c *call) error {
	conf, err := loadPtpConf(c.config)
	if err != nil {
		return configError{err}
	}
	return c.delegate(conf.IPAM.Type, "STATUS")
}

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/utils"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func init() {
	plugins["bandwidth"] = plugin{versions: version.VersionsStartingFrom("0.3.0"), add: bandwidthAdd, del: bandwidthDel, check: bandwidthCheck}
}

// bandwidthConf is the configuration of the bandwidth plugin.
type bandwidthConf struct {
	types.PluginConf
	RuntimeConfig struct {
		Bandwidth *BandwidthEntry `json:"bandwidth"`
	} `json:"runtimeConfig"`
	*BandwidthEntry
}

// BandwidthEntry has limits in bits a second and bits, as a pod sees them; zero is none.
type BandwidthEntry struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

func loadBandwidthConf(data []byte) (*bandwidthConf, error) {
	c := &bandwidthConf{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to parse network configuration: %v", err)
	}
	limits := c.limits()
	for _, l := range []limit{limits.ingress(), limits.egress()} {
		switch {
		case l.burst == 0 && l.rate != 0:
			return nil, errors.New("if rate is set, burst must also be set")
		case l.rate == 0 && l.burst != 0:
			return nil, errors.New("if burst is set, rate must also be set")
		case l.burst/8 >= math.MaxUint32:
			return nil, errors.New("burst cannot be more than 4GB")
		}
	}
	if c.RawPrevResult == nil {
		return c, nil
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, fmt.Errorf("could not parse prevResult: %v", err)
	}
	if _, err := types100.NewResultFromResult(c.PrevResult); err != nil {
		return nil, fmt.Errorf("could not convert result to current version: %v", err)
	}
	return c, nil
}

// limits are those of the configuration, and where it has none those of the pod.
func (c *bandwidthConf) limits() BandwidthEntry {
	switch {
	case c.BandwidthEntry != nil:
		return *c.BandwidthEntry
	case c.RuntimeConfig.Bandwidth != nil:
		return *c.RuntimeConfig.Bandwidth
	}
	return BandwidthEntry{}
}

// limit is a token bucket of the kernel's.
type limit struct{ rate, burst uint64 }

func (r BandwidthEntry) ingress() limit { return limit{r.IngressRate, r.IngressBurst} }

func (r BandwidthEntry) egress() limit { return limit{r.EgressRate, r.EgressBurst} }

// qdisc is what limits what an interface sends.
func (l limit) qdisc(index int) *netlink.Tbf {
	const latency = 25 // milliseconds that a packet may wait
	perSecond := float64(netlink.TIME_UNITS_PER_SEC)
	rate, burst := l.rate/8, uint32(l.burst/8)
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate,
		Limit:      uint32(float64(rate)*(perSecond*(latency/1000.0))/perSecond) + burst,
		Buffer:     uint32(float64(uint32(float64(burst)*perSecond/float64(rate))) * netlink.TickInUsec()),
	}
}

func bandwidthAdd(c *call) error {
	conf, err := loadBandwidthConf(c.config)
	if err != nil {
		return configError{err}
	}
	if conf.PrevResult == nil {
		return errors.New("must be called as chained plugin")
	}
	limits := conf.limits()
	if limits == (BandwidthEntry{}) {
		return c.print(conf.PrevResult, conf.CNIVersion)
	}
	result, err := types100.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return fmt.Errorf("could not convert result to current version: %v", err)
	}
	port, err := c.peerOnHost(result.Interfaces)
	if err != nil {
		return err
	}
	if l := limits.ingress(); l.rate > 0 {
		if err := netlink.QdiscAdd(l.qdisc(port.Attrs().Index)); err != nil {
			return fmt.Errorf("create qdisc: %s", err)
		}
	}
	if l := limits.egress(); l.rate > 0 {
		ifb, err := limitEgress(port, ifbName(conf.Name, c.containerID), l)
		if err != nil {
			return err
		}
		result.Interfaces = append(result.Interfaces, ifb)
	}
	return c.print(result, conf.CNIVersion)
}

// peerOnHost finds the other end of the pod's interface among those of a result.
func (c *call) peerOnHost(interfaces []*types100.Interface) (netlink.Link, error) {
	netns, err := ns.GetNS(c.netns)
	if err != nil {
		return nil, fmt.Errorf("failed to open netns %%!q(<nil>): %v", err) // as the reference plugin spells it
	}
	defer netns.Close() //nolint:errcheck // opened for reading
	if len(interfaces) == 0 {
		return nil, errors.New("no interfaces provided")
	}
	var index int
	err = inside(netns, func() (err error) {
		_, index, err = ip.GetVethPeerIfindex(c.ifName)
		return err
	})
	if index <= 0 {
		return nil, fmt.Errorf("container interface %s has no veth peer: %v", c.ifName, err)
	}
	l, err := netlink.LinkByIndex(index)
	if err != nil {
		return nil, fmt.Errorf("veth peer with index %d is not in host ns", index)
	}
	for _, i := range interfaces {
		if i.Sandbox == "" && i.Name == l.Attrs().Name {
			return l, nil
		}
	}
	return nil, errors.New("no veth peer of container interface found in host ns")
}

func ifbName(network, id string) string {
	const size = unix.IFNAMSIZ - 1
	return utils.MustFormatHashWithPrefix(size, "bwp", network+id)
}

// limitEgress limits what the node gets from a pod, which is what an interface that all of it is redirected to sends.
func limitEgress(port netlink.Link, name string, l limit) (*types100.Interface, error) {
	if err := netlink.LinkAdd(&netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: name, Flags: net.FlagUp, MTU: port.Attrs().MTU}}); err != nil {
		return nil, fmt.Errorf("adding link: %s", err)
	}
	ifb, err := netlinksafe.LinkByName(name)
	if err != nil {
		return nil, err
	}
	ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: port.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := netlink.QdiscAdd(ingress); err != nil {
		return nil, fmt.Errorf("create ingress qdisc: %s", err)
	}
	if err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: port.Attrs().Index, Parent: ingress.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		ClassId:     netlink.MakeHandle(1, 1),
		RedirIndex:  ifb.Attrs().Index,
		Actions:     []netlink.Action{&netlink.MirredAction{MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: ifb.Attrs().Index}},
	}); err != nil {
		return nil, fmt.Errorf("add filter: %s", err)
	}
	if err := netlink.QdiscAdd(l.qdisc(ifb.Attrs().Index)); err != nil {
		return nil, fmt.Errorf("create ifb qdisc: create qdisc: %s", err)
	}
	return &types100.Interface{Name: name, Mac: ifb.Attrs().HardwareAddr.String()}, nil
}

func bandwidthDel(c *call) error {
	conf, err := loadBandwidthConf(c.config)
	if err != nil {
		return configError{err}
	}
	if _, err := c.deleteByName(ifbName(conf.Name, c.containerID)); !errors.Is(err, ip.ErrLinkNotFound) {
		return err
	}
	return nil
}

func bandwidthCheck(c *call) error {
	conf, err := loadBandwidthConf(c.config)
	if err != nil {
		return configError{err}
	}
	if conf.PrevResult == nil {
		return errors.New("must be called as a chained plugin")
	}
	result, err := types100.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return fmt.Errorf("could not convert result to current version: %v", err)
	}
	port, err := c.peerOnHost(result.Interfaces)
	if err != nil {
		return err
	}
	limits := conf.limits()
	if l := limits.ingress(); l.rate > 0 {
		if err := l.check(port); err != nil {
			return err
		}
	}
	if l := limits.egress(); l.rate > 0 {
		ifb, err := netlinksafe.LinkByName(ifbName(conf.Name, c.containerID))
		if err != nil {
			return fmt.Errorf("get ifb device: %s", err)
		}
		return l.check(ifb)
	}
	return nil
}

// check says what is wrong with the limit of an interface. One that was replaced by another kind is none of its business, but
// for the kernel's own, which older ones do not list.
func (l limit) check(link netlink.Link) error {
	all, err := netlinksafe.QdiscList(link)
	if err != nil {
		return err
	}
	want, found := l.qdisc(0), false
	for _, q := range all {
		if _, own := q.(*netlink.PfifoFast); own {
			continue
		}
		found = true
		tbf, ok := q.(*netlink.Tbf)
		switch {
		case !ok:
			return nil
		case tbf.Rate != want.Rate:
			return errors.New("Rate doesn't match")
		case tbf.Limit != want.Limit:
			return errors.New("Limit doesn't match")
		case tbf.Buffer != want.Buffer:
			return errors.New("Buffer doesn't match")
		}
	}
	if !found {
		return errors.New("Failed to find qdisc")
	}
	return nil
}

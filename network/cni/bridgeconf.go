package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/vishvananda/netlink"
)

// bridgeConf is the configuration of the bridge plugin.
type bridgeConf struct {
	types.PluginConf
	BrName                    string       `json:"bridge"`
	IsGW                      bool         `json:"isGateway"`
	IsDefaultGW               bool         `json:"isDefaultGateway"`
	ForceAddress              bool         `json:"forceAddress"`
	IPMasq                    bool         `json:"ipMasq"`
	IPMasqBackend             *string      `json:"ipMasqBackend"`
	MTU                       int          `json:"mtu"`
	HairpinMode               bool         `json:"hairpinMode"`
	PromiscMode               bool         `json:"promiscMode"`
	Vlan                      int          `json:"vlan"`
	VlanTrunk                 []*vlanRange `json:"vlanTrunk"`
	PreserveDefaultVlan       bool         `json:"preserveDefaultVlan"`
	MacSpoofChk               bool         `json:"macspoofchk"`
	EnableDad                 bool         `json:"enabledad"`
	DisableContainerInterface bool         `json:"disableContainerInterface"`
	PortIsolation             bool         `json:"portIsolation"`
	Args                      struct {
		CNI macConf `json:"cni"`
	} `json:"args"`
	RuntimeConfig macConf `json:"runtimeConfig"`

	mac   string
	trunk []int
}

type macConf struct {
	Mac string `json:"mac"`
}

type vlanRange struct {
	MinID *int `json:"minID"`
	MaxID *int `json:"maxID"`
	ID    *int `json:"id"`
}

const maxVlan = 4094

func loadBridgeConf(data []byte, args string) (*bridgeConf, error) {
	c := &bridgeConf{BrName: "cni0"}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to load netconf: %v", err)
	}
	if c.Vlan < 0 || c.Vlan > maxVlan {
		return nil, fmt.Errorf("invalid VLAN ID %d (must be between 0 and 4094)", c.Vlan)
	}
	trunk, err := vlanIDs(c.VlanTrunk)
	if err != nil {
		return nil, err
	}
	c.trunk = trunk
	mac, err := macOf(args)
	if err != nil {
		return nil, err
	}
	for _, m := range []string{mac, c.Args.CNI.Mac, c.RuntimeConfig.Mac} {
		if m != "" {
			c.mac = m
		}
	}
	return c, nil
}

// macOf is the MAC address that CNI_ARGS ask for, if they do.
func macOf(args string) (string, error) {
	var env struct {
		types.CommonArgs
		MAC types.UnmarshallableString
	}
	err := types.LoadArgs(args, &env)
	return string(env.MAC), err
}

// validateAdd checks what only matters to ADD.
func (c *bridgeConf) validateAdd() error {
	if c.IPAM.Type != "" && c.DisableContainerInterface {
		return errors.New("cannot use IPAM when DisableContainerInterface flag is set")
	}
	c.IsGW = c.IsGW || c.IsDefaultGW
	if c.HairpinMode && c.PromiscMode {
		return errors.New("cannot set hairpin mode and promiscuous mode at the same time")
	}
	return nil
}

// vlanIDs are the VLANs of a trunk, in order.
func vlanIDs(trunk []*vlanRange) ([]int, error) {
	valid := func(id int) bool { return id > 0 && id <= maxVlan }
	ids := map[int]bool{}
	for _, r := range trunk {
		switch {
		case r.MinID == nil && r.MaxID == nil:
		case r.MinID == nil:
			return nil, errors.New("minID and maxID should be configured simultaneously, minID is missing")
		case r.MaxID == nil:
			return nil, errors.New("minID and maxID should be configured simultaneously, maxID is missing")
		case !valid(*r.MinID):
			return nil, errors.New("incorrect trunk minID parameter")
		case !valid(*r.MaxID):
			return nil, errors.New("incorrect trunk maxID parameter")
		case *r.MaxID < *r.MinID:
			return nil, errors.New("minID is greater than maxID in trunk parameter")
		default:
			for id := *r.MinID; id <= *r.MaxID; id++ {
				ids[id] = true
			}
		}
		if r.ID != nil {
			if !valid(*r.ID) {
				return nil, errors.New("incorrect trunk id parameter")
			}
			ids[*r.ID] = true
		}
	}
	return slices.Sorted(maps.Keys(ids)), nil
}

// gateways completes addresses and routes of a result, and returns the addresses that the bridge has to have, by family.
func (c *bridgeConf) gateways(r *types100.Result) (map[int][]net.IPNet, error) {
	gateways := map[int][]net.IPNet{}
	hasDefault := map[int]bool{}
	const inPod = 2 // the pod's interface in the result
	for _, ipc := range r.IPs {
		family, everywhere := netlink.FAMILY_V4, net.IPNet{IP: net.IPv4zero, Mask: net.IPMask(net.IPv4zero)}
		switch {
		case ipc.Address.IP.To4() != nil:
		case len(ipc.Address.IP) == net.IPv6len:
			family, everywhere = netlink.FAMILY_V6, net.IPNet{IP: net.IPv6zero, Mask: net.IPMask(net.IPv6zero)}
		default:
			return nil, fmt.Errorf("Unknown IP object: %v", ipc)
		}
		ipc.Interface = types100.Int(inPod)
		if ipc.Gateway == nil && c.IsGW {
			ipc.Gateway = ip.NextIP(ipc.Address.IP.Mask(ipc.Address.Mask))
		}
		if c.IsDefaultGW && !hasDefault[family] {
			hasDefault[family] = true
			if !slices.ContainsFunc(r.Routes, func(route *types.Route) bool {
				return route.GW != nil && route.Dst.String() == everywhere.String()
			}) {
				r.Routes = append(r.Routes, &types.Route{Dst: everywhere, GW: ipc.Gateway})
			}
		}
		if c.IsGW {
			gateways[family] = append(gateways[family], net.IPNet{IP: ipc.Gateway, Mask: ipc.Address.Mask})
		}
	}
	return gateways, nil
}

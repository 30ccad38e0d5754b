package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// portmapConf is the configuration of the portmap plugin.
type portmapConf struct {
	types.PluginConf
	Backend              *string   `json:"backend"`
	SNAT                 *bool     `json:"snat"`
	ConditionsV4         *[]string `json:"conditionsV4"`
	ConditionsV6         *[]string `json:"conditionsV6"`
	MasqAll              bool      `json:"masqAll"`
	MarkMasqBit          *int      `json:"markMasqBit"`
	ExternalSetMarkChain *string   `json:"externalSetMarkChain"`
	RuntimeConfig        struct {
		PortMaps []portMapping `json:"portMappings"`
	} `json:"runtimeConfig"`

	pods map[bool]netip.Prefix // addresses of the pod, by whether it is of IPv6
}

type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// defaultMarkBit of a packet says that it is to be masqueraded. Kubernetes has 14 and 15.
const defaultMarkBit = 13

func loadPortmapConf(data []byte, ifName string) (*portmapConf, error) {
	c := &portmapConf{pods: map[bool]netip.Prefix{}}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fmt.Errorf("failed to parse network configuration: %v", err)
	}
	var result *types100.Result
	if c.RawPrevResult != nil {
		if err := version.ParsePrevResult(&c.PluginConf); err != nil {
			return nil, fmt.Errorf("could not parse prevResult: %v", err)
		}
		var err error
		if result, err = types100.NewResultFromResult(c.PrevResult); err != nil {
			return nil, fmt.Errorf("could not convert result to current version: %v", err)
		}
	}
	if c.MarkMasqBit != nil && c.ExternalSetMarkChain != nil {
		return nil, errors.New("Cannot specify externalSetMarkChain and markMasqBit")
	}
	if bit := c.markBit(); bit < 0 || bit > 31 {
		return nil, errors.New("MasqMarkBit must be between 0 and 31")
	}
	if !c.plain() {
		return nil, errNotPlain // the reference may refuse it before it looks at ports
	}
	for _, m := range c.RuntimeConfig.PortMaps {
		switch {
		case m.ContainerPort <= 0:
			return nil, fmt.Errorf("Invalid container port number: %d", m.ContainerPort)
		case m.HostPort <= 0:
			return nil, fmt.Errorf("Invalid host port number: %d", m.HostPort)
		}
	}
	if result != nil {
		c.findPod(result, ifName)
	}
	return c, nil
}

func (c *portmapConf) markBit() int {
	if c.MarkMasqBit == nil {
		return defaultMarkBit
	}
	return *c.MarkMasqBit
}

// snat says whether connections of the pod to itself and of the node to its loopback address are masqueraded.
func (c *portmapConf) snat() bool { return c.SNAT == nil || *c.SNAT }

// findPod takes the first address of each family that is the pod's, as far as a result tells.
func (c *portmapConf) findPod(r *types100.Result, ifName string) {
	for _, ipc := range r.IPs {
		if i := ipc.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) && (r.Interfaces[*i].Name != ifName || r.Interfaces[*i].Sandbox == "") {
			continue
		}
		p, ok := toPrefix(&ipc.Address)
		if _, known := c.pods[p.Addr().Is6()]; ok && !known {
			c.pods[p.Addr().Is6()] = p
		}
	}
}

// plain says whether all that is configured is what is made here; anything else is for the reference plugin.
func (c *portmapConf) plain() bool {
	if c.Backend != nil && *c.Backend != backendIPTables && *c.Backend != backendNFTables || c.ConditionsV4 != nil || c.ConditionsV6 != nil || c.ExternalSetMarkChain != nil {
		return false
	}
	for _, m := range c.RuntimeConfig.PortMaps {
		if m.Protocol != "tcp" && m.Protocol != "udp" || m.HostPort > math.MaxUint16 || m.ContainerPort > math.MaxUint16 {
			return false
		}
		if m.HostIP != "" {
			if a, err := netip.ParseAddr(m.HostIP); err != nil || a.Is4In6() || a.Zone() != "" {
				return false
			}
		}
	}
	return true
}

// forFamily says whether a mapping is for pods of a family, and to which of the node's addresses; the zero one is any.
func (m portMapping) forFamily(v6 bool) (to netip.Addr, ok bool) {
	if m.HostIP == "" {
		return netip.Addr{}, true
	}
	a := netip.MustParseAddr(m.HostIP) // plain has seen to it
	if a.Is6() != v6 {
		return netip.Addr{}, false
	}
	if a.IsUnspecified() {
		return netip.Addr{}, true
	}
	return a, true
}

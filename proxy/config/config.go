package config

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"

	"github.com/berth-run/berth/proxy/model"
)

// The modes of kube-proxy on Linux. Auto is what is in force where none is configured.
const (
	Auto     v1alpha1.ProxyMode = ""
	IPTables v1alpha1.ProxyMode = "iptables"
	NFTables v1alpha1.ProxyMode = "nftables"
	IPVS     v1alpha1.ProxyMode = "ipvs"
)

// Config is what `berth proxy` goes by.
type Config struct {
	// Proxy is the configuration in force, defaults included. MasqueradeAll and the periods are those of the mode's section.
	Proxy v1alpha1.KubeProxyConfiguration
	// Master, if it is not empty, is the API server instead of the kubeconfig's.
	Master string
	// File is where Proxy was read from; empty if it is from flags.
	File string
	// Ignored are the flags that were given beside File and do not count then.
	Ignored []string

	localhost bool   // iptables.localhostNodePorts was asked for, and not by default
	modeAt    string // file and line of mode, or its flag
}

// ModeAt is where the mode was said.
func (c *Config) ModeAt() string { return c.modeAt }

// Default is the configuration without a file and flags.
func Default() *v1alpha1.KubeProxyConfiguration {
	c := &v1alpha1.KubeProxyConfiguration{}
	setDefaults(c)
	return c
}

// Load reads a file, with defaults for what it leaves out. Errors name file, line, field and value.
func Load(file string) (*v1alpha1.KubeProxyConfiguration, error) {
	c, _, _, err := loadFile(file)
	return c, err
}

// loadFile is Load, and says whether the file has iptables.localhostNodePorts be true, and where it has the mode.
func loadFile(file string) (c *v1alpha1.KubeProxyConfiguration, localhost bool, modeAt string, err error) {
	c, lines, err := readFile(file)
	if err != nil {
		return nil, false, "", err
	}
	localhost = c.IPTables.LocalhostNodePorts != nil && *c.IPTables.LocalhostNodePorts
	setDefaults(c)
	return c, localhost, place(file, lines, "mode"), check(c, func(path string) string { return place(file, lines, path) })
}

// place is file and line of a field; of the section that it would be in, if it is not there.
func place(file string, lines lines, path string) string {
	for at := path; at != ""; at = at[:max(strings.LastIndexAny(at, ".["), 0)] {
		if line, ok := lines[at]; ok {
			return fmt.Sprintf("%s:%d: %s", file, line, path)
		}
	}
	return fmt.Sprintf("%s: %s", file, path)
}

// NodeName is the name of the Node this is: hostnameOverride, or else the host's name, in lower case and without spaces around
// it, as the kubelet has it.
func (c *Config) NodeName() (string, error) {
	name := c.Proxy.HostnameOverride
	if name == "" {
		var err error
		if name, err = os.Hostname(); err != nil {
			return "", fmt.Errorf("the host's name: %w: give --hostname-override", err)
		}
	}
	if name = strings.ToLower(strings.TrimSpace(name)); name == "" {
		return "", errors.New("the node's name is empty: give --hostname-override")
	}
	return name, nil
}

// MasqueradeAll is that of the mode's section: where no mode is given, that of iptables, as in kube-proxy.
func (c *Config) MasqueradeAll() bool {
	if c.Proxy.Mode == NFTables {
		return c.Proxy.NFTables.MasqueradeAll
	}
	return c.Proxy.IPTables.MasqueradeAll
}

// loopbackGate is kube-proxy's feature gate for node ports at loopback addresses in mode nftables (KEP-6032).
const loopbackGate = "KubeProxyNFTablesLocalhostNodePorts"

// LoopbackNodePorts is whether node ports are to be listened at, at 127.0.0.1 and ::1; in mode iptables, which has a rule, they are not.
// They are where nodePortAddresses names loopback addresses, by localhost or a CIDR of them alone, and the feature gate is not
// turned off; at 127.0.0.1 also where no mode is given and iptables.localhostNodePorts is, which is how kube-proxy's mode iptables is
// asked.
func (c *Config) LoopbackNodePorts() (ipv4, ipv6 bool) {
	if on, ok := c.Proxy.FeatureGates[loopbackGate]; c.Proxy.Mode == IPTables || ok && !on {
		return false, false
	}
	ipv4 = c.Proxy.Mode == Auto && c.localhost
	for _, s := range c.Proxy.NodePortAddresses {
		if s == "localhost" {
			return true, true
		}
		if ip, _, err := netutils.ParseCIDRSloppy(s); err == nil && ip.IsLoopback() {
			ipv4, ipv6 = ipv4 || ip.To4() != nil, ipv6 || ip.To4() == nil
		}
	}
	return ipv4, ipv6
}

// SyncPeriod is how often the kernel's rules are looked at although nothing has changed; the proxy counts as unhealthy when a
// change is not in the kernel after twice as long.
func (c *Config) SyncPeriod() time.Duration {
	period, _ := periods(&c.Proxy)
	return period.Duration
}

// Model is what the model needs of it. Families are those of the node's kernel.
func (c *Config) Model(node string, ipv4, ipv6 bool) model.Config {
	p := &c.Proxy
	m := model.Config{
		NodeName: node, IPv4: ipv4, IPv6: ipv6,
		MasqueradeAll:       c.MasqueradeAll(),
		DetectLocal:         model.Mode(p.DetectLocalMode),
		BridgeInterface:     p.DetectLocal.BridgeInterface,
		InterfaceNamePrefix: p.DetectLocal.InterfaceNamePrefix,
		NodePortAddresses:   slices.Clone(p.NodePortAddresses),
		LoopbackNodePorts:   p.Mode == IPTables && *p.IPTables.LocalhostNodePorts,
	}
	if addr, ok := parseAddr(p.BindAddress); ok {
		m.BindAddress = addr
	}
	if p.DetectLocalMode == v1alpha1.LocalMode(model.ModeClusterCIDR) {
		m.ClusterCIDRs = clusterCIDRs(p)
	}
	if on, ok := p.FeatureGates["AllowServiceExternalIPs"]; ok {
		m.NoExternalIPs = !on
	}
	return m
}

// Unused are settings that say something else than the default and have no effect in berth, with the reason.
func (c *Config) Unused() []string {
	p, d := &c.Proxy, Default()
	var out []string
	note := func(changed bool, path, why string) {
		if changed {
			out = append(out, path+": "+why)
		}
	}
	const noDelay = "changes are programmed at once, and those that come meanwhile together"
	const noMark = "in mode nftables no packets are marked"
	note(p.IPTables.MinSyncPeriod != d.IPTables.MinSyncPeriod, "iptables.minSyncPeriod", noDelay)
	note(p.NFTables.MinSyncPeriod != d.NFTables.MinSyncPeriod, "nftables.minSyncPeriod", noDelay)
	if p.Mode != IPTables {
		note(*p.IPTables.MasqueradeBit != *d.IPTables.MasqueradeBit, "iptables.masqueradeBit", noMark)
		note(*p.NFTables.MasqueradeBit != *d.NFTables.MasqueradeBit, "nftables.masqueradeBit", noMark)
		note(!*p.IPTables.LocalhostNodePorts, "iptables.localhostNodePorts", "in mode nftables node ports are served at loopback addresses where nodePortAddresses names these, and not else")
	}
	note(p.ConfigSyncPeriod != d.ConfigSyncPeriod, "configSyncPeriod", "what is known of the API server's objects is not repeated")
	note(p.ShowHiddenMetricsForVersion != "", "showHiddenMetricsForVersion", "no metric is hidden")
	note(p.PortRange != "", "portRange", "kube-proxy has no use for it either")
	note(p.Logging.Options.Text.SplitStream || p.Logging.Options.JSON.SplitStream, "logging.options", "all that is logged goes to standard error")
	note(len(p.Logging.VModule) > 0, "logging.vmodule", "levels are for the whole program")
	gates := make([]string, 0, len(p.FeatureGates))
	for gate := range p.FeatureGates {
		if gate != "AllowServiceExternalIPs" && gate != loopbackGate {
			gates = append(gates, gate)
		}
	}
	slices.Sort(gates)
	for _, gate := range gates {
		note(true, "featureGates."+gate, "berth has nothing that it turns on or off")
	}
	return out
}

// clusterCIDRs are the two that clusterCIDR may have.
func clusterCIDRs(c *v1alpha1.KubeProxyConfiguration) []string {
	if c.ClusterCIDR == "" {
		return nil
	}
	return strings.Split(c.ClusterCIDR, ",")
}

// isIPv6 is whether an address of the configuration is an IPv6 one.
func isIPv6(s string) bool { return netutils.IPFamilyOfString(s) == netutils.IPv6 }

package config

import (
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"

	"github.com/berth-run/berth/proxy/model"
)

// checker gathers what is wrong with a configuration.
type checker struct {
	// place says where a field is that has a path.
	place func(path string) string
	errs  []error
}

func (c *checker) fail(path string, value any, format string, args ...any) {
	if s, ok := value.(string); ok {
		value = strconv.Quote(shorten(s))
	}
	c.errs = append(c.errs, fmt.Errorf("%s: %v: %s", c.place(path), value, fmt.Sprintf(format, args...)))
}

// check holds a configuration with defaults against kube-proxy's bounds.
func check(p *v1alpha1.KubeProxyConfiguration, place func(path string) string) error {
	c := &checker{place: place}
	c.oneOf("mode", string(p.Mode), "iptables", "ipvs", "nftables", "")
	c.bits(p)
	c.conntrack(&p.Conntrack)
	c.times(p)
	c.addresses(p)
	c.local(p)
	c.logging(p)
	if v := *p.OOMScoreAdj; v < -1000 || v > 1000 {
		c.fail("oomScoreAdj", v, "must be from -1000 to 1000")
	}
	if p.ClientConnection.Burst < 0 {
		c.fail("clientConnection.burst", p.ClientConnection.Burst, "must not be negative")
	}
	if v := float64(p.ClientConnection.QPS); math.IsNaN(v) || math.IsInf(v, 0) {
		c.fail("clientConnection.qps", v, "must be a number")
	}
	if v := p.ShowHiddenMetricsForVersion; v != "" && v != "1.36" {
		c.fail("showHiddenMetricsForVersion", v, `must be the minor version before, "1.36", or ""`)
	}
	return errors.Join(c.errs...)
}

func (c *checker) oneOf(path, value string, known ...string) {
	if !slices.Contains(known, value) {
		quoted := make([]string, len(known))
		for i, s := range known {
			quoted[i] = strconv.Quote(s)
		}
		c.fail(path, value, "must be one of %s", strings.Join(quoted, ", "))
	}
}

// bits are checked in all sections but that of IPVS, whatever the mode, since flags set them so.
func (c *checker) bits(p *v1alpha1.KubeProxyConfiguration) {
	bit := func(path string, v *int32) {
		if v != nil && (*v < 0 || *v > 31) {
			c.fail(path, *v, "must be from 0 to 31")
		}
	}
	bit("iptables.masqueradeBit", p.IPTables.MasqueradeBit)
	if p.Mode == NFTables {
		bit("nftables.masqueradeBit", p.NFTables.MasqueradeBit)
	}
}

func (c *checker) conntrack(p *v1alpha1.KubeProxyConntrackConfiguration) {
	number := func(path string, v *int32) {
		if *v < 0 {
			c.fail(path, *v, "must not be negative")
		}
	}
	number("conntrack.maxPerCore", p.MaxPerCore)
	number("conntrack.min", p.Min)
	c.notNegative("conntrack.tcpEstablishedTimeout", *p.TCPEstablishedTimeout)
	c.notNegative("conntrack.tcpCloseWaitTimeout", *p.TCPCloseWaitTimeout)
	c.notNegative("conntrack.udpTimeout", p.UDPTimeout)
	c.notNegative("conntrack.udpStreamTimeout", p.UDPStreamTimeout)
}

func (c *checker) notNegative(path string, d metav1.Duration) {
	if d.Duration < 0 {
		c.fail(path, d.Duration, "must not be negative")
	}
}

// times are checked where they count: in the mode's section.
func (c *checker) times(p *v1alpha1.KubeProxyConfiguration) {
	section := "iptables"
	switch p.Mode {
	case NFTables, IPVS:
		section = string(p.Mode)
	}
	if p.Mode == IPVS {
		c.notNegative("ipvs.tcpTimeout", p.IPVS.TCPTimeout)
		c.notNegative("ipvs.tcpFinTimeout", p.IPVS.TCPFinTimeout)
		c.notNegative("ipvs.udpTimeout", p.IPVS.UDPTimeout)
		for i, s := range p.IPVS.ExcludeCIDRs {
			c.cidr(fmt.Sprintf("ipvs.excludeCIDRs[%d]", i), s, "must be a CIDR")
		}
	}
	period, least := periods(p)
	c.periods(section, period, least)
	// Without a mode it is nftables that is in force, whatever section counts. Flags set both.
	if n := &p.NFTables; p.Mode == Auto && (n.SyncPeriod != period || n.MinSyncPeriod != least) {
		c.periods("nftables", n.SyncPeriod, n.MinSyncPeriod)
	}
	if p.ConfigSyncPeriod.Duration <= 0 {
		c.fail("configSyncPeriod", p.ConfigSyncPeriod.Duration, "must be more than 0")
	}
	if d := p.Logging.FlushFrequency.Duration.Duration; d < 0 || d > 24*time.Hour {
		c.fail("logging.flushFrequency", d, "must be from 0 to 24h")
	}
}

func (c *checker) periods(section string, period, least metav1.Duration) {
	if period.Duration <= 0 {
		c.fail(section+".syncPeriod", period.Duration, "must be more than 0")
	}
	c.notNegative(section+".minSyncPeriod", least)
	if least.Duration > period.Duration {
		c.fail(section+".minSyncPeriod", least.Duration, "must not be more than %s.syncPeriod, %v", section, period.Duration)
	}
}

func (c *checker) addresses(p *v1alpha1.KubeProxyConfiguration) {
	if netutils.ParseIPSloppy(p.BindAddress) == nil {
		c.fail("bindAddress", p.BindAddress, "must be an IP address")
	}
	if p.HealthzBindAddress != "" {
		c.listen("healthzBindAddress", p.HealthzBindAddress)
	}
	if p.MetricsBindAddress != "" {
		c.listen("metricsBindAddress", p.MetricsBindAddress)
	}
	var seen []string
	for i, s := range p.NodePortAddresses {
		path := fmt.Sprintf("nodePortAddresses[%d]", i)
		switch s {
		case "primary", "localhost", "all":
			if slices.Contains(seen, s) {
				c.fail(path, s, "is there already")
			}
			seen = append(seen, s)
		default:
			c.cidr(path, s, "must be a CIDR, or primary, localhost or all")
		}
	}
}

func (c *checker) listen(path, s string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		c.fail(path, s, "must be IP:PORT")
		return
	}
	if netutils.ParseIPSloppy(host) == nil {
		c.fail(path, s, "%q must be an IP address", shorten(host))
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > math.MaxUint16 {
		c.fail(path, s, "the port must be from 1 to 65535")
	}
}

func (c *checker) cidr(path, s, reason string) bool {
	_, _, err := netutils.ParseCIDRSloppy(s)
	if err != nil {
		c.fail(path, s, "%s", reason)
	}
	return err == nil
}

// local is how packets of pods are told.
func (c *checker) local(p *v1alpha1.KubeProxyConfiguration) {
	c.oneOf("detectLocalMode", string(p.DetectLocalMode), string(model.ModeClusterCIDR), string(model.ModeNodeCIDR),
		string(model.ModeBridgeInterface), string(model.ModeInterfaceNamePrefix), "")
	switch model.Mode(p.DetectLocalMode) {
	case model.ModeBridgeInterface:
		if p.DetectLocal.BridgeInterface == "" {
			c.fail("detectLocal.bridgeInterface", "", "must not be empty with detectLocalMode %s", p.DetectLocalMode)
		}
	case model.ModeInterfaceNamePrefix:
		if p.DetectLocal.InterfaceNamePrefix == "" {
			c.fail("detectLocal.interfaceNamePrefix", "", "must not be empty with detectLocalMode %s", p.DetectLocalMode)
		}
	case model.ModeClusterCIDR:
		list, ok := clusterCIDRs(p), true
		for _, s := range list {
			ok = c.cidr("clusterCIDR", s, "must be a CIDR, or one of IPv4 and one of IPv6 with a comma between") && ok
		}
		dual, err := netutils.IsDualStackCIDRStrings(list)
		if ok && len(list) > 1 && (len(list) > 2 || err != nil || !dual) {
			c.fail("clusterCIDR", p.ClusterCIDR, "must be a CIDR, or one of IPv4 and one of IPv6 with a comma between")
		}
	}
}

func (c *checker) logging(p *v1alpha1.KubeProxyConfiguration) {
	c.oneOf("logging.format", p.Logging.Format, "text", "json")
	if p.Logging.Verbosity > math.MaxInt32 {
		c.fail("logging.verbosity", p.Logging.Verbosity, "must be at most %d", math.MaxInt32)
	}
}

package config

import (
	"net"
	"net/netip"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	netutils "k8s.io/utils/net"

	"github.com/berth-run/berth/proxy/model"
)

// The ports that kube-proxy listens at.
const (
	HealthPort  = 10256
	MetricsPort = 10249
)

// setDefaults fills in what is not set, with what kube-proxy 1.37 has. A period of 0 is one that is not set.
func setDefaults(c *v1alpha1.KubeProxyConfiguration) {
	c.APIVersion, c.Kind = v1alpha1.SchemeGroupVersion.String(), kind
	fill(&c.BindAddress, "0.0.0.0")
	// Health is asked for from outside, metrics are for the node alone.
	any4, any6 := "0.0.0.0", "::"
	local4, local6 := "127.0.0.1", "::1"
	if isIPv6(c.BindAddress) {
		any4, local4 = any6, local6
	}
	c.HealthzBindAddress = bindAddress(c.HealthzBindAddress, any4, HealthPort)
	c.MetricsBindAddress = bindAddress(c.MetricsBindAddress, local4, MetricsPort)
	point(&c.OOMScoreAdj, -999)

	point(&c.IPTables.MasqueradeBit, 14)
	point(&c.IPTables.LocalhostNodePorts, true)
	period(&c.IPTables.SyncPeriod, 30*time.Second)
	period(&c.IPTables.MinSyncPeriod, time.Second)
	period(&c.IPVS.SyncPeriod, 30*time.Second)
	point(&c.NFTables.MasqueradeBit, 14)
	period(&c.NFTables.SyncPeriod, 30*time.Second)
	period(&c.NFTables.MinSyncPeriod, time.Second)

	point(&c.Conntrack.MaxPerCore, 32*1024)
	point(&c.Conntrack.Min, 128*1024)
	point(&c.Conntrack.TCPEstablishedTimeout, metav1.Duration{Duration: 24 * time.Hour})
	point(&c.Conntrack.TCPCloseWaitTimeout, metav1.Duration{Duration: time.Hour})
	period(&c.ConfigSyncPeriod, 15*time.Minute)

	fill(&c.ClientConnection.ContentType, "application/vnd.kubernetes.protobuf")
	if c.ClientConnection.QPS == 0 {
		c.ClientConnection.QPS = 5
	}
	if c.ClientConnection.Burst == 0 {
		c.ClientConnection.Burst = 10
	}
	logsapi.SetRecommendedLoggingConfiguration(&c.Logging)

	fill(&c.DetectLocalMode, v1alpha1.LocalMode(model.ModeClusterCIDR))
	if c.Mode == NFTables && len(c.NodePortAddresses) == 0 {
		c.NodePortAddresses = []string{"primary"}
	}
}

// bindAddress adds the port to an address that has none.
func bindAddress(s, address string, port int) string {
	if s == "" {
		s = address
	}
	if ip := netutils.ParseIPSloppy(s); ip != nil {
		return net.JoinHostPort(s, strconv.Itoa(port))
	}
	return s
}

func fill[T ~string](s *T, value T) {
	if *s == "" {
		*s = value
	}
}

func point[T any](p **T, value T) {
	if *p == nil {
		*p = &value
	}
}

func period(d *metav1.Duration, value time.Duration) {
	if d.Duration == 0 {
		d.Duration = value
	}
}

// periods are those of the mode.
func periods(c *v1alpha1.KubeProxyConfiguration) (period, least metav1.Duration) {
	switch c.Mode {
	case NFTables:
		return c.NFTables.SyncPeriod, c.NFTables.MinSyncPeriod
	case IPVS:
		return c.IPVS.SyncPeriod, c.IPVS.MinSyncPeriod
	}
	return c.IPTables.SyncPeriod, c.IPTables.MinSyncPeriod
}

// parseAddr reads an address as Kubernetes does, which takes leading zeros.
func parseAddr(s string) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(s))
	return a.Unmap(), ok
}

package proxy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"
)

// SetConntrack has the kernel track connections as configured: how many, and for how long. What is 0 is left as it is, and the
// number is never made smaller. The root is /proc/sys. Whatever cannot be set is an error that names it; the rest is set.
func SetConntrack(root string, c *v1alpha1.KubeProxyConntrackConfiguration) error {
	set := func(name string, value int) error {
		file := filepath.Join(root, "net/netfilter", name)
		have, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(have)) == strconv.Itoa(value) {
			return nil
		}
		if err := os.WriteFile(file, []byte(strconv.Itoa(value)), 0o644); err != nil {
			return fmt.Errorf("set sysctl net.netfilter.%s to %d: %w", name, value, err)
		}
		return nil
	}
	var errs []error
	if most := mostConnections(c); most > 0 {
		have, err := os.ReadFile(filepath.Join(root, "net/netfilter/nf_conntrack_max"))
		n, perr := strconv.Atoi(strings.TrimSpace(string(have)))
		if err != nil || perr != nil || n < most {
			errs = append(errs, set("nf_conntrack_max", most))
		}
	}
	for name, d := range map[string]time.Duration{
		"nf_conntrack_tcp_timeout_established": c.TCPEstablishedTimeout.Duration,
		"nf_conntrack_tcp_timeout_close_wait":  c.TCPCloseWaitTimeout.Duration,
		"nf_conntrack_udp_timeout":             c.UDPTimeout.Duration,
		"nf_conntrack_udp_timeout_stream":      c.UDPStreamTimeout.Duration,
	} {
		if d > 0 {
			errs = append(errs, set(name, int(d/time.Second)))
		}
	}
	if c.TCPBeLiberal {
		errs = append(errs, set("nf_conntrack_tcp_be_liberal", 1))
	}
	return errors.Join(errs...)
}

// mostConnections is how many are to be tracked; 0 leaves it to the kernel.
func mostConnections(c *v1alpha1.KubeProxyConntrackConfiguration) int {
	if *c.MaxPerCore <= 0 {
		return 0
	}
	return max(int(*c.MaxPerCore)*runtime.NumCPU(), int(*c.Min))
}

package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"k8s.io/kube-proxy/config/v1alpha1"
	"k8s.io/utils/cpuset"
)

// maxConnections bounds what is computed from the number of processors, as in kube-proxy: a million is 300 MiB.
const maxConnections = 1 << 20

// SetConntrack has the kernel track connections as configured: how many, and for how long. What is 0 is left as it is, and the
// number is never made smaller. The root is / (that of /proc and /sys). Whatever cannot be set is an error that names it; the rest
// is set. kube-proxy does not start then; a DaemonSet without privileges cannot set any of it, and Services go without.
func SetConntrack(root string, c *v1alpha1.KubeProxyConntrackConfiguration, log *slog.Logger) error {
	s := sysctls{root: root, log: log}
	if most := mostConnections(c, s.processors()); most > 0 {
		s.raise("proc/sys/net/netfilter/nf_conntrack_max", most)
		// A list of four entries for each bucket is what the kernel makes for itself. In the host's network namespace alone.
		s.raise("sys/module/nf_conntrack/parameters/hashsize", most/4)
	}
	for _, timeout := range []struct {
		name string
		d    time.Duration
	}{
		{"tcp_timeout_established", c.TCPEstablishedTimeout.Duration},
		{"tcp_timeout_close_wait", c.TCPCloseWaitTimeout.Duration},
		{"udp_timeout", c.UDPTimeout.Duration},
		{"udp_timeout_stream", c.UDPStreamTimeout.Duration},
	} {
		if timeout.d > 0 {
			s.set("proc/sys/net/netfilter/nf_conntrack_"+timeout.name, int(timeout.d/time.Second))
		}
	}
	if c.TCPBeLiberal {
		s.set("proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal", 1)
	}
	return errors.Join(s.errs...)
}

// mostConnections is how many are to be tracked; 0 leaves it to the kernel.
func mostConnections(c *v1alpha1.KubeProxyConntrackConfiguration, processors int) int {
	if *c.MaxPerCore <= 0 {
		return 0
	}
	// The minimum is no reason to track more than is sensible for the processors, but may be more itself.
	if scaled := int(*c.MaxPerCore) * processors; scaled > maxConnections {
		return maxConnections
	} else if scaled > int(*c.Min) {
		return scaled
	}
	return int(*c.Min)
}

// sysctls are files with numbers.
type sysctls struct {
	root string
	log  *slog.Logger
	errs []error
}

// processors are the node's, not those that this process may run on.
func (s *sysctls) processors() int {
	text, err := os.ReadFile(filepath.Join(s.root, "sys/devices/system/cpu/online"))
	if err == nil {
		if online, err := cpuset.Parse(strings.TrimSpace(string(text))); err == nil && online.Size() > 0 {
			return online.Size()
		}
	}
	return runtime.NumCPU()
}

// raise makes a number larger.
func (s *sysctls) raise(file string, value int) {
	if have, ok := s.read(file); !ok || have < value {
		s.set(file, value)
	}
}

// set makes it another one.
func (s *sysctls) set(file string, value int) {
	have, ok := s.read(file)
	if ok && have == value {
		return
	}
	if err := os.WriteFile(filepath.Join(s.root, file), []byte(strconv.Itoa(value)), 0o644); err != nil {
		s.errs = append(s.errs, fmt.Errorf("set %s to %d: %w", file, value, err))
		return
	}
	s.log.Info("conntrack is set", "file", "/"+file, "was", have, "is", value)
}

func (s *sysctls) read(file string) (int, bool) {
	text, err := os.ReadFile(filepath.Join(s.root, file))
	if err != nil {
		return 0, false
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	return n, err == nil
}

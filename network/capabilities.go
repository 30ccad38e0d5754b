package network

import (
	"fmt"
	"math"
	"math/big"
	"net/netip"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
)

// PortMapping is a port of the host that leads to one of the pod.
type PortMapping struct {
	Protocol      string // tcp, udp or sctp
	ContainerPort int32
	HostPort      int32 // 0: none
	HostIP        string
}

// DNS is what a plugin that sets up name resolution is told.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// Annotations of a pod that limit its bandwidth, in bits per second as Kubernetes quantities.
const (
	IngressBandwidth = "kubernetes.io/ingress-bandwidth"
	EgressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// podAnnotations is the capability under which containerd passes all annotations.
const podAnnotations = "io.kubernetes.cri.pod-annotations"

type portMap struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// capabilities is what the pod has for the capabilities that plugins of the network take.
func capabilities(p Pod, c *conflist) (map[string]any, error) {
	args := map[string]any{}
	ports, err := portMaps(p.PortMappings)
	if err != nil {
		return nil, err
	}
	if len(ports) > 0 && c.capable("portMappings") {
		args["portMappings"] = ports
	}
	limits, err := parseBandwidth(p.Annotations)
	if err != nil {
		return nil, err
	}
	if limits != (bandwidth{}) && c.capable("bandwidth") {
		args["bandwidth"] = limits
	}
	if p.DNS != nil && c.capable("dns") {
		args["dns"] = p.DNS
	}
	if p.CgroupParent != "" && c.capable("cgroupPath") {
		args["cgroupPath"] = p.CgroupParent
	}
	if len(p.Annotations) > 0 && c.capable(podAnnotations) {
		args[podAnnotations] = p.Annotations
	}
	return args, nil
}

func portMaps(in []PortMapping) ([]portMap, error) {
	var out []portMap
	for _, m := range in {
		if m.HostPort == 0 {
			continue // a container port that is only named
		}
		p := portMap{m.HostPort, m.ContainerPort, strings.ToLower(m.Protocol), m.HostIP}
		switch {
		case m.HostPort < 0 || m.HostPort > math.MaxUint16:
			return nil, fmt.Errorf("host port %d: %w", m.HostPort, errdefs.ErrInvalidArgument)
		case m.ContainerPort <= 0 || m.ContainerPort > math.MaxUint16:
			return nil, fmt.Errorf("container port %d: %w", m.ContainerPort, errdefs.ErrInvalidArgument)
		case p.Protocol != "tcp" && p.Protocol != "udp" && p.Protocol != "sctp":
			return nil, fmt.Errorf("protocol %q of host port %d: %w", m.Protocol, m.HostPort, errdefs.ErrInvalidArgument)
		}
		if m.HostIP != "" {
			if _, err := netip.ParseAddr(m.HostIP); err != nil {
				return nil, fmt.Errorf("host IP %q of host port %d: %w", m.HostIP, m.HostPort, errdefs.ErrInvalidArgument)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

func parseBandwidth(annotations map[string]string) (bandwidth, error) {
	var b bandwidth
	// The plugin wants a burst with a rate; this is the largest that it takes, in effect none.
	const burst = math.MaxInt32
	for name, limit := range map[string]struct{ rate, burst *uint64 }{
		IngressBandwidth: {&b.IngressRate, &b.IngressBurst},
		EgressBandwidth:  {&b.EgressRate, &b.EgressBurst},
	} {
		value, ok := annotations[name]
		if !ok {
			continue
		}
		rate, ok := parseRate(value)
		if !ok {
			return bandwidth{}, fmt.Errorf("annotation %s: %s is not a rate between 1k and 1P: %w", name, quote([]byte(value)), errdefs.ErrInvalidArgument)
		}
		*limit.rate, *limit.burst = rate, burst
	}
	return b, nil
}

var quantity = regexp.MustCompile(`^\+?([0-9]{1,18})(?:\.([0-9]{0,9}))?(?:([mkMGTP]|[KMGTP]i)|[eE]\+?([0-9]{1,2}))?$`)

var suffixes = map[string]struct{ base, exp int64 }{
	"": {10, 0}, "k": {10, 3}, "M": {10, 6}, "G": {10, 9}, "T": {10, 12}, "P": {10, 15},
	"Ki": {2, 10}, "Mi": {2, 20}, "Gi": {2, 30}, "Ti": {2, 40}, "Pi": {2, 50},
}

// parseRate reads a Kubernetes quantity, rounded up, within the bounds that the kubelet's own network plugin had.
func parseRate(s string) (uint64, bool) {
	m := quantity.FindStringSubmatch(s)
	if m == nil {
		return 0, false
	}
	whole, fraction, suffix, exponent := m[1], m[2], m[3], m[4]
	n, _ := new(big.Int).SetString(whole+fraction, 10) // digits by the expression
	down := int64(len(fraction))
	up := suffixes[suffix]
	switch {
	case suffix == "m":
		up, down = suffixes[""], down+3
	case exponent != "":
		e, _ := new(big.Int).SetString(exponent, 10)
		up.exp = e.Int64()
	}
	pow := func(base, exp int64) *big.Int { return new(big.Int).Exp(big.NewInt(base), big.NewInt(exp), nil) }
	n.Mul(n, pow(up.base, up.exp))
	rest := new(big.Int)
	n.QuoRem(n, pow(10, down), rest)
	if rest.Sign() > 0 {
		n.Add(n, big.NewInt(1))
	}
	if !n.IsUint64() || n.Uint64() < 1e3 || n.Uint64() > 1e15 {
		return 0, false
	}
	return n.Uint64(), true
}

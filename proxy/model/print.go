package model

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

func name[T ~uint8](names []string, v T) string {
	if int(v) < len(names) {
		return names[v]
	}
	return strconv.Itoa(int(v))
}

func (f Family) String() string { return name([]string{"IPv4", "IPv6"}, f) }

func (k Kind) String() string {
	return name([]string{"ClusterIP", "LoadBalancer", "ExternalIP", "NodePort"}, k)
}

func (a Action) String() string { return name([]string{"pass", "forward", "reject", "drop"}, a) }

func (p Policy) String() string { return name([]string{"cluster", "local"}, p) }

func (m Masquerade) String() string { return name([]string{"never", "off-cluster", "always"}, m) }

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return strconv.Itoa(int(p))
}

// String is its address and port, with a star where it is local, and its weight if it has one.
func (e Endpoint) String() string {
	s := e.AddrPort().String()
	if e.Local {
		s += "*"
	}
	if e.Weight != 0 {
		s += "=" + strconv.Itoa(int(e.Weight))
	}
	return s
}

// String says all of it in a line.
func (f Frontend) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s: %s", f.Kind, f.Ports(), f.Action)
	if f.Action == Forward {
		fmt.Fprintf(&b, " %s, masquerade %s", f.Policy, f.Masquerade)
	}
	if f.ShortCircuit {
		b.WriteString(", pods and node: cluster")
	}
	if f.Restricted {
		fmt.Fprintf(&b, ", from %v", f.Sources)
	}
	return b.String()
}

// String says all of it in lines.
func (s *Service) String() string {
	if s == nil {
		return "none"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s cluster IPs %v", s.Name, s.ClusterIPs)
	if s.HealthCheck.Port != 0 {
		fmt.Fprintf(&b, " health check %d: %v", s.HealthCheck.Port, s.HealthCheck.Endpoints)
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		fmt.Fprintf(&b, "\n  %s %s %q affinity %s%s\n    cluster %v local %v", p.Family, p.Protocol, p.Name, p.Affinity, p.Hash, p.Cluster, p.Local)
		if p.Serving != nil {
			fmt.Fprintf(&b, " serving %v", p.Serving)
		}
		if p.Resets {
			fmt.Fprintf(&b, " resets all but %v", p.Members)
		}
		for _, f := range append(slices.Clip(p.Frontends), p.Ranges...) {
			b.WriteString("\n    " + f.String())
		}
	}
	return b.String()
}

// String follows a Port's affinity; it is empty without a hash.
func (h Hash) String() string {
	if h.By == Unhashed {
		return ""
	}
	return fmt.Sprintf(" hash of %s, %d buckets", name([]string{"nothing", "source", "source and port"}, h.By), h.Buckets)
}

// String is a line for an Event or a log.
func (p Problem) String() string {
	return fmt.Sprintf("%s %s: %s: %q: %s", p.Kind, p.Object, p.Field, p.Value, p.Reason)
}

// line says what goes for a family.
func (g *FamilyGlobals) line(f Family) string {
	if !g.Enabled {
		return f.String() + " off"
	}
	return fmt.Sprintf("%s detector %s, node ports at %v (loopback %t), cluster IPs in %v",
		f, g.Detector, g.NodePorts.Prefixes, g.NodePorts.Loopback, g.ServiceCIDRs)
}

// String is what it goes by.
func (d Detector) String() string {
	switch {
	case d.CIDR.IsValid():
		return "source in " + d.CIDR.String()
	case d.Interface != "":
		return "interface " + d.Interface
	case d.InterfacePrefix != "":
		return "interface " + d.InterfacePrefix + "*"
	}
	return "none"
}

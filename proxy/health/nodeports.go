package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// NodePorts serves the health check node ports of Services (spec.healthCheckNodePort), by which load balancers find out
// which nodes have endpoints.
type NodePorts struct {
	// Healthy is whether the proxy is.
	Healthy func() bool
	// Failed, if it is not nil, is told of a Service whose port cannot be listened at.
	Failed func(service types.NamespacedName, port uint16, err error)
	Log    *slog.Logger

	globals model.Globals
	wanted  map[check]uint16
	mu      sync.Mutex // for what handlers read
	open    map[check]*checkServer
}

// check is one Service in one family.
type check struct {
	service types.NamespacedName
	family  model.Family
}

// checkServer answers for a check.
type checkServer struct {
	port      uint16
	at        []netip.Addr
	server    *http.Server
	endpoints int
}

// Apply follows a Delta. It belongs to one goroutine.
func (n *NodePorts) Apply(d *model.Delta) {
	if n.wanted == nil {
		n.wanted, n.open = map[check]uint16{}, map[check]*checkServer{}
	}
	if d.Globals != nil {
		n.globals = *d.Globals
	}
	touched := false
	for i := range d.Services {
		c := &d.Services[i]
		touched = touched || hasCheck(c.Old) || hasCheck(c.New)
		for f := range model.Family(model.Families) {
			n.want(c, f)
		}
	}
	if touched || d.Globals != nil {
		n.settle()
	}
}

func hasCheck(s *model.Service) bool { return s != nil && s.HealthCheck.Port != 0 }

// want notes what a Service asks for in a family, and how many endpoints it has.
func (n *NodePorts) want(c *model.Change, f model.Family) {
	k := check{c.Name, f}
	if !hasCheck(c.New) || !slices.ContainsFunc(c.New.Ports, func(p model.Port) bool { return p.Family == f }) {
		delete(n.wanted, k)
		return
	}
	n.wanted[k] = c.New.HealthCheck.Port
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.open[k]; s != nil {
		s.endpoints = c.New.HealthCheck.Endpoints[f]
		return
	}
	n.open[k] = &checkServer{endpoints: c.New.HealthCheck.Endpoints[f]}
}

// Retry tries again what could not be listened at, and follows the addresses of the node.
func (n *NodePorts) Retry() { n.settle() }

// Close ends all of them.
func (n *NodePorts) Close() {
	clear(n.wanted)
	n.settle()
}

// settle closes what is not wanted any more, then opens what is: a port may go from one Service to another.
func (n *NodePorts) settle() {
	var at [model.Families][]netip.Addr
	for f := range at {
		at[f] = n.addresses(model.Family(f))
	}
	n.mu.Lock()
	for k, s := range n.open {
		port, ok := n.wanted[k]
		if s.server != nil && (!ok || port != s.port || !slices.Equal(at[k.family], s.at)) {
			_ = s.server.Close()
			s.server = nil
		}
		if !ok {
			delete(n.open, k)
		}
	}
	var missing []check
	for k, s := range n.open {
		if s.server == nil {
			missing = append(missing, k)
		}
	}
	n.mu.Unlock()
	for _, k := range missing {
		server, err := n.listen(k, n.wanted[k], at[k.family])
		if err != nil {
			n.fail(k, err)
			continue
		}
		n.mu.Lock()
		s := n.open[k]
		s.port, s.at, s.server = n.wanted[k], at[k.family], server
		n.mu.Unlock()
	}
}

func (n *NodePorts) fail(k check, err error) {
	if n.Log != nil {
		n.Log.Warn("a health check node port cannot be listened at; it is tried again", "service", k.service.String(), "port", n.wanted[k], "error", err)
	}
	if n.Failed != nil {
		n.Failed(k.service, n.wanted[k], err)
	}
}

// addresses are where node ports are served in a family.
func (n *NodePorts) addresses(f model.Family) []netip.Addr {
	where := n.globals.Family[f].NodePorts
	if len(where.Prefixes) == 1 && where.Prefixes[0].Bits() == 0 {
		return []netip.Addr{where.Prefixes[0].Addr()}
	}
	all, _ := net.InterfaceAddrs()
	var out []netip.Addr
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil {
			continue
		}
		if ip := p.Addr().Unmap().WithZone(""); ip.Is4() == (f == model.IPv4) && !ip.IsLinkLocalUnicast() && where.Match(ip) {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// listen opens all addresses or none.
func (n *NodePorts) listen(k check, port uint16, at []netip.Addr) (*http.Server, error) {
	network := "tcp4"
	if k.family == model.IPv6 {
		network = "tcp6"
	}
	var listeners []net.Listener
	for _, addr := range at {
		l, err := (&net.ListenConfig{}).Listen(context.Background(), network, netip.AddrPortFrom(addr, port).String())
		if err != nil {
			for _, l := range listeners {
				err = errors.Join(err, l.Close())
			}
			return nil, err
		}
		listeners = append(listeners, l)
	}
	server := newServer(n.handler(k))
	for _, l := range listeners {
		go func() { _ = server.Serve(l) }() // until server.Close
	}
	return server, nil
}

// checkAnswer is the body of a health check node port.
type checkAnswer struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int  `json:"localEndpoints"`
	ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
}

func (n *NodePorts) handler(k check) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		n.mu.Lock()
		s := n.open[k]
		count := 0
		if s != nil {
			count = s.endpoints
		}
		n.mu.Unlock()
		a := checkAnswer{LocalEndpoints: count, ServiceProxyHealthy: n.Healthy()}
		a.Service.Namespace, a.Service.Name = k.service.Namespace, k.service.Name
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(count))
		reply(w, count > 0 && a.ServiceProxyHealthy, a)
	})
}

// String is for logs.
func (k check) String() string { return fmt.Sprintf("%s in %s", k.service, k.family) }

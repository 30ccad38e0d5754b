package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Server explains what a proxy does.
type Server struct {
	// Model is the proxy's, and Look is locked while it changes.
	Model *model.Model
	Look  sync.Locker
	// Mode is what programs the kernel. Inspector reads that, Counters what was counted; nil where the mode has none.
	Mode      string
	Inspector program.Inspector
	Counters  func() (map[program.Counted]program.Count, error)
	// Healthy is whether changes are in the kernel in time.
	Healthy func() bool
	// Silent is since when the API server has not told what changes, and the error; without an error it does. It may be nil.
	Silent func() (since time.Time, err error)
	// Loopback is whether the proxy itself listens at a node port at a loopback address; nil where it does at none.
	Loopback func(model.Protocol, netip.AddrPort) bool
	// Host is what is asked of the node.
	Host Host
}

// Host tells of the node.
type Host interface {
	// Local is whether it has an address itself.
	Local(netip.Addr) bool
	// Interface is by which packets from an address come in, as far as routes say; empty if they do not.
	Interface(from netip.Addr) string
}

// ErrQuestion is a question that makes no sense.
var ErrQuestion = errors.New("cannot be asked")

// some is how many things of a kind a summary names.
const some = 10

// Answer answers.
func (s *Server) Answer(q Question) (*Answer, error) {
	var t target
	var from netip.Addr
	var err error
	if q.Target != "" {
		if t, err = readTarget(q.Target); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrQuestion, err)
		}
	}
	if q.From != "" {
		if from, err = netip.ParseAddr(q.From); err != nil {
			return nil, fmt.Errorf("%w: --from: %q is no IP address", ErrQuestion, q.From)
		}
		from = from.Unmap().WithZone("")
		if t.addr.IsValid() && t.addr.Is4() != from.Is4() {
			return nil, otherFamily(t.addr.String(), from)
		}
	}
	a := &Answer{Mode: s.Mode, Target: q.Target, From: q.From, Late: s.Healthy != nil && !s.Healthy()}
	s.source(a)
	if a.Waiting {
		return a, nil // what is in the kernel is of a proxy before, and nobody knows yet whether it is right
	}
	counts := map[program.Counted]program.Count{}
	if s.Counters != nil {
		if counts, err = s.Counters(); err != nil {
			a.Notes = append(a.Notes, "counters cannot be read: "+err.Error())
		}
	}
	scope, pins, err := s.look(a, &t, from, q, counts)
	if err != nil {
		return nil, err
	}
	if err := s.kernel(a, scope, pins, from); err != nil {
		return nil, err
	}
	return a, nil
}

// source is what the API server has told.
func (s *Server) source(a *Answer) {
	s.Look.Lock()
	a.Node, a.Zone = s.Model.Node()
	if a.Waiting = !s.Model.Committed(); !a.Waiting && !s.Model.HasNode() {
		a.Notes = append(a.Notes, fmt.Sprintf("no Node has the name %s: its zone, addresses and pod CIDRs are unknown, and endpoints count as other nodes'; see hostnameOverride", a.Node))
	}
	s.Look.Unlock()
	if s.Silent == nil {
		return
	}
	if since, err := s.Silent(); err != nil {
		// By the clock as it is now: that it was set meanwhile makes nothing longer or shorter.
		a.Silent = &Silence{Since: time.Now().Add(-time.Since(since)).Truncate(time.Second), Error: err.Error()}
	}
}

// otherFamily is about a client that cannot send to where it is asked about: nothing becomes of packets that there cannot be.
func otherFamily(to string, from netip.Addr) error {
	return fmt.Errorf("%w: --from: no packet of %s goes to %s, which is of the other family", ErrQuestion, from, to)
}

// pin is where a client may be remembered.
type pin struct {
	address *Address
	service types.NamespacedName
	port    *model.Port
	policy  model.Policy
	allowed []model.Endpoint
}

// look is what the model says. What it returns is for the kernel.
func (s *Server) look(a *Answer, t *target, from netip.Addr, q Question, counts map[program.Counted]program.Count) (program.Scope, []pin, error) {
	s.Look.Lock()
	defer s.Look.Unlock()
	var scope program.Scope
	if q.Target == "" {
		a.Summary = s.summary(counts)
		return scope, nil, nil
	}
	matches := s.find(a, t, &scope)
	a.Addresses = make([]Address, 0, len(matches)) // pins point into it
	var pins []pin
	for _, m := range matches {
		if from.IsValid() && from.Is4() != (m.port.Family == model.IPv4) {
			a.Notes = append(a.Notes, fmt.Sprintf("%s is left out: %s is of the other family", m.frontend.Addr, from))
			continue
		}
		a.Addresses = append(a.Addresses, s.address(&m, from, counts))
		at := &a.Addresses[len(a.Addresses)-1]
		if from.IsValid() && m.port.Affinity > 0 && m.frontend.Last == 0 && !m.loopback.IsValid() {
			v := model.Decide(s.Model.State(), s.packet(&m, from))
			pins = append(pins, pin{at, m.service.Name, m.port, policyOf(&v), v.Endpoints})
		}
		if !slices.Contains(scope.Services, m.service.Name) {
			scope.Services = append(scope.Services, m.service.Name)
		}
		if p := (program.Port{Service: m.service.Name, Name: m.port.Name, Protocol: m.port.Protocol}); !slices.Contains(scope.Ports, p) {
			scope.Ports = append(scope.Ports, p)
		}
	}
	if len(matches) > 0 && len(a.Addresses) == 0 {
		return scope, nil, otherFamily(q.Target, from)
	}
	if len(matches) == 0 && t.addr.IsValid() && t.port != 0 {
		a.Addresses = append(a.Addresses, s.nobody(a, t, from))
	}
	return scope, pins, nil
}

// match is a frontend that a target means.
type match struct {
	service  *model.Service
	port     *model.Port
	frontend *model.Frontend
	at       uint16 // the port that was asked about, one of the frontend's
	// loopback is where the proxy itself listens for the frontend, if it is about that.
	loopback netip.AddrPort
}

// text is the frontend's address with its port, or ports.
func (m *match) text() string {
	if m.loopback.IsValid() {
		return m.loopback.String()
	}
	if m.frontend.Last == 0 {
		return m.frontend.Addr.String()
	}
	return fmt.Sprintf("%s-%d", m.frontend.Addr, m.frontend.Last)
}

// find finds what a target means, and notes what else there is to say. Scope gets the address itself.
func (s *Server) find(a *Answer, t *target, scope *program.Scope) (all []match) {
	st := s.Model.State()
	if t.byName() {
		svc := st.Service(t.service)
		if svc == nil {
			a.Notes = append(a.Notes, fmt.Sprintf("%s is no Service that this proxy does anything for: it is not there, has no cluster IP, or is another proxy's", t.service))
			return nil
		}
		scope.Services = append(scope.Services, svc.Name)
		all = matching(svc, func(p *model.Port, f *model.Frontend) bool {
			named := t.portName == "" || p.Name == t.portName || strconv.Itoa(int(f.Addr.Port())) == t.portName
			return named && (t.protocol == 0 || t.protocol == p.Protocol)
		})
		if len(all) == 0 {
			a.Notes = append(a.Notes, fmt.Sprintf("%s has no port %q: %s", t.service, t.portName, strings.Join(portNames(svc), ", ")))
		}
		return all
	}
	if t.port == 0 {
		for svc := range st.Services() {
			all = append(all, matching(svc, func(p *model.Port, f *model.Frontend) bool {
				return f.Addr.Addr() == t.addr && (t.protocol == 0 || t.protocol == p.Protocol)
			})...)
		}
		if len(all) == 0 {
			a.Notes = append(a.Notes, fmt.Sprintf("no Service has the address %s; of node ports, say which: %s", t.addr, netip.AddrPortFrom(t.addr, 30080)))
		}
		return all
	}
	for _, p := range []model.Protocol{model.TCP, model.UDP, model.SCTP} {
		if t.protocol == 0 || t.protocol == p {
			all = append(all, s.findAt(a, t, p, scope)...)
		}
	}
	return all
}

// findAt finds who answers at an address, or as a node port there.
func (s *Server) findAt(a *Answer, t *target, p model.Protocol, scope *program.Scope) (all []match) {
	st := s.Model.State()
	look := func(addr netip.Addr) {
		at := netip.AddrPortFrom(addr, t.port)
		scope.At = append(scope.At, program.Place{Protocol: p, Addr: at})
		if svc, port, f := st.Lookup(p, at); f != nil {
			all = append(all, match{service: svc, port: port, frontend: f, at: t.port})
		}
	}
	any := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	if !t.addr.IsValid() {
		look(any[model.IPv4])
		look(any[model.IPv6])
		return all
	}
	if look(t.addr); len(all) > 0 {
		return all
	}
	family := model.IPv4
	if t.addr.Is6() {
		family = model.IPv6
	}
	at := netip.AddrPortFrom(t.addr, t.port)
	svc, port, f := st.Lookup(p, netip.AddrPortFrom(any[family], t.port))
	switch served := st.Globals().Family[family].NodePorts; {
	case f == nil:
	case !s.Host.Local(t.addr):
		a.Notes = append(a.Notes, fmt.Sprintf("%d/%s is a node port of %s, but %s is no address of this node: ask there, or for :%d", t.port, p, svc.Name, t.addr, t.port))
	case !served.Match(t.addr) && t.addr.IsLoopback() && s.Loopback == nil:
		a.Notes = append(a.Notes, fmt.Sprintf("%d/%s is a node port of %s, but at %s neither a rule serves it nor the proxy itself: nodePortAddresses names no loopback addresses", t.port, p, svc.Name, t.addr))
	case !served.Match(t.addr) && t.addr.IsLoopback() && s.Loopback(p, at):
		all = append(all, match{service: svc, port: port, frontend: f, at: t.port, loopback: at})
	case !served.Match(t.addr) && t.addr.IsLoopback():
		a.Notes = append(a.Notes, fmt.Sprintf("%d/%s is a node port of %s, but the proxy itself does not listen at %s: it does for TCP and UDP, at 127.0.0.1 and ::1 as nodePortAddresses says, where there are endpoints and no other program has the port", t.port, p, svc.Name, t.addr))
	case !served.Match(t.addr):
		a.Notes = append(a.Notes, fmt.Sprintf("%d/%s is a node port of %s, but node ports are not served at %s (nodePortAddresses: %v)", t.port, p, svc.Name, t.addr, served.Prefixes))
	default:
		look(any[family])
	}
	return all
}

func matching(svc *model.Service, is func(*model.Port, *model.Frontend) bool) (all []match) {
	for i := range svc.Ports {
		p := &svc.Ports[i]
		for _, list := range [][]model.Frontend{p.Frontends, p.Ranges} {
			for j := range list {
				if is(p, &list[j]) {
					all = append(all, match{service: svc, port: p, frontend: &list[j], at: list[j].Addr.Port()})
				}
			}
		}
	}
	return all
}

func portNames(svc *model.Service) (names []string) {
	for _, p := range svc.Ports {
		for _, f := range p.Frontends {
			if name := strings.TrimPrefix(fmt.Sprintf("%s=%d/%s", p.Name, f.Addr.Port(), p.Protocol), "="); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// packet is one of a client to a frontend.
func (s *Server) packet(m *match, from netip.Addr) model.Packet {
	p := model.Packet{
		Src: from, Dst: m.frontend.Addr.Addr(), Port: m.at, Protocol: m.port.Protocol,
		SrcLocal: s.Host.Local(from),
	}
	if !p.SrcLocal {
		if p.Interface = s.Host.Interface(from); p.Interface == "" {
			p.Interface = "?"
		}
	}
	return p
}

// policyOf is whose endpoints a packet is sent to.
func policyOf(v *model.Verdict) model.Policy {
	if v.Reason == model.FromPod || v.Reason == model.FromNode {
		return model.Cluster
	}
	return v.Frontend.Policy
}

// address explains a frontend.
func (s *Server) address(m *match, from netip.Addr, counts map[program.Counted]program.Count) Address {
	st, f := s.Model.State(), m.frontend
	a := Address{
		Address: m.text(), Protocol: m.port.Protocol.String(), Service: m.service.Name.String(), Port: m.port.Name, Kind: f.Kind.String(),
		Restricted: f.Restricted, Sources: texts(f.Sources),
	}
	for _, name := range st.Claimants(m.port.Protocol, f.Addr) {
		if n := name.String(); n != a.Service && !slices.Contains(a.Claimants, n) {
			a.Claimants = append(a.Claimants, n)
		}
	}
	if m.port.Affinity > 0 && f.Last == 0 {
		a.Affinity = m.port.Affinity.String()
	}
	if h := m.port.Hash; h.By != model.Unhashed && !m.loopback.IsValid() {
		a.Hash = h.By.String()
	}
	g := &st.Globals().Family[m.port.Family]
	policies := []model.Policy{f.Policy}
	if m.loopback.IsValid() {
		if len(m.port.Endpoints(f)) == 0 {
			policies[0] = model.Cluster // as a program of the node is sent past the policy Local at its other addresses
		}
		a.Paths = []Path{{
			From: "programs of this node", Action: model.Forward.String(), Policy: policies[0].String(),
			Reason: "the proxy itself listens there", Masquerade: "yes", MasqueradeReason: "the proxy connects to the endpoint",
		}}
	} else if from.IsValid() {
		v := model.Decide(st, s.packet(m, from))
		policies[0] = policyOf(&v)
		a.Paths = []Path{pathOf(&v, g, from)}
		if len(v.Endpoints) == 1 && (m.port.Affinity == 0 || f.Last != 0) && len(a.Hash) > 0 && len(listOf(m.port, policies[0])) > 1 {
			a.Client = &Client{Endpoint: v.Endpoints[0].AddrPort().String(), By: "hash"}
		}
	} else {
		a.Paths = pathsOf(f, g)
		if f.ShortCircuit && f.Policy != model.Cluster {
			policies = append(policies, model.Cluster)
		}
	}
	for _, policy := range policies {
		list, hints := s.Model.Standings(m.service.Name, m.port, policy)
		if hints != "" {
			a.Hints = hints
		}
		for _, e := range list {
			to := e.AddrPort().String()
			if f.Last != 0 { // the port is kept
				to = e.Addr.String()
			}
			a.Endpoints = append(a.Endpoints, Endpoint{
				Address: to, Policy: policy.String(), Local: e.Local, Weight: e.Weight, Share: e.Share,
				Ready: e.Ready, Serving: e.Serving, Terminating: e.Terminating, Zones: e.Zones, Why: e.Why,
			})
		}
	}
	for of, n := range counts {
		if of.Service == m.service.Name && of.Port == m.port.Name && of.Family == m.port.Family && of.Protocol == m.port.Protocol {
			if a.Counts == nil {
				a.Counts = map[string]uint64{}
			}
			a.Counts[of.Cause.String()] = n.Packets
		}
	}
	return a
}

func listOf(p *model.Port, policy model.Policy) []model.Endpoint {
	if policy == model.Local {
		return p.Local
	}
	return p.Cluster
}

// nobody is about an address and port that no Service has.
func (s *Server) nobody(a *Answer, t *target, from netip.Addr) Address {
	st := s.Model.State()
	p := model.Packet{Src: from, Dst: t.addr, Port: t.port, Protocol: t.protocol, DstLocal: s.Host.Local(t.addr), Interface: "?"}
	if p.Protocol == 0 {
		p.Protocol = model.TCP
	}
	if from.IsValid() && s.Host.Local(from) {
		p.SrcLocal, p.Interface = true, ""
	}
	v := model.Decide(st, p)
	for svc := range st.Services() {
		if slices.Contains(svc.ClusterIPs, t.addr) {
			a.Notes = append(a.Notes, fmt.Sprintf("%s is the cluster IP of %s, which has %s", t.addr, svc.Name, strings.Join(portNames(svc), ", ")))
		}
		for i := range svc.Ports {
			port := &svc.Ports[i]
			is := func(e model.Endpoint) bool { return e.Addr == t.addr && e.Port == t.port }
			if slices.ContainsFunc(port.Cluster, is) || slices.ContainsFunc(port.Local, is) {
				a.Notes = append(a.Notes, strings.TrimSuffix(fmt.Sprintf("%s is an endpoint of %s:%s", netip.AddrPortFrom(t.addr, t.port), svc.Name, port.Name), ":"))
			}
		}
	}
	who := "anyone"
	if from.IsValid() {
		who = from.String()
	}
	return Address{
		Address: netip.AddrPortFrom(t.addr, t.port).String(), Protocol: p.Protocol.String(),
		Paths: []Path{{From: who, Action: v.Action.String(), Reason: string(v.Reason)}},
	}
}

// summary is about all of the node.
func (s *Server) summary(counts map[program.Counted]program.Count) *Summary {
	st := s.Model.State()
	n := st.Counts()
	sum := &Summary{Services: n.Services, Ports: n.Ports, Addresses: n.Frontends, Endpoints: n.Endpoints}
	var has [model.Families]bool
	for svc := range st.Services() {
		for i := range svc.Ports {
			has[svc.Ports[i].Family] = true
		}
	}
	for f := range model.Family(model.Families) {
		g := &st.Globals().Family[f]
		if !g.Enabled {
			continue
		}
		sum.Families = append(sum.Families, FamilySummary{
			Family: f.String(), Used: has[f] || len(g.ServiceCIDRs) > 0 || g.Detector.CIDR.IsValid(),
			Pods: g.Detector.String(), NodePorts: texts(g.NodePorts.Prefixes), ServiceCIDRs: texts(g.ServiceCIDRs),
		})
	}
	for svc := range st.Services() {
		for i := range svc.Ports {
			p := &svc.Ports[i]
			for _, f := range p.Frontends {
				line := fmt.Sprintf("%s %s %s/%s", svc.Name, f.Kind, f.Addr, p.Protocol)
				switch f.Action {
				case model.Reject:
					sum.Rejecting = append(sum.Rejecting, line)
				case model.Drop:
					sum.Dropping = append(sum.Dropping, line)
				}
			}
		}
	}
	for _, p := range s.Model.Problems() {
		sum.Problems = append(sum.Problems, p.String())
	}
	slices.Sort(sum.Problems)
	for _, list := range []*[]string{&sum.Rejecting, &sum.Dropping, &sum.Problems} {
		if more := len(*list) - some; more > 0 {
			*list = append((*list)[:some:some], fmt.Sprintf("and %d more", more))
		}
	}
	for of, n := range counts {
		if of.Cause != program.Connections && of.Cause != program.AtLoopback && n.Packets > 0 {
			if sum.Refused == nil {
				sum.Refused = map[string]uint64{}
			}
			sum.Refused[of.Cause.String()] += n.Packets
		}
	}
	return sum
}

func texts(prefixes []netip.Prefix) (out []string) {
	for _, p := range prefixes {
		out = append(out, p.String())
	}
	return out
}

// kernel compares what the kernel has.
func (s *Server) kernel(a *Answer, scope program.Scope, pins []pin, from netip.Addr) error {
	if s.Inspector == nil {
		a.Kernel.Note = "mode " + s.Mode + ": the kernel's rules are not read (look at them by iptables-save)"
		return nil
	}
	if scope.All() && a.Summary == nil {
		return nil // nothing was found to compare
	}
	found, err := s.Inspector.Inspect(scope)
	if errors.Is(err, program.ErrLoading) {
		a.Loading, a.Kernel.Note = true, err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	a.Kernel = Kernel{Read: true, Elements: found.Elements, Have: found.Have, Differences: found.Differences}
	for _, p := range pins {
		to, left, ok, err := s.Inspector.Client(from, p.service, p.port, p.policy)
		if errors.Is(err, errors.ErrUnsupported) {
			a.Notes = append(a.Notes, "session affinity of "+from.String()+": "+err.Error())
			break
		}
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		p.address.Client = &Client{Endpoint: to.String(), By: "affinity", Left: lasting(left)}
		if !slices.ContainsFunc(p.allowed, func(e model.Endpoint) bool { return e.AddrPort() == to }) {
			a.Kernel.Differences = append(a.Kernel.Differences, program.Difference{
				Where: "session affinity of " + from.String(), What: "an endpoint that gets no packets of " + p.address.Service, Have: to.String(),
			})
		}
	}
	return nil
}

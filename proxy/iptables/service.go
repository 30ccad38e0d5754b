package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// section is where in a chain that all Services share a rule is: before the fixed ones, or after them, in no order there.
type section uint8

const (
	head section = iota
	tail
)

// shared is a rule of a Service in a chain that all share.
type shared struct {
	chain chain
	at    section
	rule  string
}

// own is a chain of a Service, in table nat.
type own struct {
	name  string
	rules []string
}

// part is all that is there for a Service in a family.
type part struct {
	own     []own
	shared  []shared
	counted []countedShared
}

// countedShared is a rule of those that counts something.
type countedShared struct {
	chain chain
	rule  string
	of    []program.Counted
}

// behaviour is what becomes of packets from outside.
type behaviour struct {
	masquerade   model.Masquerade
	shortCircuit bool
	action       model.Action
	policy       model.Policy
}

// parts makes rules of a family's Services.
type parts struct {
	family  model.Family
	globals *model.FamilyGlobals
}

// service computes what is there for a Service; nothing for none.
func (x parts) service(s *model.Service) (p part) {
	if s == nil {
		return p
	}
	any := false
	for i := range s.Ports {
		if s.Ports[i].Family == x.family {
			any = true
			w := portWriter{parts: x, service: s, port: &s.Ports[i], out: &p}
			w.write()
		}
	}
	if any && s.HealthCheck.Port != 0 {
		p.share(filter, nodePorts, head, words("-p tcp", comment(s.Name.String()+" health check node port"),
			"-m tcp --dport", number(s.HealthCheck.Port), "-j ACCEPT"))
	}
	for _, ip := range s.ClusterIPs {
		if ip.Is6() != (x.family == model.IPv6) {
			continue
		}
		p.share(filter, clusterIPs, tail, words(destination(single(ip)), comment(s.Name.String()+" has no such port"), "-j", rejects))
		if !slices.ContainsFunc(x.globals.ServiceCIDRs, func(c netip.Prefix) bool { return c.Contains(ip) }) {
			p.share(filter, services, tail, words(destination(single(ip)), "-j", clusterIPs))
		}
	}
	return p
}

func (p *part) share(t table, name string, at section, rule string) {
	p.shared = append(p.shared, shared{chain{t, name}, at, rule})
}

// count is share of a rule whose packets are counted for some causes.
func (w *portWriter) count(t table, name string, at section, rule string, causes ...program.Cause) {
	w.out.share(t, name, at, rule)
	c := countedShared{chain: chain{t, name}, rule: rule}
	for _, cause := range causes {
		of := program.Counted{Family: w.family, Cause: cause}
		if cause != program.AtLoopback {
			of.Service, of.Port, of.Protocol = w.service.Name, w.port.Name, w.port.Protocol
		}
		c.of = append(c.of, of)
	}
	w.out.counted = append(w.out.counted, c)
}

func number(n uint16) string { return strconv.Itoa(int(n)) }

// reject says so to who has sent a packet. A connection is reset: who has just sent for one on this machine hears of an ICMP error
// with the next packet only, a second later.
func (x parts) reject(protocol string) string {
	switch {
	case protocol == "tcp":
		return "-j REJECT --reject-with tcp-reset"
	case x.family == model.IPv6:
		return "-j REJECT --reject-with icmp6-port-unreachable"
	}
	return "-j REJECT --reject-with icmp-port-unreachable"
}

// pod matches what the Detector takes for a pod's packet; empty if it takes none for that.
func (x parts) pod() string {
	switch d := x.globals.Detector; {
	case d.CIDR.IsValid():
		return source(d.CIDR)
	case d.Interface != "":
		return "-i " + d.Interface
	case d.InterfacePrefix != "":
		return "-i " + d.InterfacePrefix + "+"
	}
	return ""
}

// notPod matches all else; false where there is nothing else.
func (x parts) notPod() (match string, some bool) {
	if c := x.globals.Detector.CIDR; c.IsValid() && c.Bits() == 0 {
		return "", false
	}
	return not(x.pod()), true
}

// portWriter writes a port of a Service.
type portWriter struct {
	parts
	service *model.Service
	port    *model.Port
	out     *part

	name, protocol, hash string
	// policies are the chains of endpoints that something leads to; masquerade what each begins with.
	policies   [2]bool
	masquerade [2][]string
	external   []behaviour
	firewalls  int
}

func (w *portWriter) write() {
	w.name, w.protocol = portName(w.service, w.port), protocolName(w.port.Protocol)
	w.hash = hash(w.name, w.protocol)
	for i := range w.port.Frontends {
		w.frontend(&w.port.Frontends[i])
	}
	seen := map[model.Endpoint]bool{}
	for policy, list := range [2][]model.Endpoint{model.Cluster: w.port.Cluster, model.Local: w.port.Local} {
		if !w.policies[policy] {
			continue
		}
		w.endpoints(model.Policy(policy), list)
		for _, e := range list {
			e.Weight = 0
			if !seen[e] {
				seen[e] = true
				w.endpoint(e)
			}
		}
	}
}

// policy is the chain of a policy's endpoints.
func (w *portWriter) policy(p model.Policy) string {
	w.policies[p] = true
	if p == model.Local {
		return localChain + w.hash
	}
	return clusterChain + w.hash
}

// kindName is what a frontend is called in comments.
func kindName(k model.Kind) string {
	return map[model.Kind]string{model.ClusterIP: "cluster IP", model.LoadBalancer: "loadbalancer IP", model.ExternalIP: "external IP"}[k]
}

func (w *portWriter) frontend(f *model.Frontend) {
	leads := f.Action == model.Forward || f.ShortCircuit
	match := func(note string) string {
		if f.Kind == model.NodePort {
			return words("-p", w.protocol, comment(note), "-m", w.protocol, "--dport", number(f.Addr.Port()))
		}
		return words(destination(single(f.Addr.Addr())), "-p", w.protocol, comment(note), "-m", w.protocol, "--dport", number(f.Addr.Port()))
	}
	note := w.name + " " + kindName(f.Kind)
	switch {
	case f.Kind == model.NodePort:
		if leads {
			to := words(match(w.name), "-j", w.outside(f))
			if w.globals.NodePorts.Loopback { // apart, since kube-proxy counts these
				w.count(nat, nodePorts, head, "-d 127.0.0.0/8 "+to, program.Connections, program.AtLoopback)
				to = "! -d 127.0.0.0/8 " + to
			}
			w.count(nat, nodePorts, head, to, program.Connections)
		}
	case f.Kind == model.ClusterIP && !f.ShortCircuit && !f.Restricted:
		if leads {
			to := w.policy(f.Policy)
			w.count(nat, services, head, words(match(note), "-j", to), program.Connections)
			w.masqueradeClusterIP(f, match(note))
		}
	case leads:
		// What the chain does not lead to an endpoint goes to no node port of the same number either.
		w.count(nat, services, head, words(match(note), "-g", w.allowed(f, w.outside(f))), program.Connections)
	default:
		w.count(nat, services, head, words(match(note), "-j RETURN"), program.Connections)
	}
	if f.Restricted {
		if f.Action == model.Reject && !f.ShortCircuit {
			for _, s := range f.Sources {
				w.out.share(filter, proxyFirewall, head, words(source(s), match(w.name+" is rejected elsewhere"), "-j RETURN"))
			}
		}
		w.count(filter, proxyFirewall, tail, words(match(w.name+" traffic not accepted by "+firewallChain+w.hash), "-j DROP"), program.SourceRanges)
	}
	w.refuse(f, match)
}

// masqueradeClusterIP has packets to a cluster IP be masqueraded that come from where their answers would not.
func (w *portWriter) masqueradeClusterIP(f *model.Frontend, match string) {
	at := &w.masquerade[f.Policy]
	switch f.Masquerade {
	case model.Always:
		*at = append(*at, words(match, "-j", markMasq))
	case model.OffCluster:
		if from, some := w.notPod(); some {
			*at = append(*at, words(from, match, "-j", markMasq))
		}
	}
}

// refuse rejects or drops what has not been led to an endpoint.
func (w *portWriter) refuse(f *model.Frontend, match func(string) string) {
	var note, verdict string
	var causes []program.Cause
	switch f.Action {
	case model.Reject:
		note, verdict, causes = w.name+" has no endpoints", w.reject(w.protocol), []program.Cause{program.NoEndpoints}
	case model.Drop:
		note, verdict, causes = w.name+" has no local endpoints", "-j DROP", []program.Cause{program.NoLocal}
	default:
		return
	}
	if !f.ShortCircuit && (f.Kind == model.NodePort || f.Kind == model.ClusterIP && !f.Restricted) { // no rule has led it anywhere
		causes = append(causes, program.Connections)
	}
	switch f.Kind {
	case model.ClusterIP:
		w.count(filter, services, head, words(match(note), verdict), causes...)
	case model.NodePort:
		for _, m := range w.nodePortAddresses() {
			w.count(filter, externalServices, tail, words(m, match(note), verdict), causes...)
		}
	default:
		w.count(filter, externalServices, head, words(match(note), verdict), causes...)
	}
}

// outside is the chain that packets from outside go through; there is one for each behaviour, which is one in all.
func (w *portWriter) outside(f *model.Frontend) string {
	b := behaviour{f.Masquerade, f.ShortCircuit, f.Action, f.Policy}
	i := slices.Index(w.external, b)
	name := func(i int) string {
		if i == 0 {
			return externalChain + w.hash
		}
		return externalChain + hash(w.name, w.protocol, " ", strconv.Itoa(i))
	}
	if i >= 0 {
		return name(i)
	}
	w.external = append(w.external, b)
	c := own{name: name(len(w.external) - 1)}
	add := func(parts ...string) { c.rules = append(c.rules, words(parts...)) }
	if b.masquerade == model.Always {
		add(comment("masquerade traffic for "+w.name+" external destinations"), "-j", markMasq)
	}
	if b.shortCircuit {
		// As if it had gone out to a load balancer and come back: of pods with their source; of the node itself that is the
		// load balancer's address, if the node has it.
		if w.globals.Detector.Implemented() {
			add(w.pod(), comment("pod traffic for "+w.name+" external destinations"), "-j", w.policy(model.Cluster))
		}
		add(comment("masquerade LOCAL traffic for "+w.name+" external destinations"), "-m addrtype --src-type LOCAL -j", markMasq)
		add(comment("route LOCAL traffic for "+w.name+" external destinations"), "-m addrtype --src-type LOCAL -j", w.policy(model.Cluster))
	}
	if from, some := w.notPod(); some && b.masquerade == model.OffCluster {
		add(from, comment("masquerade off-cluster traffic for "+w.name+" external destinations"), "-j", markMasq)
	}
	if b.action == model.Forward {
		add("-j", w.policy(b.policy))
	}
	w.out.own = append(w.out.own, c)
	return c.name
}

// allowed is the chain that packets to a frontend go through first, if only some may be sent there.
func (w *portWriter) allowed(f *model.Frontend, to string) string {
	if !f.Restricted {
		return to
	}
	c := own{name: firewallChain + w.hash}
	if w.firewalls > 0 {
		c.name = firewallChain + hash(w.name, w.protocol, " ", strconv.Itoa(w.firewalls))
	}
	for _, s := range f.Sources {
		c.rules = append(c.rules, words(source(s), comment(w.name+" "+kindName(model.LoadBalancer)), "-j", to))
	}
	c.rules = append(c.rules, comment(fmt.Sprintf("other traffic to %s will be dropped by %s", w.name, proxyFirewall)))
	for _, o := range w.out.own {
		if slices.Equal(o.rules, c.rules) {
			return o.name
		}
	}
	w.firewalls++
	w.out.own = append(w.out.own, c)
	return c.name
}

// endpoints writes the chain of a policy: what a client is remembered at, and else one of all by their shares.
func (w *portWriter) endpoints(p model.Policy, list []model.Endpoint) {
	c := own{name: w.policy(p), rules: slices.Clone(w.masquerade[p])}
	left := 0
	for _, e := range list {
		left += max(1, int(e.Weight))
		if w.port.Affinity > 0 {
			to := w.endpointName(e)
			c.rules = append(c.rules, words(comment(w.name+" -> "+e.AddrPort().String()), "-m recent --rcheck --seconds",
				strconv.Itoa(int(w.port.Affinity.Seconds())), "--reap --name", to, w.wholeSource(), "-j", to))
		}
	}
	for i, e := range list {
		share, drawn := max(1, int(e.Weight)), ""
		if i < len(list)-1 {
			drawn = draw(share, left)
		}
		left -= share
		c.rules = append(c.rules, words(comment(w.name+" -> "+e.AddrPort().String()), drawn, "-j", w.endpointName(e)))
	}
	w.out.own = append(w.out.own, c)
}

func (w *portWriter) endpointName(e model.Endpoint) string {
	return endpointChain + hash(w.name, w.protocol, e.AddrPort().String())
}

// wholeSource has a client be remembered by all of its address.
func (w *portWriter) wholeSource() string {
	if w.family == model.IPv6 {
		return "--mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource"
	}
	return "--mask 255.255.255.255 --rsource"
}

// endpoint writes the chain of an endpoint. Who sends to itself is masqueraded, or the answer would not come back this way.
func (w *portWriter) endpoint(e model.Endpoint) {
	c := own{name: w.endpointName(e)}
	recent := ""
	if w.port.Affinity > 0 {
		recent = words("-m recent --set --name", c.name, w.wholeSource())
	}
	c.rules = []string{
		words(source(single(e.Addr)), comment(w.name), "-j", markMasq),
		words("-p", w.protocol, comment(w.name), recent, "-m", w.protocol, "-j DNAT --to-destination", e.AddrPort().String()),
	}
	w.out.own = append(w.out.own, c)
}

package nft

import (
	"encoding/binary"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// longestKey is that of sources in IPv6 with its end: two addresses, protocol and port, and the last address.
const longestKey = 16 + 4 + 4 + 16 + 16

// elemKey is an element of a set by its key, as the kernel has it. Of sources it has the last address of the range at its
// end; of sets of ranges of ports, the last port behind the first one, where others have nothing; of the sets of addresses with intervals, a byte that is 1 where an interval ends.
type elemKey struct {
	family model.Family
	set    setID
	size   uint8
	bytes  [longestKey]byte
}

func (k *elemKey) content() []byte { return k.bytes[:k.size] }

// elemValue is what a map has for a key, and what nft shows beside it.
type elemValue struct {
	size    uint8
	bytes   [20]byte
	comment string
}

func (v *elemValue) content() []byte { return v.bytes[:v.size] }

// elem is an element.
type elem struct {
	key   elemKey
	value elemValue
}

// elements are computed from values of package model alone.
type elements struct {
	groups *groups
	// resets is whether there are ports with Resets.
	resets [model.Families]bool
	all    [model.Families][setCount][]elem
}

// each calls f for all elements.
func (e *elements) each(f func(*elem)) {
	for family := range e.all {
		for s := range e.all[family] {
			for i := range e.all[family][s] {
				f(&e.all[family][s][i])
			}
		}
	}
}

func (e *elements) add(f model.Family, s setID, parts ...[]byte) *elem {
	list := append(e.all[f][s], elem{key: elemKey{family: f, set: s}})
	e.all[f][s] = list
	el := &list[len(list)-1]
	for _, p := range parts {
		el.key.size += uint8(copy(el.key.bytes[el.key.size:], p))
	}
	return el
}

func (el *elem) value4(v uint32) {
	el.value.size = uint8(len(binary.NativeEndian.AppendUint32(el.value.bytes[:0], v)))
}

func (el *elem) endpoint(a netip.AddrPort) {
	el.value.size = uint8(copy(el.value.bytes[:], a.Addr().AsSlice()))
	binary.BigEndian.PutUint16(el.value.bytes[el.value.size:], a.Port())
	el.value.size += 4
}

// toKey is an address, protocol and port; of a node port, protocol and port.
func toKey(f *model.Frontend, p model.Protocol) []byte {
	b := make([]byte, 0, 24)
	if f.Kind != model.NodePort {
		b = append(b, f.Addr.Addr().AsSlice()...)
	}
	b = appendPort(b, p, f.Addr.Port())
	if f.Last != 0 {
		binary.BigEndian.PutUint16(b[len(b)-2:], f.Last)
	}
	return b
}

func appendPort(b []byte, p model.Protocol, port uint16) []byte {
	b = append(b, byte(p), 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, port)
	return append(b, 0, 0)
}

// lastPortAt is where the last port of a range is in a key.
func lastPortAt(f layer) int { return f.size + 6 }

// service adds all elements of a Service.
func (e *elements) service(s *model.Service) {
	if s == nil {
		return
	}
	for _, a := range s.ClusterIPs {
		f := model.IPv4
		if a.Is6() {
			f = model.IPv6
		}
		e.add(f, clusterIPs, a.AsSlice())
	}
	var first [model.Families]int // of the Service's own
	for f := range first {
		first[f] = len(e.all[f][affinityTimeouts])
	}
	for i := range s.Ports {
		p := &s.Ports[i]
		name := frontendName(s, p)
		e.resets[p.Family] = e.resets[p.Family] || p.Resets
		for j := range p.Frontends {
			e.frontend(s, p, &p.Frontends[j], name)
		}
		for j := range p.Ranges {
			e.frontend(s, p, &p.Ranges[j], name)
		}
		for policy, is := range policies(p.Ranges) {
			if is {
				e.spread(p, setsFor(&p.Ranges[0]), native32(e.groups.of(s, p, model.Policy(policy))), 0, listOf(p, model.Policy(policy)))
			}
		}
		e.affinityTimeouts(s, p, &first)
	}
}

// longestComment is what nft takes (NFTNL_UDATA_COMMENT_MAXLEN).
const longestComment = 127

func frontendName(s *model.Service, p *model.Port) string {
	name := s.Name.String()
	if p.Name != "" {
		name += ":" + p.Name
	}
	if len(name) > longestComment {
		name = name[:longestComment-3] + "..."
	}
	return name
}

// setsOf are the sets of a frontend, which are others for node ports and for ranges of ports.
type setsOf struct {
	frontends, reject, drop, masquerade, short, endpoints, sizes setID
	restricted, sources                                          setID // not of node ports
	groups, groupsCluster                                        setID
}

func setsFor(f *model.Frontend) setsOf {
	switch {
	case f.Kind == model.NodePort:
		return setsOf{
			frontends: nodeports, reject: nodeportReject, drop: nodeportDrop, masquerade: nodeportMasquerade, short: nodeportShortCircuit,
			endpoints: nodeportEndpoints, sizes: nodeportSizes, groups: nodeportAffinityGroups, groupsCluster: nodeportAffinityGroupsCluster,
		}
	case f.Last != 0:
		return setsOf{
			frontends: portRanges, reject: rangeReject, drop: rangeDrop, masquerade: rangeMasquerade, short: rangeShortCircuit,
			endpoints: rangeEndpoints, sizes: rangeSizes, restricted: rangeRestricted, sources: rangeSources,
			groups: rangeGroups, groupsCluster: rangeGroupsCluster,
		}
	}
	return setsOf{
		frontends: frontends, reject: reject, drop: drop, masquerade: masquerade, short: shortCircuit, endpoints: endpoints, sizes: sizes,
		restricted: restricted, sources: sources, groups: affinityGroups, groupsCluster: affinityGroupsCluster,
	}
}

func (e *elements) frontend(s *model.Service, p *model.Port, f *model.Frontend, name string) {
	in, grouped := setsFor(f), p.Affinity > 0 || f.Last != 0
	to := toKey(f, p.Protocol)
	e.add(p.Family, in.frontends, to).value.comment = name
	switch f.Action {
	case model.Reject:
		e.add(p.Family, in.reject, to)
	case model.Drop:
		e.add(p.Family, in.drop, to)
	case model.Forward:
		if f.Last == 0 {
			e.spread(p, in, to, 0, p.Endpoints(f))
		}
		if grouped {
			e.add(p.Family, in.groups, to).value4(e.groups.of(s, p, f.Policy))
		}
	}
	if f.Masquerade == model.Always && f.Action == model.Forward {
		e.add(p.Family, in.masquerade, to)
	}
	// OffCluster is on cluster IPs alone, and a rule for all of them.
	if f.ShortCircuit {
		e.add(p.Family, in.short, to)
		if f.Last == 0 {
			e.spread(p, in, to, clusterOffset, p.Cluster)
		}
		if grouped {
			e.add(p.Family, in.groupsCluster, to).value4(e.groups.of(s, p, model.Cluster))
		}
	}
	if f.Restricted && f.Kind != model.NodePort {
		e.add(p.Family, in.restricted, to)
		for _, r := range ranges(f.Sources) {
			e.add(p.Family, in.sources, to, r.first.AsSlice(), r.last.AsSlice())
		}
	}
}

// spread has packets sent to each of some endpoints by its share.
func (e *elements) spread(p *model.Port, in setsOf, to []byte, offset uint32, list []model.Endpoint) {
	f := p.Family
	if table := p.Hash.Table(list); table != nil {
		e.add(f, in.sizes, to, native32(offset+hashNumber(p.Hash)))
		for number, i := range table {
			e.target(f, in, to, offset+uint32(number), &list[i])
		}
		return
	}
	list = list[:min(len(list), clusterOffset)]
	number, shares := uint32(0), model.Shares(list)
	for i := range list {
		times := 1
		if shares != nil {
			times = shares[i]
		}
		for range times {
			e.target(f, in, to, offset+number, &list[i])
			number++
		}
	}
	if n := sizeFor(int(number)); n > 1 {
		e.add(f, in.sizes, to, native32(offset+n))
	}
}

// target has a number lead to an endpoint; of ranges that is an address alone.
func (e *elements) target(f model.Family, in setsOf, to []byte, number uint32, at *model.Endpoint) {
	el := e.add(f, in.endpoints, to, native32(number))
	if in.endpoints == rangeEndpoints {
		el.value.size = uint8(copy(el.value.bytes[:], at.Addr.AsSlice()))
		return
	}
	el.endpoint(at.AddrPort())
}

// policies are those whose endpoints packets to some frontends are sent to.
func policies(frontends []model.Frontend) (used [2]bool) {
	for i := range frontends {
		f := &frontends[i]
		if f.Action == model.Forward {
			used[f.Policy] = true
		}
		used[model.Cluster] = used[model.Cluster] || f.ShortCircuit
	}
	return used
}

// affinityTimeouts says how long the clients of a Port are remembered.
func (e *elements) affinityTimeouts(s *model.Service, p *model.Port, first *[model.Families]int) {
	if p.Affinity <= 0 {
		return
	}
	used := policies(p.Frontends)
	for policy, is := range used {
		group := e.groups.of(s, p, model.Policy(policy))
		// Two Ports of one name share a group.
		if !is || slices.ContainsFunc(e.all[p.Family][affinityTimeouts][first[p.Family]:], func(el elem) bool { return nativeOf(el.key.content()) == group }) {
			continue
		}
		e.add(p.Family, affinityTimeouts, native32(group), native32(seconds(p.Affinity)))
		if used[1-policy] {
			e.add(p.Family, affinityPeers, native32(group)).value4(e.groups.of(s, p, model.Policy(1-policy)))
			for _, member := range listOf(p, model.Policy(policy)) {
				e.add(p.Family, affinityMembers, native32(group), member.Addr.AsSlice(), appendPort(nil, 0, member.Port)[4:])
			}
		}
	}
}

func listOf(p *model.Port, policy model.Policy) []model.Endpoint {
	if policy == model.Local {
		return p.Local
	}
	return p.Cluster
}

// seconds are those of a timeout, rounded up to three digits: each different one is a rule, and who writes Services chooses them.
func seconds(d time.Duration) uint32 {
	n := uint32(min(max(1, (d+time.Second-1)/time.Second), math.MaxUint32/2))
	for step := uint32(10); n >= 100*step; step *= 10 {
		n = (n + step - 1) / step * step
	}
	return n
}

// hairpin adds an endpoint that is masqueraded where it reaches itself.
func (e *elements) hairpin(h model.Hairpin) {
	f := model.IPv4
	if h.Endpoint.Addr().Is6() {
		f = model.IPv6
	}
	a := h.Endpoint.Addr().AsSlice()
	if h.Endpoint.Port() == 0 {
		e.add(f, rangeHairpin, a, a, []byte{byte(h.Protocol), 0, 0, 0})
		return
	}
	e.add(f, hairpin, a, a, appendPort(nil, h.Protocol, h.Endpoint.Port()))
}

// globals adds what goes for all Services.
func (e *elements) globals(g *model.Globals) {
	for f := range model.Family(model.Families) {
		of := &g.Family[f]
		if !of.Enabled {
			continue
		}
		e.intervals(f, serviceCIDRs, ranges(of.ServiceCIDRs))
		e.intervals(f, nodeportAddresses, nodePortRanges(f, of.NodePorts))
	}
}

// loopback are the addresses that have no node ports, unless they are asked for.
var loopback = [model.Families]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

func nodePortRanges(f model.Family, n model.NodePortAddresses) []addrRange {
	all := ranges(n.Prefixes)
	if n.Loopback {
		return all
	}
	return without(all, rangeOf(loopback[f]))
}

// intervals adds ranges to a set of addresses: where each begins, and the first address behind it.
func (e *elements) intervals(f model.Family, s setID, all []addrRange) {
	for _, r := range all {
		e.add(f, s, r.first.AsSlice(), []byte{0})
		if next := r.last.Next(); next.IsValid() {
			e.add(f, s, next.AsSlice(), []byte{1})
		}
	}
}

// addrRange is a range of addresses, with both.
type addrRange struct{ first, last netip.Addr }

func (r addrRange) String() string { return r.first.String() + "-" + r.last.String() }

func rangeOf(p netip.Prefix) addrRange {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return addrRange{p.Masked().Addr(), last}
}

// ranges are those of prefixes: sorted, none touches another, since the kernel takes none that overlap.
func ranges(prefixes []netip.Prefix) []addrRange {
	all := make([]addrRange, 0, len(prefixes))
	for _, p := range prefixes {
		all = append(all, rangeOf(p))
	}
	slices.SortFunc(all, func(a, b addrRange) int { return a.first.Compare(b.first) })
	out := all[:0]
	for _, r := range all {
		if n := len(out); n > 0 {
			prev := &out[n-1]
			if next := prev.last.Next(); !next.IsValid() || r.first.Compare(next) <= 0 {
				if r.last.Compare(prev.last) > 0 {
					prev.last = r.last
				}
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

// without takes a range out of others.
func without(all []addrRange, hole addrRange) []addrRange {
	var out []addrRange
	for _, r := range all {
		if r.last.Less(hole.first) || hole.last.Less(r.first) {
			out = append(out, r)
			continue
		}
		if r.first.Less(hole.first) {
			out = append(out, addrRange{r.first, hole.first.Prev()})
		}
		if hole.last.Less(r.last) {
			out = append(out, addrRange{hole.last.Next(), r.last})
		}
	}
	return out
}

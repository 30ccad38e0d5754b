package nft

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/proxy/model"
)

// Table is the name of the tables, one for IPv4 and one for IPv6.
const Table = "berth-proxy"

// version names the layout. It is a chain's name, so that a newer berth can tell what an older one has left.
const version = "layout-1"

// tableComment says whose the table is; a table of the name with another comment is not touched.
const tableComment = "Services, by berth proxy: what others change here is undone"

// layer is what differs between the families.
type layer struct {
	model           model.Family
	family          byte   // NFPROTO_*
	size            int    // of an address, in bytes
	saddrAt         uint32 // in the header
	daddrAt         uint32
	ctDst           uint32
	portUnreachable byte
	typeAddr        uint32 // nft's number for the type
	protoDesc       uint32 // nft's number for the header, and for its destination
	daddrDesc       uint32
}

var layers = [model.Families]layer{
	{model.IPv4, unix.NFPROTO_IPV4, 4, 12, 16, ctDstIP4, 3, 7, 12, 12},
	{model.IPv6, unix.NFPROTO_IPV6, 16, 8, 24, ctDstIP6, 4, 8, 13, 9},
}

// String is the family as nft writes it.
func (f layer) String() string {
	if f.family == unix.NFPROTO_IPV6 {
		return "ip6"
	}
	return "ip"
}

// setID is one of the sets and maps. Elements are added in this order, and taken away in the opposite one: what a frontend
// leads to is there before it.
type setID uint8

const (
	sources setID = iota
	rangeSources
	restricted
	rangeRestricted
	endpoints
	nodeportEndpoints
	rangeEndpoints
	sizes
	nodeportSizes
	rangeSizes
	rangeGroups
	rangeGroupsCluster
	affinityTimeouts
	affinityMembers
	affinityPeers
	affinityGroups
	affinityGroupsCluster
	nodeportAffinityGroups
	nodeportAffinityGroupsCluster
	hairpin
	rangeHairpin
	masquerade
	nodeportMasquerade
	rangeMasquerade
	shortCircuit
	nodeportShortCircuit
	rangeShortCircuit
	nodeportAddresses
	frontends
	nodeports
	portRanges
	reject
	nodeportReject
	rangeReject
	drop
	nodeportDrop
	rangeDrop
	clusterIPs
	serviceCIDRs
	affinity // its elements are put in by packets
	resets   // its elements are put in by Resets
	setCount
)

// forRanges is whether a set is there where Services have ranges of ports alone.
func (s setID) forRanges() bool {
	switch s {
	case rangeEndpoints, rangeSizes, rangeHairpin:
		return true
	}
	return s.hasPorts()
}

// hasPorts is whether keys of a set have a range of ports, hasSources one of addresses at their end; hasEnd is either.
func (s setID) hasPorts() bool {
	switch s {
	case rangeSources, rangeRestricted, rangeGroups, rangeGroupsCluster, rangeMasquerade, rangeShortCircuit, portRanges, rangeReject, rangeDrop:
		return true
	}
	return false
}

func (s setID) hasSources() bool { return s == sources || s == rangeSources }
func (s setID) hasEnd() bool     { return s.hasPorts() || s.hasSources() }

// set is a set or a map of the kernel.
type set struct {
	name                string
	absent              bool   // it is not needed, and not there
	keyType, keyLen     uint32 // type as nft numbers it
	valueType, valueLen uint32 // of a map
	flags               uint32
	size                uint32   // at most so many elements, if not 0
	fields              []uint32 // sizes of the parts of a key with intervals
	expr                string   // the expression that each element has one of its own of: counter, or none
	userdata            []byte   // how nft shows it, with the comment
}

// base says where the kernel comes to a chain.
type base struct {
	kind     string
	hook     uint32
	priority int32
}

// chain is a list of rules.
type chain struct {
	name    string
	base    *base
	rules   []rule
	comment string
}

// layout is all of a table but the elements of its sets. It is the same for no Services and for ten thousand.
type layout struct {
	layer
	sets   []set
	chains []chain
}

// A place is one of five kinds of keys that endpoints have: at an address or a node port, under the policy of the Frontend
// or, for packets from this node that are exempt from it, all of the Service's; and of a group, which ranges of ports lead to.
type place uint8

const (
	vip place = iota
	vipCluster
	nodeport
	nodeportCluster
	ranged // by the number of a group of endpoints, which a packet's priority has meanwhile
	places
)

var placeNames = [places]string{"vip", "vip-cluster", "nodeport", "nodeport-cluster", "range"}

func (p place) ofNodePort() bool { return p == nodeport || p == nodeportCluster }
func (p place) ofCluster() bool  { return p == vipCluster || p == nodeportCluster }

// clusterOffset is where the endpoints and sizes of the places of clusters begin in the maps that they share.
const clusterOffset = 1 << 16

func (p place) offset() uint32 {
	if p.ofCluster() {
		return clusterOffset
	}
	return 0
}

// exactSizes is up to how many endpoints there is a rule for each number.
const exactSizes = 16

// wideSizes are numbers to draw from where there are more endpoints: a draw that nothing is found for is repeated. They
// leave less than a third of draws without an endpoint.
var wideSizes = func() (all []uint32) {
	for n := uint32(16); n < clusterOffset; n *= 2 {
		all = append(all, n+n/2, 2*n)
	}
	return all
}()

// draws is how often a draw is repeated: one of 3^6 packets at most is sent to one of the first two thirds of endpoints for
// want of luck.
const draws = 6

// sizeFor is the number to draw from for so many endpoints.
func sizeFor(n int) uint32 {
	if n <= exactSizes {
		return uint32(n)
	}
	i, _ := slices.BinarySearch(wideSizes, uint32(n))
	return wideSizes[min(i, len(wideSizes)-1)]
}

// params is what the layout depends on.
type params struct {
	detector model.Detector
	// wide are the members of wideSizes that are in use, sorted; timeouts those of session affinity, in seconds. Both are
	// as many as there are different ones, not as there are Services, and wide has 24 at most.
	wide     [places][]uint32
	timeouts []uint32
	// hashes are the kinds of hashes that are in use, as hashNumber has them, sorted: six at most.
	hashes [places][]uint32
	// counters is whether there are some for each Service's port.
	counters bool
	// ranges is whether there are ranges of ports.
	ranges bool
	// resets is whether connections are reset.
	resets bool
}

// hashNumber is what sizes has where endpoints are not drawn but found by a hash.
func hashNumber(h model.Hash) uint32 {
	return firstHash + uint32(h.By)<<hashByShift + uint32(h.Buckets)
}

const (
	firstHash   = 1 << 24
	hashByShift = 20
)

// hashOf is the kind of hash of such a number.
func hashOf(n uint32) model.Hash {
	return model.Hash{By: model.HashBy((n - firstHash) >> hashByShift), Buckets: uint16(n)}
}

func newLayout(f layer, p *params) *layout {
	l := &layout{layer: f}
	l.addSets(p)
	l.addBases(p)
	l.addFilters(p)
	l.addServices(p)
	l.addAffinity(p)
	l.addMasquerade(p)
	if p.resets {
		l.addResets()
	}
	l.chains = append(l.chains, chain{name: version, comment: "names what the rules here are"})
	return l
}

func (l *layout) chain(name, comment string, rules ...*rb) {
	c := chain{name: name, comment: comment}
	for _, r := range rules {
		if r != nil {
			c.rules = append(c.rules, r.r)
		}
	}
	l.chains = append(l.chains, c)
}

func (l *layout) rule() *rb { return &rb{f: l.layer} }

// Keys of node ports, of the packet and of the first one of its connection.
var (
	toPort         = key{protocol, port}
	originallyPort = key{originalProtocol, originalPort}
)

// Priorities of chains (enum nf_ip_hook_priorities): before connections are tracked, and just behind; before destinations are changed, where they are, where filters are,
// and just before others change sources, since the first one to do so decides.
const (
	beforeConntrack = -300
	afterConntrack  = -150

	beforeDNAT = -110
	atDNAT     = -100
	atFilter   = 0
	beforeSNAT = 95
)

func (l *layout) addBases(p *params) {
	// What is to a range of ports is none of an exact frontend's, which precedes.
	ranges := func(chain string) *rb {
		if !p.ranges {
			return nil
		}
		return l.rule().isNew().notIn(l.to(), "frontends").jump(chain)
	}
	toNodePort := l.rule().isNew().notIn(l.to(), "frontends")
	if p.ranges {
		toNodePort = toNodePort.notIn(l.to(), "port-ranges")
	}
	for _, b := range []struct {
		name  string
		base  base
		rules []*rb
	}{
		{"filter-prerouting", base{"filter", unix.NF_INET_PRE_ROUTING, beforeDNAT}, []*rb{l.rule().isNew().jump("source-check"), ranges("range-source-check")}},
		{"filter-output-before-dnat", base{"filter", unix.NF_INET_LOCAL_OUT, beforeDNAT}, []*rb{l.rule().isNew().jump("source-check"), ranges("range-source-check")}},
		{"filter-input", base{"filter", unix.NF_INET_LOCAL_IN, atFilter}, []*rb{l.rule().isNew().jump("frontend-check"), ranges("range-check"), toNodePort.jump("nodeport-check")}},
		{"filter-forward", base{"filter", unix.NF_INET_FORWARD, atFilter}, []*rb{l.rule().isNew().jump("frontend-check"), ranges("range-check"), l.rule().isNew().jump("cluster-ip-check")}},
		{"filter-output", base{"filter", unix.NF_INET_LOCAL_OUT, atFilter}, []*rb{l.rule().isNew().jump("frontend-check"), ranges("range-check"), l.rule().isNew().jump("cluster-ip-check")}},
		{"nat-prerouting", base{"nat", unix.NF_INET_PRE_ROUTING, atDNAT}, []*rb{l.rule().jump("services")}},
		{"nat-output", base{"nat", unix.NF_INET_LOCAL_OUT, atDNAT}, []*rb{l.rule().jump("services")}},
		{"nat-input", base{"nat", unix.NF_INET_LOCAL_IN, beforeSNAT}, []*rb{l.rule().isForwarded().jump("affinity-record")}},
		{"nat-postrouting", base{"nat", unix.NF_INET_POST_ROUTING, beforeSNAT}, []*rb{l.rule().isForwarded().jump("affinity-record"), l.rule().isForwarded().jump("masquerading")}},
	} {
		l.chain(b.name, "", b.rules...)
		l.chains[len(l.chains)-1].base = &b.base
	}
}

// addFilters makes the chains that reject and drop.
//
// What a lookup finds is counted in the element (layout.addSets), but by one that asks what is not there: those that are not
// to count ask so.
func (l *layout) addFilters(p *params) {
	l.chain("source-check", "loadBalancerSourceRanges",
		l.rule().notIn(l.to(), "restricted").returns(),
		l.rule().notIn(l.to().and(l.source()), "sources").in(l.to(), "restricted").count().drop())
	l.chain("frontend-check", "Services without an endpoint that may be used",
		l.rule().in(l.to(), "rejected").goTo("refuse"),
		l.rule().in(l.to(), "dropped").count().drop().note("there are endpoints on other nodes only"))
	if p.ranges {
		l.chain("range-source-check", "",
			l.rule().notIn(l.to(), "range-restricted").returns(),
			l.rule().notIn(l.to().and(l.source()), "range-sources").in(l.to(), "range-restricted").count().drop())
		l.chain("range-check", "",
			l.rule().in(l.to(), "range-rejected").goTo("refuse"),
			l.rule().in(l.to(), "range-dropped").count().drop().note("there are endpoints on other nodes only"))
	}
	l.chain("nodeport-check", "node ports without an endpoint that may be used",
		l.nodePortIn("nodeport-rejected").goTo("refuse"),
		l.nodePortIn("nodeport-dropped").count().drop().note("there are endpoints on other nodes only"))
	l.chain("cluster-ip-check", "ports that a cluster IP has not, and cluster IPs that no Service has",
		l.rule().in(key{l.destination()}, "cluster-ips").goTo("refuse"),
		l.rule().in(key{l.destination()}, "service-cidrs").count().drop())
	l.chain("refuse", "",
		l.rule().isTCP().count().rejectReset(),
		l.rule().count().rejectPort())
}

// nodePortIn goes on if the packet is to a node port that is in a set, at an address that has node ports.
func (l *layout) nodePortIn(name string) *rb {
	return l.rule().in(toPort, name).destinationIsLocal().in(key{l.destination()}, "nodeport-addresses")
}

// addServices makes the chains that choose endpoints.
func (l *layout) addServices(p *params) {
	rules := []*rb{l.rule().in(l.to(), "frontends").goTo("vip")}
	if p.ranges {
		rules = append(rules, l.rule().in(l.to(), "port-ranges").goTo("port-range"))
	}
	l.chain("services", "", append(rules, l.nodePortIn("nodeports").goTo("nodeport"))...)
	for at := range places {
		if p.ranges || at != ranged {
			l.addPlace(at, p)
		}
	}
	if p.ranges {
		l.addRanges(p)
	}
}

// names are the sets and keys of a place.
func (l *layout) names(at place) (to key, sizes, endpoints, short, groups string) {
	to, sizes, endpoints, short, groups = l.to(), "sizes", "endpoints", "short-circuit", "affinity-groups"
	if at.ofNodePort() {
		to, sizes, endpoints, short, groups = toPort, "nodeport-sizes", "nodeport-endpoints", "nodeport-short-circuit", "nodeport-affinity-groups"
	}
	if at == ranged {
		to, sizes, endpoints, short = key{priority}, "range-sizes", "range-endpoints", "range-short-circuit"
	}
	if at.ofCluster() {
		groups += "-cluster"
	}
	return to, sizes, endpoints, short, groups
}

func (l *layout) addPlace(at place, p *params) {
	to, sizes, endpoints, short, groups := l.names(at)
	var rules []*rb
	if !at.ofCluster() && at != ranged {
		rules = l.toAll(to, short, placeNames[at+1], p)
	}
	if len(p.timeouts) > 0 && at != ranged {
		rules = append(rules, l.rule().isTransport().setPriority(to, groups).dnat(key{l.source(), priority}, "affinity"))
	}
	send := func(r *rb, number field) *rb {
		if at == ranged {
			return r.dnatAddress(to.and(number), endpoints)
		}
		return r.dnat(to.and(number), endpoints)
	}
	draw := func(n uint32) *rb { return send(l.rule(), random(n, at.offset())) }
	for n := uint32(2); n <= exactSizes; n++ {
		rules = append(rules, send(l.rule().in(to.and(constant(at.offset()+n)), sizes), random(n, at.offset())))
	}
	for _, n := range p.wide[at] {
		rules = append(rules, l.rule().in(to.and(constant(at.offset()+n)), sizes).jump(fmt.Sprintf("%s-%d", placeNames[at], n)))
	}
	for _, n := range p.hashes[at] {
		h := hashOf(n)
		of := key{l.source()}
		if h.By == model.BySourcePort {
			of = append(of, fromPort)
		}
		rules = append(rules, send(l.rule().in(to.and(constant(at.offset()+n)), sizes), hashed(of, uint32(h.Buckets), at.offset())))
	}
	rules = append(rules, draw(1))
	if at == ranged {
		rules = append(rules, l.rule().zeroPriority())
	}
	l.chain(placeNames[at], "", rules...)
	for _, n := range p.wide[at] {
		var rules []*rb
		for range draws {
			rules = append(rules, draw(n))
		}
		below := uint32(exactSizes)
		if i := slices.Index(wideSizes, n); i > 0 {
			below = wideSizes[i-1]
		}
		l.chain(fmt.Sprintf("%s-%d", placeNames[at], n), "not all numbers have an endpoint: draw again", append(rules, draw(below))...)
	}
}

// toAll are rules for packets of the node and its pods to what short-circuit sets have.
func (l *layout) toAll(to key, short, all string, p *params) (rules []*rb) {
	if r := l.isPod(p, false, l.rule().in(to, short)); r != nil {
		rules = append(rules, r.goTo(all).note("pods of the node reach all endpoints"))
	}
	return append(rules, l.rule().in(to, short).sourceIsLocal().goTo(all).note("and so does the node"))
}

// addRanges makes the chains that find the group of endpoints of a range of ports: the sets of ranges are small, since the
// kernel copies them when they are changed, and it takes long over large ones.
func (l *layout) addRanges(p *params) {
	l.chain("port-range", "", append(l.toAll(l.to(), "range-short-circuit", "port-range-cluster", p),
		l.rule().isTransport().setPriority(l.to(), "range-groups").goTo("range"))...)
	l.chain("port-range-cluster", "",
		l.rule().isTransport().setPriority(l.to(), "range-groups-cluster").goTo("range"))
}

// isPod adds to a rule that the source is a pod's, or is not; nil without a detector.
func (l *layout) isPod(p *params, not bool, r *rb) *rb {
	switch d := p.detector; {
	case d.CIDR.IsValid() && d.CIDR.Addr().Is6() == (l.family == unix.NFPROTO_IPV6):
		return r.from(d.CIDR, not)
	case d.Interface != "":
		return r.through(d.Interface, false, not)
	case d.InterfacePrefix != "":
		return r.through(d.InterfacePrefix, true, not)
	}
	return nil
}

// addAffinity makes the chains that remember which endpoint a client was sent to. They see packets when that is decided.
// The packet's priority, which the kernel sets anew on the way, carries the number of the group of endpoints meanwhile:
// nothing else can hold a value between rules that is not somebody's.
func (l *layout) addAffinity(p *params) {
	// A range of ports has no session affinity, but its packets have the number of a group, too.
	var noRange, ofRange *rb
	toNodePort := l.toNodePort("affinity-record-nodeport")
	if p.ranges {
		noRange = l.rule().isTransport().notIn(l.originally(), "port-ranges").returns()
		ofRange = l.rule().isTransport().notIn(l.originally(), "frontends").zeroPriority()
		toNodePort = l.rule().isTransport().notIn(l.originally(), "frontends").notIn(l.originally(), "port-ranges").goTo("affinity-record-nodeport")
	}
	if len(p.timeouts) == 0 {
		l.chain("affinity-record", "no Service has session affinity", noRange, ofRange)
		return
	}
	record := func(at place) *rb {
		_, _, _, _, groups := l.names(at)
		return l.rule().isTransport().setPriority(l.originalKey(at), groups).goTo("affinity-update")
	}
	var rules [places][]*rb
	for _, at := range []place{vip, nodeport} {
		_, _, _, short, _ := l.names(at)
		to := "affinity-record-" + placeNames[at+1]
		if r := l.isPod(p, false, l.rule().isTransport().in(l.originalKey(at), short)); r != nil {
			rules[at] = append(rules[at], r.goTo(to))
		}
		rules[at] = append(rules[at], l.rule().isTransport().in(l.originalKey(at), short).sourceIsLocal().goTo(to), record(at))
	}
	l.chain("affinity-record", "remembers clients of Services with session affinity", append(rules[vip], toNodePort, ofRange)...)
	l.chain("affinity-record-nodeport", "", rules[nodeport]...)
	l.chain("affinity-record-vip-cluster", "", record(vipCluster))
	l.chain("affinity-record-nodeport-cluster", "", record(nodeportCluster))
	// If the endpoint is one of the other policy's, too, the client is sent there by frontends of that, if it has no other yet.
	l.chain("affinity-update", "",
		l.rule().jump("affinity-remember"),
		l.rule().setPriority(key{priority}, "affinity-peers").in(key{priority, l.destination(), port}, "affinity-members").jump("affinity-remember"),
		l.rule().zeroPriority())
	var remember []*rb
	for _, seconds := range p.timeouts {
		remember = append(remember, l.rule().isTransport().in(key{priority, constant(seconds)}, "affinity-timeouts").
			update(key{l.source(), priority}, key{l.destination(), port}, "affinity", uint64(seconds)*1000))
	}
	l.chain("affinity-remember", "", remember...)
}

// toNodePort goes to a chain if what was asked for was not an address of a Service: it was a node port, if any.
func (l *layout) toNodePort(chain string) *rb {
	return l.rule().isTransport().notIn(l.originally(), "frontends").goTo(chain)
}

func (l *layout) originalKey(at place) key {
	if at.ofNodePort() {
		return originallyPort
	}
	return l.originally()
}

// addMasquerade makes the chain that replaces sources. It goes by what conntrack says was asked for, so that no mark on
// packets is needed, which might be another program's.
func (l *layout) addMasquerade(p *params) {
	var rules [places][]*rb
	rules[vip] = append(rules[vip], l.rule().in(key{l.source(), l.destination(), protocol, port}, "hairpin").masquerade().note("a pod that reaches itself"))
	if p.ranges {
		rules[vip] = append(rules[vip], l.rule().in(key{l.source(), l.destination(), protocol}, "range-hairpin").masquerade())
	}
	for _, at := range []place{vip, ranged, nodeport} {
		_, _, _, short, _ := l.names(at) // a range goes by the address, like a frontend, here
		always := "masqueraded"
		switch at {
		case ranged:
			always = "range-masqueraded"
		case nodeport:
			always = "nodeport-masqueraded"
		}
		if r := l.isPod(p, false, l.rule().isTransport().in(l.originalKey(at), short)); r != nil {
			rules[at] = append(rules[at], r.returns())
		}
		rules[at] = append(rules[at],
			l.rule().isTransport().in(l.originalKey(at), short).sourceIsLocal().masquerade(),
			l.rule().isTransport().in(l.originalKey(at), always).masquerade())
		if at == vip {
			if r := l.isPod(p, true, l.rule().in(key{l.originalDestination()}, "cluster-ips")); r != nil {
				rules[at] = append(rules[at], r.masquerade().note("to cluster IPs from outside the cluster"))
			}
		}
	}
	next := "masquerading-nodeport"
	if p.ranges {
		l.chain("masquerading-range", "", append(rules[ranged], l.rule().isTransport().notIn(l.originally(), "port-ranges").goTo(next))...)
		next = "masquerading-range"
	}
	l.chain("masquerading", "", append(rules[vip], l.toNodePort(next))...)
	l.chain("masquerading-nodeport", "", rules[nodeport]...)
}

// Numbers of nft's types (include/datatype.h of nftables), which it packs into six bits each.
const (
	typeInteger = 4
	typeProto   = 12
	typeService = 13
	typeClassID = 23
)

// addSets makes the sets; those that say what becomes of a packet count those that they say it of.
func (l *layout) addSets(p *params) {
	f := l.layer
	addr := part{f.typeAddr, uint32(f.size), bigEndian, describePayload(f.protoDesc, f.daddrDesc)}
	proto := part{typeProto, 1, 0, describeMeta(unix.NFT_META_L4PROTO)}
	service := part{typeService, 2, bigEndian, describePayload(descTransport, descDport)}
	number := part{typeInteger, 4, hostEndian, describeNumgen()}
	class := part{typeClassID, 4, hostEndian, describeMeta(unix.NFT_META_PRIORITY)}
	to, toPort := []part{addr, proto, service}, []part{proto, service}
	endpoint := []part{addr, service}
	const intervals, mapped = unix.NFT_SET_INTERVAL, unix.NFT_SET_MAP
	for id, s := range [setCount]struct {
		name    string
		key     []part
		value   []part
		flags   uint32
		typeof  bool
		size    uint32
		counted bool
		comment string
	}{
		sources:                       {name: "sources", key: append(to[:3:3], addr), flags: intervals, comment: "who may send to restricted"},
		rangeSources:                  {name: "range-sources", key: append(to[:3:3], addr), flags: intervals},
		restricted:                    {name: "restricted", key: to, counted: true},
		rangeRestricted:               {name: "range-restricted", key: to, flags: intervals, counted: true},
		endpoints:                     {name: "endpoints", key: append(to[:3:3], number), value: endpoint, typeof: true, comment: "from 65536 on: for packets of this node, whatever the policy"},
		nodeportEndpoints:             {name: "nodeport-endpoints", key: append(toPort[:2:2], number), value: endpoint, typeof: true, comment: "from 65536 on: for packets of this node, whatever the policy"},
		rangeEndpoints:                {name: "range-endpoints", key: []part{class, number}, value: []part{addr}, typeof: true, comment: "of a range's group"},
		rangeSizes:                    {name: "range-sizes", key: []part{class, number}, typeof: true},
		rangeGroups:                   {name: "range-groups", key: to, value: []part{class}, flags: intervals},
		rangeGroupsCluster:            {name: "range-groups-cluster", key: to, value: []part{class}, flags: intervals},
		sizes:                         {name: "sizes", key: append(to[:3:3], number), typeof: true, comment: "how many endpoints to draw from, if there are several; from 16777216 on: a hash"},
		nodeportSizes:                 {name: "nodeport-sizes", key: append(toPort[:2:2], number), typeof: true},
		affinityTimeouts:              {name: "affinity-timeouts", key: []part{class, number}, typeof: true, comment: "in seconds"},
		affinityMembers:               {name: "affinity-members", key: []part{class, addr, service}, comment: "endpoints of groups that have a peer"},
		affinityPeers:                 {name: "affinity-peers", key: []part{class}, value: []part{class}, comment: "the same port under the other policy"},
		affinityGroups:                {name: "affinity-groups", key: to, value: []part{class}},
		affinityGroupsCluster:         {name: "affinity-groups-cluster", key: to, value: []part{class}},
		nodeportAffinityGroups:        {name: "nodeport-affinity-groups", key: toPort, value: []part{class}},
		nodeportAffinityGroupsCluster: {name: "nodeport-affinity-groups-cluster", key: toPort, value: []part{class}},
		hairpin:                       {name: "hairpin", key: []part{addr, addr, proto, service}},
		rangeHairpin:                  {name: "range-hairpin", key: []part{addr, addr, proto}},
		rangeMasquerade:               {name: "range-masqueraded", key: to, flags: intervals},
		rangeShortCircuit:             {name: "range-short-circuit", key: to, flags: intervals},
		portRanges:                    {name: "port-ranges", key: to, flags: intervals, counted: true, comment: "ranges of ports of Services"},
		rangeReject:                   {name: "range-rejected", key: to, flags: intervals, counted: true},
		rangeDrop:                     {name: "range-dropped", key: to, flags: intervals, counted: true},
		masquerade:                    {name: "masqueraded", key: to},
		nodeportMasquerade:            {name: "nodeport-masqueraded", key: toPort},
		shortCircuit:                  {name: "short-circuit", key: to, comment: "externalTrafficPolicy Local: this node and its pods reach all endpoints"},
		nodeportShortCircuit:          {name: "nodeport-short-circuit", key: toPort},
		nodeportAddresses:             {name: "nodeport-addresses", key: []part{addr}, flags: intervals, comment: "addresses of the node here have node ports"},
		frontends:                     {name: "frontends", key: to, counted: true, comment: "addresses and ports of Services"},
		nodeports:                     {name: "nodeports", key: toPort, counted: true},
		reject:                        {name: "rejected", key: to, counted: true},
		nodeportReject:                {name: "nodeport-rejected", key: toPort, counted: true},
		drop:                          {name: "dropped", key: to, counted: true},
		nodeportDrop:                  {name: "nodeport-dropped", key: toPort, counted: true},
		clusterIPs:                    {name: "cluster-ips", key: []part{addr}},
		serviceCIDRs:                  {name: "service-cidrs", key: []part{addr}, flags: intervals, counted: true, comment: "where cluster IPs are given out"},
		affinity:                      {name: "affinity", key: []part{addr, class}, value: endpoint, flags: unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL, size: affinityLimit, comment: "where clients are sent again"},
		resets:                        {name: "resets", key: []part{addr, service, addr, service}, flags: unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL, size: resetLimit, comment: "connections whose endpoint is gone, each way"},
	} {
		k := set{name: s.name, absent: setID(id).forRanges() && !p.ranges || setID(id) == resets && !p.resets, flags: s.flags, size: s.size, keyType: typeOf(s.key), keyLen: lengthOf(s.key)}
		if p.counters && s.counted {
			k.expr = counterExpr
		}
		if s.value != nil {
			k.flags |= mapped
			k.valueType, k.valueLen = typeOf(s.value), lengthOf(s.value)
		}
		if k.flags&intervals != 0 && len(s.key) > 1 {
			k.flags |= setConcat
			for _, p := range s.key {
				k.fields = append(k.fields, p.size)
			}
		}
		k.userdata = describeSet(s.key, s.value, s.typeof, s.comment)
		l.sets = append(l.sets, k)
	}
}

// affinityLimit is how many clients of Services with session affinity are remembered; more are sent to any endpoint. One
// takes some 100 bytes of the kernel's memory.
const affinityLimit = 1 << 18

// resetLimit is how many flows are answered by resets at a time, two for a connection.
const resetLimit = 1 << 17

const setConcat = 0x80 // NFT_SET_CONCAT

// counterExpr is the name of the expression that counts.
const counterExpr = "counter"

// part is a part of a key or value.
type part struct {
	kind, size, order uint32
	describe          func([]byte) []byte // as nft's typeof
}

func typeOf(parts []part) (t uint32) {
	for _, p := range parts {
		t = t<<6 | p.kind
	}
	return t
}

func lengthOf(parts []part) uint32 {
	if len(parts) == 1 {
		return parts[0].size
	}
	n := 0
	for _, p := range parts {
		n += 4 * words(int(p.size))
	}
	return uint32(n)
}

// What nft keeps in the user data of sets (enum nftnl_udata_set_types, and its own numbers of expressions and headers).
const (
	udataKeyOrder    = 0
	udataValueOrder  = 1
	udataKeyTypeof   = 3
	udataValueTypeof = 4
	udataSetComment  = 7

	hostEndian = 1
	bigEndian  = 2

	exprPayload = 7
	exprMeta    = 9
	exprConcat  = 13
	exprNumgen  = 23

	descTransport = 11
	descDport     = 2
)

func udata(b []byte, kind byte, content []byte) []byte {
	return append(append(b, kind, byte(len(content))), content...)
}

func udata32(b []byte, kind byte, v uint32) []byte {
	return udata(b, kind, binary.NativeEndian.AppendUint32(nil, v))
}

func describeExpr(kind uint32, inside []byte) func([]byte) []byte {
	return func(b []byte) []byte { return udata(udata32(b, 0, kind), 1, inside) }
}

func describePayload(header, field uint32) func([]byte) []byte {
	return describeExpr(exprPayload, udata32(udata32(nil, 0, header), 1, field))
}

func describeMeta(k uint32) func([]byte) []byte { return describeExpr(exprMeta, udata32(nil, 0, k)) }

// describeNumgen describes "numgen random mod 2", which is how nft writes the type of a number.
func describeNumgen() func([]byte) []byte {
	return describeExpr(exprNumgen, udata32(udata32(udata32(nil, 0, unix.NFT_NG_RANDOM), 1, 2), 2, 0))
}

// describeSet makes user data of a set for nft, without which it does not know how to show elements.
func describeSet(k, value []part, typeof bool, comment string) []byte {
	order := func(parts []part) uint32 {
		if len(parts) == 1 {
			return parts[0].order
		}
		return 0
	}
	b := udata32(nil, udataKeyOrder, order(k))
	if value != nil {
		b = udata32(b, udataValueOrder, order(value))
	}
	if typeof {
		b = udata(b, udataKeyTypeof, describeConcat(k))
		if value != nil {
			b = udata(b, udataValueTypeof, describeConcat(value))
		}
	}
	if comment != "" {
		b = udata(b, udataSetComment, append([]byte(comment), 0))
	}
	return b
}

func describeConcat(parts []part) []byte {
	if len(parts) == 1 {
		return parts[0].describe(nil)
	}
	var inside []byte
	for i, p := range parts {
		inside = udata(inside, byte(i), p.describe(nil))
	}
	return describeExpr(exprConcat, inside)(nil)
}

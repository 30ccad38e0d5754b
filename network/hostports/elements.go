package hostports

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
)

// Target is a pod whose ports are led to it.
type Target struct {
	Pod
	// Addrs are the pod's addresses. The first of a family counts.
	Addrs []netip.Addr
	// Link is the node's link on which the pod is.
	Link string
}

// addr is the pod's address of a family.
func (t Target) addr(v6 bool) (netip.Addr, bool) {
	i := slices.IndexFunc(t.Addrs, func(a netip.Addr) bool { return a.Is6() == v6 })
	if i < 0 {
		return netip.Addr{}, false
	}
	return t.Addrs[i], true
}

// element is one of a set. Key and value are as the kernel has them.
type element struct{ set, key string }

// content is what is at an element.
type content struct {
	value string
	note  string // for people
}

// entry is an element with what is at it, and where it comes from.
type entry struct {
	element
	content
}

// elements are all of the table.
type elements map[element]content

// elementsOf computes what the table must have. Where two pods have one port, the one that comes later has it.
func elementsOf(targets []Target) elements {
	all := elements{}
	for _, t := range targets {
		used := false
		for _, v6 := range []bool{false, true} {
			pod, ok := t.addr(v6)
			if !ok {
				continue
			}
			for _, p := range t.Ports {
				if p.of(v6) {
					all[p.element(v6)] = content{value: concat(pod.AsSlice(), be16(p.To)), note: t.Name}
					used = true
				}
			}
		}
		if used && t.Link != "" {
			all[element{links, ifname(t.Link)}] = content{}
		}
	}
	return all
}

func (p Port) element(v6 bool) element {
	set := map[bool]string{false: ports4, true: ports6}[v6]
	key := concat([]byte{byte(p.Protocol)}, be16(p.Host))
	if !p.all() {
		set = map[bool]string{false: addrs4, true: addrs6}[v6]
		key = concat(p.At.AsSlice()) + key
	}
	return element{set, key}
}

// localnet are the links on which the node's loopback address must be able to go out.
func localnet(targets []Target) map[string]bool {
	all := map[string]bool{}
	for _, t := range targets {
		if _, ok := t.addr(false); ok && t.Link != "" && slices.ContainsFunc(t.Ports, func(p Port) bool { return p.of(false) }) {
			all[t.Link] = true
		}
	}
	return all
}

// diff is what has to go and to come for one to become the other, in an order that is always the same.
func diff(have, want elements) (del, add []entry) {
	for e, c := range have {
		if w, ok := want[e]; !ok || w.value != c.value {
			del = append(del, entry{e, c})
		}
	}
	for e, c := range want {
		if h, ok := have[e]; !ok || h.value != c.value {
			add = append(add, entry{e, c})
		}
	}
	for _, l := range [][]entry{del, add} {
		slices.SortFunc(l, func(a, b entry) int { return cmp.Or(cmp.Compare(a.set, b.set), cmp.Compare(a.key, b.key)) })
	}
	return del, add
}

// concat joins fields as nf_tables does: each takes whole words of four bytes.
func concat(fields ...[]byte) string {
	var b []byte
	for _, f := range fields {
		b = append(b, f...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return string(b)
}

func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

// ifname is the name of a link as nf_tables has it.
func ifname(link string) string {
	const size = 16 // IFNAMSIZ
	b := make([]byte, size)
	copy(b[:size-1], link)
	return string(b)
}

// linksOf are the links that a table has.
func linksOf(all elements) map[string]bool {
	names := map[string]bool{}
	for e := range all {
		if e.set == links {
			names[strings.TrimRight(e.key, "\x00")] = true
		}
	}
	return names
}

// flow is what an entry of a map says: which port leads where.
type flow struct {
	protocol Protocol
	port     uint16
	at       netip.Addr // invalid: any of the node
	pod      netip.Addr
}

// flow reads an entry; ok is whether it is one of a map.
func (e entry) flow() (f flow, ok bool) {
	size := map[string]int{ports4: 0, ports6: 0, addrs4: 4, addrs6: 16}
	n, ok := size[e.set]
	const port = 8 // protocol and port
	if !ok || len(e.key) != n+port || len(e.value) < 4 {
		return f, false
	}
	f.at, _ = netip.AddrFromSlice([]byte(e.key[:n]))
	f.protocol, f.port = Protocol(e.key[n]), binary.BigEndian.Uint16([]byte(e.key[n+4:]))
	f.pod, ok = netip.AddrFromSlice([]byte(e.value[:len(e.value)-4]))
	return f, ok
}

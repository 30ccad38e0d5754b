package hostports

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/internal/conntrack"
)

// A connection of UDP is what the kernel has seen of one lately, and what it goes on to do with it: one that began before a
// port led to a pod goes on past it, and one that a pod had goes on to where the pod was, for as long as somebody sends.

// forget has the kernel forget the connections of UDP that entries which have gone have led to their pods, and those to the
// ports of entries which have come that lead elsewhere. Nothing but later packets depends on it.
func (t *Table) forget(gone, come []entry) {
	if err := forget(gone, come); err != nil {
		t.log.Warn("connections of UDP to host ports go on as before", "error", err)
	}
}

func forget(gone, come []entry) error {
	var errs []error
	for _, v6 := range []bool{false, true} {
		stale := staleFlows{gone: udpFlows(gone, v6), come: udpFlows(come, v6)}
		if len(stale.gone)+len(stale.come) > 0 {
			errs = append(errs, stale.forget(v6))
		}
	}
	return errors.Join(errs...)
}

func (s staleFlows) forget(v6 bool) (err error) {
	if s.node, err = nodeAddrs(); err != nil {
		return err
	}
	ports := map[uint16]bool{}
	for _, flows := range []map[uint16][]flow{s.gone, s.come} {
		for port := range flows {
			ports[port] = true
		}
	}
	conn, err := conntrack.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.ForgetUDP(v6, slices.Sorted(maps.Keys(ports)), s.staleEntry)
}

// udpFlows are what entries of a family say of ports of UDP, by the ports.
func udpFlows(all []entry, v6 bool) map[uint16][]flow {
	flows := map[uint16][]flow{}
	for _, e := range all {
		if f, ok := e.flow(); ok && f.protocol == UDP && f.pod.Is6() == v6 {
			flows[f.port] = append(flows[f.port], f)
		}
	}
	return flows
}

// staleFlows picks connections that are to be forgotten.
type staleFlows struct {
	gone, come map[uint16][]flow
	node       map[netip.Addr]bool
}

func (s staleFlows) staleEntry(e *conntrack.Entry) bool {
	return s.stale(e.Original.Dst.Port(), e.Original.Dst.Addr(), e.Reply.Src.Addr())
}

// stale says whether a connection is to be forgotten that goes to a port of an address, and leads to another.
func (s staleFlows) stale(port uint16, to, with netip.Addr) bool {
	for _, f := range s.gone[port] {
		if with == f.pod && to != f.pod {
			return true
		}
	}
	for _, f := range s.come[port] {
		here := f.at == to || !f.at.IsValid() && (s.node[to] || to.IsLoopback())
		if here && with != f.pod {
			return true
		}
	}
	return false
}

// nodeAddrs are the addresses of the node.
func nodeAddrs() (map[netip.Addr]bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	all := map[netip.Addr]bool{}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			all[addr.Unmap()] = true
		}
	}
	return all, nil
}

package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
)

func compareNames(a, b types.NamespacedName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func nativeOf(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }

// losesClients says whether clients may be remembered for an endpoint that a change has taken away.
func losesClients(c model.Change) bool {
	if c.Old == nil {
		return false
	}
	for i := range c.Old.Ports {
		if c.Old.Ports[i].Affinity > 0 {
			return true
		}
	}
	return false
}

// purge forgets clients that are remembered for an endpoint that their group has not any more. It costs as much as there are
// clients, and is for changes of Services with session affinity alone. Packets that were sent to such an endpoint by the
// former rules and were not remembered yet are waited for.
func (p *Programmer) purge() error {
	// Also without any such Service there may be clients of former ones, which would come back with them.
	if len(p.params[model.IPv4].timeouts)+len(p.params[model.IPv6].timeouts) > 0 {
		nftables.WaitForPackets()
	}
	allowed := p.allowed()
	var err error
	for range attempts {
		var stale plan
		for f := range p.have {
			if p.have[f] == nil {
				continue
			}
			clients, err := readElements(p.conn, layers[f], p.table, affinity, "affinity", 0)
			if err != nil {
				return err
			}
			for k, v := range clients {
				at := client{model.Family(f), nativeOf(k.bytes[k.size-4:]), endpointOf(&v, layers[f])}
				if _, ok := allowed[at]; !ok {
					stale.add(op{key: k, del: true})
				}
			}
		}
		if stale.len() == 0 {
			return nil
		}
		// One that ends by itself meanwhile has all of them be refused.
		if err = p.change(&stale, isLoad(&stale)); !errors.Is(err, unix.ENOENT) {
			return err
		}
		p.batch.Clear()
	}
	return err
}

// client is what is remembered about one, but its address.
type client struct {
	family model.Family
	group  uint32
	to     netip.AddrPort
}

func endpointOf(v *elemValue, f layer) netip.AddrPort {
	a, _ := netip.AddrFromSlice(v.bytes[:f.size])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(v.bytes[f.size:]))
}

// allowed are all endpoints of all groups.
func (p *Programmer) allowed() map[client]struct{} {
	all := map[client]struct{}{}
	for name, n := range p.groups.number {
		s := p.services[name.service]
		if s == nil {
			continue
		}
		for i := range s.Ports {
			port := &s.Ports[i]
			if port.Affinity <= 0 || port.Name != name.port || port.Family != name.family || port.Protocol != name.protocol {
				continue
			}
			for _, e := range listOf(port, name.policy) {
				all[client{name.family, n, e.AddrPort()}] = struct{}{}
			}
		}
	}
	return all
}

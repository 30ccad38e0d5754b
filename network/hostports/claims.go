package hostports

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Protocol is the number of a protocol that has ports.
type Protocol uint8

// The protocols of host ports.
const (
	TCP  Protocol = unix.IPPROTO_TCP
	UDP  Protocol = unix.IPPROTO_UDP
	SCTP Protocol = unix.IPPROTO_SCTP
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Port is a port of the node that leads to one of a pod.
type Port struct {
	Protocol Protocol
	// At is the node's address that it is at: the zero value is all, 0.0.0.0 all of IPv4, and :: all of IPv6.
	At netip.Addr
	// Host is the node's port, To the pod's.
	Host, To uint16
}

// Pod has ports of the node.
type Pod struct {
	ID    string
	Name  string // for people: namespace and name
	Ports []Port
}

// all says whether a port is at all addresses of a family.
func (p Port) all() bool { return !p.At.IsValid() || p.At.IsUnspecified() }

// of says whether a port is at an address of a family.
func (p Port) of(v6 bool) bool { return !p.At.IsValid() || p.At.Is6() == v6 }

// overlaps says whether there is a packet that both would have.
func (p Port) overlaps(o Port) bool {
	if p.Protocol != o.Protocol || p.Host != o.Host {
		return false
	}
	oneFamily := p.of(false) && o.of(false) || p.of(true) && o.of(true)
	return oneFamily && (p.all() || o.all() || p.At == o.At)
}

func (p Port) String() string {
	s := fmt.Sprintf("%v port %d", p.Protocol, p.Host)
	if p.At.IsValid() {
		s += " at " + p.At.String()
	}
	return s
}

// Claims are which pods have which ports. The zero value has none.
type Claims struct {
	mu   sync.Mutex
	pods map[string]Pod
}

// Take gives a pod its ports, all or none of them. The error, of class errdefs.ErrFailedPrecondition, names the pod that has
// one of them.
func (c *Claims) Take(p Pod) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(c.pods)) {
		if id == p.ID {
			continue
		}
		other := c.pods[id]
		for _, want := range p.Ports {
			if i := slices.IndexFunc(other.Ports, want.overlaps); i >= 0 {
				return fmt.Errorf("%v: pod %s (%s) has %v, until its network is torn down: %w",
					want, other.Name, brief(other.ID), other.Ports[i], errdefs.ErrFailedPrecondition)
			}
		}
	}
	c.keep(p)
	return nil
}

// Keep gives a pod ports that it has already, whoever else has them.
func (c *Claims) Keep(p Pod) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(p)
}

func (c *Claims) keep(p Pod) {
	if len(p.Ports) == 0 {
		return
	}
	if c.pods == nil {
		c.pods = map[string]Pod{}
	}
	c.pods[p.ID] = p
}

// Has says whether a pod has ports.
func (c *Claims) Has(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pods[id].Ports) > 0
}

// Free takes the ports of a pod back. It may have none.
func (c *Claims) Free(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pods, id)
}

// brief is as much of an id as people need.
func brief(id string) string { return id[:min(len(id), 12)] }

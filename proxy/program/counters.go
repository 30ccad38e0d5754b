package program

import (
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
)

// Cause is what packets are counted for. All are the first ones of connections, and those that are sent again without an answer.
type Cause uint8

// The causes.
const (
	// Connections are new connections that were asked for, whatever became of them but for SourceRanges.
	Connections Cause = iota
	// NoEndpoints were rejected: the Service has no endpoint anywhere.
	NoEndpoints
	// NoLocal were dropped: the traffic policy is Local, and there are endpoints on other nodes only.
	NoLocal
	// SourceRanges were dropped: the source is in none of loadBalancerSourceRanges.
	SourceRanges
	// Unallocated were dropped: no Service has the cluster IP. It is nobody's, so Counted has a family alone.
	Unallocated
	// Invalid were dropped: conntrack takes them for none of their connection. A family's alone, in mode iptables.
	Invalid
	// AtLoopback are those of Connections that were to node ports at loopback addresses. A family's alone, in mode iptables.
	AtLoopback
	Causes // how many there are
)

// String is the cause as metrics have it.
func (c Cause) String() string {
	return [Causes]string{"connections", "no-endpoints", "no-local-endpoints", "source-ranges", "unallocated", "invalid", "loopback"}[c]
}

// Counted is a port of a Service in a family, and what is counted there.
type Counted struct {
	Service  types.NamespacedName
	Port     string // its name, empty if it has none
	Family   model.Family
	Protocol model.Protocol
	Cause    Cause
}

// Count is a number of packets, and of their bytes with headers of the network layer.
type Count struct{ Packets, Bytes uint64 }

// Plus is the sum.
func (c Count) Plus(o Count) Count { return Count{c.Packets + o.Packets, c.Bytes + o.Bytes} }

// Minus is the difference, and nothing if there is none.
func (c Count) Minus(o Count) Count {
	return Count{c.Packets - min(o.Packets, c.Packets), c.Bytes - min(o.Bytes, c.Bytes)}
}

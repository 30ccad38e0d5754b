// Package model computes what each address and port of a node's Services should do: which endpoints a packet may be sent
// to, what is rejected or dropped, and whose source address has to be replaced.
//
// It does no I/O. What goes in are Services, EndpointSlices, ServiceCIDRs, the node's own Node and a Config; what comes out
// is a State of plain values, which can be printed, compared and tested, and a Delta for whoever programs a kernel:
//
//	m, err := model.New(config)
//	m.SetNode(node)
//	m.SetService(service)
//	m.SetSlice(slice)
//	delta := m.Commit()              // all that has changed since the last one
//	v := model.Decide(m.State(), p)  // what a kernel that was programmed by it would do to a packet
//
// It promises what kube-proxy 1.37 does in its nftables mode (KEP-3866), at a cost for a change of one Service or slice that
// does not depend on how many there are. A change of the Node's zone, or of the Config, computes all anew. An object that
// contradicts the API's validation loses its bad part, or is left out, and a Problem says which field and value; it never
// touches other objects. No object of Kubernetes is kept.
//
// It does not promise to be safe for concurrent use: a Model belongs to one goroutine, or to a lock of the caller. What it
// hands out in a Delta is never written to again.
package model

// Package conntrack removes what the kernel goes on to do for Services as they were: entries of its table of connections.
//
// A connection of UDP is what the kernel has seen of one lately, and what it does with the next packet: one that was sent to an
// endpoint is sent there for as long as somebody sends, and one that began before there was an endpoint goes on past it.
//
//	c := conntrack.New(conntrack.Options{Log: log, Swept: metrics.ConntrackSwept})
//	go c.Run(ctx)
//	c.WillAll(model.State()) // before the kernel is made to have all
//	c.Done()                 // it has
//	c.Will(&delta)           // before a change
//	c.Done()
//
// It promises:
//   - An entry is removed if it was sent to an address and port of a Service and leads to an endpoint which that has lost, also the
//     last one, also if the Service was deleted; and if it leads nowhere else although there are endpoints since. Endpoints that
//     serve while they end keep theirs, and so do those of pods that are not ready but are published (kube-proxy removes
//     these at each change).
//   - The first time all is compared: what was sent to a Service and leads to none of its endpoints is removed, whoever has made it so,
//     and what was sent to an address of a ServiceCIDR that is no Service's any more.
//   - No other entry is touched. A node port is one at addresses of the node, where node ports are served. What was deleted
//     while no proxy ran, and was no cluster IP, is not known to have been a Service's.
//   - Where a Service asks for it (model.Port.Resets), established connections of TCP to an endpoint that is in none of its slices
//     any more are reset: both ends are told, also those that do not send anything (program.Resetter). Those of a Service or address that
//     is no more are left alone.
//   - Nobody waits for it. Will and Done cost nothing; changes that come while the table is read go together. A large table is
//     read in parts, with pauses, since softirqs of a processor wait while the kernel looks for something in it, and costs a
//     quarter of a processor at most, however often Services change; a small one is searched by the kernel.
//   - What fails is tried again.
//
// Semantics are those of kube-proxy 1.37 (pkg/proxy/conntrack), but for node ports without an endpoint, deleted Services and
// packets that were not led anywhere (kubernetes#139628, #135323).
package conntrack

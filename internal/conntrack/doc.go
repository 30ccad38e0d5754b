// Package conntrack reads the kernel's table of connections over netlink, and removes some.
//
//	c, err := conntrack.Open()
//	err = c.Each(conntrack.Filter{Family: unix.AF_INET, Protocol: unix.IPPROTO_UDP}, func(e *conntrack.Entry) bool {
//		if stale(e) {
//			gone = append(gone, e.Key())
//		}
//		return true
//	})
//	err = c.Delete(gone[0])
//
// A node may track a million connections, so it promises that nothing of them is collected: Each hands on one after the other, in
// the same memory, and reads on when it is done with those that the kernel has told of, some 150 at a time. It knows nothing
// of what connections are for. A Conn belongs to the network namespace of the thread that opened it, and to one goroutine at a
// time.
//
// A Filter has the kernel pick (protocol and port from Linux 5.8 on), at the price of softirqs of a processor that wait for as
// long as it finds nothing: it looks through its whole table, other namespaces' entries included, before it returns (0.3 s for
// a million).
package conntrack

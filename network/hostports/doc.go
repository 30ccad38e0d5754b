// Package hostports leads ports of the node to pods, by a table of nf_tables of its own, and knows which pod has which.
//
// [Claims] is the model: two pods never have the same port of the same protocol at the same address of the node.
//
// [Table] is what the kernel has of it, for the pods of the default network:
//   - the number of rules is constant, whatever the number of ports: these are elements of maps, keyed by protocol and port,
//     or by address, protocol and port;
//   - what changes for one pod changes in one transaction, and so does what is found wrong: there is no moment without rules;
//   - only what is for an address of the node is led to a pod (CVE-2025-67499), and only what no Service has taken
//     (CVE-2019-9946): its chains come after those of Services;
//   - 127.0.0.1 works on the node, which needs route_localnet on the pods' bridge; neighbours on that bridge do not reach the
//     node's loopback addresses by it (CVE-2020-8558). There is no such thing for ::1;
//   - connections of UDP that were under way before a port came, or that outlive it, are forgotten;
//   - whatever others do to the table is undone as soon as the kernel tells, or within ten seconds. Nothing of theirs is touched;
//   - without a port there is no table.
//
// The network namespace is that of the thread that calls first.
//
//	claims.Take(pod) // before anything is made
//	...
//	err := table.Set(hostports.Target{Pod: pod, Addrs: addrs, Link: bridge})
//	...
//	err = table.Remove(pod.ID)
//	claims.Free(pod.ID)
package hostports

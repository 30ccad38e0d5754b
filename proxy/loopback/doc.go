// Package loopback serves node ports at 127.0.0.1 and ::1, where no rule of a kernel can send a packet elsewhere unless the
// whole node is opened for it (route_localnet, CVE-2020-8558): it listens there and copies, TCP and UDP (KEP-6032).
//
//	ports := loopback.New(loopback.Options{IPv4: true, IPv6: true, Failed: …})
//	ports.Apply(&delta) // after each Commit of the model
//	ports.Retry()       // now and then: what could not be listened at
//	ports.Close()
//
// It promises that a port follows its Service at once; that open connections outlive changes of their Service, as those that the
// kernel translates do, until Close; that each end of a connection sees how the other ends it: half, wholly, or by a reset; that what
// local programs open is bounded; and that Close returns when nothing of it is left.
//
// It does not serve SCTP, which nothing answers at these addresses.
package loopback

// Package nftables speaks to the kernel's nf_tables over netlink, without the nft program: messages that are built in place,
// batches that the kernel takes as one transaction or not at all, dumps, and notifications of what others change.
//
//	conn, err := nftables.Open()
//	var b nftables.Batch
//	b.Begin(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, unix.NFPROTO_IPV4, "table t")
//	b.String(unix.NFTA_TABLE_NAME, "t")
//	b.End()
//	err = conn.Commit(&b)
//
// It promises that a batch is refused before it is sent where the kernel would not take its size (Conn.Limit), and that an
// error names the object that was refused. It knows nothing of what tables are for. A Conn belongs to the network
// namespace of the thread that opened it, and to one goroutine at a time.
//
// Numbers of nf_tables are big endian, those of netlink's own headers are the machine's (libnl's, nfnetlink(7)).
package nftables

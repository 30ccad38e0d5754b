package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Transactions tell that nf_tables have changed, and not what: for whose table is small, and who looks at all of it.
type Transactions struct{ file *os.File }

// WatchTransactions begins to listen in the network namespace of the calling thread. Those of the caller are told, too.
func WatchTransactions() (*Transactions, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("nf_tables: %w", os.NewSyscallError("socket", err))
	}
	filter := onlyGenerations()
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES),
	)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("nf_tables: %w", err)
	}
	return &Transactions{os.NewFile(uintptr(fd), "nf_tables")}, nil
}

// onlyGenerations lets messages pass that end a transaction: a proxy with ten thousand Services changes as many elements in one.
func onlyGenerations() []unix.SockFilter {
	const typeAt = 4 // struct nlmsghdr
	const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
	generation := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, newGeneration)) // as the filter reads it
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: typeAt},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(generation), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
}

// Each calls f for each transaction until Close. What was lost is one that has come.
func (t *Transactions) Each(f func()) {
	buf := make([]byte, 1<<10)
	for {
		if _, err := t.file.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		f()
	}
}

// Close ends Each.
func (t *Transactions) Close() error { return t.file.Close() }

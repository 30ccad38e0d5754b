package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Transactions tell that nf_tables have changed, and not what: for whose table is small, and who looks at all of it.
type Transactions struct {
	// C has a value when there were some since the last one was taken.
	C <-chan struct{}

	file *os.File
	done chan struct{}
}

// WatchTransactions begins to listen in the network namespace of the calling thread, until Close. Those of the caller are told, too.
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
	c := make(chan struct{}, 1)
	t := &Transactions{C: c, file: os.NewFile(uintptr(fd), "nf_tables"), done: make(chan struct{})}
	go t.tell(c)
	return t, nil
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

// tell has C know of each. What was lost is one that has come.
func (t *Transactions) tell(c chan<- struct{}) {
	defer close(t.done)
	buf := make([]byte, 1<<10)
	for {
		if _, err := t.file.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		select {
		case c <- struct{}{}:
		default: // one that is not yet taken stands for all
		}
	}
}

// Close ends it.
func (t *Transactions) Close() error {
	err := t.file.Close()
	<-t.done
	return err
}

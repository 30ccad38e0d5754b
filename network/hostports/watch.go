package hostports

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// settle is how long a burst of changes may take to be seen as one.
	settle = 50 * time.Millisecond
	// atMostEvery is how often it is looked what has become of the table, however busy others are with theirs.
	atMostEvery = time.Second
	// atLeastEvery finds what was not told.
	atLeastEvery = 10 * time.Second
)

// Watch checks the table whenever somebody has changed nf_tables, and now and then, until stop is closed.
func (t *Table) Watch(stop <-chan struct{}) {
	changes := make(chan struct{}, 1)
	changes <- struct{}{} // what nobody was there to be told
	if sock, err := subscribe(); err != nil {
		t.log.Debug("changes of nf_tables are not told, and looked for every ten seconds", "error", err)
	} else {
		done := make(chan struct{})
		go func() {
			defer close(done)
			tell(sock, changes)
		}()
		defer func() {
			_ = sock.Close()
			<-done
		}()
	}
	poll := time.NewTicker(atLeastEvery)
	defer poll.Stop()
	var last time.Time
	var due <-chan time.Time
	said := ""
	for {
		select {
		case <-stop:
			return
		case <-changes:
			if due == nil {
				due = time.After(max(settle, time.Until(last.Add(atMostEvery))))
			}
			continue
		case <-due:
		case <-poll.C:
		}
		due, last = nil, time.Now()
		now := ""
		if err := t.Check(); err != nil {
			if now = err.Error(); now != said {
				t.log.Warn("host ports of pods cannot be checked", "error", err)
			}
		}
		said = now
	}
}

// subscribe opens a socket on which the kernel tells of each transaction of nf_tables, without what is in it.
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	sock := os.NewFile(uintptr(fd), "netfilter")
	filter := onlyGenerations()
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES),
	)
	if err != nil {
		_ = sock.Close()
		return nil, fmt.Errorf("netfilter: %w", err)
	}
	return sock, nil
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

// tell notes that messages have come, until the socket is closed. One that was lost is one that has come.
func tell(sock *os.File, changes chan<- struct{}) {
	buf := make([]byte, 1<<10)
	for {
		if _, err := sock.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return
		}
		select {
		case changes <- struct{}{}:
		default:
		}
	}
}

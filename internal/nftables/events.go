package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Event is a change of an object, or with kind NFT_MSG_NEWGEN the end of a transaction.
type Event struct {
	Kind   uint16 // NFT_MSG_*
	Family byte
	Table  string
	// Process is the name of the one that made the change, of the end of a transaction; empty if the kernel does not say.
	Process string
}

// ErrOverrun is that there were more changes than a socket has room for: anything may have changed.
var ErrOverrun = errors.New("nf_tables: more changes than were read")

// Events are the changes that others make.
type Events struct {
	file *os.File
	raw  [datagram]byte
}

// Watch begins to listen for changes of nf_tables in the network namespace of the calling thread, but for those that sockets
// of some ports make.
func Watch(own ...uint32) (*Events, error) {
	const groups = 1 << (unix.NFNLGRP_NFTABLES - 1)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("nf_tables: %w", os.NewSyscallError("socket", err))
	}
	err = ignore(fd, own)
	if err == nil {
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
		}
		err = os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}))
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("nf_tables: %w", err)
	}
	return &Events{file: os.NewFile(uintptr(fd), "nf_tables")}, nil
}

// ignore has the kernel leave out datagrams of ports: a load of our own must not fill the buffer. All messages of one are
// of one transaction, and each has the port of its socket in the header.
func ignore(fd int, ports []uint32) error {
	code := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 12}} // nlmsg_pid, as if it were big endian
	for _, port := range ports {
		b := binary.NativeEndian.AppendUint32(nil, port)
		code = append(code, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 0, Jf: 1, K: binary.BigEndian.Uint32(b)},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0})
	}
	code = append(code, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff})
	return os.NewSyscallError("SO_ATTACH_FILTER", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}))
}

// Next waits for changes and calls f for each. After ErrOverrun it can go on; after another error, or Close, not.
func (e *Events) Next(f func(Event)) error {
	n, err := e.file.Read(e.raw[:])
	if errors.Is(err, unix.ENOBUFS) {
		return e.drain()
	}
	if err != nil {
		return fmt.Errorf("nf_tables: %w", err)
	}
	for b := e.raw[:n]; len(b) >= unix.SizeofNlMsghdr; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return nil
		}
		kind := binary.NativeEndian.Uint16(b[4:])
		if body := b[unix.SizeofNlMsghdr:size]; kind>>8 == unix.NFNL_SUBSYS_NFTABLES && len(body) >= 4 {
			f(event(kind&0xff, body))
		}
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return nil
}

// drain reads what there still is, and only then says that something is missing: until the buffer is empty the kernel leaves
// out what comes, without another error (netlink_rcv_wake), and who would look at the tables now would not be told.
func (e *Events) drain() error {
	raw, err := e.file.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool {
		for {
			_, _, err := unix.Recvfrom(int(fd), e.raw[:], unix.MSG_DONTWAIT)
			if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
				return true
			}
		}
	})
	if err != nil {
		return err
	}
	return ErrOverrun
}

// event reads a message. The first attribute of all kinds of objects is the name of their table.
func event(kind uint16, body []byte) Event {
	const procName = 3 // NFTA_GEN_PROC_NAME
	e := Event{Kind: kind, Family: body[0]}
	Attrs(body[4:], func(attr uint16, content []byte) {
		switch {
		case kind == unix.NFT_MSG_NEWGEN && attr == procName:
			e.Process = Text(content)
		case kind != unix.NFT_MSG_NEWGEN && attr == unix.NFTA_TABLE_NAME:
			e.Table = Text(content)
		}
	})
	return e
}

// Close ends listening, and a Next that waits.
func (e *Events) Close() error { return e.file.Close() }

package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is a netlink socket for nf_tables.
type Conn struct {
	fd      int
	port    uint32
	seq     uint32
	limit   int
	request Buffer
	in      []byte
}

const (
	// sendBuffer is what is asked for: a transaction has to fit in.
	sendBuffer = 16 << 20
	// receiveBuffer is for errors, of which there is one for each message that is refused.
	receiveBuffer = 4 << 20
	// answerTime is for an answer of the kernel, which may have to load modules and to wait for others' transactions.
	answerTime = time.Minute
	// datagram is the largest part of a dump (the kernel's NLMSG_GOODSIZE and max_recvmsg_len end at 32 KiB).
	datagram = 64 << 10
)

// Open opens a connection in the network namespace of the calling thread.
func Open() (*Conn, error) {
	c, err := open(0)
	if err != nil {
		return nil, fmt.Errorf("nf_tables: %w", err)
	}
	return c, nil
}

func open(groups uint32) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	c := &Conn{fd: fd, in: make([]byte, datagram)}
	if err := c.setUp(groups); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return c, nil
}

func (c *Conn) setUp(groups uint32) error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	name, err := unix.Getsockname(c.fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	c.port = name.(*unix.SockaddrNetlink).Pid
	// Whose namespace does not let it have more gets what all sockets get (net.core.wmem_max).
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sendBuffer)
	}
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	if err := c.readLimit(); err != nil {
		return err
	}
	wait := unix.NsecToTimeval(int64(answerTime))
	return errors.Join(
		os.NewSyscallError("NETLINK_CAP_ACK", unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)),
		os.NewSyscallError("NETLINK_EXT_ACK", unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)),
		os.NewSyscallError("SO_SNDTIMEO", unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait)),
		os.NewSyscallError("SO_RCVTIMEO", unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)),
	)
}

func (c *Conn) readLimit() error {
	size, err := unix.GetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	c.limit = size - 32 // netlink_sendmsg
	return nil
}

// SetSendBuffer has the socket's send buffer be smaller, in bytes, and so Limit.
func (c *Conn) SetSendBuffer(size int) error {
	// The kernel takes twice what it is told, for what it adds itself (socket(7)).
	if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size/2); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	return c.readLimit()
}

// Close closes the connection. Closing it again is an error, and closes nothing: the number may be another file's by then.
func (c *Conn) Close() error {
	if c.fd < 0 {
		return os.ErrClosed
	}
	fd := c.fd
	c.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// Port is the address of the socket, which notifications of its changes carry.
func (c *Conn) Port() uint32 { return c.port }

// Limit is how many bytes a batch may have.
func (c *Conn) Limit() int { return c.limit }

// message is one that was received.
type message struct {
	kind, flags uint16
	seq         uint32
	body        []byte // behind the header
}

func (c *Conn) send(b []byte) error {
	for {
		err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("nf_tables: %w", os.NewSyscallError("sendto", err))
		}
	}
}

// receive waits for a datagram and calls f for its messages, whose bodies are valid until the next one.
func (c *Conn) receive(f func(message) error) error {
	n, from, err := unix.Recvfrom(c.fd, c.in, 0)
	switch {
	case errors.Is(err, unix.EINTR):
		return nil
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("nf_tables: the kernel has not answered for %s", answerTime)
	case err != nil:
		return fmt.Errorf("nf_tables: %w", os.NewSyscallError("recvfrom", err))
	}
	if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
		return nil // not the kernel's
	}
	for b := c.in[:n]; len(b) >= unix.SizeofNlMsghdr; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return errors.New("nf_tables: a torn message of the kernel")
		}
		m := message{
			kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
			seq: binary.NativeEndian.Uint32(b[8:]), body: b[unix.SizeofNlMsghdr:size],
		}
		if err := f(m); err != nil {
			return err
		}
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return nil
}

// ErrInterrupted is a dump during which tables have changed, this one or another: it may lack something.
var ErrInterrupted = errors.New("nf_tables: changed while it was read")

// Get asks for one object, or with NLM_F_DUMP for all that there are. put adds attributes to the question; each gets the
// attributes of each answer, which are valid until it returns, with the family and generation of its header. After
// ErrInterrupted each has been called for all.
func (c *Conn) Get(kind, flags uint16, family byte, put func(*Buffer), each func(family byte, attrs []byte)) error {
	c.request.Reset()
	at := c.request.header(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, family, 0)
	if put != nil {
		put(&c.request)
	}
	c.seq++
	seq := c.seq
	c.request.finish(at, seq)
	if err := c.send(c.request.b); err != nil {
		return err
	}
	torn, done := false, false
	for !done {
		err := c.receive(func(m message) error {
			if m.seq != seq {
				return nil
			}
			torn = torn || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch m.kind {
			case unix.NLMSG_ERROR:
				done = true
				if errno := errnoOf(m.body); errno != 0 {
					return &RefusedError{Errno: errno, Text: errorText(m)}
				}
			case unix.NLMSG_DONE:
				done = true
				if errno := errnoOf(m.body); len(m.body) >= 4 && errno != 0 {
					return &RefusedError{Errno: errno, Text: errorText(m)}
				}
			default:
				done = done || m.flags&unix.NLM_F_MULTI == 0
				if len(m.body) >= 4 {
					each(m.body[0], m.body[4:])
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if torn {
		return ErrInterrupted
	}
	return nil
}

// WaitForPackets waits until each packet that is in the kernel's hooks by now has left them, and so is done with rules that are
// no more: MEMBARRIER_CMD_GLOBAL is synchronize_rcu (membarrier(2)), and hooks run as its readers. Where it is refused
// (nohz_full) nothing is waited for.
func WaitForPackets() {
	const global = 1
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
}

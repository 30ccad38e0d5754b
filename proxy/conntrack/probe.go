package conntrack

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// probeBuffer has room for what is sent for more than 10,000 connections. It is not memory: the kernel keeps little for a neighbour.
const probeBuffer = 64 << 20

// probes makes those who are idle send a packet. It belongs to the network namespace of the thread that sends first.
type probes struct {
	sockets [model.Families]int // 0 for none
	said    bool                // that there are no sockets
	waiting []asked
	packet  []byte
}

// asked are flows whose senders were asked.
type asked struct {
	flows       []program.Flow
	first, next time.Time
	wait        time.Duration // after next, if none of them answers
}

func newAsked(flows []program.Flow, now time.Time) asked {
	return asked{slices.Clone(flows), now, now.Add(askAgain), askNext}
}

// answered takes those out that were told, and says whether the others are to be asked now, and when then.
func (a *asked) answered(still map[program.Flow]struct{}, now time.Time) bool {
	before := len(a.flows)
	a.flows = slices.DeleteFunc(a.flows, func(f program.Flow) bool { _, ok := still[f]; return !ok })
	if len(a.flows) < before {
		a.next, a.wait = now.Add(askNext), askNext
	} else {
		a.next, a.wait = now.Add(a.wait), 2*a.wait
	}
	return len(a.flows) > 0 && now.Before(a.first.Add(askMost))
}

// due is when the next ones are to be asked again; zero for never.
func (p *probes) due() (first time.Time) {
	for i := range p.waiting {
		if next := p.waiting[i].next; first.IsZero() || next.Before(first) {
			first = next
		}
	}
	return first
}

// open opens a socket for packets with headers of our own.
func (p *probes) open(f model.Family) error {
	if p.sockets[f] != 0 {
		return nil
	}
	domain := [model.Families]int{unix.AF_INET, unix.AF_INET6}[f]
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	// What waits for the address of a neighbour that is gone must not keep what is for others from being sent.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, probeBuffer)
	p.sockets[f] = fd
	return nil
}

func (p *probes) close() {
	for f, fd := range p.sockets {
		if fd != 0 {
			_ = unix.Close(fd)
			p.sockets[f] = 0
		}
	}
	p.waiting = nil
}

// send asks the sender of each flow for a packet. What cannot be sent is not: who sends by itself is told, too.
func (p *probes) send(log *slog.Logger, flows []program.Flow) {
	for _, flow := range flows {
		f := model.FamilyOf(flow.Src.Addr())
		if err := p.open(f); err != nil {
			if !p.said {
				p.said = true
				log.Warn("idle clients of endpoints that are gone are not told at once, but when they send: the proxy needs CAP_NET_RAW for that", "error", err)
			}
			return
		}
		p.packet = probe(p.packet[:0], flow.Dst, flow.Src, rand.Uint32())
		var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(flow.Src.Addr().AsSlice()[:4])}
		if f == model.IPv6 {
			to = &unix.SockaddrInet6{Addr: flow.Src.Addr().As16()}
		}
		if err := unix.Sendto(p.sockets[f], p.packet, 0, to); errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) {
			time.Sleep(time.Millisecond) // it is asked again anyway
		}
	}
}

// probe appends a packet that draws one for a connection that is there: a SYN with a window of 0, as no other has it, by which rules
// know it.
func probe(b []byte, from, to netip.AddrPort, seq uint32) []byte {
	const size, lives = 20, 64
	if from.Addr().Is4() {
		b = append(b, 0x45, 0, 0, 2*size, 0, 0, 0x40, 0, lives, unix.IPPROTO_TCP, 0, 0) // the kernel fills in the sum
	} else {
		b = append(b, 0x60, 0, 0, 0, 0, size, unix.IPPROTO_TCP, lives)
	}
	addresses := len(b)
	b = append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, size/4<<4, 0x02, 0, 0, 0, 0, 0, 0)
	binary.BigEndian.PutUint16(b[at+16:], checksum(b[addresses:], size+unix.IPPROTO_TCP))
	return b
}

// checksum is TCP's over addresses and packet; more is what else is in the sum.
func checksum(b []byte, more uint32) uint16 {
	sum := more
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

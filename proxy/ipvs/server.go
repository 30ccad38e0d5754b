package ipvs

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// What IPVS speaks by generic netlink (include/uapi/linux/ip_vs.h).
const (
	genlName    = "IPVS"
	genlVersion = 1

	cmdDelService = 3
	cmdGetService = 4

	attrService = 1 // of a command

	attrFamily   = 1 // of a service
	attrProtocol = 2
	attrAddr     = 3
	attrPort     = 4
	attrMark     = 5
)

// server is a virtual server: what it is known by.
type server struct {
	family, protocol uint16
	addr             netip.Addr
	port             uint16
	mark             uint32 // instead of protocol, address and port, if it is not 0
}

func request(family uint16, command uint8, flags int) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(int(family), flags)
	r.AddData(&nl.Genlmsg{Command: command, Version: genlVersion})
	return r
}

// listServers are all virtual servers of the network namespace.
func listServers(family uint16) ([]server, error) {
	answers, err := request(family, cmdGetService, unix.NLM_F_DUMP).Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, err
	}
	var out []server
	for _, a := range answers {
		s, err := readServer(a)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// readServer reads an answer: the header of generic netlink, and in an attribute those of the service.
func readServer(answer []byte) (s server, err error) {
	if len(answer) < nl.SizeofGenlmsg {
		return s, fmt.Errorf("an answer has %d bytes", len(answer))
	}
	outer, err := nl.ParseRouteAttr(answer[nl.SizeofGenlmsg:])
	if err != nil {
		return s, err
	}
	for _, o := range outer {
		if o.Attr.Type&^unix.NLA_F_NESTED != attrService {
			continue
		}
		inner, err := nl.ParseRouteAttr(o.Value)
		if err != nil {
			return s, err
		}
		for _, a := range inner {
			v := a.Value
			switch kind := a.Attr.Type; {
			case kind == attrFamily && len(v) >= 2:
				s.family = binary.NativeEndian.Uint16(v)
			case kind == attrProtocol && len(v) >= 2:
				s.protocol = binary.NativeEndian.Uint16(v)
			case kind == attrAddr && len(v) >= 16:
				s.addr = netip.AddrFrom16([16]byte(v))
			case kind == attrPort && len(v) >= 2:
				s.port = binary.BigEndian.Uint16(v)
			case kind == attrMark && len(v) >= 4:
				s.mark = binary.NativeEndian.Uint32(v)
			}
		}
	}
	if s.family == unix.AF_INET && s.addr.IsValid() { // it is in the first four bytes
		b := s.addr.As16()
		s.addr = netip.AddrFrom4([4]byte(b[:4]))
	}
	return s, nil
}

// attribute names the virtual server in a request.
func (s *server) attribute() *nl.RtAttr {
	var addr [16]byte
	copy(addr[:], s.addr.AsSlice())
	a := nl.NewRtAttr(attrService|unix.NLA_F_NESTED, nil)
	a.AddRtAttr(attrFamily, binary.NativeEndian.AppendUint16(nil, s.family))
	a.AddRtAttr(attrProtocol, binary.NativeEndian.AppendUint16(nil, s.protocol))
	a.AddRtAttr(attrAddr, addr[:])
	a.AddRtAttr(attrPort, binary.BigEndian.AppendUint16(nil, s.port))
	return a
}

// remove removes it, with its real servers.
func (s *server) remove(family uint16) error {
	r := request(family, cmdDelService, unix.NLM_F_ACK)
	r.AddData(s.attribute())
	_, err := r.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

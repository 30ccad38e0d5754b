package nodetest

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
)

// Serve answers each line on TCP, and each datagram on UDP, with the name of the namespace and the address that it sees.
func (s *Space) Serve(port int) {
	s.T.Helper()
	s.ServeTCP(port)
	s.ServeUDP(port)
}

// ServeTCP is Serve without UDP.
func (s *Space) ServeTCP(port int) { s.ListenTCP(port, s.Answer) }

// ServeTCPOnce answers each connection with the number of the port.
func (s *Space) ServeTCPOnce(port int) {
	s.ListenTCP(port, func(c net.Conn) {
		fmt.Fprintln(c, port)
		c.Close()
	})
}

// ListenTCP hands each connection to a function.
func (s *Space) ListenTCP(port int, serve func(net.Conn)) {
	s.T.Helper()
	var l net.Listener
	if err := s.Do(func() (err error) { l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); return err }); err != nil {
		s.T.Fatal(err)
	}
	s.T.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
}

// Answer serves a connection.
func (s *Space) Answer(c net.Conn) {
	defer c.Close()
	from, _ := netip.ParseAddrPort(c.RemoteAddr().String())
	for in := bufio.NewScanner(c); in.Scan(); {
		if _, err := fmt.Fprintf(c, "%s %s\n", s.Name, from.Addr().Unmap()); err != nil {
			return
		}
	}
}

// ServeUDP is Serve without TCP.
func (s *Space) ServeUDP(port int) {
	s.T.Helper()
	for _, network := range []string{"udp4", "udp6"} {
		var l net.PacketConn
		if err := s.Do(func() (err error) { l, err = net.ListenPacket(network, fmt.Sprintf(":%d", port)); return err }); err != nil {
			s.T.Fatal(err)
		}
		s.T.Cleanup(func() { l.Close() })
		go func() {
			b := make([]byte, 100)
			for {
				_, from, err := l.ReadFrom(b)
				if err != nil {
					return
				}
				a, _ := netip.ParseAddrPort(from.String())
				_, _ = l.WriteTo([]byte(s.Name+" "+a.Addr().Unmap().String()), from)
			}
		}()
	}
}

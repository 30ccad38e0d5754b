package nft

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/berth-run/berth/proxy/model"
)

// sctpInit is the first packet of an SCTP association (RFC 9260, section 3.3.2).
func sctpInit(from, to uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = append(b, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// SCTP is led to endpoints, too: seen in its packets, since this works without the kernel having SCTP for programs.
func TestSCTP(t *testing.T) {
	eachFamily(t, 2, func(t *testing.T, l *lab, f family) {
		l.sync(newState(serviceOf("web", portOf(model.SCTP, f.pods(1), clusterIP(at(f.cluster, 80)), f.nodePort(30080)))))
		network := map[model.Family]string{model.IPv4: "ip4:132", model.IPv6: "ip6:132"}[f.of]
		var in net.PacketConn
		if err := l.pods[0].do(func() (err error) { in, err = net.ListenPacket(network, f.podIP(1)); return err }); err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		for i, try := range []struct {
			from *space
			to   string
			port int
		}{{l.pods[1], f.cluster, 80}, {l.client, f.cluster, 80}, {l.client, f.node, 30080}, {l.node, f.cluster, 80}} {
			err := try.from.do(func() error {
				c, err := net.Dial(network, try.to)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Write(sctpInit(uint16(4000+i), uint16(try.port)))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := in.SetReadDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			n, from, err := in.ReadFrom(b)
			if err != nil {
				t.Fatalf("%s to %s: %v", try.from.name, try.to, err)
			}
			if port := binary.BigEndian.Uint16(b[2:]); n < 12 || port != podPort {
				t.Errorf("%s to %s: to port %d", try.from.name, try.to, port)
			}
			seen := netip.MustParseAddr(from.String())
			if try.from == l.client && seen == netip.MustParseAddr(f.client) {
				t.Errorf("to %s: not masqueraded", try.to)
			}
		}
	})
}

// CVE-2020-8558: node ports at 127.0.0.1 need route_localnet, which opens the node's loopback to its neighbours. It is not
// set, and what comes from outside to 127.0.0.0/8 is led nowhere.
func TestCVE_2020_8558(t *testing.T) {
	l := newLab(t, 1)
	f := families[0]
	s := newState(serviceOf("web", portOf(model.TCP, f.pods(1), f.nodePort(30080))))
	l.sync(s)
	if got := l.node.run("sh", "-c", "cat /proc/sys/net/ipv4/conf/*/route_localnet | sort -u"); got != "0\n" {
		t.Errorf("route_localnet: %q", got)
	}
	l.client.sysctl("net/ipv4/conf/all/route_localnet", "1")
	l.client.run("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
	l.client.run("ip", "route", "add", "127.0.0.0/8", "via", nodeIP4, "src", clientIP4)
	l.node.serveTCP(7777)
	l.want(l.client, "tcp4", "127.0.0.1:7777", silence)
	l.want(l.client, "tcp4", "127.0.0.1:30080", silence)
	if got := l.node.ask("tcp4", "127.0.0.1:30080"); got != refused {
		t.Errorf("from the node itself: %q", got)
	}
}

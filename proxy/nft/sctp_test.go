package nft

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	userspace "github.com/berth-run/berth/proxy/loopback"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nodetest"
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
	eachFamily(t, 2, func(t *testing.T, l *lab, f nodetest.Family) {
		l.sync(nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.SCTP, f.Pods(1), nodetest.ClusterIP(nodetest.At(f.Cluster, 80)), f.NodePort(30080)))))
		network := map[model.Family]string{model.IPv4: "ip4:132", model.IPv6: "ip6:132"}[f.Of]
		var in net.PacketConn
		if err := l.Pods[0].Do(func() (err error) { in, err = net.ListenPacket(network, f.PodIP(1)); return err }); err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		for i, try := range []struct {
			from *nodetest.Space
			to   string
			port int
		}{{l.Pods[1], f.Cluster, 80}, {l.Client, f.Cluster, 80}, {l.Client, f.Node, 30080}, {l.Node, f.Cluster, 80}} {
			err := try.from.Do(func() error {
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
			if err := in.SetReadDeadline(time.Now().Add(nodetest.Patience)); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			n, from, err := in.ReadFrom(b)
			if err != nil {
				t.Fatalf("%s to %s: %v", try.from.Name, try.to, err)
			}
			if port := binary.BigEndian.Uint16(b[2:]); n < 12 || port != nodetest.PodPort {
				t.Errorf("%s to %s: to port %d", try.from.Name, try.to, port)
			}
			seen := netip.MustParseAddr(from.String())
			if try.from == l.Client && seen == netip.MustParseAddr(f.Client) {
				t.Errorf("to %s: not masqueraded", try.to)
			}
		}
	})
}

// CVE-2020-8558: node ports at 127.0.0.1 need route_localnet, which opens the node's loopback to its neighbours. It is not
// set, and what comes from outside to 127.0.0.0/8 is led nowhere.
func TestCVE_2020_8558(t *testing.T) {
	l := newLab(t, 1)
	f := nodetest.Families[0]
	s := nodetest.NewState(nodetest.ServiceOf("web", nodetest.PortOf(model.TCP, f.Pods(1), f.NodePort(30080))))
	l.sync(s)
	if got := l.Node.Run("sh", "-c", "cat /proc/sys/net/ipv4/conf/*/route_localnet | sort -u"); got != "0\n" {
		t.Errorf("route_localnet: %q", got)
	}
	l.Client.Sysctl("net/ipv4/conf/all/route_localnet", "1")
	l.Client.Run("ip", "address", "del", "127.0.0.1/8", "dev", "lo")
	l.Client.Run("ip", "route", "add", "127.0.0.0/8", "via", nodetest.NodeIP4, "src", nodetest.ClientIP4)
	l.Node.ServeTCP(7777)
	l.Want(l.Client, "tcp4", "127.0.0.1:7777", nodetest.Silence)
	l.Want(l.Client, "tcp4", "127.0.0.1:30080", nodetest.Silence)
	if got := l.Node.Ask("tcp4", "127.0.0.1:30080"); got != nodetest.Refused {
		t.Errorf("from the node itself: %q", got)
	}
	// Where they are asked for, they are the node's own alone.
	ports := userspace.New(userspace.Options{IPv4: true, Dial: func(_ context.Context, network, address string) (net.Conn, error) {
		return l.Node.Dial(network, address)
	}})
	defer ports.Close()
	if err := l.Node.Do(func() error { ports.Apply(s.Delta(nil, s.ServiceList[0])); return nil }); err != nil {
		t.Fatal(err)
	}
	if got := l.Node.Ask("tcp4", "127.0.0.1:30080"); !strings.HasPrefix(got, "pod1 ") {
		t.Errorf("from the node itself: %q", got)
	}
	l.Want(l.Client, "tcp4", "127.0.0.1:30080", nodetest.Silence)
	if got := l.Node.Run("sh", "-c", "cat /proc/sys/net/ipv4/conf/*/route_localnet | sort -u"); got != "0\n" {
		t.Errorf("route_localnet: %q", got)
	}
}

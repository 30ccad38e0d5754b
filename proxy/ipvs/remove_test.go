package ipvs

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
	"github.com/berth-run/berth/proxy/model"
)

func TestServersAreRead(t *testing.T) {
	for _, want := range []server{
		{family: unix.AF_INET, protocol: 6, addr: netip.MustParseAddr("10.96.0.1"), port: 443},
		{family: unix.AF_INET6, protocol: 17, addr: netip.MustParseAddr("fd00::1"), port: 53},
	} {
		a := want.attribute()
		got, err := readServer(append([]byte{cmdGetService, genlVersion, 0, 0}, a.Serialize()...))
		if err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	for _, wrong := range [][]byte{nil, {1, 1}, {4, 1, 0, 0, 3, 0, 1, 0}} {
		if _, err := readServer(wrong); err == nil {
			t.Errorf("%v is taken for an answer", wrong)
		}
	}
}

func TestOnlyKubeProxysIsItsOwn(t *testing.T) {
	for name, want := range map[string]bool{
		"KUBE-CLUSTER-IP": true, "KUBE-6-CLUSTER-IP": true, "KUBE-NODE-PORT-LOCAL-UDP": true, "KUBE-NODE-PORT-SCTP-HASH": true,
		"KUBE-ROUTER-PODS": false, "CLUSTER-IP": false, "KUBE-": false, "others": false, "6-CLUSTER-IP": false,
	} {
		if isKubeSet(name) != want {
			t.Errorf("%s", name)
		}
	}
	vip, other := netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("192.0.2.7")
	addrs, ports := map[netip.Addr]bool{vip: true}, map[portKey]bool{{model.TCP, 30080}: true}
	for _, tc := range []struct {
		s    server
		want bool
	}{
		{server{protocol: 6, addr: vip, port: 80}, true},
		{server{protocol: 6, addr: other, port: 80}, false},
		{server{protocol: 6, addr: other, port: 30080}, false}, // not an address of this node
		{server{protocol: 6, addr: netip.MustParseAddr("127.0.0.1"), port: 30080}, true},
		{server{protocol: 17, addr: netip.MustParseAddr("127.0.0.1"), port: 30080}, false},
		{server{mark: 7}, false},
	} {
		if tc.s.kubeProxys(addrs, ports) != tc.want {
			t.Errorf("%+v", tc.s)
		}
	}
}

// What kube-proxy leaves in mode ipvs goes, and what is another's stays. The kernel has to have IPVS, ipsets and dummy links: make
// test-vm runs it where it has.
func TestRemoveInANamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	err := thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if removed, err := Remove(); err != nil || removed != nil {
			t.Errorf("of nothing: %v, %v", removed, err)
		}
		return leaveAndRemove(t)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		t.Skip("the kernel has no dummy links, ipsets or IPVS: ", err)
	}
	if err != nil {
		t.Error(err)
	}
}

func leaveAndRemove(t *testing.T) error {
	dummy := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: link}}
	if err := netlink.LinkAdd(dummy); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, a := range []string{"10.96.0.1/32", "fd00::1/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(dummy, addr); err != nil {
			return err
		}
	}
	port := uint16(30080)
	for name, kind := range map[string]string{"KUBE-CLUSTER-IP": "hash:ip,port", "KUBE-NODE-PORT-TCP": "bitmap:port", "others": "hash:ip,port"} {
		o := netlink.IpsetCreateOptions{}
		if kind == "bitmap:port" {
			o.PortTo = 65535
		}
		if err := netlink.IpsetCreate(name, kind, o); err != nil {
			return err
		}
	}
	if err := addPort("KUBE-NODE-PORT-TCP", port); err != nil {
		return err
	}
	family, err := netlink.GenlFamilyGet(genlName)
	if err != nil {
		return err
	}
	const stays = "192.0.2.7"
	for _, s := range []server{
		{family: unix.AF_INET, protocol: 6, addr: netip.MustParseAddr("10.96.0.1"), port: 443},
		{family: unix.AF_INET6, protocol: 17, addr: netip.MustParseAddr("fd00::1"), port: 53},
		{family: unix.AF_INET, protocol: 6, addr: netip.MustParseAddr("127.0.0.1"), port: port},
		{family: unix.AF_INET, protocol: 6, addr: netip.MustParseAddr(stays), port: 6443},
	} {
		if err := addServer(family.ID, s); err != nil {
			return err
		}
	}
	removed, err := Remove()
	if got := strings.Join(removed, "; "); err != nil || got != "3 virtual servers of IPVS; link kube-ipvs0; 2 ipsets" {
		t.Errorf("removed %q, %v", got, err)
	}
	left, err := listServers(family.ID)
	if err != nil || len(left) != 1 || left[0].addr.String() != stays {
		t.Errorf("left %+v, %v", left, err)
	}
	if sets, err := netlink.IpsetListAll(); err != nil || len(sets) != 1 || sets[0].SetName != "others" {
		t.Errorf("left %+v, %v", sets, err)
	}
	if _, err := net.InterfaceByName(link); err == nil {
		t.Error("the link is left")
	}
	if removed, err := Remove(); err != nil || removed != nil {
		t.Errorf("again: %v, %v", removed, err)
	}
	return nil
}

// addPort puts a port into a set of them; the library's function says a protocol with it, which kernels refuse there.
func addPort(set string, port uint16) error {
	r := nl.NewNetlinkRequest(nl.IPSET_CMD_ADD|unix.NFNL_SUBSYS_IPSET<<8, unix.NLM_F_ACK)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_INET})
	r.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	r.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(set)))
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|int(nl.NLA_F_NESTED), nil)
	data.AddChild(nl.NewRtAttr(nl.IPSET_ATTR_PORT|int(nl.NLA_F_NET_BYTEORDER), binary.BigEndian.AppendUint16(nil, port)))
	r.AddData(data)
	_, err := r.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

// addServer makes a virtual server, round robin.
func addServer(family uint16, s server) error {
	const (
		cmdNewService           = 1
		attrScheduler, attrFlag = 6, 7
		attrTimeout, attrMask   = 8, 9
	)
	r := request(family, cmdNewService, unix.NLM_F_ACK)
	a := s.attribute()
	a.AddRtAttr(attrScheduler, nl.ZeroTerminated("rr"))
	a.AddRtAttr(attrFlag, make([]byte, 8))
	a.AddRtAttr(attrTimeout, make([]byte, 4))
	mask := ^uint32(0)
	if s.family == unix.AF_INET6 {
		mask = 128
	}
	a.AddRtAttr(attrMask, binary.NativeEndian.AppendUint32(nil, mask))
	r.AddData(a)
	_, err := r.Execute(unix.NETLINK_GENERIC, 0)
	return err
}

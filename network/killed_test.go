package network

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// The daemon is killed in the first ADD of a node, when the bridge is there and has no address yet; then the pod's end of the only
// port goes, and with it the bridge's MAC address. No later ADD got over that.
func TestBridgeThatAKilledAddHasLeft(t *testing.T) {
	bin := referenceBin(t)
	needRoot(t)
	host := newLinks(t)
	host.add(bridge("left0"))
	host.do(func() error {
		br, err := netlink.LinkByName("left0")
		if err != nil {
			return err
		}
		port := cable("port", 1500)
		if err := errors.Join(netlink.LinkAdd(port), netlink.LinkSetMaster(port, br), netlink.LinkDel(port)); err != nil {
			return err
		}
		if br, err = netlink.LinkByName("left0"); err == nil && len(br.Attrs().HardwareAddr) > 0 {
			err = fmt.Errorf("the bridge has %s", br.Attrs().HardwareAddr)
		}
		return err
	})
	n := newNode(t)
	n.bin = bin
	n.write(n.conf+"/10-left.conflist", strings.Replace(ofRange("left", "bridge", "10.89.9.0/24", `"bridge":"left0","isGateway":true,`),
		`"type":"host-local",`, fmt.Sprintf(`"type":"host-local","dataDir":%q,`, t.TempDir()), 1))
	m := n.open()
	for _, id := range []string{podID, otherID} {
		p := n.pod()
		p.ID, p.Conflist = id, []byte(read(t, n.conf+"/10-left.conflist"))
		host.do(func() error {
			res, err := m.Setup(t.Context(), p)
			if err != nil {
				return err
			}
			serve(t, p.NetNS, 8080)
			if got, err := ask(host.ns, res.IPs[0].String(), 8080); err != nil {
				t.Errorf("%q, %v", got, err)
			}
			return nil
		})
		host.do(func() error { return m.Teardown(t.Context(), p) })
	}
	host.do(func() error {
		br, err := netlink.LinkByName("left0")
		if mac := br.Attrs().HardwareAddr; err == nil && mac[0]&3 != 2 {
			t.Errorf("the bridge's MAC address is %s", mac)
		}
		return err
	})
}

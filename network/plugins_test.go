package network

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// The reference plugins, on a bridge in a namespace that plays the host: bridge, host-local, portmap and firewall.
func TestReferencePlugins(t *testing.T) {
	needRoot(t)
	for name, exec := range map[string][]string{"in process": nil, "programs": {ExecAll}, "programs for addresses": {"host-local"}} {
		t.Run(name, func(t *testing.T) { testReferencePlugins(t, exec) })
	}
}

func testReferencePlugins(t *testing.T, exec []string) {
	n := newNode(t)
	n.bin, n.exec = referenceBin(t), exec
	data := t.TempDir() + "/ipam"
	n.write(n.conf+"/10-bt.conflist", fmt.Sprintf(`{"cniVersion":"1.0.0","name":"bt-net","plugins":[
{"type":"bridge","bridge":"bt-br0","isGateway":true,"ipMasq":true,"hairpinMode":true,
 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.90.7.0/24"}],[{"subnet":"fd00:90:7::/64"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
{"type":"portmap","capabilities":{"portMappings":true}},{"type":"firewall","ingressPolicy":"same-bridge"}]}`, data))
	m := n.open()
	if err := m.Ready(); err != nil {
		t.Fatal(err)
	}
	host := pinned(t, NamespaceSet{}).Net
	p := n.pod()
	p.PortMappings = []PortMapping{{Protocol: "tcp", ContainerPort: 8080, HostPort: 18080}}

	inHost := func(f func() error) {
		t.Helper()
		if err := InNamespaces([]string{host}, f); err != nil {
			t.Fatal(err)
		}
	}
	leases := func() int {
		files, err := filepath.Glob(data + "/bt-net/[0-9f]*")
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	var res *Result
	inHost(func() (err error) { // plugins are started from this thread and so inherit its namespace
		res, err = m.Setup(t.Context(), p)
		return err
	})
	if len(res.IPs) != 2 || !strings.HasPrefix(res.IPs[0].String(), "10.90.7.") || !res.IPs[1].Is6() {
		t.Fatalf("addresses %v", res.IPs)
	}
	if leases() != 2 {
		t.Errorf("%d leases", leases())
	}
	var l net.Listener
	if err := InNamespaces([]string{p.NetNS}, func() (err error) {
		l, err = net.Listen("tcp4", ":8080")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // a test
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello"))
			_ = c.Close()
		}
	}()
	get := func(addr string) (got string, err error) {
		err = InNamespaces([]string{host}, func() error {
			c, err := net.DialTimeout("tcp4", addr, 5*time.Second)
			if err != nil {
				return err
			}
			defer c.Close() //nolint:errcheck // a test
			buf := make([]byte, 16)
			k, err := c.Read(buf)
			got = string(buf[:k])
			return err
		})
		return got, err
	}
	for _, addr := range []string{res.IPs[0].String() + ":8080", "10.90.7.1:18080"} {
		if got, err := get(addr); got != "hello" {
			t.Errorf("%s: %q, %v", addr, got, err)
		}
	}

	p.Conflist = res.Conflist
	inHost(func() error { return m.Teardown(t.Context(), p) })
	if leases() != 0 {
		t.Errorf("%d leases after Teardown", leases())
	}
	if got, err := get("10.90.7.1:18080"); err == nil {
		t.Errorf("the host port still answers: %q", got)
	}
	inHost(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "veth" {
				t.Errorf("left: %s", l.Attrs().Name)
			}
		}
		return err
	})
	inHost(func() error { return m.Teardown(t.Context(), p) })

	// Added again; then, as after a reboot, the namespace is gone and the cache torn.
	inHost(func() (err error) {
		res, err = m.Setup(t.Context(), p)
		return err
	})
	if err := Unpin(p.NetNS); err != nil {
		t.Fatal(err)
	}
	for _, file := range n.caches() {
		if err := os.Truncate(file, 0); err != nil {
			t.Fatal(err)
		}
	}
	inHost(func() error { return m.Teardown(t.Context(), p) })
	if leases() != 0 {
		t.Errorf("%d leases after Teardown without a namespace", leases())
	}
	if c := n.caches(); len(c) != 0 {
		t.Errorf("cache left: %v", c)
	}
	atHome(t)
	if log := n.daemonLog.String(); strings.Contains(log, "by running") {
		t.Errorf("iptables was run: %s", log)
	}
}

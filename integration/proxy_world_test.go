//go:build integration

package integration

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// proxyWorld is two nodes with two pods each, and two clients outside, of which the first sends all by way of the first node and the
// second by way of the second. All are network namespaces. What no node takes for its own goes up, where all is unreachable: what is
// dropped is silence.
type proxyWorld struct {
	root   *testing.T // whose end is the world's
	t      *testing.T
	cp     *lab.ControlPlane
	dir    string
	rights string // a kubeconfig
	places map[string]*place
	nodes  []*worldNode
}

// place is a network namespace in which somebody asks or answers, with its addresses by family.
type place struct {
	name, ns string
	addr     [2]string
	raw      sync.Map // of addresses to *sync.Mutex, see askSCTP
}

// worldNode is a node; its proxy is nil while it has none.
type worldNode struct {
	*place
	world *proxyWorld
	zone  string
	proxy *lab.Process
	log   string
}

// What the API server and the proxies are told of the cluster.
const (
	serviceRanges = "10.93.0.0/24,fd93::/112"
	podRanges     = "10.1.0.0/16,fd01::/32"
)

func newProxyWorld(t *testing.T) *proxyWorld {
	t.Helper()
	cp, err := lab.StartControlPlane(t.Context(), tools, "--authorization-mode=RBAC", "--service-cluster-ip-range", serviceRanges)
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	w := &proxyWorld{root: t, t: t, cp: cp, dir: t.TempDir(), rights: proxyRights(t, cp), places: map[string]*place{}}
	up := w.place("up", "", "")
	script(t, up.ns, quietNetwork+`
		ip link add lan type bridge
		ip addr add 10.94.0.254/24 dev lan
		ip addr add fd94::254/64 dev lan nodad
		ip link set lan up
		ip route add unreachable default
		ip -6 route add unreachable default`)
	for i := 1; i <= 2; i++ {
		n := &worldNode{world: w, zone: fmt.Sprintf("zone-%d", i), place: w.place(fmt.Sprintf("node-%d", i), fmt.Sprintf("10.94.0.%d", i), fmt.Sprintf("fd94::%d", i))}
		w.nodes = append(w.nodes, n)
		w.plug(n.place, "10.94.0.254", "fd94::254")
		w.plug(w.place(fmt.Sprintf("out%d", i), fmt.Sprintf("10.94.0.1%d", i), fmt.Sprintf("fd94::1%d", i)), n.addr[0], n.addr[1])
	}
	for i, n := range w.nodes {
		for k := 1; k <= 2; k++ {
			n.pod(fmt.Sprintf("%c%d", 'a'+i, k), i+1, k+1)
		}
		script(t, n.ns, routeToPods(2-i))
		script(t, up.ns, routeToPods(i+1))
		forward, err := lab.NewForward(n.ns, cp.Address())
		must(t, err)
		t.Cleanup(func() { must(t, forward.Close()) })
		n.object()
	}
	return w
}

// routeToPods are commands.
func routeToPods(node int) string {
	return fmt.Sprintf("ip route add 10.1.%d.0/24 via 10.94.0.%[1]d; ip route add fd01:0:%[1]d::/48 via fd94::%[1]d", node)
}

// on has a test that is part of the world's be the one that fails, until it ends.
func (w *proxyWorld) on(t *testing.T) *proxyWorld {
	before := w.t
	w.t = t
	t.Cleanup(func() { w.t = before })
	return w
}

// quietNetwork has addresses work at once, all errors be told, and packets go as routes say.
const quietNetwork = `
	cd /proc/sys/net
	echo 1 > ipv4/ip_forward
	echo 1 > ipv6/conf/all/forwarding
	echo 0 > ipv6/conf/all/accept_dad
	echo 0 > ipv6/conf/default/accept_dad
	echo 0 > ipv4/conf/all/rp_filter
	echo 0 > ipv4/conf/default/rp_filter
	echo 0 > ipv4/conf/all/send_redirects
	echo 0 > ipv4/conf/default/send_redirects
	echo 0 > ipv4/icmp_ratemask
	echo 0 > ipv6/icmp/ratelimit
	ip link set lo up
`

func (w *proxyWorld) place(name, addr4, addr6 string) *place {
	p := &place{name: name, ns: namespace(w.t, filepath.Join(w.dir, name)), addr: [2]string{addr4, addr6}}
	w.places[name] = p
	return p
}

// plug connects a place to the network that the nodes are in.
func (w *proxyWorld) plug(p *place, gateway4, gateway6 string) {
	w.t.Helper()
	script(w.t, p.ns, quietNetwork)
	script(w.t, w.places["up"].ns, fmt.Sprintf("ip link add %s type veth peer name eth0 netns %s; ip link set %[1]s master lan up", p.name, p.ns))
	script(w.t, p.ns, fmt.Sprintf(`
		ip addr add %s/24 dev eth0
		ip addr add %s/64 dev eth0 nodad
		ip link set eth0 up
		ip route add default via %s
		ip -6 route add default via %s`, p.addr[0], p.addr[1], gateway4, gateway6))
}

// pod makes a pod, routed as by the plugin ptp: its gateway is the node, by the same address for all.
func (n *worldNode) pod(name string, node, number int) *place {
	w := n.world
	p := w.place(name, fmt.Sprintf("10.1.%d.%d", node, number), fmt.Sprintf("fd01:0:%d::%d", node, number))
	gateway4, gateway6 := fmt.Sprintf("10.1.%d.1", node), fmt.Sprintf("fd01:0:%d::1", node)
	script(w.t, p.ns, quietNetwork)
	script(w.t, n.ns, fmt.Sprintf(`
		ip link add %[1]s type veth peer name eth0 netns %[2]s
		ip addr add %[3]s/32 dev %[1]s
		ip addr add %[4]s/128 dev %[1]s nodad
		ip link set %[1]s up
		ip route add %[5]s/32 dev %[1]s
		ip -6 route add %[6]s/128 dev %[1]s`, name, p.ns, gateway4, gateway6, p.addr[0], p.addr[1]))
	script(w.t, p.ns, fmt.Sprintf(`
		ip addr add %[1]s/32 dev eth0
		ip addr add %[2]s/128 dev eth0 nodad
		ip link set eth0 up
		ip route add %[3]s dev eth0
		ip route add default via %[3]s
		ip -6 route add %[4]s dev eth0
		ip -6 route add default via %[4]s`, p.addr[0], p.addr[1], gateway4, gateway6))
	for _, port := range []int{8080, 8081, 5353} {
		p.serve(w.t, port)
	}
	p.serveSCTP(w.t)
	return p
}

// object makes the Node object, as kubelet and controller manager do together.
func (n *worldNode) object() {
	w := n.world
	w.t.Helper()
	w.create("/api/v1/nodes", map[string]any{
		"apiVersion": "v1", "kind": "Node",
		"metadata": map[string]any{"name": n.name, "labels": map[string]any{"topology.kubernetes.io/zone": n.zone, "kubernetes.io/hostname": n.name}},
	})
	w.patch("/api/v1/nodes/"+n.name+"/status", map[string]any{"status": map[string]any{"addresses": []any{
		map[string]any{"type": "InternalIP", "address": n.addr[0]}, map[string]any{"type": "InternalIP", "address": n.addr[1]},
	}}})
}

func (w *proxyWorld) create(path string, object any) {
	w.t.Helper()
	text, err := json.Marshal(object)
	must(w.t, err)
	must(w.t, w.cp.Create(w.t.Context(), path+"?fieldValidation=Strict", string(text)))
}

func (w *proxyWorld) patch(path string, merge any) {
	w.t.Helper()
	w.send(http.MethodPatch, path, "application/merge-patch+json", merge)
}

func (w *proxyWorld) send(method, path, contentType string, object any) {
	w.t.Helper()
	text, err := json.Marshal(object)
	must(w.t, err)
	_, err = w.cp.Do(w.t.Context(), method, path, contentType, text)
	must(w.t, err)
}

// start has a node's proxy run in a mode, and waits until it has programmed what there is.
func (n *worldNode) start(mode string, args ...string) {
	t := n.world.t
	t.Helper()
	n.launch(append([]string{"--proxy-mode", mode}, args...)...)
	n.wantLog("Services are programmed")
}

// launch starts a node's proxy, and does not wait.
func (n *worldNode) launch(args ...string) {
	w := n.world
	w.t.Helper()
	n.log = filepath.Join(w.dir, fmt.Sprintf("%s-%d.log", n.name, logNumber.Add(1)))
	p, err := lab.StartProxy(n.ns, n.log, n.flags(args...)...)
	must(w.t, err)
	n.watch(p)
}

// flags are kube-proxy's.
func (n *worldNode) flags(args ...string) []string {
	return append([]string{
		"--kubeconfig", n.world.rights, "--hostname-override", n.name, "--cluster-cidr", podRanges, "--nodeport-addresses", "primary",
		"--conntrack-max-per-core", "0", "--conntrack-min", "0", // the machine's, not the namespace's
	}, args...)
}

// watch has the node's proxy be a process, which ends with the world.
func (n *worldNode) watch(p *lab.Process) {
	n.proxy = p
	root := n.world.root
	root.Cleanup(func() {
		if root.Failed() {
			root.Logf("%s: the end of the log of %s:\n%s", n.name, p.Name, p.Tail(15))
		}
		must(root, p.Kill())
	})
}

var logNumber atomic.Int32

// wantLog waits for a text in the log of the node's proxy.
func (n *worldNode) wantLog(text string) {
	t := n.world.t
	t.Helper()
	must(t, lab.Eventually(t.Context(), soon, n.name+"'s proxy says "+text, func(context.Context) error {
		log, err := os.ReadFile(n.log)
		if err == nil && !strings.Contains(string(log), text) {
			err = fmt.Errorf("%s", log)
		}
		return err
	}))
}

// clean removes a proxy's rules.
func (n *worldNode) clean() {
	n.world.t.Helper()
	must(n.world.t, network.InNamespaces([]string{n.ns}, func() error { _, err := lab.CleanProxy(); return err }))
}

// serve answers each line on TCP, and each datagram on UDP, with who it is, its port, and the address that it sees.
func (p *place) serve(t *testing.T, port int) {
	t.Helper()
	var tcp net.Listener
	var udp [2]net.PacketConn
	must(t, network.InNamespaces([]string{p.ns}, func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		for i := range udp {
			if udp[i], err = net.ListenPacket([]string{"udp4", "udp6"}[i], net.JoinHostPort(p.addr[i], fmt.Sprint(port))); err != nil {
				return err
			}
		}
		return nil
	}))
	answer := func(from net.Addr) []byte {
		a, _ := netip.ParseAddrPort(from.String())
		return fmt.Appendf(nil, "%s %d %s\n", p.name, port, a.Addr().Unmap())
	}
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				for in := bufio.NewScanner(c); in.Scan(); {
					if _, err := c.Write(answer(c.RemoteAddr())); err != nil {
						return
					}
				}
			}()
		}
	}()
	t.Cleanup(func() { _ = tcp.Close() })
	for _, l := range udp {
		go answerPackets(l, func(_ []byte, from net.Addr) []byte { return answer(from) })
		t.Cleanup(func() { _ = l.Close() })
	}
}

// answerPackets answers until the socket is closed; nil is no answer.
func answerPackets(l net.PacketConn, answer func(packet []byte, from net.Addr) []byte) {
	b := make([]byte, 2048)
	for {
		n, from, err := l.ReadFrom(b)
		if err != nil {
			return
		}
		if a := answer(b[:n], from); a != nil {
			_, _ = l.WriteTo(a, from)
		}
	}
}

// SCTP's beginning is spoken here, an INIT and its answer, which is all that is told of a Service, and goes without a kernel that has
// SCTP for programs. Chunks of RFC 9260, section 3.3.
const (
	sctpInit    = 1
	sctpInitAck = 2
	sctpTag     = 1
)

var sctpPort atomic.Uint32

// sctpPacket is an INIT, or the answer to one with a parameter that has a text in it (as a state cookie).
func sctpPacket(from, to uint16, chunk byte, cookie string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	tag := byte(0)
	if chunk == sctpInitAck {
		tag = sctpTag
	}
	b = append(b, 0, 0, 0, tag, 0, 0, 0, 0, chunk, 0, 0, 0, 0, 0, 0, sctpTag, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	if cookie != "" {
		b = append(b, 0, 7)
		b = binary.BigEndian.AppendUint16(b, uint16(4+len(cookie)))
		b = append(b, cookie...)
	}
	binary.BigEndian.PutUint16(b[14:], uint16(len(b)-12))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// serveSCTP answers an INIT to any port.
func (p *place) serveSCTP(t *testing.T) {
	t.Helper()
	for family, name := range []string{"ip4:132", "ip6:132"} {
		var l net.PacketConn
		must(t, network.InNamespaces([]string{p.ns}, func() (err error) { l, err = net.ListenPacket(name, p.addr[family]); return err }))
		t.Cleanup(func() { _ = l.Close() })
		go answerPackets(l, func(in []byte, from net.Addr) []byte {
			if len(in) < 13 || in[12] != sctpInit {
				return nil
			}
			port := binary.BigEndian.Uint16(in[2:])
			return sctpPacket(port, binary.BigEndian.Uint16(in), sctpInitAck, fmt.Sprintf("%s %d %s", p.name, port, from))
		})
	}
}

// What ask says if nobody answers.
const (
	rejected    = "rejected"
	silence     = "silence"
	unreachable = "unreachable" // of what went up
	denied      = "denied"      // the node's own packet, rejected or dropped before it went anywhere
)

// How long an answer is waited for that should come; silence costs less.
const (
	patient  = 15 * time.Second
	briefly  = 700 * time.Millisecond
	sctpSize = 2048
)

// ask says who answers at an address (HOST:PORT) on a network (tcp4, sctp6 …): its name, its port, and whom it takes for the client.
func (p *place) ask(network, to string, wait time.Duration) string {
	if strings.HasPrefix(network, "sctp") {
		return p.askSCTP(network, to, wait)
	}
	c, err := p.dial(network, to, wait)
	if err != nil {
		return nobody(err)
	}
	defer func() { _ = c.Close() }()
	return askAgain(c, wait)
}

func (p *place) dial(kind, to string, wait time.Duration) (c net.Conn, err error) {
	err = network.InNamespaces([]string{p.ns}, func() (err error) { c, err = net.DialTimeout(kind, to, wait); return err })
	return c, err
}

// askAgain asks on a connection that is open.
func askAgain(c net.Conn, wait time.Duration) string {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err.Error()
	}
	if _, err := io.WriteString(c, "who\n"); err != nil {
		return nobody(err)
	}
	b := make([]byte, 200)
	n, err := c.Read(b)
	if err != nil {
		return nobody(err)
	}
	return strings.TrimSpace(string(b[:n]))
}

// askSCTP asks one at a time at an address: a raw socket is told of errors of all that is sent there, whatever their ports.
func (p *place) askSCTP(kind, to string, wait time.Duration) string {
	at, err := netip.ParseAddrPort(to)
	if err != nil {
		return err.Error()
	}
	turn, _ := p.raw.LoadOrStore(at.Addr(), new(sync.Mutex))
	turn.(*sync.Mutex).Lock()
	defer turn.(*sync.Mutex).Unlock()
	c, err := p.dial(strings.Replace(kind, "sctp", "ip", 1)+":132", at.Addr().String(), wait)
	if err != nil {
		return nobody(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err.Error()
	}
	port := uint16(20000 + sctpPort.Add(1)%40000)
	if _, err := c.Write(sctpPacket(port, at.Port(), sctpInit, "")); err != nil {
		return nobody(err)
	}
	b := make([]byte, sctpSize)
	for {
		n, _, err := c.(*net.IPConn).ReadFrom(b)
		if err != nil {
			return nobody(err)
		}
		// All that comes from the address is seen here.
		if n > 36 && b[12] == sctpInitAck && binary.BigEndian.Uint16(b[2:]) == port && binary.BigEndian.Uint16(b) == at.Port() {
			return string(b[36:min(n, 32+int(binary.BigEndian.Uint16(b[34:])))])
		}
	}
}

func nobody(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return rejected
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return unreachable
	case errors.Is(err, unix.EPERM):
		return denied
	case errors.As(err, &timeout) && timeout.Timeout():
		return silence
	}
	return err.Error()
}

//go:build integration

package integration

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// TestNodeRoutes has three nodes, each with a daemon of its own in a network namespace of its own: the first two in one subnet,
// the third behind a router, which knows nothing of pods. Node objects, at a real API server, are all that they know of each
// other.
func TestNodeRoutes(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools, "--authorization-mode=RBAC")
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	f := newFabric(t, cp)
	one, two, three := f.node(1, 1), f.node(2, 1), f.node(3, 2)
	f.nodes = []*clusterNode{one, two, three}

	t.Run("one subnet", func(t *testing.T) {
		f := f.on(t)
		f.restart("host-gw")
		f.wantLog(one, "node routes wait for a kubeconfig")
		must(t, os.WriteFile(f.kubeconfig(), []byte(leastRights(t, cp)), 0o600))
		for _, n := range f.nodes {
			n.object(t)
			n.pod(t)
		}
		f.wantRoutes(one, direct(two)...)
		f.wantRoutes(two, direct(one)...)
		f.wantRoutes(three)
		f.exchange(one, two)
		f.outside(one)
		f.wantState(one, "2 routed, 0 tunnelled, 2 left out: ")
		f.wantLog(one, "10.89.2.3 is in no subnet of this node: mode auto or vxlan leads there")
	})
	t.Run("across subnets", func(t *testing.T) {
		f := f.on(t)
		f.restart("auto")
		for _, n := range f.nodes {
			n.pod(t) // beside the one that was made before
		}
		f.wantRoutes(one, slices.Concat(direct(two), tunnelled("berth.vxlan", three))...)
		f.exchange(f.nodes...)
		for _, n := range f.nodes {
			f.outside(n)
		}
		if rules := script(t, two.ns, "nft list ruleset"); !strings.Contains(rules, "cni_plugins_masquerade") {
			t.Errorf("the second node does not masquerade by nftables:\n%s", rules)
		}
		if mtu := three.pods[1].mtu(t); mtu != 1450 {
			t.Errorf("the MTU of a pod is %d", mtu)
		}
	})
	t.Run("the tunnel is for nodes alone", func(t *testing.T) { f.on(t).inject(one, three) })
	t.Run("without an API server", func(t *testing.T) {
		f := f.on(t)
		f.wantState(one, "2 routed, 2 tunnelled, 0 left out: ")
		must(t, cp.KillAPIServer())
		f.exchange(f.nodes...)
		stop := f.talk(one, three)
		must(t, one.KillBerth())
		f.exchange(f.nodes...)
		f.start(one)
		f.exchange(f.nodes...)
		stop()
		must(t, cp.StartAPIServer(t.Context()))
	})
	t.Run("a node goes and comes", func(t *testing.T) {
		f := f.on(t)
		stop := f.talk(one, two)
		_, err := cp.Do(t.Context(), http.MethodDelete, "/api/v1/nodes/"+three.name, "", nil)
		must(t, err)
		f.wantRoutes(one, direct(two)...)
		f.wantRoutes(two, direct(one)...)
		began := time.Now()
		three.object(t)
		f.wantRoutes(one, slices.Concat(direct(two), tunnelled("berth.vxlan", three))...)
		t.Logf("from the Node object to the routes: %v", time.Since(began))
		f.exchange(f.nodes...)
		stop()
	})
	t.Run("a node that cannot be right", func(t *testing.T) {
		f := f.on(t)
		bad := &clusterNode{f: f, name: "node-0", addr4: "10.89.1.9", addr6: two.addr6, cidr4: "0.0.0.0/0", cidr6: two.cidr6}
		bad.object(t)
		f.wantState(one, "2 routed, 2 tunnelled, 3 left out: ")
		for _, why := range []string{
			`what="pod CIDR 0.0.0.0/0" reason="it is larger than a /8"`, `what="pod CIDR fd90:2::/64" reason="it overlaps pod CIDR fd90:2::/64 of node node-2"`,
			`what="address fd89:1::2" reason="it is, or is in, address fd89:1::2 of node node-2"`,
		} {
			f.wantLog(one, "node=node-0 "+why)
		}
		f.exchange(f.nodes...)
		_, err := cp.Do(t.Context(), http.MethodDelete, "/api/v1/nodes/"+bad.name, "", nil)
		must(t, err)
		f.wantState(one, "2 routed, 2 tunnelled, 0 left out: ")
	})
	t.Run("all through the tunnel", func(t *testing.T) {
		f := f.on(t)
		f.restart("vxlan")
		f.wantRoutes(one, tunnelled("berth.vxlan", two, three)...)
		f.exchange(f.nodes...)
	})
	t.Run("nodes of IPv6 alone", func(t *testing.T) {
		f := f.on(t)
		for _, n := range f.nodes {
			n.addresses(t, n.addr6)
		}
		f.wantRoutes(one, tunnelled("berth.vxlan6", two, three)...)
		f.exchange(f.nodes...)
		for _, n := range f.nodes {
			n.addresses(t, n.addr4, n.addr6)
		}
	})
	t.Run("a network of another's", func(t *testing.T) {
		f := f.on(t)
		conf := strings.Replace(three.Conflist(), three.Subnet(), "10.95.3.0/24", 1)
		must(t, os.WriteFile(filepath.Join(three.CNIConf(), "10-other.conflist"), []byte(conf), 0o644))
		f.wantNothing(three)
		f.wantState(three, "0 routed, 0 tunnelled, 0 left out: left to the node's network, "+three.CNIConf()+"/10-other.conflist")
		f.wantLog(three, "node routes are left to the node's network")
		f.exchange(one, two)
	})
	t.Run("turned off", func(t *testing.T) {
		f := f.on(t)
		f.configure(two, "off")
		must(t, two.KillBerth())
		f.start(two)
		f.wantNothing(two)
		f.wantState(two, "0 routed, 0 tunnelled, 0 left out: ")
	})
}

// fabric is the nodes, and the router between them that is all of the world outside.
type fabric struct {
	t      *testing.T
	cp     *lab.ControlPlane
	dir    string
	router string // path of its network namespace
	nodes  []*clusterNode
}

// The world outside has these addresses.
const outside4, outside6 = "10.89.9.9", "fd89:9::9"

// kubeconfig is a file that gives the rights of examples/noderoutes/rbac.yaml.
func (f *fabric) kubeconfig() string { return filepath.Join(f.dir, "kubeconfig") }

func (f *fabric) on(t *testing.T) *fabric {
	on := *f
	on.t = t
	return &on
}

func namespace(t testing.TB, path string) string {
	t.Helper()
	must(t, network.Pin(network.NamespaceSet{Net: path}))
	t.Cleanup(func() { must(t, network.Unpin(path)) })
	return path
}

// script runs commands in a network namespace, one a line.
func script(t testing.TB, netns, text string) string {
	t.Helper()
	var out []byte
	must(t, network.InNamespaces([]string{netns}, func() (err error) {
		out, err = exec.Command("sh", "-ec", text).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	}))
	return string(out)
}

func newFabric(t *testing.T, cp *lab.ControlPlane) *fabric {
	f := &fabric{t: t, cp: cp, dir: t.TempDir()}
	f.router = namespace(t, filepath.Join(f.dir, "router"))
	script(t, f.router, `
		ip link add lan1 type bridge
		ip link add lan2 type bridge
		for i in 1 2; do
			ip addr add 10.89.$i.254/24 dev lan$i
			ip addr add fd89:$i::fe/64 dev lan$i nodad
			ip link set lan$i up
		done
		ip addr add `+outside4+`/32 dev lo
		ip addr add `+outside6+`/128 dev lo
		echo 1 > /proc/sys/net/ipv4/ip_forward
		echo 1 > /proc/sys/net/ipv6/conf/all/forwarding`)
	return f
}

// leastRights does what docs/operations.md says of examples/noderoutes, and returns the kubeconfig.
func leastRights(t *testing.T, cp *lab.ControlPlane) string {
	t.Helper()
	kubectl := func(args ...string) string {
		out, err := cp.Kubectl(t.Context(), append([]string{"--namespace", "kube-system"}, args...)...)
		must(t, err)
		return out
	}
	kubectl("create", "-f", "../examples/noderoutes/rbac.yaml")
	// What a controller does that this control plane does not have.
	ca, err := os.ReadFile(filepath.Join(cp.Dir, "pki", "apiserver.crt"))
	must(t, err)
	token := strings.TrimSpace(kubectl("create", "token", "berth-node-routes"))
	data, err := json.Marshal(map[string]any{"data": map[string][]byte{"token": []byte(token), "ca.crt": ca}})
	must(t, err)
	kubectl("patch", "secret", "berth-node-routes", "--patch", string(data))

	script := exec.CommandContext(t.Context(), "sh", "../examples/noderoutes/kubeconfig.sh")
	script.Env = append(os.Environ(), "KUBECONFIG="+cp.Kubeconfig, "HOME="+cp.Dir, "PATH="+filepath.Dir(cp.KubectlCommand(t.Context()).Path)+":"+os.Getenv("PATH"))
	text, err := script.Output()
	must(t, err)
	return string(text)
}

// clusterNode is a node of the cluster.
type clusterNode struct {
	*lab.Node
	f            *fabric
	name         string
	ns           string
	addr4, addr6 string
	cidr4, cidr6 string
	pods         []*clusterPod
}

// node makes a node in one of both subnets. It runs nothing yet.
func (f *fabric) node(i, lan int) *clusterNode {
	t := f.t
	n := &clusterNode{
		f: f, name: fmt.Sprintf("node-%d", i), ns: namespace(t, filepath.Join(f.dir, fmt.Sprint("node", i))),
		addr4: fmt.Sprintf("10.89.%d.%d", lan, i), addr6: fmt.Sprintf("fd89:%d::%d", lan, i),
		cidr4: fmt.Sprintf("10.90.%d.0/24", i), cidr6: fmt.Sprintf("fd90:%d::/64", i),
	}
	must(t, network.InNamespaces([]string{f.router}, func() error {
		ns, err := os.Open(n.ns)
		if err != nil {
			return err
		}
		defer func() { _ = ns.Close() }()
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: n.name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(ns.Fd()))})
	}))
	script(t, f.router, fmt.Sprintf("ip link set %s master lan%d up", n.name, lan))
	script(t, n.ns, fmt.Sprintf(`
		ip addr add %s/24 dev eth0
		ip addr add %s/64 dev eth0 nodad
		ip link set eth0 up
		ip route add default via 10.89.%d.254
		ip -6 route add default via fd89:%[3]d::fe
		echo 1 > /proc/sys/net/ipv4/conf/all/rp_filter`, n.addr4, n.addr6, lan))
	forward, err := lab.NewForward(n.ns, f.cp.Address())
	must(t, err)
	t.Cleanup(func() { must(t, forward.Close()) })
	config := filepath.Join(f.dir, n.name+".yaml")
	n.Node = idleNode(t, lab.Options{Bare: true, NetNS: n.ns, Serve: []string{"--config", config}})
	return n
}

func (f *fabric) configure(n *clusterNode, mode string) {
	f.t.Helper()
	text := fmt.Sprintf("nodeRoutes: %q\nkubeconfig: %s\nnodeName: %s\n", mode, f.kubeconfig(), n.name)
	must(f.t, os.WriteFile(filepath.Join(f.dir, n.name+".yaml"), []byte(text), 0o644))
}

// restart has all nodes run with a mode.
func (f *fabric) restart(mode string) {
	f.t.Helper()
	for _, n := range f.nodes {
		f.configure(n, mode)
		if n.Berth != nil {
			must(f.t, n.Berth.Stop())
		}
		f.start(n)
	}
}

func (f *fabric) start(n *clusterNode) {
	f.t.Helper()
	var env []string
	if n.name == "node-2" {
		env = append(env, "PATH=/nonexistent") // a node without iptables: what masquerades is in nftables
	}
	must(f.t, n.StartBerth(f.t.Context(), env...))
	_, err := n.CRI.UpdateRuntimeConfig(f.t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{
		NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: n.cidr4 + "," + n.cidr6},
	}})
	must(f.t, err)
	must(f.t, n.CRI.Ready(f.t.Context()))
}

// object makes the Node object, as kubelet and controller manager do together.
func (n *clusterNode) object(t *testing.T) {
	t.Helper()
	must(t, n.f.cp.Create(t.Context(), "/api/v1/nodes", fmt.Sprintf(`
apiVersion: v1
kind: Node
metadata: {name: %s}
spec: {podCIDR: %[2]q, podCIDRs: [%[2]q, %q]}
`, n.name, n.cidr4, n.cidr6)))
	n.addresses(t, n.addr4, n.addr6)
}

func (n *clusterNode) addresses(t *testing.T, addrs ...string) {
	t.Helper()
	var all []string
	for _, a := range addrs {
		all = append(all, fmt.Sprintf(`{"type":"InternalIP","address":%q}`, a))
	}
	patch := fmt.Sprintf(`{"status":{"addresses":[%s]}}`, strings.Join(all, ","))
	_, err := n.f.cp.Do(t.Context(), http.MethodPatch, "/api/v1/nodes/"+n.name+"/status", "application/merge-patch+json", []byte(patch))
	must(t, err)
}

// direct are the routes to pods of a node in the same subnet, and tunnelled those through a tunnel, as wantRoutes shows them.
func direct(to *clusterNode) []string {
	return []string{to.cidr4 + " by " + to.addr4, to.cidr6 + " by " + to.addr6}
}

func tunnelled(link string, nodes ...*clusterNode) (all []string) {
	for _, to := range nodes {
		all = append(all, to.cidr4+" dev "+link, to.cidr6+" dev "+link)
	}
	return all
}

// wantRoutes waits until these are all routes of berth's on the node.
func (f *fabric) wantRoutes(n *clusterNode, want ...string) {
	f.t.Helper()
	slices.Sort(want)
	must(f.t, lab.Eventually(f.t.Context(), soon, "routes of "+n.name, func(context.Context) error {
		var have []string
		err := network.InNamespaces([]string{n.ns}, func() error {
			for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
				all, err := netlink.RouteListFiltered(family, &netlink.Route{Protocol: 98}, netlink.RT_FILTER_PROTOCOL)
				if err != nil {
					return err
				}
				for _, r := range all {
					link, err := netlink.LinkByIndex(r.LinkIndex)
					if err != nil {
						return err
					}
					line := r.Dst.String() + " dev " + link.Attrs().Name
					if link.Attrs().Name == "eth0" {
						line = r.Dst.String() + " by " + r.Gw.String()
					}
					have = append(have, line)
				}
			}
			return nil
		})
		slices.Sort(have)
		if err == nil && !slices.Equal(have, want) {
			err = fmt.Errorf("they are %q, want %q", have, want)
		}
		return err
	}))
}

// wantNothing waits until there is nothing of node routes on the node.
func (f *fabric) wantNothing(n *clusterNode) {
	f.t.Helper()
	f.wantRoutes(n)
	must(f.t, lab.Eventually(f.t.Context(), soon, "nothing is left on "+n.name, func(context.Context) error {
		left := script(f.t, n.ns, "nft list tables; ip -o link")
		if strings.Contains(left, "berth-routes") || strings.Contains(left, "berth.vxlan") {
			return errors.New(left)
		}
		return nil
	}))
}

// wantState waits until crictl info says so.
func (f *fabric) wantState(n *clusterNode, want string) {
	f.t.Helper()
	must(f.t, lab.Eventually(f.t.Context(), soon, "the state of "+n.name, func(ctx context.Context) error {
		status, err := n.CRI.RuntimeServiceClient.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
		if err != nil {
			return err
		}
		var s struct {
			Routed, Tunnelled int
			LeftOut           []string
			Problem           string
		}
		if err := json.Unmarshal([]byte(status.Info["nodeRoutes"]), &s); err != nil {
			return err
		}
		if got := fmt.Sprintf("%d routed, %d tunnelled, %d left out: %s", s.Routed, s.Tunnelled, len(s.LeftOut), s.Problem); got != want {
			return fmt.Errorf("it is %q, want %q", got, want)
		}
		return nil
	}))
}

func (f *fabric) wantLog(n *clusterNode, text string) {
	f.t.Helper()
	must(f.t, lab.Eventually(f.t.Context(), soon, "the log of "+n.name, func(context.Context) error {
		if log := n.Berth.Tail(200); !strings.Contains(log, text) {
			return fmt.Errorf("it does not say %q", text)
		}
		return nil
	}))
}

// clusterPod is a pod that says by TCP and by UDP where who asks it comes from.
type clusterPod struct {
	node  *clusterNode
	netns string
	addrs []netip.Addr
}

const echoPort = "7000"

func (n *clusterNode) pod(t *testing.T) {
	t.Helper()
	id, err := n.CRI.RunPod(t.Context(), n.Pod(fmt.Sprint("pod", len(n.pods))))
	must(t, err)
	status, err := n.CRI.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
	must(t, err)
	p := &clusterPod{node: n, netns: filepath.Join(n.Run(), "pods", id, "ns", "net")}
	texts := []string{status.Status.Network.Ip}
	for _, more := range status.Status.Network.AdditionalIps {
		texts = append(texts, more.Ip)
	}
	for i, cidr := range []string{n.cidr4, n.cidr6} {
		if len(texts) != 2 || !netip.MustParsePrefix(cidr).Contains(netip.MustParseAddr(texts[i])) {
			t.Fatalf("the pod's addresses are %v, want one of %s and of %s", texts, n.cidr4, n.cidr6)
		}
		p.addrs = append(p.addrs, netip.MustParseAddr(texts[i]))
	}
	answer(n.f.t, p.netns)
	n.pods = append(n.pods, p)
}

// answer has a server in a network namespace until the end of the test.
func answer(t *testing.T, netns string) {
	t.Helper()
	var tcp net.Listener
	var udp net.PacketConn
	must(t, network.InNamespaces([]string{netns}, func() (err error) {
		if tcp, err = net.Listen("tcp", ":"+echoPort); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", ":"+echoPort)
		return err
	}))
	t.Cleanup(func() { _, _ = tcp.Close(), udp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				for lines := bufio.NewScanner(c); lines.Scan(); { // an answer to each line
					if _, err := fmt.Fprintln(c, c.RemoteAddr()); err != nil {
						return
					}
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 2000)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo([]byte(from.String()+"\n"), from)
		}
	}()
}

// ask asks a server from inside a network namespace where the question comes from.
func ask(netns, proto string, to netip.Addr) (from string, err error) {
	var c net.Conn
	err = network.InNamespaces([]string{netns}, func() (err error) {
		c, err = net.DialTimeout(proto, net.JoinHostPort(to.String(), echoPort), 3*time.Second)
		return err
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	return question(c)
}

func question(c net.Conn) (string, error) {
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, "?\n"); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "", err
	}
	host, _, err := net.SplitHostPort(strings.TrimSpace(line))
	return host, err
}

// exchange has each pod of the nodes, and each node, reach each pod of the other nodes, with its own address as the source.
func (f *fabric) exchange(nodes ...*clusterNode) {
	f.t.Helper()
	for _, from := range nodes {
		for _, to := range nodes {
			if from == to {
				continue
			}
			for _, q := range to.pods {
				for _, p := range from.pods {
					for i := range q.addrs {
						f.reach(p, q, i)
					}
				}
				for i := range q.addrs {
					if _, err := ask(from.ns, "tcp", q.addrs[i]); err != nil {
						f.t.Errorf("%s itself to a pod of %s: %v", from.name, to.name, err)
					}
				}
			}
		}
	}
}

// reach waits until a pod reaches another one at one of its addresses, and wants its own to be seen there.
func (f *fabric) reach(p, q *clusterPod, i int) {
	f.t.Helper()
	what := fmt.Sprintf("from %s of %s to %s of %s", p.addrs[i], p.node.name, q.addrs[i], q.node.name)
	for _, proto := range []string{"tcp", "udp"} {
		must(f.t, lab.Eventually(f.t.Context(), soon, what, func(context.Context) error {
			from, err := ask(p.netns, proto, q.addrs[i])
			if err == nil && from != p.addrs[i].String() {
				f.t.Errorf("%s, by %s: it comes from %s", what, proto, from)
			}
			return err
		}))
	}
	// Large ones are put together again. The first one may be too large where pods were made before the tunnel: the kernel tells.
	must(f.t, lab.Eventually(f.t.Context(), soon, "ping "+what, func(ctx context.Context) error {
		return network.InNamespaces([]string{p.netns}, func() error {
			out, err := exec.CommandContext(ctx, tools.Busybox, "ping", "-c", "1", "-W", "1", "-s", "4000", q.addrs[i].String()).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}))
}

// outside wants pods to be seen with their node's address by the rest of the world.
func (f *fabric) outside(n *clusterNode) {
	f.t.Helper()
	if !f.answers() {
		answer(f.t, f.router)
	}
	for _, p := range n.pods {
		for _, to := range [][2]string{{outside4, n.addr4}, {outside6, n.addr6}} {
			if from, err := ask(p.netns, "tcp", netip.MustParseAddr(to[0])); err != nil || from != to[1] {
				f.t.Errorf("a pod of %s is seen outside as %q, want %s: %v", n.name, from, to[1], err)
			}
		}
	}
}

func (f *fabric) answers() bool {
	_, err := ask(f.router, "tcp", netip.MustParseAddr(outside4))
	return err == nil
}

func (p *clusterPod) mtu(t *testing.T) (mtu int) {
	must(t, network.InNamespaces([]string{p.netns}, func() error {
		link, err := netlink.LinkByName("eth0")
		if err == nil {
			mtu = link.Attrs().MTU
		}
		return err
	}))
	return mtu
}

// talk keeps connections of both families open between pods of two nodes. The returned function ends them and wants every
// question to have been answered.
func (f *fabric) talk(from, to *clusterNode) (stop func()) {
	f.t.Helper()
	done := make(chan error)
	quit := make(chan struct{})
	p, q := from.pods[0], to.pods[0]
	for _, addr := range q.addrs {
		var c net.Conn
		must(f.t, network.InNamespaces([]string{p.netns}, func() (err error) {
			c, err = net.DialTimeout("tcp", net.JoinHostPort(addr.String(), echoPort), 3*time.Second)
			return err
		}))
		go func() {
			defer func() { _ = c.Close() }()
			for n := 0; ; n++ {
				if _, err := question(c); err != nil {
					done <- fmt.Errorf("question %d to %s: %w", n, addr, err)
					return
				}
				select {
				case <-quit:
					done <- nil
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		}()
	}
	return func() {
		f.t.Helper()
		close(quit)
		for range q.addrs {
			if err := <-done; err != nil {
				f.t.Error(err)
			}
		}
	}
}

// inject sends packets for a pod into the tunnel, from where no node is: pods of another node, whose packets to nodes have
// that node's address when they arrive, pods of the same node, and the world outside.
func (f *fabric) inject(from, to *clusterNode) {
	t := f.t
	victim := to.pods[0]
	var heard net.PacketConn
	must(t, network.InNamespaces([]string{victim.netns}, func() (err error) {
		heard, err = net.ListenPacket("udp4", ":7001")
		return err
	}))
	defer func() { _ = heard.Close() }()
	var mac net.HardwareAddr
	must(t, network.InNamespaces([]string{to.ns}, func() error {
		link, err := netlink.LinkByName("berth.vxlan")
		if err == nil {
			mac = link.Attrs().HardwareAddr
		}
		return err
	}))
	packet := forged(mac, netip.MustParseAddr("10.90.2.99"), victim.addrs[0])
	arrives := func(netns string) bool {
		for range 3 {
			must(t, network.InNamespaces([]string{netns}, func() error {
				c, err := net.Dial("udp4", to.addr4+":4789")
				if err != nil {
					return err
				}
				defer func() { _ = c.Close() }()
				_, err = c.Write(packet)
				return err
			}))
			must(t, heard.SetReadDeadline(time.Now().Add(300*time.Millisecond)))
			if _, _, err := heard.ReadFrom(make([]byte, 100)); err == nil {
				return true
			}
		}
		return false
	}
	sources := map[string]string{"a pod of another node": from.pods[0].netns, "another pod of the node": to.pods[1].netns, "the world outside": f.router}
	for who, netns := range sources {
		if arrives(netns) {
			t.Errorf("what %s sends through the tunnel arrives", who)
		}
	}
	// Without the table it does, so that it is the table that keeps it away.
	for _, n := range []*clusterNode{from, to} {
		script(t, n.ns, "nft delete table inet berth-routes")
	}
	for who, netns := range sources {
		if !arrives(netns) {
			t.Errorf("what %s sends does not arrive in any case: this test shows nothing", who)
		}
	}
	for _, n := range []*clusterNode{from, to} { // the daemon looks at all when something is changed
		script(t, n.ns, "ip route flush proto 98")
	}
	must(t, lab.Eventually(t.Context(), soon, "the tables are there again", func(context.Context) error {
		for who, netns := range sources {
			if arrives(netns) {
				return fmt.Errorf("what %s sends arrives", who)
			}
		}
		return nil
	}))
}

// forged is a datagram to port 7001 of a pod, in a packet of the tunnel.
func forged(mac net.HardwareAddr, from, to netip.Addr) []byte {
	data := []byte("forged")
	udp := binary.BigEndian.AppendUint16(nil, 7001)
	udp = binary.BigEndian.AppendUint16(udp, 7001)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(data)))
	udp = append(binary.BigEndian.AppendUint16(udp, 0), data...) // no checksum
	ip := []byte{0x45, 0, 0, byte(20 + len(udp)), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	const vni = 48711
	packet := []byte{8, 0, 0, 0, vni >> 16, vni >> 8 & 0xff, vni & 0xff, 0}
	packet = append(append(packet, mac...), 2, 0, 0, 0, 0, 9, 8, 0) // from a station of nobody's, IPv4
	return append(append(packet, ip...), udp...)
}

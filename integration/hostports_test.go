//go:build integration

package integration

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestHostPorts is about ports of the node, on the default network, where they are berth's own, and on a configured one, where
// they are portmap's.
func TestHostPorts(t *testing.T) {
	t.Run("default network", func(t *testing.T) {
		n := newPortsNode(t, true)
		t.Run("conflicts", n.conflicts)
		t.Run("kept", n.kept)
		t.Run("kills", n.kills)
	})
	t.Run("configured network", func(t *testing.T) { newPortsNode(t, false).conflicts(t) })
}

type portsNode struct {
	*lab.Node
	bare bool
	next int32
}

func newPortsNode(t *testing.T, bare bool) *portsNode {
	t.Helper()
	if os.Getenv("BERTH_TEST_ENDPOINT") != "" || os.Getenv("BERTH_TEST_CONTAINERD") != "" {
		t.Skip("other runtimes let two pods have one host port")
	}
	o := lab.Options{Tools: tools, Log: t.Logf, Bare: bare}
	n := &portsNode{bare: bare}
	if bare {
		n.Node = startNode(t, o)
		_, err := n.CRI.UpdateRuntimeConfig(t.Context(), &runtimeapi.UpdateRuntimeConfigRequest{
			RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: n.Subnet()}},
		})
		must(t, err)
	} else {
		n.Node = newNode(t)
	}
	n.next = 25000 + 40*int32(n.Index)
	_, err := n.CRI.Pull(t.Context(), testimages.Busybox)
	must(t, err)
	ledger(t, n.Node)
	return n
}

// port is one that no other pod has.
func (n *portsNode) port() int32 {
	n.next++
	return n.next
}

func mapping(port int32, at string) *runtimeapi.PortMapping {
	return &runtimeapi.PortMapping{ContainerPort: 8080, HostPort: port, HostIp: at}
}

// web is a pod that has ports of the node; one that runs answers with its name.
func (n *portsNode) web(name string, ports ...*runtimeapi.PortMapping) *runtimeapi.PodSandboxConfig {
	p := n.Pod(name)
	p.PortMappings = ports
	return p
}

func (n *portsNode) run(t *testing.T, p *runtimeapi.PodSandboxConfig) string {
	t.Helper()
	id, err := n.CRI.RunPod(t.Context(), p)
	must(t, err)
	_, err = n.CRI.Start(t.Context(), id, p, lab.Sh("web", "exec tcpsvd -E 0 8080 echo "+p.Metadata.Name))
	must(t, err)
	return id
}

// answers waits for who answers at a port; "" is nobody.
func (n *portsNode) answers(t *testing.T, port int32, want string) {
	t.Helper()
	var got string
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		got = ""
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
		if err == nil {
			_ = conn.SetDeadline(time.Now().Add(time.Second))
			buf := make([]byte, 64)
			k, _ := conn.Read(buf)
			_ = conn.Close()
			got = strings.TrimSpace(string(buf[:k]))
		}
		if got == want {
			return
		}
	}
	t.Errorf("at port %d %q answers, want %q", port, got, want)
}

func (n *portsNode) conflicts(t *testing.T) {
	ctx := t.Context()
	port, other := n.port(), n.port()
	first := n.run(t, n.web("first", mapping(port, ""), mapping(other, "127.0.0.1")))
	n.answers(t, port, "first")
	second := n.web("second", mapping(port, ""))
	refused := func(p *runtimeapi.PodSandboxConfig, port int32) {
		t.Helper()
		_, err := n.CRI.RunPod(ctx, p)
		wantCode(t, err, codes.FailedPrecondition, "port_mappings", fmt.Sprintf("TCP port %d", port), "pod "+n.Network()+"/first", first[:12])
	}
	refused(second, port)
	refused(n.web("third", mapping(port, "127.0.0.1")), port)
	refused(n.web("third", mapping(port, "0.0.0.0")), port)
	refused(n.web("third", mapping(n.port(), ""), mapping(other, "127.0.0.1")), other)
	if dirs, err := os.ReadDir(filepath.Join(n.Run(), "pods")); err != nil || len(dirs) != 1 {
		t.Errorf("there is more than the first pod: %v, %v", dirs, err)
	}
	must(t, n.KillBerth())
	must(t, n.StartBerth(ctx))
	refused(second, port)

	// What is not the same port.
	udp := mapping(port, "")
	udp.Protocol = runtimeapi.Protocol_UDP
	onNode := n.web("on-the-node", mapping(port, ""))
	onNode.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
	for _, p := range []*runtimeapi.PodSandboxConfig{n.web("udp", udp), n.web("elsewhere", mapping(other, "127.0.0.2")), onNode} {
		id, err := n.CRI.RunPod(ctx, p)
		if err != nil {
			t.Errorf("%s: %v", p.Metadata.Name, err)
			continue
		}
		must(t, n.CRI.RemovePod(ctx, id))
	}

	// A pod that could not be made has none.
	bad, free := n.web("bad", mapping(n.next+1, "")), n.port()
	bad.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "much"}
	if _, err := n.CRI.RunPod(ctx, bad); err == nil {
		t.Error("a pod with a bandwidth that is none is made")
	}
	last, err := n.CRI.RunPod(ctx, n.web("last", mapping(free, "")))
	must(t, err)
	must(t, n.CRI.RemovePod(ctx, last))

	// A pod that is stopped, and not removed yet, has none.
	_, err = n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: first})
	must(t, err)
	id := n.run(t, second)
	n.answers(t, port, "second")
	must(t, n.CRI.RemovePod(ctx, first))
	n.answers(t, port, "second")
	must(t, n.CRI.RemovePod(ctx, id))
	n.answers(t, port, "")
}

// table is the table of the node's daemon; there is none while no pod has a port.
func (n *portsNode) table(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "table", "inet", n.HostPortsTable()).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "No such file or directory") {
		t.Fatalf("nft: %v: %s", err, out)
	}
	if err != nil {
		return ""
	}
	return string(out)
}

// kept is what becomes of ports when the daemon is killed, and when others remove its table.
func (n *portsNode) kept(t *testing.T) {
	ctx := t.Context()
	port := n.port()
	id := n.run(t, n.web("web", mapping(port, "")))
	n.answers(t, port, "web")
	before := n.table(t)
	if !strings.Contains(before, fmt.Sprintf("tcp . %d comment \"%s/web\"", port, n.Network())) {
		t.Errorf("the table is %s", before)
	}
	must(t, n.KillBerth())
	n.answers(t, port, "web")
	must(t, n.StartBerth(ctx))
	n.answers(t, port, "web")
	if after := n.table(t); after != before {
		t.Errorf("after a kill the table is\n%s\nand was\n%s", after, before)
	}

	name := n.HostPortsTable()
	out, err := exec.Command("nft", "delete", "table", "inet", name).CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	began := time.Now()
	for n.table(t) != before {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("the table is not back: %s", n.table(t))
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Logf("the table is back after %v", time.Since(began).Round(time.Millisecond))
	n.answers(t, port, "web")

	// The same while the daemon is not there.
	must(t, n.KillBerth())
	out, err = exec.Command("nft", "delete", "table", "inet", name).CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	n.answers(t, port, "")
	must(t, n.StartBerth(ctx))
	n.answers(t, port, "web")

	must(t, n.CRI.RemovePod(ctx, id))
	if left := n.table(t); left != "" {
		t.Errorf("left: %s", left)
	}
}

// kills has the daemon killed around the making and the removal of a pod's network. The port is nobody's, or whoever has it
// answers, afterwards.
func (n *portsNode) kills(t *testing.T) {
	ctx := t.Context()
	for _, point := range []string{
		"RunPodSandbox.network.before", "RunPodSandbox.network.after", "RunPodSandbox.record.before",
		"StopPodSandbox.network.undo-before", "StopPodSandbox.network.undo-after",
	} {
		t.Run(point, func(t *testing.T) {
			port := n.port()
			must(t, n.KillBerth())
			must(t, n.StartBerth(ctx, "BERTH_FAIL_AT="+point))
			p := n.web("killed", mapping(port, ""))
			id, err := n.CRI.RunPod(ctx, p)
			if err == nil {
				_, err = n.CRI.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
			}
			if err == nil {
				t.Fatal("the daemon was not killed")
			}
			select {
			case <-n.Berth.Done():
			case <-time.After(soon):
				t.Fatalf("the daemon was not killed: %v", err)
			}
			must(t, n.StartBerth(ctx))
			again := n.web("again", mapping(port, ""))
			must(t, lab.Eventually(ctx, soon, "the port is free", func(ctx context.Context) error {
				id, err = n.CRI.RunPod(ctx, again)
				return err
			}))
			_, err = n.CRI.Start(ctx, id, again, lab.Sh("web", "exec tcpsvd -E 0 8080 echo again"))
			must(t, err)
			n.answers(t, port, "again")
			must(t, n.CRI.RemovePods(ctx, func(*runtimeapi.PodSandbox) bool { return true }))
			if left := n.table(t); left != "" {
				t.Errorf("left: %s", left)
			}
		})
	}
}

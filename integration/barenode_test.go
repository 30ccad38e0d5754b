//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/integration/testimages"
)

// TestBareNode has no network configuration: the pod CIDR that a kubelet hands over is all that the network is made of.
func TestBareNode(t *testing.T) {
	t.Run("a kubelet by itself", bareKubelet)
	t.Run("a kubelet of a cluster", bareClusterNode)
}

// bareNode is a node whose network is made of its pod CIDR.
type bareNode struct{ *lab.Node }

// newBareNetwork starts a node without a network configuration, and with two images. Nothing of its pods is left in the end.
func newBareNetwork(t *testing.T) bareNode {
	t.Helper()
	if os.Getenv("BERTH_TEST_ENDPOINT") != "" || os.Getenv("BERTH_TEST_CONTAINERD") != "" {
		t.Skip("other runtimes have no default network")
	}
	n := bareNode{startNode(t, lab.Options{Tools: tools, Log: t.Logf, Bare: true})}
	for _, image := range []string{testimages.Busybox, testimages.Httpd} {
		_, err := n.CRI.Pull(t.Context(), image)
		must(t, err)
	}
	if err := n.CRI.Ready(t.Context()); err == nil || !strings.Contains(err.Error(), "no pod CIDR from the kubelet") {
		t.Fatalf("before the kubelet: %v", err)
	}
	return n
}

// bothFamilies is the node's pod CIDR, and one of IPv6 beside it.
func (n bareNode) bothFamilies() string { return fmt.Sprintf("%s,fd91:%x::/64", n.Subnet(), n.Index) }

func bareKubelet(t *testing.T) {
	n := newBareNetwork(t)
	ctx := t.Context()
	began := time.Now()
	ready := make(chan time.Duration, 1)
	go func() {
		for n.CRI.Ready(ctx) != nil && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		ready <- time.Since(began)
	}()
	must(t, n.StartKubelet(ctx, func(config map[string]any) { config["podCIDR"] = n.bothFamilies() }))
	t.Logf("the kubelet is healthy %v after its start, the network is ready after %v", time.Since(began), <-ready)
	if took := n.handOver(t); took > time.Second {
		t.Errorf("from the pod CIDR to the network it took %v", took)
	}
	before, err := n.Snapshot()
	must(t, err)
	kn := kubeletNode{n.Node, n.Kubelet}

	t.Run("pods", func(t *testing.T) {
		port := 23000 + n.Index
		web := kn.apply(t, "web", fmt.Sprintf(`
  containers:
  - {name: web, image: %q, ports: [{containerPort: 80, hostPort: %d}]}
`, testimages.Httpd, port), lab.Running)
		t.Logf("the first pod runs %v after the start of the kubelet", time.Since(began))
		addrs := n.wantAddresses(t, web.Metadata.UID, n.bothFamilies())
		for _, a := range addrs {
			must(t, eventually(t, "http://"+net.JoinHostPort(a.String(), "80")+"/"))
		}
		gateway := strings.TrimSuffix(n.Subnet(), "0/24") + "1"
		for _, url := range []string{fmt.Sprintf("http://127.0.0.1:%d/", port), fmt.Sprintf("http://%s:%d/", gateway, port)} {
			must(t, eventually(t, url))
		}
		kn.apply(t, "client", `
  containers:
  - {name: c, image: "`+testimages.Busybox+`", command: [sh, -c, "sleep 86400"]}
`, lab.Running)
		for _, from := range []string{"client", "web"} { // from web: to itself, through the bridge
			id := n.containerOf(t, from)
			for _, to := range []string{net.JoinHostPort(addrs[0].String(), "80"), net.JoinHostPort(addrs[1].String(), "80"), fmt.Sprintf("%s:%d", gateway, port)} {
				if _, err := n.CRI.Exec(ctx, id, "wget", "-q", "-T", "5", "-O", "/dev/null", "http://"+to+"/"); err != nil {
					t.Errorf("from %s to %s: %v", from, to, err)
				}
			}
		}

		// The kubelet says its pod CIDR once.
		must(t, n.KillBerth())
		must(t, n.StartBerth(ctx))
		must(t, n.CRI.Ready(ctx))
		must(t, eventually(t, "http://"+net.JoinHostPort(addrs[0].String(), "80")+"/"))

		// A configuration comes, of other addresses.
		subnet := fmt.Sprintf("10.94.%d.0/24", n.Index)
		must(t, os.WriteFile(filepath.Join(n.CNIConf(), "10-lab.conflist"), []byte(strings.Replace(n.Conflist(), n.Subnet(), subnet, 1)), 0o644))
		var now currentNetwork
		must(t, lab.Eventually(ctx, soon, "the configuration is in force", func(ctx context.Context) error {
			now = n.network(ctx, t)
			if now.Name != n.Network() {
				return fmt.Errorf("the network is %+v", now)
			}
			return nil
		}))
		if total := sum(now.PodsElsewhere); total != 2 {
			t.Errorf("%d pods are said to be on the default network: %+v", total, now)
		}
		if log := n.Berth.Tail(100); !strings.Contains(log, "network changed from pod CIDR "+n.bothFamilies()+" to "+n.CNIConf()+"/10-lab.conflist") {
			t.Errorf("the log says nothing of it")
		}
		later := kn.apply(t, "later", `
  containers:
  - {name: web, image: "`+testimages.Httpd+`"}
`, lab.Running)
		n.wantAddresses(t, later.Metadata.UID, subnet)
		for _, url := range []string{"http://" + later.Status.PodIP + "/", "http://" + net.JoinHostPort(addrs[0].String(), "80") + "/"} {
			must(t, eventually(t, url))
		}
	})
	// The kubelet removes dead sandboxes once a minute.
	if err := n.SettleWithin(ctx, before, 150*time.Second); err != nil {
		t.Error(err)
	}
}

func bareClusterNode(t *testing.T) {
	cp, err := lab.StartControlPlane(t.Context(), tools)
	must(t, err)
	t.Cleanup(func() { must(t, cp.Close()) })
	n := newBareNetwork(t)
	ctx := t.Context()
	began := time.Now()
	assigned := make(chan time.Duration, 1)
	go func() { // what the controller manager does
		defer close(assigned)
		path := "/api/v1/nodes/" + n.Network()
		for ctx.Err() == nil {
			if _, err := cp.Get(ctx, path); err == nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
		patch := fmt.Sprintf(`{"spec":{"podCIDR":%q,"podCIDRs":[%q]}}`, n.Subnet(), n.Subnet())
		if _, err := cp.Do(ctx, http.MethodPatch, path, "application/merge-patch+json", []byte(patch)); err != nil {
			t.Error(err)
		}
		assigned <- time.Since(began)
	}()
	must(t, n.JoinKubelet(ctx, cp, nil, func(config map[string]any) { delete(config, "podCIDR") }))
	ready, given := time.Since(began), <-assigned
	t.Logf("the node has its pod CIDR %v after the start of its kubelet, and is ready %v after that", given, ready-given)
	if took := n.handOver(t); took > time.Second {
		t.Errorf("from the pod CIDR to the network it took %v", took)
	}
	before, err := n.Snapshot()
	must(t, err)
	t.Run("pods", func(t *testing.T) {
		web := kubeNode{n.Node, cp}.apply(t, "web", `
  containers:
  - {name: web, image: "`+testimages.Httpd+`"}
`, lab.Running)
		must(t, eventually(t, "http://"+web.Status.PodIP+"/"))
	})
	must(t, n.RetireKubelet(ctx, soon))
	if err := n.SettleWithin(ctx, before, soon); err != nil {
		t.Error(err)
	}
}

// handOver is the time from the pod CIDR's arrival to the network's readiness, as the log has it.
func (n bareNode) handOver(t *testing.T) time.Duration {
	t.Helper()
	text, err := os.ReadFile(n.Berth.Log)
	must(t, err)
	at := func(message string) time.Time {
		for line := range strings.Lines(string(text)) {
			stamp, rest, _ := strings.Cut(strings.TrimPrefix(line, "time="), " ")
			if strings.Contains(rest, message) {
				when, err := time.Parse(time.RFC3339Nano, stamp)
				must(t, err)
				return when
			}
		}
		t.Fatalf("the log does not say %q", message)
		return time.Time{}
	}
	took := at("network is ready").Sub(at("pod CIDRs handed over"))
	t.Logf("from the pod CIDR to the network: %v", took)
	return took
}

// currentNetwork is what crictl info says of it.
type currentNetwork struct {
	Name, From    string
	PodsElsewhere map[string]int
}

func (n bareNode) network(ctx context.Context, t *testing.T) currentNetwork {
	t.Helper()
	status, err := n.CRI.RuntimeServiceClient.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	must(t, err)
	var now currentNetwork
	must(t, json.Unmarshal([]byte(status.Info["currentNetwork"]), &now))
	return now
}

func sum(counts map[string]int) (total int) {
	for _, n := range counts {
		total += n
	}
	return total
}

// sandbox is the ready pod of that uid.
func (n bareNode) sandbox(t *testing.T, uid string) *runtimeapi.PodSandboxStatus {
	t.Helper()
	pods, err := n.CRI.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": uid},
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}})
	must(t, err)
	if len(pods.Items) != 1 {
		t.Fatalf("%d pods of uid %s", len(pods.Items), uid)
	}
	status, err := n.CRI.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pods.Items[0].Id})
	must(t, err)
	return status.Status
}

// wantAddresses wants a pod to have an address of each range, and of no other, and returns them.
func (n bareNode) wantAddresses(t *testing.T, uid, cidrs string) []netip.Addr {
	t.Helper()
	network := n.sandbox(t, uid).GetNetwork()
	texts := []string{network.GetIp()}
	for _, more := range network.GetAdditionalIps() {
		texts = append(texts, more.GetIp())
	}
	var addrs []netip.Addr
	for _, text := range texts {
		addr, err := netip.ParseAddr(text)
		must(t, err)
		addrs = append(addrs, addr)
	}
	ranges := strings.Split(cidrs, ",")
	err := error(nil)
	if len(addrs) != len(ranges) {
		err = errors.New("not one of each")
	}
	for i := range min(len(addrs), len(ranges)) {
		if !netip.MustParsePrefix(ranges[i]).Contains(addrs[i]) {
			err = fmt.Errorf("%s is not of %s", addrs[i], ranges[i])
		}
	}
	if err != nil {
		t.Fatalf("addresses %v of %s: %v", addrs, cidrs, err)
	}
	return addrs
}

// containerOf is the running container of the static pod of that name.
func (n bareNode) containerOf(t *testing.T, pod string) string {
	t.Helper()
	list, err := n.CRI.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.name": pod + "-" + n.Network()},
		State:         &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}})
	must(t, err)
	if len(list.Containers) != 1 {
		t.Fatalf("%d containers of pod %s", len(list.Containers), pod)
	}
	return list.Containers[0].Id
}

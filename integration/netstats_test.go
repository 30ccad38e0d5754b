//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berth-run/berth/integration/lab"
	"github.com/berth-run/berth/network"
)

// TestNetworkStatsAreTheKernels has traffic on each of a pod's interfaces, of which an add-on may have given it more than one: what
// is told lies between what the kernel counts before and after.
func TestNetworkStatsAreTheKernels(t *testing.T) {
	n := newNode(t)
	if n.Foreign() {
		t.Skip("about berth serve alone")
	}
	ctx := t.Context()
	pod, podID, _ := runTrap(t, n, "counted", nil)
	_, err := n.CRI.Start(ctx, podID, pod, lab.Sh("talks", "exec tcpsvd -E 0 8080 head -c 1000000 /dev/zero"))
	must(t, err)
	addr, err := n.CRI.PodIP(ctx, podID)
	must(t, err)
	space := filepath.Join(n.Run(), "pods", podID, "ns", "net")
	must(t, network.InNamespaces([]string{space}, secondNetwork))
	must(t, lab.Eventually(ctx, soon, "the pod talks", func(context.Context) error {
		conn, err := net.DialTimeout("tcp", addr+":8080", 5*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if all, err := io.ReadAll(conn); err != nil || len(all) != 1_000_000 {
			return fmt.Errorf("%d bytes, %w", len(all), err)
		}
		return nil
	}))

	before := kernelCounters(t, space)
	resp, err := n.CRI.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: podID})
	must(t, err)
	after := kernelCounters(t, space)
	told := resp.GetStats().GetLinux().GetNetwork()
	if name := told.GetDefaultInterface().GetName(); name != network.IfName {
		t.Errorf("the default interface is %q", name)
	}
	var names []string
	for _, i := range append(told.GetInterfaces(), told.GetDefaultInterface()) {
		names = append(names, i.GetName())
		is := counters{i.GetRxBytes().GetValue(), i.GetTxBytes().GetValue(), i.GetRxErrors().GetValue(), i.GetTxErrors().GetValue()}
		t.Logf("%s: %v", i.GetName(), is)
		for c := range is {
			if least, most := before[i.GetName()][c], after[i.GetName()][c]; is[c] < least || is[c] > most {
				t.Errorf("%s: counter %d is %d, the kernel's %d to %d", i.GetName(), c, is[c], least, most)
			}
		}
		if is[0] == 0 || is[1] == 0 {
			t.Errorf("%s has had no traffic: %v", i.GetName(), is)
		}
	}
	if slices.Sort(names); !slices.Equal(names, []string{"eth0", "net1", "net2"}) {
		t.Errorf("interfaces %v", names)
	}
	if sent := told.GetDefaultInterface().GetTxBytes().GetValue(); sent < 1_000_000 {
		t.Errorf("a megabyte was sent, and %d bytes are told", sent)
	}
}

// counters are bytes received and sent, and errors of both.
type counters [4]uint64

// kernelCounters are those of a namespace's interfaces, by netlink.
func kernelCounters(t *testing.T, space string) map[string]counters {
	t.Helper()
	all := map[string]counters{}
	must(t, network.InNamespaces([]string{space}, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			s := l.Attrs().Statistics
			all[l.Attrs().Name] = counters{s.RxBytes, s.TxBytes, s.RxErrors, s.TxErrors}
		}
		return err
	}))
	return all
}

// secondNetwork adds two interfaces to a pod, with a cable between them, and sends something from each.
func secondNetwork() error {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "net1"}, PeerName: "net2"}); err != nil {
		return err
	}
	for i, name := range []string{"net1", "net2"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(fmt.Sprintf("192.0.2.%d/25", 1+i*128))
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link)); err != nil {
			return err
		}
	}
	for _, to := range []string{"192.0.2.9", "192.0.2.137"} { // nobody has these: the kernel asks for them on the link
		conn, err := net.Dial("udp", to+":9")
		if err != nil {
			return err
		}
		_, err = conn.Write([]byte("x"))
		_ = conn.Close()
		if err != nil {
			return err
		}
	}
	time.Sleep(100 * time.Millisecond)
	return nil
}

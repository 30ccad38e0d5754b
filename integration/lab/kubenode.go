package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Address is the node's own, at which the API server finds its kubelet: a kubelet refuses loopback addresses, and an address
// of the machine's would show it to the network.
func (n *Node) Address() string { return fmt.Sprintf("10.92.%d.1", n.Index) }

func (n *Node) ownAddress() (netlink.Link, *netlink.Addr, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, nil, err
	}
	return lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(n.Address()), Mask: net.CIDRMask(32, 32)}}, nil
}

func (n *Node) addAddress() error {
	lo, addr, err := n.ownAddress()
	if err != nil {
		return err
	}
	return netlink.AddrReplace(lo, addr)
}

func (n *Node) removeAddress() error {
	lo, addr, err := n.ownAddress()
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(lo, addr); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return err
	}
	return nil
}

// JoinKubelet starts a kubelet that registers the node, by the name of its network, and waits until that is ready. What the
// test wants otherwise it changes in the kubelet's configuration, or adds as an argument.
func (n *Node) JoinKubelet(ctx context.Context, cp *ControlPlane, args []string, change ...func(config map[string]any)) error {
	if err := n.addAddress(); err != nil {
		return err
	}
	args = append([]string{"--kubeconfig", cp.Kubeconfig, "--node-ip", n.Address()}, args...)
	if err := n.startKubelet(ctx, net.JoinHostPort(n.Address(), "10250"), args, change); err != nil {
		return err
	}
	return cp.WaitNode(ctx, n.Network(), 90*time.Second)
}

// RetireKubelet ends the kubelet of a node whose pods have all been deleted, and does what it would have done at its next
// garbage collection, up to a minute later: it removes the dead sandboxes and their links. That all are dead and all volumes
// are unmounted is waited for.
func (n *Node) RetireKubelet(ctx context.Context, within time.Duration) error {
	err := Eventually(ctx, within, "end of all pods and volumes", func(ctx context.Context) error {
		pods, err := n.CRI.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if pod.State == runtimeapi.PodSandboxState_SANDBOX_READY {
				return fmt.Errorf("pod %s is ready", pod.GetMetadata().GetName())
			}
		}
		mounts, err := mountTable()
		if err != nil {
			return err
		}
		for _, m := range mounts {
			if strings.HasPrefix(m.point, filepath.Join(n.Dir, "kubelet")+"/") {
				return fmt.Errorf("%s is mounted", m.point)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := n.Kubelet.Stop(); err != nil {
		return err
	}
	n.Kubelet = nil
	return errors.Join(n.CRI.RemovePods(ctx, n.owns), n.sweepLogLinks())
}

// Limits are those of a cgroup, as the kernel has them: bytes of memory, and microseconds of CPU time in a period.
type Limits struct{ Memory, Quota string }

// PodLimits are the limits of the cgroup that the kubelet has made for a pod.
func (n *Node) PodLimits(uid string) (Limits, error) {
	dirs, err := cgroupDirs(n.Cgroup())
	if err != nil {
		return Limits{}, err
	}
	var l Limits
	for _, dir := range dirs {
		if filepath.Base(dir) != "pod"+uid {
			continue
		}
		for file, into := range map[string]*string{
			"memory.max": &l.Memory, "memory.limit_in_bytes": &l.Memory, "cpu.max": &l.Quota, "cpu.cfs_quota_us": &l.Quota,
		} {
			if text, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
				*into = strings.Fields(string(text))[0]
			}
		}
	}
	if l.Memory == "" || l.Quota == "" {
		return l, fmt.Errorf("no cgroups of pod %s below %s", uid, n.Cgroup())
	}
	return l, nil
}

package cni

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// inNamespace runs f in a network namespace of its own.
func inNamespace(t testing.TB, f func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	if err := thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	}); err != nil {
		t.Fatal(err)
	}
}

func newPlugins(t testing.TB) *Plugins {
	p := New(slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(p.Close)
	return p
}

// pair makes a pair of interfaces, the second of which is a port of a bridge.
func pair() (first netlink.Link, err error) {
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}
	if err := netlink.LinkAdd(br); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	if br, err = bridgeByName("br0"); err != nil {
		return nil, err
	}
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "a"}, PeerName: "b"}
	if err := netlink.LinkAdd(v); err != nil {
		return nil, err
	}
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		return nil, err
	}
	port, err := netlink.LinkByName("b")
	if err != nil {
		return nil, err
	}
	return v, errors.Join(netlink.LinkSetMaster(port, br), netlink.AddrAdd(v, addr), netlink.LinkSetUp(br), netlink.LinkSetUp(port), netlink.LinkSetUp(v))
}

// An interface whose removal has returned is gone with all that was of it, again and again under the same name, although the
// kernel is not waited for.
func TestDeletedLinkIsGone(t *testing.T) {
	p := newPlugins(t)
	inNamespace(t, func() error {
		for range 20 {
			if _, err := pair(); err != nil {
				return err
			}
			nets, err := p.deleteByName("a")
			if err != nil {
				return err
			}
			if len(nets) != 1 || nets[0].String() != "192.0.2.1/24" {
				t.Errorf("addresses: %v", nets)
			}
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			for _, l := range links {
				if n := l.Attrs().Name; n != "lo" && n != "br0" {
					t.Errorf("%s is there", n)
				}
			}
			addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				t.Errorf("%s is there", a)
			}
		}
		if _, err := p.deleteByName("a"); !errors.Is(err, ip.ErrLinkNotFound) {
			t.Errorf("one that is not there: %v", err)
		}
		return nil
	})
}

// A removal that the kernel refuses is told, and does not wait for news that never come.
func TestRefusedRemovalIsTold(t *testing.T) {
	p := newPlugins(t)
	inNamespace(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		start := time.Now()
		if err := p.deleteLink(lo); err == nil {
			t.Error("lo is removed")
		}
		t.Logf("after %v", time.Since(start))
		return nil
	})
}

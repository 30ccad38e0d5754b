package cni

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// deleteInside deletes an interface in a namespace, and returns its global addresses. It is no error if either is gone.
func (p *Plugins) deleteInside(path, ifName string) (nets []*net.IPNet, err error) {
	if path == "" {
		return nil, nil
	}
	err = insidePath(path, func() (err error) {
		nets, err = p.deleteByName(ifName)
		if errors.Is(err, ip.ErrLinkNotFound) {
			return nil
		}
		return err
	})
	if gone(err) {
		return nil, nil
	}
	return nets, err
}

// deleteByName is the reference project's ip.DelLinkByNameAddr, but for what it does not wait for: see deleteLink.
func (p *Plugins) deleteByName(name string) (nets []*net.IPNet, err error) {
	l, err := netlinksafe.LinkByName(name)
	var notFound netlink.LinkNotFoundError
	switch {
	case errors.As(err, &notFound):
		return nil, ip.ErrLinkNotFound
	case err != nil:
		return nil, fmt.Errorf("failed to lookup %q: %v", name, err)
	}
	addrs, err := netlinksafe.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("failed to get IP addresses for %q: %v", name, err)
	}
	if err := p.deleteLink(l); err != nil {
		return nil, fmt.Errorf("failed to delete %q: %v", name, err)
	}
	for _, a := range addrs {
		if a.IP.IsGlobalUnicast() {
			nets = append(nets, a.IPNet)
		}
	}
	return nets, nil
}

// deleteLink deletes an interface in the namespace of this thread, and returns as soon as the kernel tells that it has gone:
// with its addresses, its routes and its other end, which is no port of a bridge any more. The kernel does not return from
// the request before nothing on any processor may still look at the interface (netdev_run_todo in net/core/dev.c), which
// nobody can see and which takes it 20 to 50 ms. That is not waited for, but by Close; it is done also if this process is
// killed.
func (p *Plugins) deleteLink(l netlink.Link) error {
	news, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE) // its socket is of this namespace, wherever it is used
	if err != nil {
		news.Close()
		return err
	}
	ended := make(chan error, 1)
	p.leave(func() {
		start := time.Now()
		err := h.LinkDel(l)
		h.Close()
		ended <- err
		news.Close() // and so whoever waits for news is told
		if err == nil {
			p.log.Debug("a deleted interface is freed by the kernel, which was not waited for", "interface", l.Attrs().Name, "after", time.Since(start))
		}
	})
	for {
		msgs, _, err := news.Receive()
		if err != nil { // the end, or too many news
			return <-ended
		}
		for _, m := range msgs {
			if m.Header.Type == unix.RTM_DELLINK && isAbout(m.Data, l.Attrs().Index) {
				return nil
			}
		}
	}
}

// isAbout says whether news are of an interface, and not of it as a port of a bridge. m begins with struct ifinfomsg.
func isAbout(m []byte, index int) bool {
	const indexAt = 4
	return len(m) >= unix.SizeofIfInfomsg && m[0] == unix.AF_UNSPEC && int(int32(binary.NativeEndian.Uint32(m[indexAt:]))) == index
}

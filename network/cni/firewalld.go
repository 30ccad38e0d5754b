package cni

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/godbus/dbus/v5"
)

// firewalld opens by having pods' addresses in a zone of firewalld, which is asked for over D-Bus (firewalld.dbus(5)).
type firewalld struct {
	ctx  context.Context
	conn *dbus.Conn
}

const (
	firewalldName = "org.fedoraproject.FirewallD1"
	firewalldPath = "/org/fedoraproject/FirewallD1"
	firewalldZone = firewalldName + ".zone."
)

// openFirewalld connects to the system's bus, as the reference does; firewalld need not be there.
func openFirewalld(ctx context.Context) (*firewalld, error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, err
	}
	return &firewalld{ctx, conn}, nil
}

func (f *firewalld) close() { _ = f.conn.Close() } // nothing is on its way

// running says whether firewalld is there.
func (f *firewalld) running() bool {
	var owner string
	return f.conn.BusObject().CallWithContext(f.ctx, "org.freedesktop.DBus.GetNameOwner", 0, firewalldName).Store(&owner) == nil
}

// ask calls a method of zones about an address.
func (f *firewalld) ask(method, zone string, addr *net.IPNet, answer any) error {
	return f.conn.Object(firewalldName, firewalldPath).CallWithContext(f.ctx, firewalldZone+method, 0, zone, addr.String()).Store(answer)
}

func (f *firewalld) open(conf *firewallConf) error {
	for _, ipc := range conf.result.IPs {
		addr, zone := alone(ipc.Address.IP, ipc), ""
		if err := f.ask("addSource", conf.FirewalldZone, addr, &zone); err != nil && !strings.Contains(err.Error(), "ZONE_ALREADY_SET") {
			return fmt.Errorf("failed to add the address %v to %v zone: %v", addr, conf.FirewalldZone, err)
		}
	}
	return nil
}

// shut does not tell that an address is not there.
func (f *firewalld) shut(conf *firewallConf) error {
	for _, ipc := range conf.result.IPs {
		var zone string
		_ = f.ask("removeSource", conf.FirewalldZone, alone(ipc.Address.IP, ipc), &zone)
	}
	return f.ctx.Err()
}

// check takes any answer for a yes, as the reference does.
func (f *firewalld) check(conf *firewallConf) error {
	for _, ipc := range conf.result.IPs {
		addr, there := alone(ipc.Address.IP, ipc), false
		if err := f.ask("querySource", conf.FirewalldZone, addr, &there); err != nil {
			return fmt.Errorf("failed to find the address %v in %v zone", addr, conf.FirewalldZone)
		}
	}
	return nil
}

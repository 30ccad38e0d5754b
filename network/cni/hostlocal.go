package cni

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
)

func init() {
	plugins["host-local"] = plugin{versions: version.All, add: hostLocalAdd, del: hostLocalDel, check: hostLocalCheck}
}

func hostLocalAdd(c *call) error {
	conf, confVersion, err := allocator.LoadIPAMConfig(c.config, c.args)
	if err != nil {
		return configError{err}
	}
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Routes: conf.Routes}
	if conf.ResolvConf != "" {
		if result.DNS, err = readResolvConf(conf.ResolvConf); err != nil {
			return err
		}
	}
	store, err := openLeases(c.ctx, conf.Name, conf.DataDir)
	if err != nil {
		return err
	}
	defer store.close()
	store.freeTorn(c.log)
	if result.IPs, err = allocate(c, conf, store); err != nil {
		return err
	}
	return c.print(result, confVersion)
}

// allocate takes an address from each set of ranges, or none at all.
func allocate(c *call, conf *allocator.IPAMConfig, store *leases) (ips []*types100.IPConfig, err error) {
	wanted := map[string]net.IP{}
	for _, ip := range conf.IPArgs {
		wanted[ip.String()] = ip
	}
	defer func() {
		if err != nil && len(ips) > 0 {
			_ = store.ReleaseByID(c.containerID, c.ifName) // it tells no errors
		}
	}()
	for i := range conf.Ranges {
		ip, err := allocator.NewIPAllocator(&conf.Ranges[i], store, i).Get(c.containerID, c.ifName, takeWanted(wanted, &conf.Ranges[i]))
		if err != nil {
			return ips, fmt.Errorf("failed to allocate for range %d: %v", i, err)
		}
		ips = append(ips, ip)
	}
	if len(wanted) > 0 {
		msg := "failed to allocate all requested IPs:"
		for _, ip := range wanted {
			msg += " " + ip.String()
		}
		return ips, errors.New(msg)
	}
	return ips, nil
}

// takeWanted takes an address that was asked for and is in a set of ranges, if there is one.
func takeWanted(wanted map[string]net.IP, set *allocator.RangeSet) net.IP {
	for key, ip := range wanted {
		if set.Contains(ip) {
			delete(wanted, key)
			return ip
		}
	}
	return nil
}

// hostLocalLeases reads the configuration and opens the leases of its network, which the caller closes.
func hostLocalLeases(c *call) (*allocator.IPAMConfig, *leases, error) {
	conf, _, err := allocator.LoadIPAMConfig(c.config, c.args)
	if err != nil {
		return nil, nil, configError{err}
	}
	store, err := openLeases(c.ctx, conf.Name, conf.DataDir)
	return conf, store, err
}

func hostLocalDel(c *call) error {
	conf, store, err := hostLocalLeases(c)
	if err != nil {
		return err
	}
	defer store.close()
	// Once for each set of ranges: the second time finds what was noted before there were names of interfaces.
	for range conf.Ranges {
		if err := store.ReleaseByID(c.containerID, c.ifName); err != nil {
			return err
		}
	}
	return nil
}

func hostLocalCheck(c *call) error {
	_, store, err := hostLocalLeases(c)
	if err != nil {
		return err
	}
	defer store.close()
	if !store.has(c.containerID, c.ifName) {
		return fmt.Errorf("host-local: Failed to find address added by container %v", c.containerID)
	}
	return nil
}

// readResolvConf reads a resolv.conf(5).
func readResolvConf(file string) (dns types.DNS, err error) {
	f, err := os.Open(file)
	if err != nil {
		return dns, err
	}
	defer f.Close() //nolint:errcheck // opened for reading
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || strings.ContainsAny(fields[0][:1], "#;") {
			continue
		}
		switch fields[0] {
		case "nameserver":
			dns.Nameservers = append(dns.Nameservers, fields[1])
		case "domain":
			dns.Domain = fields[1]
		case "search":
			dns.Search = append(dns.Search, fields[1:]...)
		case "options":
			dns.Options = append(dns.Options, fields[1:]...)
		}
	}
	return dns, lines.Err()
}

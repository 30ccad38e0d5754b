package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"

	"github.com/berth-run/berth/proxy"
	"github.com/berth-run/berth/proxy/config"
	"github.com/berth-run/berth/proxy/iptables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/nft"
	"github.com/berth-run/berth/proxy/program"
)

// kernel is what programs it, in a mode.
type kernel struct {
	program.Programmer
	io.Closer
	mode     string
	families []string
	// counted has what the kernel has counted for Services; nil if it does not.
	counted func() (map[program.Counted]program.Count, error)
	// restores has what iptables-restore was given; nil where it is not it.
	restores func() [model.Families]program.Restores
	// inspector reads what the kernel has; nil if the mode has none.
	inspector program.Inspector
	// resets answers packets by resets; nil if nothing does.
	resets program.Resetter
	// alone removes the rules of the other mode, and of kube-proxy in this one where they are not taken over, once all is programmed.
	alone func()
}

// Abilities are those of the Programmer.
func (k *kernel) Abilities() program.Abilities { return program.AbilitiesOf(k.Programmer) }

// openKernel opens what the mode says: where it is empty nftables, and iptables on a kernel without. What is taken then is the
// configuration in force. The claim is for programs that change tables.
func openKernel(c *config.Config, own *proxyFlags, claim *os.File, log *slog.Logger) (*kernel, error) {
	switch c.Proxy.Mode {
	case config.IPTables:
		return openIPTables(c, own, claim, log)
	case config.NFTables:
		return openNFTables(c, own, log)
	case config.Auto:
	default:
		return nil, fmt.Errorf("%s: %q: berth has nftables and iptables: say one of them, or leave it empty", c.ModeAt(), c.Proxy.Mode)
	}
	k, err := openNFTables(c, own, log)
	if err == nil {
		return k, nil
	}
	log.Warn("the kernel's nf_tables cannot do what is needed, and no mode is configured: it is iptables", "error", err)
	c.Proxy.Mode = config.IPTables
	return openIPTables(c, own, claim, log)
}

func openNFTables(c *config.Config, own *proxyFlags, log *slog.Logger) (*kernel, error) {
	p, err := nft.Open(nft.Options{Log: log, Counters: own.counters})
	if err != nil {
		return nil, err
	}
	if c.Proxy.Mode == config.Auto {
		if err := p.Supported(); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	k := &kernel{Programmer: p, Closer: p, mode: string(config.NFTables), families: []string{"IPv4"}}
	if ipv6() {
		k.families = append(k.families, "IPv6")
	}
	if counters := p.Counters(); counters != nil {
		k.counted = counters.Read
	}
	k.inspector, k.resets = p.Inspector(), p.Resets()
	k.alone = func() {
		tellRemoved(log, proxy.RemoveKubeProxyTables)
		tellRemoved(log, iptables.Remove)
	}
	return k, nil
}

func openIPTables(c *config.Config, own *proxyFlags, claim *os.File, log *slog.Logger) (*kernel, error) {
	if err := iptables.Supported(model.IPv4); err != nil {
		return nil, fmt.Errorf("mode iptables: %w", err)
	}
	k := &kernel{mode: string(config.IPTables), families: []string{"IPv4"}}
	if ipv6() {
		if err := iptables.Supported(model.IPv6); err != nil {
			log.Warn("Services are reached by IPv4 alone", "error", err)
		} else {
			k.families = append(k.families, "IPv6")
		}
	}
	p, err := iptables.Open(iptables.Options{MasqueradeBit: int(*c.Proxy.IPTables.MasqueradeBit), Period: c.SyncPeriod(), Held: claim, Log: log})
	if err != nil {
		return nil, err
	}
	k.Programmer, k.Closer, k.restores, k.inspector = p, p, p.Restores, p.Inspector()
	if own.counters {
		k.counted = p.Counters().Read
	}
	k.alone = func() { tellRemoved(log, proxy.RemoveNFTables) }
	return k, nil
}

// tellRemoved removes the rules of another proxy. What is left of them may lead packets to endpoints that are no more.
func tellRemoved(log *slog.Logger, remove func() ([]string, error)) {
	removed, err := remove()
	if len(removed) > 0 {
		log.Info("rules of another proxy, or mode, are removed", "removed", strings.Join(removed, "; "))
	}
	if err != nil {
		log.Warn("rules of another proxy, or mode, could not be removed: berth proxy --cleanup tries it again", "error", err)
	}
}

// ipv6 is whether the kernel does it.
func ipv6() bool {
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		return false
	}
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err != nil || strings.TrimSpace(string(off)) != "1"
}

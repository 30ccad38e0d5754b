package proxy

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/iptables"
	"github.com/berth-run/berth/proxy/ipvs"
	"github.com/berth-run/berth/proxy/nft"
)

// kubeProxyTable is the table that kube-proxy has in each family in its nftables mode.
const kubeProxyTable = "kube-proxy"

// Cleanup removes the rules of berth and of a former kube-proxy in modes nftables, iptables and ipvs, in the network namespace
// of the calling thread, and says what it has removed. Services are not reachable then, until a proxy starts. What the
// kubelet has made stays. A failure does not keep it from the rest.
func Cleanup() ([]string, error) {
	removed, err := RemoveNFTables()
	chains, err2 := iptables.Remove()
	others, err3 := ipvs.Remove() // its sets can go when no rule has them
	return append(append(removed, chains...), others...), errors.Join(err, err2, err3)
}

// CleanupOwn is Cleanup of what berth alone has, for a node whose kube-proxy runs again: that keeps its rules.
func CleanupOwn() ([]string, error) {
	removed, err := removeOwnTables()
	chains, err2 := iptables.RemoveOwn()
	return append(removed, chains...), errors.Join(err, err2)
}

// OwnLeft is what CleanupOwn leaves of berth's, since no kube-proxy has taken it over: the rules of mode iptables, which are in force.
func OwnLeft() []string { return iptables.OwnLeft() }

// RemoveNFTables is Cleanup for mode nftables alone.
func RemoveNFTables() ([]string, error) {
	removed, err := removeOwnTables()
	others, err2 := RemoveKubeProxyTables()
	return append(removed, others...), errors.Join(err, err2)
}

func removeOwnTables() ([]string, error) {
	own, err := nft.Remove(nft.Options{})
	if !own {
		return nil, err
	}
	return []string{"tables " + nft.Table}, err
}

// RemoveKubeProxyTables is Cleanup of what kube-proxy has in its mode nftables.
func RemoveKubeProxyTables() ([]string, error) {
	var removed []string
	var errs []error
	for _, f := range []struct {
		family byte
		name   string
	}{{unix.NFPROTO_IPV4, "ip"}, {unix.NFPROTO_IPV6, "ip6"}} {
		there, err := removeTable(f.family, kubeProxyTable)
		if there {
			removed = append(removed, "table "+f.name+" "+kubeProxyTable)
		}
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// removeTable removes a table with all that is in it.
func removeTable(family byte, table string) (bool, error) {
	c, err := nftables.Open()
	if err != nil {
		return false, err
	}
	defer c.Close()
	var b nftables.Batch
	b.Begin(unix.NFT_MSG_DELTABLE, 0, family, "table "+table)
	b.String(unix.NFTA_TABLE_NAME, table)
	b.End()
	switch err := c.Commit(&b); {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("remove table %s: %w", table, err)
	}
	return true, nil
}

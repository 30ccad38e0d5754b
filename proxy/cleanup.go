package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/nft"
)

// kubeProxyTable is the table that kube-proxy has in each family in its nftables mode.
const kubeProxyTable = "kube-proxy"

// Cleanup removes the rules of berth and of a former kube-proxy in modes nftables, iptables and ipvs, in the network namespace
// of the calling thread, and says what it has removed. Services are not reachable then, until a proxy starts. What the
// kubelet has made stays. A failure does not keep it from the rest.
func Cleanup(ctx context.Context) ([]string, error) {
	var removed []string
	var errs []error
	own, err := nft.Remove(nft.Options{})
	if own {
		removed = append(removed, "tables "+nft.Table)
	}
	errs = append(errs, err)
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
	for _, program := range iptablesPrograms() {
		for _, table := range []string{"nat", "filter", "mangle"} {
			n, err := removeChains(ctx, program, table)
			if n > 0 {
				removed = append(removed, fmt.Sprintf("%d chains of %s in table %s", n, program, table))
			}
			errs = append(errs, err)
		}
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

// iptablesPrograms are those that are there: a kube-proxy may have used either of a host that has two backends.
func iptablesPrograms() []string {
	var out []string
	for _, name := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		if _, err := exec.LookPath(name + "-save"); err == nil {
			out = append(out, name)
		}
	}
	if out != nil {
		return out
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		if _, err := exec.LookPath(name + "-save"); err == nil {
			out = append(out, name)
		}
	}
	return out
}

// removeChains removes kube-proxy's chains from a table, in one transaction, and says how many.
func removeChains(ctx context.Context, program, table string) (int, error) {
	saved, err := exec.CommandContext(ctx, program+"-save", "-t", table).Output()
	if err != nil {
		return 0, nil // the kernel does not have the table, so there is nothing in it
	}
	input, n := removal(table, string(saved))
	if n == 0 {
		return 0, nil
	}
	cmd := exec.CommandContext(ctx, program+"-restore", "--noflush")
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s-restore, table %s: %w: %s", program, table, err, bytes.TrimSpace(out))
	}
	return n, nil
}

// removal is what iptables-restore reads to remove kube-proxy's chains, and those rules of other chains that lead there.
func removal(table, saved string) (input string, chains int) {
	var flush, jumps, remove strings.Builder
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, ":"); ok {
			if name, _, _ = strings.Cut(name, " "); isKubeProxys(name) {
				chains++
				fmt.Fprintf(&flush, ":%s - [0:0]\n", name)
				fmt.Fprintf(&remove, "-X %s\n", name)
			}
			continue
		}
		rule, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		words := strings.Fields(rule)
		at := slices.IndexFunc(words, func(w string) bool { return w == "-j" || w == "-g" })
		if at >= 0 && at+1 < len(words) && isKubeProxys(words[at+1]) && !isKubeProxys(words[0]) {
			fmt.Fprintf(&jumps, "-D %s\n", rule)
		}
	}
	return "*" + table + "\n" + flush.String() + jumps.String() + remove.String() + "COMMIT\n", chains
}

// isKubeProxys tells its chains from the kubelet's (KUBE-FIREWALL, KUBE-KUBELET-CANARY, KUBE-IPTABLES-HINT) and from those of
// others. KUBE-MARK-DROP is the kubelet's as well.
func isKubeProxys(chain string) bool {
	name, ok := strings.CutPrefix(chain, "KUBE-")
	if !ok {
		return false
	}
	switch name {
	case "SERVICES", "EXTERNAL-SERVICES", "NODEPORTS", "FORWARD", "PROXY-FIREWALL", "POSTROUTING", "MARK-MASQ", "PROXY-CANARY",
		"LOAD-BALANCER", "NODE-PORT", "SOURCE-RANGES-FIREWALL", "IPVS-FILTER", "IPVS-OUT-FILTER":
		return true
	}
	for _, prefix := range []string{"SVC-", "SVL-", "SEP-", "FW-", "EXT-", "XLB-"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

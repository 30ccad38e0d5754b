package cni

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// Where Docker runs on the node, or a firewall such as ufw, what is forwarded is dropped unless a rule lets it through: the policy
// of chain FORWARD in iptables' table filter is DROP. No pod is reached then, nor reaches anything but the node. Those who make
// networks for pods have rules for their ranges at the end of that chain (flannel, for one), and so has the default network: what
// the node's operator drops by a rule stays dropped.

const (
	filterForward = "FORWARD"
	// forwardTime bounds what iptables may take.
	forwardTime = 20 * time.Second
)

// LetThrough sees to it that what iptables drops by policy is forwarded all the same where it is from or for one of the ranges.
// It returns those that it has made rules for. Without that policy it does nothing. To look at an iptables that does not use
// nf_tables, legacy, takes a process.
func LetThrough(ranges []netip.Prefix, legacy bool) (opened []netip.Prefix, err error) {
	var errs []error
	for _, r := range ranges {
		made, err := letThrough(r, legacy)
		if made {
			opened = append(opened, r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("the node's firewall drops what is for pods of %s, and from them (policy DROP of chain FORWARD): %w", r, err))
		}
	}
	return opened, errors.Join(errs...)
}

func letThrough(r netip.Prefix, legacy bool) (made bool, err error) {
	family := "iptables"
	if r.Addr().Is6() {
		family = "ip6tables"
	}
	programs := []string{family + "-nft-restore", family + "-restore"}
	shut, err := shutNFT(r)
	if err == nil && !shut && legacy {
		programs[0] = family + "-legacy-restore"
		shut, err = shutLegacy(r, family)
	}
	if err != nil || !shut {
		return false, err
	}
	err = openForward(r, programs...)
	return err == nil, err
}

// forwardChain is the chain for a range.
func forwardChain(r netip.Prefix) string {
	sum := sha256.Sum256([]byte(r.String()))
	return "BERTH-FORWARD-" + hex.EncodeToString(sum[:4])
}

// shutNFT says whether iptables in nf_tables drops what is of a range.
func shutNFT(r netip.Prefix) (bool, error) {
	t, err := openNFTTable(nfproto(r.Addr().Is6()), "filter")
	if err != nil {
		return false, nil //nolint:nilerr // this kernel has no nf_tables
	}
	defer t.close()
	chain, err := t.get(t.getChain(filterForward))
	if err != nil {
		return false, nil //nolint:nilerr // there is none
	}
	drops := false
	nftables.Attrs(bytes.Join(chain, nil), func(kind uint16, content []byte) {
		const nfDrop = 0 // NF_DROP
		drops = drops || kind == unix.NFTA_CHAIN_POLICY && len(content) == 4 && binary.BigEndian.Uint32(content) == nfDrop
	})
	if !drops {
		return false, nil
	}
	rules, err := t.rules(filterForward)
	if err != nil {
		return false, err
	}
	return !slices.ContainsFunc(rules, func(rule nftRule) bool { return rule.exprs.jumpsTo(forwardChain(r)) }), nil
}

// shutLegacy says the same of an iptables that does not use nf_tables, where its module is loaded.
func shutLegacy(r netip.Prefix, family string) (bool, error) {
	names := "/proc/thread-self/net/ip_tables_names"
	if r.Addr().Is6() {
		names = "/proc/thread-self/net/ip6_tables_names"
	}
	tables, err := os.ReadFile(names)
	if err != nil || !slices.Contains(strings.Fields(string(tables)), "filter") {
		return false, nil //nolint:nilerr // not loaded
	}
	program, err := installed(family+"-legacy", family)
	if err != nil {
		return false, nil //nolint:nilerr // whoever loaded it has taken his program with him
	}
	rules, err := runProgram(program, "", "-w", "-S", filterForward)
	if err != nil {
		return false, err
	}
	return strings.Contains(rules, "-P "+filterForward+" DROP") && !strings.Contains(rules, "-j "+forwardChain(r)+"\n"), nil
}

// openForward makes the rules for a range with the first program that there is, all at once. They are made anew where the chain is there
// and nothing leads to it.
func openForward(r netip.Prefix, programs ...string) error {
	chain := forwardChain(r)
	program, err := installed(programs...)
	if err != nil {
		return fmt.Errorf("%w; let it through: iptables -A %s -s %s -j ACCEPT; iptables -A %s -d %s -j ACCEPT", err, filterForward, r, filterForward, r)
	}
	const comment = `-m comment --comment "pods of berth's default network"`
	_, err = runProgram(program, fmt.Sprintf(`*filter
:%[1]s - [0:0]
-A %[1]s -s %[2]s %[3]s -j ACCEPT
-A %[1]s -d %[2]s %[3]s -j ACCEPT
-A %[4]s %[3]s -j %[1]s
COMMIT
`, chain, r, comment, filterForward), "-w", "--noflush")
	return err
}

// installed is the path of the first program that there is.
func installed(names ...string) (string, error) {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", strings.Join(names, ", "), errNoIPTables)
}

// runProgram runs a program, in the network namespace of this thread, and returns what it writes.
func runProgram(program, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), forwardTime)
	defer cancel()
	var out, complaint bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", program, err, bytes.TrimSpace(complaint.Bytes()))
	}
	return out.String(), nil
}

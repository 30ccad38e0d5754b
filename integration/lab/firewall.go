package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// firewallDumps are the commands that show rules, where they are installed.
var firewallDumps = [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}}

// lookFirewall notes the rules that speak of the node's network or of its addresses. Chains that a plugin makes once, for
// all networks, stay.
func (n *Node) lookFirewall(s Snapshot) error {
	prefix := strings.TrimSuffix(n.Subnet(), "0/24")
	for _, dump := range firewallDumps {
		if _, err := exec.LookPath(dump[0]); err != nil {
			continue
		}
		out, err := exec.Command(dump[0], dump[1:]...).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", strings.Join(dump, " "), err)
		}
		for _, line := range strings.Split(string(out), "\n") {
			if n.named(line) || strings.Contains(line, prefix) {
				s[dump[0]+" "+strings.TrimSpace(line)] = true
			}
		}
	}
	return nil
}

// named tells whether a rule's comment names the node's network.
func (n *Node) named(rule string) bool {
	return strings.Contains(rule, n.Network()+`"`) || strings.Contains(rule, n.Network()+`\"`)
}

// sweepFirewall removes the NAT rules of pods that no CNI DEL has removed: those whose comment names the network, and the
// chains of a pod that they lead to; and the table of the default network's host ports.
func (n *Node) sweepFirewall() error {
	if n.bare {
		_ = exec.Command("nft", "delete", "table", "inet", n.HostPortsTable()).Run() // not there, usually
	}
	out, err := exec.Command("iptables-save", "-t", "nat").Output()
	if err != nil {
		return fmt.Errorf("iptables-save: %w", err)
	}
	restore := n.undoRules(strings.Split(string(out), "\n"))
	if restore == "" {
		return nil
	}
	cmd := exec.Command("iptables-restore", "--noflush")
	cmd.Stdin = strings.NewReader(restore)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("iptables-restore: %w: %s", err, text)
	}
	return nil
}

// HostPortsTable is the name of the nftables table, of family inet, that the node's daemon has for host ports.
func (n *Node) HostPortsTable() string {
	sum := sha256.Sum256([]byte(filepath.Join(n.Root(), "cni")))
	return "berth-hostports-" + hex.EncodeToString(sum[:4])
}

// undoRules is the input of iptables-restore that removes the node's rules from what iptables-save wrote.
func (n *Node) undoRules(saved []string) string {
	var jumps, chains []string
	for _, line := range saved {
		words := strings.Fields(line)
		if len(words) < 4 || words[0] != "-A" || !n.named(line) {
			continue
		}
		jumps = append(jumps, line)
		target := words[len(words)-1]
		if words[len(words)-2] == "-j" && strings.HasPrefix(target, "CNI-") && !strings.HasPrefix(target, "CNI-HOSTPORT") {
			chains = append(chains, target)
		}
	}
	if len(jumps) == 0 {
		return ""
	}
	undo := []string{"*nat"}
	for _, line := range jumps {
		if !slices.Contains(chains, strings.Fields(line)[1]) { // those inside a pod's chain go with it
			undo = append(undo, "-D"+strings.TrimPrefix(line, "-A"))
		}
	}
	for _, chain := range chains {
		undo = append(undo, "-F "+chain)
	}
	for _, chain := range chains {
		undo = append(undo, "-X "+chain)
	}
	return strings.Join(append(undo, "COMMIT", ""), "\n")
}

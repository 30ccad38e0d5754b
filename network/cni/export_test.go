package cni

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
)

// RuleSet is all that nf_tables holds in the network namespace of this thread, byte for byte but for counts: a line for each
// chain, and one for each of its rules that drop does not want dropped, with its number.
func RuleSet(drop func(line string) bool) ([]string, error) {
	c, err := openNFT()
	if err != nil {
		return nil, err
	}
	defer c.close()
	var all []string
	tables, err := c.get(nftMsg{kind: unix.NFT_MSG_GETTABLE, flags: unix.NLM_F_DUMP})
	if err != nil {
		return nil, err
	}
	for _, m := range tables {
		line := "nft table"
		nftables.Attrs(m, func(kind uint16, content []byte) {
			switch kind {
			case unix.NFTA_TABLE_NAME, unix.NFTA_TABLE_FLAGS, nftaTableUserdata:
				line += fmt.Sprintf(" %q", content)
			}
		})
		// iptables makes its table when it is asked to delete what is not there; it is not missed.
		if !strings.HasPrefix(line, `nft table "nat\x00"`) && !strings.HasPrefix(line, `nft table "filter\x00"`) {
			all = append(all, line)
		}
	}
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET, unix.NFPROTO_BRIDGE} {
		chains, err := c.get(nftMsg{kind: unix.NFT_MSG_GETCHAIN, flags: unix.NLM_F_DUMP, family: family})
		if err != nil {
			return nil, err
		}
		for _, m := range chains {
			lines, err := c.chainLines(family, m, drop)
			if err != nil {
				return nil, err
			}
			all = append(all, lines...)
		}
	}
	slices.Sort(all)
	return all, nil
}

func (c *nftConn) chainLines(family byte, chain []byte, drop func(string) bool) ([]string, error) {
	var table, name, base string
	nftables.Attrs(chain, func(kind uint16, content []byte) {
		switch kind {
		case unix.NFTA_CHAIN_TABLE:
			table = strings.TrimRight(string(content), "\x00")
		case unix.NFTA_CHAIN_NAME:
			name = strings.TrimRight(string(content), "\x00")
		case unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE:
			base += fmt.Sprintf(" %x", content)
		case nftaChainUserdata:
			base += fmt.Sprintf(" %q", content)
		}
	})
	t := nftTable{nftConn: c, family: family, name: table}
	rules, err := t.rules(name)
	if err != nil {
		return nil, err
	}
	where := fmt.Sprintf("nft %d %s %s", family, table, name)
	var lines []string
	if !drop(where) {
		lines = append(lines, where+base)
	}
	number := 0
	for _, r := range rules {
		line := fmt.Sprintf("%s %q", exprLine(r.exprs), r.userdata)
		if drop(where + " " + line) {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s rule %03d: %s", where, number, line))
		number++
	}
	return lines, nil
}

func exprLine(exprs nftExprs) string {
	var parts []string
	for _, e := range exprs {
		name, data := exprParts(e[4:])
		parts = append(parts, fmt.Sprintf("%s%q", name, data))
	}
	return strings.Join(parts, " ")
}

// ForgetIPTables has the node's iptables looked for anew.
func ForgetIPTables() {
	iptables.Lock()
	defer iptables.Unlock()
	for _, known := range iptables.tables {
		known.looked, known.asked = time.Time{}, time.Time{}
	}
}

// IPTablesDiffers says why rules are not made here.
func (p *Plugins) IPTablesDiffers(table string, v6 bool) error { return p.iptablesDiffers(table, v6) }

package iptables

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/berth-run/berth/proxy/program"
)

// saved is what iptables-save shows of the tables that a proxy has rules in: chains, with their rules.
type saved map[chain][]string

// IncompatibleError is a table that iptables cannot read, since another program has made it with nft.
type IncompatibleError struct{ Line string }

func (e *IncompatibleError) Error() string {
	return fmt.Sprintf("iptables cannot work with its tables: %s: have what made such rules use tables of its own", strings.TrimLeft(e.Line, "# "))
}

// parse reads what iptables-save has written.
func parse(text string) (saved, error) {
	out, _, err := parseCounted(text)
	return out, err
}

// parseCounted is parse with what each rule has counted, where that is shown.
func parseCounted(text string) (out saved, counts map[chain][]program.Count, err error) {
	out, counts = saved{}, map[chain][]program.Count{}
	var t table
	known := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "*"):
			t, known = tableOf(line[1:])
		case line == "COMMIT":
			known = false
		case strings.HasPrefix(line, "#") && strings.Contains(line, "is incompatible"):
			for _, name := range []string{"`filter'", "`nat'", "`mangle'"} {
				if strings.Contains(line, name) {
					return nil, nil, &IncompatibleError{line}
				}
			}
		case !known:
		case strings.HasPrefix(line, ":"):
			name, _, _ := strings.Cut(line[1:], " ")
			c := chain{t, name}
			out[c] = append([]string{}, out[c]...)
		default:
			// Packets and bytes come before a rule.
			shown := ""
			if strings.HasPrefix(line, "[") {
				shown, line, _ = strings.Cut(line[1:], "] ")
			}
			if rule, ok := strings.CutPrefix(line, "-A "); ok {
				name, rule, _ := strings.Cut(rule, " ")
				c := chain{t, name}
				out[c] = append(out[c], rule)
				if shown != "" {
					packets, bytes, _ := strings.Cut(shown, ":")
					var n program.Count
					n.Packets, _ = strconv.ParseUint(packets, 10, 64)
					n.Bytes, _ = strconv.ParseUint(bytes, 10, 64)
					counts[c] = append(counts[c], n)
				}
			}
		}
	}
	return out, counts, nil
}

func tableOf(name string) (table, bool) {
	for t := range table(tables) {
		if t.String() == name {
			return t, true
		}
	}
	return 0, false
}

// has says whether a chain has a rule.
func (s saved) has(c chain, rule string) bool {
	want := key(rule)
	for _, r := range s[c] {
		if r == rule || key(r) == want {
			return true
		}
	}
	return false
}

// kept are the chains that a rule leads to which is in none of some chains.
func (s saved) kept(but func(chain) bool) map[chain]bool {
	out := map[chain]bool{}
	for c, rules := range s {
		if but(c) {
			continue
		}
		for _, r := range rules {
			if to := target(r); to != "" {
				out[chain{c.table, to}] = true
			}
		}
	}
	return out
}

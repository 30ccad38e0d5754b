package iptables

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Rules are written as iptables-save 1.8 does it, but for the chain that they are in: with what iptables would add where it is
// left out, such as masks. So most of them are compared as they are.

// words joins what is not empty.
func words(parts ...string) string {
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " ")
}

// maxComment is what the kernel has room for, less one.
const maxComment = 255

// comment is a match that says something to people. Names come from the API server: what is no letter, digit or mark of ours is
// replaced, so that no name ends a comment and goes on as something else.
func comment(text string) string {
	clean := []byte(text[:min(len(text), maxComment)])
	plain := true
	for i, c := range clean {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		case strings.IndexByte(" ./:>[];", c) >= 0:
			plain = false
		default:
			clean[i] = '_'
		}
	}
	if plain {
		return "-m comment --comment " + string(clean)
	}
	return `-m comment --comment "` + string(clean) + `"`
}

// source and destination match addresses; a prefix of all matches without a word.
func source(p netip.Prefix) string { return address("-s ", p) }

func destination(p netip.Prefix) string { return address("-d ", p) }

func address(flag string, p netip.Prefix) string {
	if p.Bits() == 0 {
		return ""
	}
	return flag + p.String()
}

// single is the prefix of an address alone.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func not(match string) string {
	if match == "" {
		return ""
	}
	return "! " + match
}

// draw matches one of n packets, as kube-proxy draws them: the probability has ten decimals, and the kernel 31 bits for it.
func draw(of, all int) string {
	p, _ := strconv.ParseFloat(strconv.FormatFloat(float64(of)/float64(all), 'f', 10, 64), 64)
	const bits = 1 << 31
	return "-m statistic --mode random --probability " + strconv.FormatFloat(math.Round(p*bits)/bits, 'f', 11, 64)
}

// key is a rule in a form that is the same for all ways of writing it that iptables has: its matches are sorted, and what loads
// a match is left out.
func key(rule string) string {
	var groups []string
	invert := false
	for _, w := range split(rule) {
		switch {
		case w.text == "!" && !w.quoted:
			invert = true
		case strings.HasPrefix(w.text, "-") && !w.quoted:
			name := w.text
			if invert {
				name, invert = "! "+name, false
			}
			groups = append(groups, name)
		case len(groups) > 0:
			groups[len(groups)-1] += "\x00" + w.text
		default:
			groups = append(groups, w.text)
		}
	}
	groups = slices.DeleteFunc(groups, func(g string) bool { return strings.HasPrefix(g, "-m\x00") })
	slices.Sort(groups)
	return strings.Join(groups, "\x01")
}

type word struct {
	text   string
	quoted bool
}

// split is the words of a rule, as iptables-restore reads them.
func split(rule string) (out []word) {
	var b strings.Builder
	quoted, inside, some := false, false, false
	flush := func() {
		if some {
			out = append(out, word{b.String(), quoted})
		}
		b.Reset()
		quoted, some = false, false
	}
	for i := 0; i < len(rule); i++ {
		switch c := rule[i]; {
		case inside && c == '\\' && i+1 < len(rule):
			i++
			b.WriteByte(rule[i])
		case c == '"':
			inside, quoted, some = !inside, true, true
		case !inside && (c == ' ' || c == '\t'):
			flush()
		default:
			b.WriteByte(c)
			some = true
		}
	}
	flush()
	return out
}

// target is the chain that a rule leads to; empty if it leads to none.
func target(rule string) string {
	w := split(rule)
	for i := range w {
		if i > 0 && !w[i-1].quoted && (w[i-1].text == "-j" || w[i-1].text == "-g") {
			return w[i].text
		}
	}
	return ""
}

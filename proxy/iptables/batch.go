package iptables

import (
	"strings"
)

// batch is what iptables-restore reads: changes of tables, each of which is one transaction.
type batch struct {
	tables [tables]tableBatch
	rules  int // how many are put in or taken away
	chains int // how many are made, written anew, or removed
}

type tableBatch struct {
	chains, remove, rules, last strings.Builder
	put                         int // rules that are put in
}

// flush has a chain be there, without rules.
func (b *batch) flush(c chain) {
	b.chains++
	line(&b.tables[c.table].chains, ":", c.name, " - [0:0]")
}

// write has a chain have these rules alone.
func (b *batch) write(c chain, rules []string) {
	b.flush(c)
	for _, r := range rules {
		b.append(c, r)
	}
}

// append adds a rule at the end of a chain, insert before all others.
func (b *batch) append(c chain, rule string) {
	b.rules++
	b.tables[c.table].put++
	line(&b.tables[c.table].rules, "-A ", c.name, " ", rule)
}

func (b *batch) insert(c chain, rule string) {
	b.rules++
	b.tables[c.table].put++
	line(&b.tables[c.table].rules, "-I ", c.name, " 1 ", rule)
}

// remove takes a rule away, before others come.
func (b *batch) remove(c chain, rule string) {
	b.rules++
	line(&b.tables[c.table].remove, "-D ", c.name, " ", rule)
}

// drop removes a chain that nothing leads to by then.
func (b *batch) drop(c chain) {
	b.flush(c)
	line(&b.tables[c.table].last, "-X ", c.name)
}

// put is how many rules are put into each table.
func (b *batch) put() (n [tables]int) {
	for t := range b.tables {
		n[t] = b.tables[t].put
	}
	return n
}

func (b *batch) empty() bool { return b.rules == 0 && b.chains == 0 }

// String is what iptables-restore reads.
func (b *batch) String() string {
	var out strings.Builder
	for t := range b.tables {
		x := &b.tables[t]
		body := x.chains.String() + x.remove.String() + x.rules.String() + x.last.String()
		if body != "" {
			line(&out, "*", table(t).String())
			out.WriteString(body)
			line(&out, "COMMIT")
		}
	}
	return out.String()
}

func line(b *strings.Builder, parts ...string) {
	for _, p := range parts {
		b.WriteString(p)
	}
	b.WriteByte('\n')
}

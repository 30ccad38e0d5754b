package iptables

import (
	"sync"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// restores counts what iptables-restore was given, for who asks from another goroutine.
type restores struct {
	mu sync.Mutex
	of [model.Families]restored
}

type restored struct {
	failures, partial uint64
	rules, last       [tables]int
}

// failed notes that a family could not be programmed.
func (r *restores) failed(f model.Family, partial bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.of[f].failures++
	if partial {
		r.of[f].partial++
	}
}

// all notes that a family has these chains, after a batch.
func (r *restores) all(f model.Family, want map[chain]*wanted, b *batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	x := &r.of[f]
	x.rules, x.last = [tables]int{}, b.put()
	for c, w := range want {
		x.rules[c.table] += len(w.head) + len(w.fixed) + len(w.tail)
	}
}

// more notes that a family has so many more, after a batch.
func (r *restores) more(f model.Family, grown [tables]int, b *batch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	x := &r.of[f]
	x.last = b.put()
	for t, n := range grown {
		x.rules[t] += n
	}
}

// Restores may be asked for from any goroutine.
func (p *Programmer) Restores() (out [model.Families]program.Restores) {
	p.restores.mu.Lock()
	defer p.restores.mu.Unlock()
	for f := range out {
		x := &p.restores.of[f]
		out[f] = program.Restores{Failures: x.failures, Partial: x.partial, Rules: map[string]int{}, Last: map[string]int{}}
		for _, t := range []table{filter, nat} { // mangle has a chain without rules alone
			out[f].Rules[t.String()], out[f].Last[t.String()] = x.rules[t], x.last[t]
		}
	}
	return out
}

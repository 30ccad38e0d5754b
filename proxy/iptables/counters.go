package iptables

import (
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Counters are what rules have counted, which the kernel does whether somebody asks or not. They may be read from any goroutine. What
// a rule has counted that goes while its Service stays (there are endpoints again) is kept as of the last time it was read.
type Counters struct {
	p *Programmer

	mu   sync.Mutex
	at   time.Time
	wait time.Duration
	counts
}

// counts are sums of rules.
type counts struct {
	sum  map[program.Counted]program.Count
	base map[program.Counted]program.Count // of rules that have gone, or were written anew
	last map[ruleAt]counting
}

// counting is a rule's count, and what it counts for.
type counting struct {
	of []program.Counted
	program.Count
}

// ruleAt is a rule of a family.
type ruleAt struct {
	family model.Family
	chain  chain
	rule   string
}

// Reading takes programs, which take the longer the more Services there are: they are run at most every readAtMost, and for one
// part of time in readShare. All that ask meanwhile get the same answer.
const (
	readAtMost = 2 * time.Second
	readShare  = 20
)

// countedChains are those whose rules count, in the order in which they are read: what is taken from another's count, first.
var countedChains = []chain{{filter, proxyFirewall}, {filter, services}, {filter, externalServices}, {filter, forward}, {nat, services}, {nat, nodePorts}}

// Counters are the Programmer's.
func (p *Programmer) Counters() *Counters { return &Counters{p: p} }

// Read is what was counted up to some seconds ago. It is not to be changed. Of a Service's port Connections are always there, the
// rest if there was something. After an error of a program it is what it was.
func (c *Counters) Read() (map[program.Counted]program.Count, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sum != nil && time.Since(c.at) < c.wait {
		return c.sum, nil
	}
	began := time.Now()
	all, globals := c.p.wantedNow()
	owners, now := map[ruleAt][]program.Counted{}, map[ruleAt]program.Count{}
	err := c.p.enter(func() error {
		for f := range model.Family(model.Families) {
			if !globals.Family[f].Enabled {
				continue
			}
			parts{family: f, globals: &globals.Family[f]}.counted(all, owners)
			for _, at := range countedChains {
				if err := c.p.programs(f).counts(at, owners, now); err != nil {
					return err
				}
			}
		}
		return nil
	})
	c.at = time.Now()
	c.wait = max(readAtMost, readShare*c.at.Sub(began))
	if err != nil {
		return c.sum, fmt.Errorf("read counters: %w", err)
	}
	c.add(owners, now)
	return c.sum, nil
}

// counted are the rules that count something, with what.
func (x parts) counted(all []*model.Service, owners map[ruleAt][]program.Counted) {
	tell := func(c chain, rule string, of ...program.Counted) {
		owners[ruleAt{x.family, c, rule}] = of
	}
	for _, s := range all {
		for _, r := range x.service(s).counted {
			tell(r.chain, r.rule, r.of...)
		}
	}
	for _, cidr := range x.globals.ServiceCIDRs {
		tell(chain{filter, services}, dropUnallocated(cidr), program.Counted{Family: x.family, Cause: program.Unallocated})
	}
	tell(chain{filter, forward}, dropInvalid, program.Counted{Family: x.family, Cause: program.Invalid})
}

// counts reads what the rules of a chain have counted; a chain that is not there has none.
func (p programs) counts(at chain, owners map[ruleAt][]program.Counted, now map[ruleAt]program.Count) error {
	text, err := p.run("", "", "--wait", lockWait, "-t", at.table.String(), "-v", "-S", at.name)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil
	}
	if err != nil {
		return err
	}
	var keys map[string]ruleAt // for rules that are written otherwise
	for line := range strings.Lines(text) {
		rule, n, ok := countedRule(strings.TrimSuffix(line, "\n"), at.name)
		if !ok {
			continue
		}
		r := ruleAt{p.family, at, rule}
		if _, ok := owners[r]; !ok {
			if keys == nil {
				keys = map[string]ruleAt{}
				for o := range owners {
					if o.family == p.family && o.chain == at {
						keys[key(o.rule)] = o
					}
				}
			}
			if r, ok = keys[key(rule)]; !ok {
				continue
			}
		}
		now[r] = n
	}
	return nil
}

// countedRule reads a line of iptables -v -S: a rule with packets and bytes before its target.
func countedRule(line, name string) (rule string, n program.Count, ok bool) {
	rest, ok := strings.CutPrefix(line, "-A "+name)
	at := strings.LastIndex(rest, " -c ")
	if !ok || at < 0 {
		return "", n, false
	}
	packets, after, _ := strings.Cut(rest[at+len(" -c "):], " ")
	bytes, after, _ := strings.Cut(after, " ")
	var err, err2 error
	n.Packets, err = strconv.ParseUint(packets, 10, 64)
	n.Bytes, err2 = strconv.ParseUint(bytes, 10, 64)
	return words(strings.TrimPrefix(rest[:at], " "), after), n, err == nil && err2 == nil
}

// add makes the sums of what was read.
func (c *counts) add(owners map[ruleAt][]program.Counted, now map[ruleAt]program.Count) {
	if c.base == nil {
		c.base = map[program.Counted]program.Count{}
	}
	plus := func(to map[program.Counted]program.Count, of []program.Counted, n program.Count) {
		for _, k := range of {
			to[k] = to[k].Plus(n)
		}
	}
	sum, last := map[program.Counted]program.Count{}, make(map[ruleAt]counting, len(owners))
	for r, of := range owners {
		is, ok := now[r]
		was := c.last[r].Count
		switch {
		case !ok: // somebody has taken it away, and it will be put in again
			is = was
		case is.Packets < was.Packets: // it was put in again
			plus(c.base, of, was)
		}
		last[r] = counting{of, is}
		plus(sum, of, is)
	}
	for r, was := range c.last {
		if _, ok := owners[r]; !ok {
			plus(c.base, was.of, was.Count)
		}
	}
	alive := func(of program.Counted) bool {
		if of.Service.Name == "" {
			return true
		}
		of.Cause = program.Connections
		_, ok := sum[of]
		return ok
	}
	for of, n := range c.base {
		if alive(of) {
			sum[of] = sum[of].Plus(n)
		} else {
			delete(c.base, of)
		}
	}
	for of, n := range sum {
		if of.Cause == program.SourceRanges { // was looked at after it had been led to its endpoint
			conn := of
			conn.Cause = program.Connections
			sum[conn] = sum[conn].Minus(n)
		}
	}
	for of, n := range sum {
		switch was := c.sum[of]; {
		case n.Packets < was.Packets: // a chain was read before another one
			sum[of] = was
		case n.Packets == 0 && of.Service.Name != "" && of.Cause != program.Connections:
			delete(sum, of)
		}
	}
	c.sum, c.last = sum, last
}

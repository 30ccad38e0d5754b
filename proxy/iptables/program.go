package iptables

import (
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Options are how to program.
type Options struct {
	// MasqueradeBit is the bit of packets' marks that has them masqueraded, from 0 to 31; other programs should not use it.
	MasqueradeBit int
	// Period is how often it is looked whether the tables were flushed; 30 seconds if it is 0.
	Period time.Duration
	// Held is handed to each program that changes tables, which has it until it ends: who waits until nobody has it, as for a
	// socket.Name, knows that none is left that a killed proxy has started. It may be nil.
	Held *os.File
	// Log gets what an operator can act on; none if it is nil.
	Log *slog.Logger

	// For tests: another program than the host's (nft, legacy), and where programs run.
	backend string
	enter   func(func() error) error
}

// Programmer has the kernel do what a model says. It belongs to one goroutine at a time, but for Changed, Counters and
// Inspector.
type Programmer struct {
	Options
	canary *watcher

	// working is locked while the kernel is changed.
	working program.Work

	// What is wanted. Services are the model's own, which it never changes. look is locked while it changes, for Counters and the Inspector.
	look     sync.Mutex
	services map[types.NamespacedName]*model.Service
	globals  model.Globals
	report   program.Report
	restores restores
	// programmed is whether the kernel has all that is wanted, as far as is known.
	programmed bool
	// was is which families were programmed once: what is there is removed when they are disabled.
	was [model.Families]bool
}

// Open opens a Programmer for the network namespace of the process. It changes nothing yet.
func Open(o Options) (*Programmer, error) {
	if o.MasqueradeBit < 0 || o.MasqueradeBit > 31 {
		return nil, fmt.Errorf("iptables: masquerade bit %d is not from 0 to 31", o.MasqueradeBit)
	}
	if o.Period <= 0 {
		o.Period = 30 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.enter == nil {
		o.enter = func(f func() error) error { return f() }
	}
	p := &Programmer{Options: o, services: map[types.NamespacedName]*model.Service{}}
	p.canary = watch(p)
	return p, nil
}

// Close stops watching. What was programmed stays: connections and Services go on.
func (p *Programmer) Close() error {
	p.canary.close()
	return nil
}

// Changed tells that the tables were flushed: call Verify then. It does not know by whom.
func (p *Programmer) Changed() <-chan string { return p.canary.changed }

// Sync has the kernel do what a State says, whatever it has now: it is read and compared, and the chains that differ are
// written.
func (p *Programmer) Sync(s program.State) (program.Report, error) {
	p.working.Lock() // before anything else is wanted, for who compares
	defer p.working.Unlock()
	defer p.working.Loaded()
	p.look.Lock()
	p.services = map[types.NamespacedName]*model.Service{}
	for svc := range s.Services() {
		p.services[svc.Name] = svc
	}
	p.globals = *s.Globals()
	p.look.Unlock()
	return p.verify()
}

// wantedNow is what is wanted, for another goroutine.
func (p *Programmer) wantedNow() ([]*model.Service, model.Globals) {
	p.look.Lock()
	defer p.look.Unlock()
	return slices.Collect(maps.Values(p.services)), p.globals
}

// Verify reads the kernel, compares it with what it should have, and writes the chains that differ.
func (p *Programmer) Verify() (program.Report, error) {
	p.working.Lock()
	defer p.working.Unlock()
	return p.verify()
}

func (p *Programmer) verify() (program.Report, error) {
	p.report = program.Report{}
	err := p.enter(p.reconcile)
	return p.report, err
}

// attempts is how often a reconciliation is tried: another program may have changed what was read.
const attempts = 2

func (p *Programmer) reconcile() error {
	p.programmed = false
	for f := range model.Family(model.Families) {
		var err error
		for range attempts {
			if err = p.reconcileFamily(f); err == nil {
				break
			}
			p.restores.failed(f, false)
		}
		if err != nil {
			return err
		}
	}
	p.programmed = true
	return nil
}

func (p *Programmer) reconcileFamily(f model.Family) error {
	if !p.globals.Family[f].Enabled {
		if p.was[f] {
			p.canary.planted[f].Store(false)
			if _, err := p.programs(f).removeAll(); err != nil {
				return err
			}
			p.was[f] = false
			p.restores.all(f, nil, &batch{})
		}
		return nil
	}
	have, err := p.programs(f).save()
	if err != nil {
		return err
	}
	localNodePorts := f == model.IPv4 && p.globals.Family[f].NodePorts.Loopback
	want := p.wanted(f)
	b := difference(have, want, localNodePorts)
	if err := p.commit(f, b); err != nil {
		return err
	}
	p.restores.all(f, want, b)
	p.was[f] = true
	p.canary.planted[f].Store(true)
	if localNodePorts {
		return setSysctl(routeLocalnet, "1")
	}
	return nil
}

func (p *Programmer) programs(f model.Family) programs { return programs{f, p.backend, p.Held} }

func (p *Programmer) parts(f model.Family) parts {
	return parts{family: f, globals: &p.globals.Family[f]}
}

// commit has the kernel take a batch.
func (p *Programmer) commit(f model.Family, b *batch) error {
	if b.empty() {
		return nil
	}
	if err := p.programs(f).restore(b); err != nil {
		return err
	}
	p.report.Transactions++
	p.report.Elements += b.rules
	p.report.Objects += b.chains
	return nil
}

// wanted is what the proxy's chains should have.
func (p *Programmer) wanted(f model.Family) map[chain]*wanted {
	return p.wantedOf(f, &p.globals.Family[f], slices.Collect(maps.Values(p.services)))
}

// wantedOf is wanted of some Services.
func (p *Programmer) wantedOf(f model.Family, g *model.FamilyGlobals, all []*model.Service) map[chain]*wanted {
	x := parts{family: f, globals: g}
	out := x.fixed(params{mark: 1 << p.MasqueradeBit, dropInvalid: !isSet("net/netfilter/nf_conntrack_tcp_be_liberal")})
	for _, s := range sortedServices(all) {
		part := x.service(s)
		for _, o := range part.own {
			out[chain{nat, o.name}] = &wanted{fixed: o.rules}
		}
		for _, r := range part.shared {
			out[r.chain].add(r.at, r.rule)
		}
	}
	return out
}

func sortedServices(all []*model.Service) []*model.Service {
	return slices.SortedFunc(slices.Values(all), func(a, b *model.Service) int { return strings.Compare(a.Name.String(), b.Name.String()) })
}

// difference is what makes of what there is what should be.
func difference(have saved, want map[chain]*wanted, localNodePorts bool) *batch {
	b := &batch{}
	for _, c := range sortedChains(want) {
		if rules, there := have[c]; !there || !want[c].is(rules) {
			b.write(c, want[c].all())
		}
	}
	for t := range table(tables) {
		if c := (chain{t, canary}); have[c] == nil {
			b.flush(c)
		}
	}
	stale := func(c chain) bool { return c.table == nat && isService(c.name) && want[c] == nil }
	ours := func(c chain) bool { return stale(c) || want[c] != nil }
	var kept map[chain]bool
	for _, c := range sortedChains(have) {
		if !stale(c) {
			continue
		}
		if kept == nil {
			kept = have.kept(ours)
		}
		if !kept[c] {
			b.drop(c)
		} else if len(have[c]) > 0 { // another's rule leads there: it stays, and does nothing
			b.flush(c)
		}
	}
	if localNodePorts {
		c := chain{filter, kubeletFirewall}
		if have[c] == nil {
			b.flush(c)
		}
		if !have.has(c, martian) {
			b.append(c, martian)
		}
	}
	for _, j := range jumps(localNodePorts) {
		if c := (chain{j.table, j.from}); !have.has(c, j.rule) {
			b.insert(c, j.rule)
		}
	}
	return b
}

func sortedChains[V any](m map[chain]V) []chain {
	out := make([]chain, 0, len(m))
	for c := range m {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b chain) int {
		if a.table != b.table {
			return int(a.table) - int(b.table)
		}
		return strings.Compare(a.name, b.name)
	})
	return out
}

// many is of how many Services a change is made as if all had changed: each rule that is taken from a chain is looked for there.
const many = 100

// Apply has the kernel do what has changed: chains of the Services that have, and their rules in chains that all share. If the
// kernel does not take it, all is read and mended as by Verify.
func (p *Programmer) Apply(d *model.Delta) (program.Report, error) {
	p.working.Lock()
	defer p.working.Unlock()
	p.report = program.Report{}
	p.look.Lock()
	for i := range d.Services {
		if c := &d.Services[i]; c.New == nil {
			delete(p.services, c.Name)
		} else {
			p.services[c.Name] = c.New
		}
	}
	if d.Globals != nil {
		p.globals = *d.Globals
	}
	p.look.Unlock()
	err := p.enter(func() error {
		if !p.programmed || d.Globals != nil || len(d.Services) > many {
			return p.reconcile()
		}
		for f := range model.Family(model.Families) {
			if !p.globals.Family[f].Enabled {
				continue
			}
			b, grown := change(p.parts(f), d.Services)
			if err := p.commit(f, b); err != nil {
				p.restores.failed(f, true)
				p.Log.Debug("a change did not fit the kernel's chains, which are read again", "error", err)
				return p.reconcile()
			}
			p.restores.more(f, grown, b)
		}
		return nil
	})
	return p.report, err
}

// change is what makes of Services what they should be now, and how many rules more that are.
func change(x parts, services []model.Change) (b *batch, grown [tables]int) {
	b = &batch{}
	before, after := map[string][]string{}, map[string][]string{}
	counts := map[shared]int{}
	for i := range services {
		was, is := x.service(services[i].Old), x.service(services[i].New)
		for _, o := range was.own {
			before[o.name] = o.rules
		}
		for _, o := range is.own {
			after[o.name] = o.rules
		}
		for _, r := range was.shared {
			counts[r]--
		}
		for _, r := range is.shared {
			counts[r]++
		}
	}
	for _, name := range sortedNames(after) {
		grown[nat] += len(after[name])
		if rules, there := before[name]; !there || !slices.Equal(rules, after[name]) {
			b.write(chain{nat, name}, after[name])
		}
	}
	for _, name := range sortedNames(before) {
		grown[nat] -= len(before[name])
		if _, there := after[name]; !there {
			b.drop(chain{nat, name})
		}
	}
	for _, r := range sortedRules(counts) {
		grown[r.chain.table] += counts[r]
		for range -counts[r] {
			b.remove(r.chain, r.rule)
		}
		for range counts[r] {
			if r.at == head {
				b.insert(r.chain, r.rule)
			} else {
				b.append(r.chain, r.rule)
			}
		}
	}
	return b, grown
}

func sortedNames(m map[string][]string) []string {
	out := make([]string, 0, len(m))
	for name := range m {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func sortedRules(m map[shared]int) []shared {
	out := make([]shared, 0, len(m))
	for r, n := range m {
		if n != 0 {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b shared) int { return strings.Compare(a.chain.name+" "+a.rule, b.chain.name+" "+b.rule) })
	return out
}

func isSet(sysctl string) bool {
	b, err := os.ReadFile("/proc/sys/" + sysctl)
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

func setSysctl(name, value string) error {
	file := "/proc/sys/" + name
	if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == value {
		return nil
	}
	if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
		return fmt.Errorf("set sysctl %s to %s, for node ports at loopback addresses (iptables.localhostNodePorts): %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

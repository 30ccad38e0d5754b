package nft

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Options are how to program.
type Options struct {
	// Table is the name of the tables; Table if it is empty.
	Table string
	// Counters has the kernel count for each Service's port (Programmer.Counters).
	Counters bool
	// Log gets what an operator can act on; none if it is nil.
	Log *slog.Logger
}

// Report is what a call has done.
type Report = program.Report

// State is all that is wanted: that of package model.
type State = program.State

// Programmer has the kernel do what a model says. It belongs to one goroutine at a time, but for Changed, Counters, Inspector and Resets.
type Programmer struct {
	table string
	log   *slog.Logger
	conn  *nftables.Conn
	watch *watcher

	batch    nftables.Batch
	writer   *writer
	report   Report
	counters *Counters // nil if nothing is counted

	inspector *Inspector
	resets    *Resets

	// working is locked while the kernel is changed.
	working program.Work

	// What is wanted. Services are the model's own, which it never changes. The lock is for those who look on.
	look     sync.Mutex
	services map[types.NamespacedName]*model.Service
	globals  model.Globals
	hairpins map[model.Hairpin]struct{}
	groups   *groups
	params   [model.Families]params

	// have is what the kernel has, as far as is known; nil before it was read, and after a failure.
	have *[model.Families]*layout
}

// Open opens a Programmer for the network namespace of the calling thread. It changes nothing yet.
func Open(o Options) (*Programmer, error) {
	p := &Programmer{table: o.Table, log: o.Log, groups: newGroups()}
	if p.table == "" {
		p.table = Table
	}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.writer = newWriter(&p.batch, p.table)
	var err error
	if p.conn, err = nftables.Open(); err != nil {
		return nil, explain(err)
	}
	p.resets = &Resets{table: p.table}
	if p.resets.conn, err = nftables.Open(); err != nil {
		return nil, errors.Join(explain(err), p.conn.Close())
	}
	if p.watch, err = newWatcher(p.table, p.conn.Port(), p.resets.conn.Port()); err != nil {
		return nil, errors.Join(err, p.resets.close(), p.conn.Close())
	}
	p.inspector = &Inspector{p: p}
	if p.inspector.conn, err = nftables.Open(); err != nil {
		return nil, errors.Join(explain(err), p.watch.close(), p.resets.close(), p.conn.Close())
	}
	if o.Counters {
		if p.counters, err = newCounters(p); err != nil {
			return nil, errors.Join(err, p.Close())
		}
	}
	return p, nil
}

// Close stops watching. What was programmed stays: connections and Services go on.
func (p *Programmer) Close() error {
	err := errors.Join(p.watch.close(), p.conn.Close(), p.inspector.close(), p.resets.close())
	if p.counters != nil {
		err = errors.Join(err, p.counters.close())
	}
	return err
}

// Changed tells that another program has changed the tables, or may have: call Verify then. One value stands for any number
// of changes; it names the program if the kernel does.
func (p *Programmer) Changed() <-chan string { return p.watch.changed }

// Sync has the kernel do what a State says, whatever it has now: it is read and compared, and what differs is changed. What
// is as it should be is not touched, so that a restart and an upgrade break no connection and drop no packet.
func (p *Programmer) Sync(s State) (Report, error) {
	p.working.Lock() // before anything else is wanted, for who compares
	defer p.working.Unlock()
	defer p.working.Loaded()
	p.want(s)
	return p.verify()
}

// want has all of a State be what is wanted.
func (p *Programmer) want(s State) {
	p.look.Lock()
	defer p.look.Unlock()
	p.services = map[types.NamespacedName]*model.Service{}
	for svc := range s.Services() {
		p.services[svc.Name] = svc
	}
	p.globals, p.groups = *s.Globals(), newGroups()
	p.hairpins = map[model.Hairpin]struct{}{}
	for _, h := range s.Hairpins() {
		p.hairpins[h] = struct{}{}
	}
}

// Verify reads the kernel, compares it with what it should have, and changes what differs.
func (p *Programmer) Verify() (Report, error) {
	p.working.Lock()
	defer p.working.Unlock()
	return p.verify()
}

func (p *Programmer) verify() (Report, error) {
	p.report = Report{}
	err := p.reconcile()
	return p.report, err
}

// attempts is how often a reconciliation is tried whose changes do not fit what the kernel has by then.
const attempts = 4

func (p *Programmer) reconcile() error {
	var err error
	for range attempts {
		p.have = nil
		p.batch.Clear()
		var foreign *ForeignTableError
		if err = p.reconcileOnce(); err == nil || errors.As(err, &foreign) || !errors.As(err, new(*nftables.RefusedError)) {
			return err
		}
	}
	return explain(err)
}

func (p *Programmer) reconcileOnce() error {
	wanted := p.wanted()
	var have [model.Families]*layout
	var fresh [model.Families]bool
	o := &objects{Batch: &p.batch, table: p.table}
	count := 0
	for f := range model.Family(model.Families) {
		got, err := readTable(p.conn, layers[f], p.table)
		if err != nil {
			return err
		}
		if !p.globals.Family[f].Enabled {
			if got.there && got.comment == tableComment {
				o.deleteTable(layers[f])
				count++
			}
			continue
		}
		if err := p.mayChange(got); err != nil {
			return err
		}
		p.tellUpgrade(got)
		if fresh[f] = !got.there; fresh[f] {
			o.addTable(layers[f])
			count++
		}
		have[f] = newLayout(layers[f], &p.params[f])
		count += o.change(&got.layout, have[f])
		p.refill(&got.layout, have[f], &wanted[f])
	}
	if err := p.commitObjects(); err != nil {
		return err
	}
	p.report.Objects += count
	var changes plan
	for f := range have {
		if have[f] == nil {
			continue
		}
		for s := range setID(affinity) {
			old := map[elemKey]elemValue{}
			if !fresh[f] && !have[f].sets[s].absent {
				var err error
				if old, err = readElements(p.conn, layers[f], p.table, s, have[f].sets[s].name, len(wanted[f][s])); err != nil {
					return err
				}
			}
			if s == serviceCIDRs || s == nodeportAddresses {
				changes.replace(old, wanted[f][s])
			} else {
				changes.diff(old, wanted[f][s])
			}
		}
	}
	if err := p.change(&changes, isLoad(&changes)); err != nil {
		return err
	}
	p.have = &have
	return p.purge()
}

// refill puts elements into sets that are replaced, so that they are there as soon as the sets are.
func (p *Programmer) refill(old, next *layout, wanted *[setCount][]elem) {
	for s := range setID(affinity) {
		i := slices.IndexFunc(old.sets, func(o set) bool { return o.name == next.sets[s].name })
		if i < 0 || next.sets[s].is(&old.sets[i]) {
			continue
		}
		puts := make([]op, 0, len(wanted[s]))
		for _, e := range wanted[s] {
			puts = append(puts, op{key: e.key, put: true, value: e.value})
		}
		p.writer.write(puts, false)
	}
}

// wanted computes all elements, by set, and what the layout depends on.
func (p *Programmer) wanted() *[model.Families][setCount][]elem {
	p.look.Lock()
	defer p.look.Unlock()
	e := elements{groups: p.groups}
	for _, name := range slices.SortedFunc(maps.Keys(p.services), compareNames) {
		e.service(p.services[name])
	}
	for h := range p.hairpins {
		e.hairpin(h)
	}
	e.globals(&p.globals)
	for f := range p.params {
		p.params[f] = params{detector: p.globals.Family[f].Detector, counters: p.counters != nil, resets: e.resets[f]}
	}
	e.each(func(el *elem) { p.params[el.key.family].see(el) })
	return &e.all
}

// change commits a plan: in one transaction, unless it is a load, or larger than a transaction may be.
func (p *Programmer) change(changes *plan, load bool) error {
	n := changes.len()
	p.batch.Clear()
	if !load {
		p.writer.whole(changes)
	}
	if load || p.batch.Size() > p.conn.Limit() {
		p.batch.Clear()
		if err := p.writer.parts(changes, p.conn.Limit(), p.commit); err != nil {
			return err
		}
	} else if err := p.commit(); err != nil {
		return err
	}
	p.report.Elements += n
	return nil
}

// isLoad says whether so many elements are not to be changed in one transaction, since others wait for it.
func isLoad(changes *plan) bool { return changes.len() > 1500 }

// commitObjects commits what makes the layout, in one transaction if there is room for it.
func (p *Programmer) commitObjects() error {
	if p.batch.Size() <= p.conn.Limit() {
		return p.commit()
	}
	for _, part := range p.batch.Split(p.conn.Limit()) {
		if err := p.conn.Commit(part); err != nil {
			return err
		}
		p.report.Transactions++
	}
	p.batch.Clear()
	return nil
}

func (p *Programmer) commit() error {
	if p.batch.Empty() {
		return nil
	}
	if err := p.conn.Commit(&p.batch); err != nil {
		return err
	}
	p.report.Transactions++
	return nil
}

// Apply has the kernel do what has changed, in one transaction if the Delta is not a load of many Services. If the kernel
// has something else than it should, that is mended as by Verify. After an error the Delta is remembered: Verify tries again.
func (p *Programmer) Apply(d *model.Delta) (Report, error) {
	p.working.Lock()
	defer p.working.Unlock()
	p.report = Report{}
	gone := p.counters.begin(d)
	defer p.counters.end(gone)
	old, next := p.remember(d)
	if p.have == nil || d.Globals != nil {
		return p.report, p.reconcile()
	}
	err := p.apply(old, next, len(d.Services) == 1, gone)
	if err == nil && slices.ContainsFunc(d.Services, losesClients) {
		err = p.purge()
	}
	p.forget(d)
	if err != nil {
		p.log.Debug("a change did not fit the kernel's tables, which are read again", "error", err)
		return p.report, p.reconcile()
	}
	return p.report, nil
}

// forget gives the numbers of groups back that a Delta has taken away.
func (p *Programmer) forget(d *model.Delta) {
	p.look.Lock()
	defer p.look.Unlock()
	for i := range d.Services {
		if c := &d.Services[i]; c.Old != nil {
			p.groups.forget(c.Old, c.New)
		}
	}
}

// remember has a Delta be part of what is wanted, and computes the elements before and after it.
func (p *Programmer) remember(d *model.Delta) (old map[elemKey]elemValue, next *elements) {
	p.look.Lock()
	defer p.look.Unlock()
	was, is := elements{groups: p.groups}, elements{groups: p.groups}
	if p.services == nil {
		p.services, p.hairpins = map[types.NamespacedName]*model.Service{}, map[model.Hairpin]struct{}{}
	}
	for i := range d.Services {
		c := &d.Services[i]
		was.service(c.Old)
		is.service(c.New)
		if c.New == nil {
			delete(p.services, c.Name)
		} else {
			p.services[c.Name] = c.New
		}
	}
	for _, h := range d.HairpinRemoved {
		was.hairpin(h)
		delete(p.hairpins, h)
	}
	for _, h := range d.HairpinAdded {
		is.hairpin(h)
		p.hairpins[h] = struct{}{}
	}
	if d.Globals != nil {
		p.globals = *d.Globals
	}
	old = map[elemKey]elemValue{}
	was.each(func(e *elem) { old[e.key] = e.value })
	return old, &is
}

func (p *Programmer) apply(old map[elemKey]elemValue, next *elements, single bool, gone []going) error {
	p.batch.Clear()
	grown := p.see(next)
	layouts := *p.have
	if grown {
		o := &objects{Batch: &p.batch, table: p.table}
		for f := range layouts {
			if layouts[f] != nil {
				layouts[f] = newLayout(layers[f], &p.params[f])
				p.report.Objects += o.change(p.have[f], layouts[f])
			}
		}
		// Rules come before the elements that they are for.
		if err := p.commitObjects(); err != nil {
			return err
		}
	}
	var changes plan
	changes.diffAll(old, next)
	load := !single && isLoad(&changes)
	if !load {
		p.counters.look(p.conn, gone)
	}
	if err := p.change(&changes, load); err != nil {
		return err
	}
	p.counters.keep(gone)
	p.have = &layouts
	return nil
}

// see has the layouts be some that elements can work with, and says whether those are others.
func (p *Programmer) see(next *elements) (grown bool) {
	p.look.Lock()
	defer p.look.Unlock()
	next.each(func(e *elem) { grown = p.params[e.key.family].see(e) || grown })
	for f, is := range next.resets {
		grown = grown || is && !p.params[f].resets
		p.params[f].resets = p.params[f].resets || is
	}
	return grown
}

// see has the layout be one that an element can work with, and says whether that is another one.
func (q *params) see(e *elem) bool {
	k := e.key.content()
	switch e.key.set {
	case portRanges:
		was := q.ranges
		q.ranges = true
		return !was
	case sizes, nodeportSizes, rangeSizes:
		at := map[setID]place{sizes: vip, nodeportSizes: nodeport, rangeSizes: ranged}[e.key.set]
		n := nativeOf(k[len(k)-4:])
		if n >= firstHash {
			if n&clusterOffset != 0 {
				at, n = at+1, n-clusterOffset
			}
			return insert(&q.hashes[at], n)
		}
		if n > clusterOffset {
			at, n = at+1, n-clusterOffset
		}
		return n > exactSizes && insert(&q.wide[at], n)
	case affinityTimeouts:
		return insert(&q.timeouts, nativeOf(k[len(k)-4:]))
	}
	return false
}

func insert(list *[]uint32, n uint32) bool {
	i, ok := slices.BinarySearch(*list, n)
	if !ok {
		// A list of its own: layouts that were made before have the other one.
		*list = slices.Insert(slices.Clone(*list), i, n)
	}
	return !ok
}

// ForeignTableError is a table of the name that is not berth's.
type ForeignTableError struct {
	Family, Table, Comment string
	// Owner is the port of the netlink socket that alone may change it; 0 without one.
	Owner uint32
}

func (e *ForeignTableError) Error() string {
	if e.Owner != 0 {
		return fmt.Sprintf("nf_tables: table %s %s is owned by the process of netlink port %d, and no other may change it: stop that process, or have it use another name",
			e.Family, e.Table, e.Owner)
	}
	return fmt.Sprintf("nf_tables: table %s %s is not berth's (comment %q): if nothing needs it, remove it by: nft delete table %s %s",
		e.Family, e.Table, e.Comment, e.Family, e.Table)
}

func (p *Programmer) mayChange(got *found) error {
	if got.there && (got.comment != tableComment || got.owner != 0) {
		return &ForeignTableError{Family: got.layer.String(), Table: p.table, Comment: got.comment, Owner: got.owner}
	}
	return nil
}

func (p *Programmer) tellUpgrade(got *found) {
	if got.there && got.find(version) == nil {
		p.log.Info("rules of another version of berth are replaced, connections stay", "table", got.layer.String()+" "+p.table)
	}
}

// explain adds a remedy to what an old kernel says.
func explain(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("%w (nftables needs Linux 5.13 or newer with nf_tables, nft_nat, nft_masq, nft_fib, nft_numgen, nft_reject and nft_ct; on older ones use mode iptables)", err)
	}
	return err
}

// Remove takes the tables away, as far as they are berth's, in the network namespace of the calling thread. It says whether
// there were any.
func Remove(o Options) (bool, error) {
	table := o.Table
	if table == "" {
		table = Table
	}
	c, err := nftables.Open()
	if err != nil {
		return false, err
	}
	defer c.Close()
	b := nftables.Batch{}
	ob := objects{Batch: &b, table: table}
	for _, f := range layers {
		got, err := readTable(c, f, table)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
			continue // a kernel without the family has no table of it
		}
		if err != nil {
			return false, err
		}
		if got.there && got.comment == tableComment {
			ob.deleteTable(f)
		}
	}
	if b.Empty() {
		return false, nil
	}
	return true, c.Commit(&b)
}

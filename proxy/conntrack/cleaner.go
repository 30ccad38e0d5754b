package conntrack

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/conntrack"
	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/proxy/model"
	"github.com/berth-run/berth/proxy/program"
)

// Options are the parts of a Cleaner. All have to be there.
type Options struct {
	Log *slog.Logger
	// Swept is told what was done for a family: how long the table was looked through, and how many entries were removed.
	Swept func(f model.Family, took time.Duration, removed int)
	// Resets answers packets of connections of TCP whose endpoint is gone; nil if nothing does, and then there are none that
	// are looked for. Reset is told how many there were in a family; it may be nil where Resets is.
	Resets program.Resetter
	Reset  func(f model.Family, n int)
}

const (
	// atOnce is how many entries the kernel may look through in one go, while softirqs of a processor wait: 5 ms. It tells of
	// answer entries, and then lets them run.
	atOnce, answer = 16384, 128
	// turn is for how long a larger table is read before others have their turn, which is as long.
	turn = 5 * time.Millisecond
	// batch is how many stale entries are remembered before they are removed.
	batch = 256
	// retryFirst is how long after a failure it is tried again; that doubles up to retryMost.
	retryFirst, retryMost = time.Second, time.Minute
)

// change is what a Cleaner is told of.
type change struct {
	services []model.Change
	globals  *model.Globals
	// all is whether these are all Services, of which nothing was known.
	all bool
}

// Cleaner removes entries that changes of Services have made stale.
type Cleaner struct {
	Options

	wake chan struct{}
	mu   sync.Mutex
	told []change
	// done is how many of told are in the kernel, if known, and so is whatever was told before.
	done  int
	known bool

	// What follows is Run's: what is about to be in the kernel, what is there and is to be swept, and what is being swept.
	held, pending, active work

	conn   *conntrack.Conn
	seen   kinds[int] // how many entries there were
	probes probes
	next   time.Time     // of the next sweep, at the earliest
	delay  time.Duration // until the next try
	failed string        // what was said of the last failure
}

// New makes a Cleaner, for Run.
func New(o Options) *Cleaner {
	return &Cleaner{Options: o, wake: make(chan struct{}, 1), delay: retryFirst}
}

// Will says what is about to change in the kernel. It costs nothing.
func (c *Cleaner) Will(d *model.Delta) {
	if len(d.Services) > 0 || d.Globals != nil {
		c.tell(change{services: d.Services, globals: d.Globals})
	}
}

// WillAll says that the kernel is about to have a State, whatever it had: the whole table is compared with it once.
func (c *Cleaner) WillAll(s *model.State) {
	g := *s.Globals()
	all := change{globals: &g, all: true}
	for svc := range s.Services() {
		all.services = append(all.services, model.Change{Name: svc.Name, New: svc})
	}
	c.tell(all)
}

func (c *Cleaner) tell(ch change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told = append(c.told, ch)
	c.poke()
}

// Done says that the kernel has all that was told of.
func (c *Cleaner) Done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = len(c.told)
	c.known = true
	c.poke()
}

func (c *Cleaner) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// take takes what was told. What the kernel has of it is pending.
func (c *Cleaner) take() {
	c.mu.Lock()
	told, done, known := c.told, c.done, c.known
	c.told, c.done, c.known = nil, 0, false
	c.mu.Unlock()
	for i := range told {
		if i == done && known {
			c.settle()
		}
		c.held.note(&told[i], &c.pending, &c.active)
	}
	if done == len(told) && known {
		c.settle()
	}
}

// settle has all that is held be pending: the kernel has it.
func (c *Cleaner) settle() {
	c.held.again(&c.pending)
	c.pending, c.held = c.held, work{nodePorts: c.held.nodePorts}
}

// Run removes what is stale, in the network namespace of the calling thread, until the context ends.
func (c *Cleaner) Run(ctx context.Context) {
	defer c.close()
	defer c.probes.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-timer.C:
		}
		c.again()
		if c.take(); !c.pending.empty() && time.Until(c.next) <= 0 {
			begin := time.Now()
			err := c.sweep(ctx)
			if ctx.Err() != nil {
				return
			}
			c.report(err)
			wait := time.Since(begin) // half of the time at most, a quarter of a processor
			if err != nil {
				wait, c.delay = c.delay, min(2*c.delay, retryMost)
			}
			c.next = time.Now().Add(wait)
		}
		if due := c.due(); !due.IsZero() {
			timer.Reset(time.Until(due))
		}
	}
}

// due is when there is something to be done, if nothing else is told; zero for never.
func (c *Cleaner) due() time.Time {
	due := c.probes.due()
	if !c.pending.empty() && (due.IsZero() || c.next.Before(due)) {
		due = c.next
	}
	return due
}

// report says once what is wrong, and when it is right again.
func (c *Cleaner) report(err error) {
	switch {
	case err == nil && c.failed != "":
		c.Log.Info("stale connections are removed again")
		c.failed, c.delay = "", retryFirst
	case err != nil && err.Error() != c.failed:
		c.failed = err.Error()
		c.Log.Warn("stale connections are not removed, it is tried again", "error", err)
	}
}

func (c *Cleaner) open() (err error) {
	if c.conn == nil {
		c.conn, err = conntrack.Open()
	}
	return err
}

func (c *Cleaner) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// sweep does the work that there is. What fails is work again.
func (c *Cleaner) sweep(ctx context.Context) error {
	c.active = work{places: c.pending.places, clusterIPs: c.pending.clusterIPs, nodePorts: c.pending.nodePorts}
	c.pending.places, c.pending.clusterIPs = nil, [model.Families][]netip.Prefix{}
	defer func() { c.active = work{} }()
	nftables.WaitForPackets()
	err := c.clean(ctx)
	if err != nil {
		c.close() // whatever is wrong with it, the next one is as good as new
		c.pending.again(&c.active)
	}
	return err
}

// found is a stale entry.
type found struct {
	key             conntrack.Key
	original, reply conntrack.Tuple
	// at is where it was found to be stale; orphan is whether it is nowhere.
	at     place
	orphan bool
	// established is whether it is a connection of TCP whose ends take it for one.
	established bool
}

// clean looks through the table, and removes what is stale.
func (c *Cleaner) clean(ctx context.Context) error {
	begin := time.Now()
	needed, nodePorts := c.active.kinds()
	c.active.index()
	here := node(func(netip.Addr) bool { return false })
	if nodePorts {
		var err error
		if here, err = localAddresses(); err != nil {
			return err
		}
	}
	if err := c.open(); err != nil {
		return err
	}
	filters, err := c.filters(needed)
	if err != nil {
		return err
	}
	stale := make([]found, 0, batch)
	var removed [model.Families]int
	p := pace{since: begin}
	remove := func() error {
		began := time.Now()
		n, err := c.remove(stale)
		if slices.ContainsFunc(stale, func(s found) bool { return s.established }) {
			p.since = p.since.Add(time.Since(began)) // somebody waits for each, and reading holds others up, not this
		}
		for f := range removed {
			removed[f] += n[f]
		}
		stale = stale[:0]
		return err
	}
	var seen kinds[int]
	each := func(e *conntrack.Entry) bool {
		if p.rests(ctx) {
			c.take()
		}
		if i := kindOf(e.Protocol); i >= 0 {
			seen[model.FamilyOf(e.Original.Dst.Addr())][i]++
			if s, ok := c.active.judge(e, here); ok {
				stale = append(stale, s)
			}
			if len(stale) == batch {
				err = remove()
			}
		}
		return err == nil && ctx.Err() == nil
	}
	for _, filter := range filters {
		if failed := c.conn.Each(filter, each); err == nil {
			err = failed
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			break
		}
	}
	if err == nil {
		err = remove()
	}
	for f := range needed {
		for i, is := range needed[f] {
			if is {
				c.seen[f][i] = seen[f][i]
			}
		}
		if slices.Contains(needed[f][:], true) {
			c.Swept(model.Family(f), time.Since(begin), removed[f])
		}
	}
	return err
}

// filters is what the kernel picks, one after the other. It picks nothing where it could look for long before it finds something
// to tell: how many entries are of a protocol is known of the last time.
func (c *Cleaner) filters(needed kinds[bool]) ([]conntrack.Filter, error) {
	size, err := c.conn.Count()
	if err != nil {
		return nil, err
	}
	var each []conntrack.Filter
	for f, family := range [...]uint8{model.IPv4: unix.AF_INET, model.IPv6: unix.AF_INET6} {
		for i, protocol := range protocols {
			filter := conntrack.Filter{Family: family, Protocol: uint8(protocol)}
			switch {
			case !needed[f][i]:
				continue
			case size <= atOnce:
				filter.Port = c.active.port(protocol)
			case c.seen[f][i]*(atOnce/answer) < size:
				return []conntrack.Filter{{}}, nil
			}
			each = append(each, filter)
		}
	}
	return each, nil
}

// remove removes entries, unless what was told meanwhile has made them good. Who takes one for an established connection is told
// that it is none.
func (c *Cleaner) remove(stale []found) (removed [model.Families]int, err error) {
	c.take()
	var gone []found
	for _, s := range stale {
		if t := c.active.places[s.at]; !s.orphan && (t == nil || !t.stale(s.original.Dst, s.reply.Src)) {
			continue
		}
		if s.established {
			gone = append(gone, s)
			continue
		}
		there, err := c.conn.Delete(s.key)
		if err != nil {
			return removed, err
		}
		if there {
			removed[model.FamilyOf(s.original.Dst.Addr())]++
		}
	}
	return removed, c.reset(gone)
}

// pace has others take turns with what reads a large table.
type pace struct {
	since time.Time
	n     int
}

// rests waits if it is others' turn, and says whether it was.
func (p *pace) rests(ctx context.Context) bool {
	if p.n++; p.n%128 != 0 {
		return false
	}
	worked := time.Since(p.since)
	if worked < turn {
		return false
	}
	select {
	case <-time.After(worked):
	case <-ctx.Done():
	}
	p.since = time.Now()
	return true
}

// localAddresses is what the kernel takes for the node's own addresses (fib daddr type local).
func localAddresses() (node, error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL},
		netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	if err != nil {
		return nil, fmt.Errorf("the node's addresses: %w", err)
	}
	addrs, rest := map[netip.Addr]bool{}, []netip.Prefix{}
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		addr, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		switch p := netip.PrefixFrom(addr.Unmap(), ones); {
		case !ok || !p.IsValid():
		case p.IsSingleIP():
			addrs[p.Addr()] = true
		default:
			rest = append(rest, p)
		}
	}
	return func(a netip.Addr) bool {
		return addrs[a] || slices.ContainsFunc(rest, func(p netip.Prefix) bool { return p.Contains(a) })
	}, nil
}

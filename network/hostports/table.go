package hostports

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/thread"
)

// Table is a table of nf_tables that leads ports of the node to pods.
type Table struct {
	name string
	log  *slog.Logger

	mu      sync.Mutex
	adopted bool           // it is known what the table must have
	want    []Target       // in the order in which they came
	rules   handles        // of the table as it was made; nil: it was not made yet, or is not there
	conn    *nftables.Conn // nil: none is open
	sock    *netlink.Conn  // of conn
}

// handles are the numbers that the kernel has given the rules of each chain.
type handles map[string][]uint64

// New is the table of that name, of which nothing is done yet.
func New(name string, log *slog.Logger) *Table { return &Table{name: name, log: log} }

// Name is what the table is called, in family inet.
func (t *Table) Name() string { return t.name }

// Supported says why the kernel does not take the table, or nil. It makes one in an empty network namespace.
func Supported() error {
	return thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		probe := New("probe", slog.New(slog.DiscardHandler))
		defer probe.close()
		return probe.build(elements{
			{links, ifname("lo")}:                         {},
			{ports4, concat([]byte{byte(TCP)}, be16(80))}: {value: concat([]byte{192, 0, 2, 1}, be16(80))},
		})
	})
}

// Adopt makes the table what these pods want, the later ones if two want the same, whatever is there of an earlier process.
// From then on [Table.Check] holds it to that.
func (t *Table) Adopt(pods []Target) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.want, t.adopted = slices.Clone(pods), true
	have, err := t.stored()
	if err != nil {
		return err
	}
	now := localnet(t.want)
	var errs []error
	for link := range linksOf(have) {
		if !now[link] {
			errs = append(errs, setLocalnet(link, false)) // while it is still guarded
		}
	}
	del, add := diff(have, elementsOf(t.want))
	if err := t.make(elementsOf(t.want)); err != nil {
		return err
	}
	t.forget(del, add)
	for link := range now {
		errs = append(errs, setLocalnet(link, true))
	}
	return errors.Join(errs...)
}

// Set leads a pod's ports to it. If it fails, none is.
func (t *Table) Set(p Target) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.want
	err := t.become(append(without(before, p.ID), p))
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("host ports: %w", err), t.become(before))
}

// Remove leads no port to a pod any more. There may be none.
func (t *Table) Remove(id string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.ContainsFunc(t.want, func(p Target) bool { return p.ID == id }) {
		return nil
	}
	if err := t.become(without(t.want, id)); err != nil {
		return fmt.Errorf("host ports: %w", err)
	}
	return nil
}

func without(all []Target, id string) []Target {
	return slices.DeleteFunc(slices.Clone(all), func(p Target) bool { return p.ID == id })
}

// become changes the table from what it must have to what it is to have from now on.
func (t *Table) become(want []Target) error {
	before, now := localnet(t.want), localnet(want)
	for link := range before {
		if !now[link] {
			if err := setLocalnet(link, false); err != nil { // while it is still guarded
				return err
			}
		}
	}
	del, add := diff(elementsOf(t.want), elementsOf(want))
	if len(del)+len(add) > 0 {
		if err := t.move(want, del, add); err != nil {
			return err
		}
	}
	t.want = want
	t.forget(del, add)
	for link := range now {
		if err := setLocalnet(link, true); err != nil {
			return err
		}
	}
	return nil
}

// move changes elements, in one transaction; where the table is not as it was made, it is made anew.
func (t *Table) move(want []Target, del, add []entry) error {
	all := elementsOf(want)
	if t.rules == nil || len(all) == 0 || t.change(del, add) != nil {
		return t.make(all)
	}
	return nil
}

// make makes the table anew, or removes it where nothing is wanted.
func (t *Table) make(all elements) error {
	if len(all) == 0 {
		return t.drop()
	}
	return t.build(all)
}

// Check makes the table what it must be, where others have changed it, and says so in the log.
func (t *Table) Check() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.adopted || len(t.want) == 0 {
		return nil
	}
	now, err := t.compare()
	if err == nil && now.differs() {
		now, err = t.compare() // what is read while others change their tables may be in pieces, and is not told from a whole
	}
	if err != nil || !now.differs() {
		return err
	}
	unknown := t.rules == nil // an earlier try has failed
	if err := t.make(elementsOf(t.want)); err != nil {
		return err
	}
	t.forget(now.strange, now.missing)
	if !unknown {
		t.log.Warn("host ports of pods were changed by somebody else, and are as they should be again",
			"table", "inet "+t.name, "missing", len(now.missing), "strange", len(now.strange), "rulesChanged", now.rules)
	}
	return nil
}

// difference is what the kernel has otherwise than it should be.
type difference struct {
	strange, missing []entry
	rules            bool // these, too
}

func (d difference) differs() bool { return d.rules || len(d.strange)+len(d.missing) > 0 }

func (t *Table) compare() (d difference, err error) {
	have, err := t.stored()
	if err != nil {
		return d, err
	}
	now, err := t.listRules()
	d.strange, d.missing = diff(have, elementsOf(t.want))
	d.rules = !maps.EqualFunc(now, t.rules, slices.Equal)
	return d, err
}

// table is the table for the library.
func (t *Table) table() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}

// patience is for an answer of the kernel, which may have to load modules.
const patience = 20 * time.Second

// largest bounds a transaction: some 200 bytes for each of all ports there are.
const largest = 32 << 20

// do has f use the connection, which is kept: to close one takes the kernel as long as to free what was deleted, and that is
// milliseconds. Without nf_tables the kernel does not answer a transaction as often as the library waits for: so it is asked
// for something first, and there is an end to waiting.
func (t *Table) do(f func(c *nftables.Conn) error) error {
	err := t.open()
	if err == nil {
		err = t.sock.SetDeadline(time.Now().Add(patience))
	}
	if err == nil {
		err = f(t.conn)
	}
	if err != nil {
		t.close() // there may be answers that nobody has read
		return fmt.Errorf("table inet %s: %w", t.name, err)
	}
	return nil
}

func (t *Table) open() error {
	if t.conn != nil {
		return nil
	}
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		t.sock = c
		return c.SetWriteBuffer(largest)
	}))
	if err == nil {
		t.conn = conn
	}
	return err
}

func (t *Table) close() {
	if t.conn != nil {
		_ = t.conn.CloseLasting() // nothing to lose
		t.conn, t.sock = nil, nil
	}
}

// Close closes the connection; the next call opens it again.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.close()
}

func (t *Table) exists(c *nftables.Conn) (bool, error) {
	_, err := c.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// drop removes the table, if it is there.
func (t *Table) drop() error {
	t.rules = nil
	return t.do(func(c *nftables.Conn) error {
		there, err := t.exists(c)
		if err != nil || !there {
			return err
		}
		c.DelTable(t.table())
		return c.Flush()
	})
}

// build makes the table anew, in one transaction.
func (t *Table) build(all elements) error {
	t.rules = nil
	err := t.do(func(c *nftables.Conn) error {
		if _, err := t.exists(c); err != nil {
			return err
		}
		table := c.AddTable(t.table())
		c.DelTable(table)
		c.AddTable(table)
		for _, name := range allSets {
			if err := c.AddSet(setOf(table, name), nil); err != nil {
				return err
			}
		}
		_, add := diff(nil, all)
		if err := t.add(c, add); err != nil {
			return err
		}
		chains := map[string]*nftables.Chain{}
		for _, name := range allChains {
			chain := &nftables.Chain{Table: table, Name: name}
			if b, ok := bases[name]; ok {
				chain.Type, chain.Hooknum, chain.Priority = b.kind, b.hook, &b.priority
			}
			chains[name] = c.AddChain(chain)
		}
		for _, r := range rules() {
			n := &nftables.Rule{Table: table, Chain: chains[r.chain], Exprs: r.exprs}
			if r.why != "" {
				n.UserData = userdata.AppendString(nil, userdata.TypeComment, r.why)
			}
			c.AddRule(n)
		}
		return c.Flush()
	})
	if err != nil {
		return err
	}
	t.rules, err = t.listRules()
	return err
}

// change adds and deletes elements, in one transaction.
func (t *Table) change(del, add []entry) error {
	return t.do(func(c *nftables.Conn) error {
		if err := t.inSets(del, c.SetDeleteElements); err != nil {
			return err
		}
		if err := t.add(c, add); err != nil {
			return err
		}
		return c.Flush()
	})
}

func (t *Table) add(c *nftables.Conn, add []entry) error { return t.inSets(add, c.SetAddElements) }

// inSets calls f for the elements of each set. The kernel takes 64 KiB of them in one message.
func (t *Table) inSets(all []entry, f func(*nftables.Set, []nftables.SetElement) error) error {
	const most, longest = 200, 127
	bySet := map[string][]nftables.SetElement{}
	for _, e := range all {
		n := nftables.SetElement{Key: []byte(e.key), Comment: e.note[:min(len(e.note), longest)]}
		if e.value != "" {
			n.Val = []byte(e.value)
		}
		bySet[e.set] = append(bySet[e.set], n)
	}
	for _, name := range allSets {
		for some := range slices.Chunk(bySet[name], most) {
			if err := f(setOf(t.table(), name), some); err != nil {
				return err
			}
		}
	}
	return nil
}

// stored are the elements that the kernel has. A table or a set that is not there has none.
func (t *Table) stored() (elements, error) {
	all := elements{}
	err := t.do(func(c *nftables.Conn) error {
		if there, err := t.exists(c); err != nil || !there {
			return err
		}
		there, err := c.GetSets(t.table())
		if err != nil {
			return err
		}
		for _, set := range there {
			if !slices.Contains(allSets, set.Name) {
				continue
			}
			list, err := c.GetSetElements(set)
			if err != nil {
				return fmt.Errorf("%s: %w", set.Name, err)
			}
			for _, e := range list {
				all[element{set.Name, string(e.Key)}] = content{string(e.Val), e.Comment}
			}
		}
		return nil
	})
	return all, err
}

// listRules are the rules that the kernel has, by their numbers.
func (t *Table) listRules() (handles, error) {
	all := handles{}
	err := t.do(func(c *nftables.Conn) error {
		if there, err := t.exists(c); err != nil || !there {
			return err
		}
		for _, name := range allChains {
			list, err := c.GetRules(t.table(), &nftables.Chain{Table: t.table(), Name: name})
			if err != nil {
				return fmt.Errorf("chain %s: %w", name, err)
			}
			for _, r := range list {
				all[name] = append(all[name], r.Handle)
			}
		}
		return nil
	})
	return all, err
}

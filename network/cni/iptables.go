package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/internal/thread"
)

// Whether the rules that this package makes over netlink are those that the node's own iptables would make: it keeps them in
// nf_tables, or, as "legacy", elsewhere; and what a rule is in nf_tables has changed with its versions. So it is asked: it
// makes a sample of the rules of a table in a namespace of their own, and they are compared.
var iptables struct {
	sync.Mutex
	tables map[xtKind]*xtAnswer
}

// xtKind is a table of the IPv4 or IPv6 family.
type xtKind struct {
	table string
	v6    bool
}

// program is that of the family, by its name.
func (k xtKind) program() string {
	if k.v6 {
		return "ip6tables"
	}
	return "iptables"
}

// xtAnswer is what is known of the node's iptables.
type xtAnswer struct {
	looked  time.Time
	asked   time.Time // it was done with asking
	program string    // which one was asked
	differs error     // why its rules are not made here; nil if they are
}

const (
	// lookAgain is how old what is known of the node's iptables may be, before it is looked whether it is the same program.
	lookAgain = time.Second
	// askAgain is how long one that could not be asked counts as one whose rules differ.
	askAgain = time.Minute
)

var (
	// errNoIPTables says that the node has none.
	errNoIPTables = errors.New("not installed")
	// errNoAnswer says that the node's iptables has not made the sample, so that nothing is known of its rules. A moment without memory or
	// processors may be why.
	errNoAnswer = fmt.Errorf("it could not be asked, and is again after %v", askAgain)
)

// askTime bounds what the node's iptables may take for the sample.
const askTime = 10 * time.Second

// iptablesDiffers says why rules of a table of a family cannot be made over netlink; nil if they can.
func (p *Plugins) iptablesDiffers(table string, v6 bool) error {
	iptables.Lock()
	defer iptables.Unlock()
	kind := xtKind{table, v6}
	known := iptables.tables[kind]
	switch {
	case known == nil:
		known = &xtAnswer{}
		if iptables.tables == nil {
			iptables.tables = map[xtKind]*xtAnswer{}
		}
		iptables.tables[kind] = known
	case time.Since(known.looked) < lookAgain:
		return known.differs
	}
	program, err := identify(kind.program())
	known.looked = time.Now()
	switch {
	case err != nil:
		known.program, known.differs = "", fmt.Errorf("%s: %w", kind.program(), err)
	case program != known.program, errors.Is(known.differs, errNoAnswer) && time.Since(known.asked) >= askAgain:
		before := known.differs
		known.program, known.differs = program, kind.compareSample()
		known.asked = time.Now()
		known.looked = known.asked
		p.logRules(kind, before, known.differs)
	}
	return known.differs
}

// logRules says how rules are made, where that is not what was said last.
func (p *Plugins) logRules(kind xtKind, before, differs error) {
	log := p.log.With("table", kind.table)
	switch {
	case fmt.Sprint(differs) == fmt.Sprint(before):
	case differs != nil:
		log.Info("firewall rules are made by running "+kind.program(), "reason", differs)
	case !errors.Is(before, errNoIPTables): // without one, none was run either
		log.Info("firewall rules are made without running " + kind.program() + " from now on")
	}
}

// identify tells one installation of a program from the next.
func identify(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", errNoIPTables
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d:%d %d %d.%09d", path, st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec), nil
}

// sampleRule is a rule in a chain of the sample.
type sampleRule struct {
	chain string
	rule  xtRule
}

// sample has a rule of each kind that is made in the table.
func (k xtKind) sample() []sampleRule {
	if k.table == tableFilter {
		return k.sampleFilter()
	}
	pod, node, local, others, home := "192.0.2.5/24", "192.0.2.9/32", "127.0.0.1/32", "224.0.0.0/4", "192.0.2.5:80"
	if k.v6 {
		pod, node, local, others, home = "2001:db8::5/64", "2001:db8::9/128", "2001:db8::/61", "ff00::/8", "[2001:db8::5]:80"
	}
	prefix := netip.MustParsePrefix
	return []sampleRule{
		{"POSTROUTING", xtRule{src: single(prefix(pod).Addr()), comment: `name: "n" id: "i"`, target: xtTo{chain: sampleOut}}},
		{sampleOut, xtRule{dst: prefix(pod), comment: "c", target: xtTo{chain: "ACCEPT"}}},
		{sampleOut, xtRule{dst: prefix(others), notDst: true, comment: "c", target: xtTo{masquerade: true}}},
		{sampleOut, xtRule{mark: 1 << 13, target: xtTo{masquerade: true}}},
		{"PREROUTING", xtRule{toLocal: true, target: xtTo{chain: sampleIn}}},
		{"OUTPUT", xtRule{toLocal: true, target: xtTo{chain: sampleIn}}},
		{sampleIn, xtRule{comment: "c", dports: []uint16{80, 65535}, proto: "udp", target: xtTo{chain: sampleMark}}},
		{sampleIn, xtRule{proto: "tcp", dport: 8080, src: prefix(pod), target: xtTo{chain: sampleMark}}},
		{sampleIn, xtRule{proto: "udp", dport: 53, dst: prefix(node), src: prefix(local), target: xtTo{chain: sampleMark}}},
		{sampleIn, xtRule{proto: "tcp", dport: 8080, dst: prefix(node), target: xtTo{dnat: netip.MustParseAddrPort(home)}}},
		{sampleMark, xtRule{comment: "c", target: xtTo{mark: 1 << 13}}},
	}
}

func (k xtKind) sampleFilter() []sampleRule {
	pod := netip.MustParseAddr("192.0.2.5")
	if k.v6 {
		pod = netip.MustParseAddr("2001:db8::5")
	}
	longest := "br0123456789abc"
	return []sampleRule{
		{"FORWARD", xtRule{comment: "c c", target: xtTo{chain: sampleIn}}},
		{sampleIn, xtRule{dst: single(pod), established: true, target: xtTo{chain: "ACCEPT"}}},
		{sampleIn, xtRule{src: single(pod), target: xtTo{chain: "ACCEPT"}}},
		{sampleIn, xtRule{in: "br0", out: "br0", notOut: true, comment: "(c: c|c)", target: xtTo{chain: sampleOut}}},
		{sampleIn, xtRule{in: longest, out: longest, comment: "c", target: xtTo{chain: "DROP"}}},
		{sampleIn, xtRule{comment: "c", target: xtTo{chain: "RETURN"}}},
		{sampleOut, xtRule{out: "br0", comment: "c", target: xtTo{chain: "DROP"}}},
	}
}

// The chains of the sample.
const (
	sampleOut  = "OUT"
	sampleIn   = "IN"
	sampleMark = "SETMARK"
)

// compareSample has the node's iptables make the sample, and says what differs from what is made here.
func (k xtKind) compareSample() error {
	restore, err := exec.LookPath(k.program() + "-restore")
	if err != nil {
		return fmt.Errorf("%s-restore: %w", k.program(), errNoIPTables)
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	return thread.Throwaway(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("%w: a network namespace: %w", errNoAnswer, err)
		}
		if err := k.restoreSample(ctx, restore); err != nil {
			return fmt.Errorf("%w: %w", errNoAnswer, err)
		}
		t, err := openXT(k.table, k.v6)
		if err != nil {
			return err
		}
		defer t.sock.Close() // not kept: nobody comes back to this namespace
		return t.compare(k.sample())
	})
}

func (k xtKind) restoreSample(ctx context.Context, restore string) error {
	var in, out bytes.Buffer
	in.WriteString("*" + k.table + "\n")
	for _, chain := range []string{sampleOut, sampleIn, sampleMark} {
		in.WriteString(":" + chain + " - [0:0]\n")
	}
	for _, s := range k.sample() {
		in.WriteString("-A " + s.chain)
		for _, a := range s.rule.args() {
			in.WriteString(` "` + strings.ReplaceAll(a, `"`, `\"`) + `"`)
		}
		in.WriteByte('\n')
	}
	in.WriteString("COMMIT\n")
	cmd := exec.CommandContext(ctx, restore, "--noflush")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &out
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%s has not ended after %v", restore, askTime)
		}
		return fmt.Errorf("%s: %w: %s", restore, err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// compare compares chains and rules that are there with a sample, and those that are there when the sample was made here, too.
func (t *xtTable) compare(want []sampleRule) error {
	if err := t.same(want); err != nil {
		return err
	}
	bases, err := t.bases()
	if err != nil {
		return err
	}
	t.remove()
	if err := t.apply(); err != nil {
		return err
	}
	if err := t.ensureChains(sampleOut, sampleIn, sampleMark); err != nil {
		return err
	}
	for _, s := range want {
		if err := t.ensureRule(s.chain, false, s.rule); err != nil {
			return err
		}
	}
	if err := t.apply(); err != nil {
		return fmt.Errorf("the kernel does not take the rules: %w", err)
	}
	if ours, err := t.bases(); err != nil || ours != bases {
		return errors.Join(errors.New("iptables makes its chains in another way"), err)
	}
	return t.same(want)
}

// bases is what says where the kernel comes to the chains.
func (t *xtTable) bases() (string, error) {
	var all []byte
	for _, name := range slices.Sorted(maps.Keys(xtBases[t.name])) {
		c, err := t.get(t.getChain(name))
		if err != nil {
			return "", fmt.Errorf("chain %s: %w", name, err)
		}
		nftables.Attrs(bytes.Join(c, nil), func(kind uint16, content []byte) {
			switch kind {
			case unix.NFTA_CHAIN_HOOK, unix.NFTA_CHAIN_POLICY, unix.NFTA_CHAIN_TYPE:
				all = append(all, attr(kind, content)...)
			}
		})
	}
	return string(all), nil
}

func (t *xtTable) same(want []sampleRule) error {
	at := map[string]int{}
	for _, s := range want {
		rules, err := t.rules(s.chain)
		if err != nil {
			return err
		}
		if i := at[s.chain]; i >= len(rules) || !rules[i].exprs.equal(s.rule.exprs(t.v6)) {
			return fmt.Errorf("iptables makes %q in another way", s.rule.args())
		}
		at[s.chain]++
	}
	return nil
}

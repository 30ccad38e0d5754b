package routes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/berth-run/berth/internal/file"
	"github.com/berth-run/berth/internal/nftables"
	"github.com/berth-run/berth/internal/socket"
)

const (
	// settle is how long a burst of changes may take to be seen as one.
	settle = 100 * time.Millisecond
	// tableEvery is how often it is looked what has become of the table, however busy others are with theirs.
	tableEvery = 2 * time.Second
	// lookEvery finds what others have changed and the kernel does not tell of, and tries again what failed.
	lookEvery = 30 * time.Second
	// retryAfter is how soon what failed is tried again at first.
	retryAfter = 2 * time.Second
)

// mostLeftOut is how much of what is left out is told: it is wrong elsewhere.
const mostLeftOut = 20

// Options of an [Agent].
type Options struct {
	Mode Mode
	// Kubeconfig leads to the API server. It need not exist yet.
	Kubeconfig string
	// Node is the name of this node's object.
	Node string
	// Network says which ranges pods get their addresses of, where their network is berth's default one, or else the file of
	// the network that they get; neither while nobody knows.
	Network func() (cidrs []netip.Prefix, other string)
	// NetworkChanges has a value when Network may say something else.
	NetworkChanges <-chan struct{}
	// Note is a file that is there while there may be routes of ours.
	Note string
	// Log may be nil.
	Log *slog.Logger
}

// Agent keeps the routes of the node that it runs on.
type Agent struct {
	opts    Options
	log     *slog.Logger
	nodes   watcher
	stop    context.CancelFunc
	stopped sync.WaitGroup

	// The loop alone uses these.
	said    map[string]bool // what was told and still holds
	elseNow string          // the file of the network that is none of ours
	shape   string
	table   rules     // what the table was made to be
	only    io.Closer // has other daemons leave the node's routes alone; nil without it

	current atomic.Pointer[State]
	// used are the indexes of links that routes lead out by.
	used atomic.Pointer[[]int]
}

// Start keeps the node's routes until Close. With the mode Off it removes those that the note tells of, and ends.
func Start(o Options) (*Agent, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	ctx, stop := context.WithCancel(context.Background())
	a := &Agent{opts: o, log: o.Log, stop: stop, said: map[string]bool{}, shape: (&Plan{}).shape()}
	if o.Mode == Off || o.Mode == "" {
		stop()
		err := a.remove("node routes are turned off: those of before are removed")
		return a, errors.Join(err, a.release())
	}
	a.nodes = watcher{kubeconfig: o.Kubeconfig, log: o.Log, changed: make(chan struct{}, 1)}
	kernel := make(chan struct{}, 1)
	a.stopped.Go(func() { a.nodes.run(ctx) })
	a.stopped.Go(func() { a.watchKernel(ctx, kernel) })
	a.stopped.Go(func() { a.loop(ctx, kernel) })
	return a, nil
}

// Close ends the agent. Routes stay.
func (a *Agent) Close() error {
	a.stop()
	a.stopped.Wait()
	return a.release()
}

// poke has somebody look who has not looked since the last time.
func poke(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func (a *Agent) loop(ctx context.Context, kernel <-chan struct{}) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	failed := time.Duration(0)
	soon := false
	for {
		changed := true
		select {
		case <-ctx.Done():
			return
		case <-a.opts.NetworkChanges:
		case <-a.nodes.changed:
		case <-kernel:
		case <-timer.C:
			changed = false
		}
		switch {
		case changed && !soon:
			soon = true
			timer.Reset(settle)
		case !changed:
			soon = false
			next := lookEvery
			if a.sync() {
				failed = 0
			} else {
				failed = min(max(2*failed, retryAfter), lookEvery)
				next = failed
			}
			timer.Reset(next)
		}
	}
}

// sync makes the routes be what they should be now, if that is known. It returns false if something failed.
func (a *Agent) sync() bool {
	cidrs, other := a.opts.Network()
	if other != "" {
		return a.leaveAlone(other)
	}
	a.elseNow = ""
	if len(cidrs) == 0 {
		return true // nobody knows yet: all stays
	}
	if err := a.claim(); err != nil {
		a.report(nil, err)
		return false
	}
	nodes, synced := a.nodes.list()
	if !synced {
		return true // as above
	}
	links, err := readLinks()
	if err != nil {
		a.report(nil, err)
		return false
	}
	keep, err := nextHops()
	if err != nil {
		a.report(nil, err)
		return false
	}
	for _, server := range a.nodes.servers() {
		keep[server] = "an address of the API server"
	}
	plan, err := Compute(Input{Mode: a.opts.Mode, Self: a.opts.Node, PodCIDRs: cidrs, Nodes: nodes, Links: links, Keep: keep})
	if err != nil {
		a.report(nil, err)
		return true
	}
	if err = a.note(); err == nil {
		err = a.apply(plan)
	}
	a.remember(plan)
	a.report(plan, err)
	return err == nil
}

func (a *Agent) apply(plan *Plan) error {
	made, err := plan.apply()
	table := plan.rules()
	if made && err == nil && table.equal(a.table) {
		a.log.Warn("node routes' rules were changed by somebody else, and are as they should be again", "table", "inet "+tableName)
	}
	if err == nil {
		a.table = table
	}
	return err
}

// leaveAlone has nothing of ours on a node whose network is another's.
func (a *Agent) leaveAlone(other string) bool {
	if a.elseNow == other {
		return true
	}
	if err := a.remove("the node's network is another's: routes of ours are removed"); err != nil {
		a.report(nil, err)
		return false
	}
	if err := a.release(); err != nil {
		a.log.Debug("the name by which node routes are kept", "error", err)
	}
	a.log.Info("node routes are left to the node's network", "network", other)
	a.elseNow, a.shape, a.said, a.table = other, (&Plan{}).shape(), map[string]bool{}, rules{}
	a.used.Store(nil)
	a.current.Store(&State{Mode: a.opts.Mode, Problem: "left to the node's network, " + other})
	return true
}

// State is how node routes are, for people.
type State struct {
	Mode Mode `json:"mode"`
	// Routed and Tunnelled are how many pod CIDRs of other nodes are reached directly, and through a tunnel.
	Routed    int `json:"routed"`
	Tunnelled int `json:"tunnelled"`
	// LeftOut is what no route is made for, and why: the first of it.
	LeftOut []string `json:"leftOut,omitempty"`
	// Problem is why they are not as they should be, or what they wait for; "" if nothing is wrong.
	Problem string `json:"problem,omitempty"`
}

// State is how node routes are.
func (a *Agent) State() State {
	if s := a.current.Load(); s != nil {
		return *s
	}
	s := State{Mode: a.opts.Mode}
	if s.Mode != Off {
		s.Problem = "waiting for the node's network and for Nodes"
	}
	return s
}

func (a *Agent) keepState(plan *Plan, err error) {
	s := State{Mode: a.opts.Mode}
	if before := a.current.Load(); plan == nil && before != nil {
		s = *before
	}
	s.Problem = ""
	if err != nil {
		s.Problem = err.Error()
	}
	if plan != nil {
		s.Routed, s.Tunnelled = plan.count()
		for _, out := range plan.LeftOut[:min(len(plan.LeftOut), mostLeftOut)] {
			s.LeftOut = append(s.LeftOut, out.String())
		}
	}
	a.current.Store(&s)
}

// note writes down that there are routes of ours, before there are any.
func (a *Agent) note() error {
	if a.opts.Note == "" || a.noted() {
		return nil
	}
	if err := file.Replace(a.opts.Note, []byte("there may be node routes of berth's\n")); err != nil {
		return fmt.Errorf("that there are node routes cannot be noted: %w", err)
	}
	return nil
}

func (a *Agent) noted() bool {
	_, err := os.Stat(a.opts.Note)
	return !errors.Is(err, fs.ErrNotExist)
}

// remove removes what there is of ours. Without a note there is nothing: routes of this kind are another daemon's, and so are
// those that another daemon keeps by now.
func (a *Agent) remove(why string) error {
	if a.opts.Note == "" || !a.noted() {
		return nil
	}
	switch err := a.claim(); {
	case errors.Is(err, socket.ErrInUse):
		a.log.Info("node routes of before are left to another daemon", "reason", err)
		return os.Remove(a.opts.Note)
	case err != nil:
		return err
	}
	a.log.Info(why)
	if err := withdraw(); err != nil {
		return fmt.Errorf("remove node routes: %w", err)
	}
	return os.Remove(a.opts.Note)
}

// onlyName is what one daemon of a network namespace has: all that plans are made of there has one name and one number for all.
const onlyName = "berth-node-routes"

// claim has this daemon be the one that makes the node's routes. Two would take each other's for their own of before.
func (a *Agent) claim() error {
	if a.only != nil {
		return nil
	}
	only, err := socket.Only(context.Background(), onlyName)
	if errors.Is(err, socket.ErrInUse) {
		return fmt.Errorf("another berth serve of this node keeps them; give one of both --node-routes off: %w", err)
	}
	if err != nil {
		return fmt.Errorf("whether another daemon keeps the node's routes: %w", err)
	}
	a.only = only
	return nil
}

func (a *Agent) release() error {
	if a.only == nil {
		return nil
	}
	err := a.only.Close()
	a.only = nil
	return err
}

// report tells what is new: what the routes are, what is left out, what fails.
func (a *Agent) report(plan *Plan, err error) {
	a.keepState(plan, err)
	now := map[string]bool{}
	say := func(level slog.Level, msg string, args ...any) {
		key := msg + fmt.Sprint(args...)
		now[key] = true
		if !a.said[key] {
			a.log.Log(context.Background(), level, msg, args...)
		}
	}
	switch {
	case errors.Is(err, socket.ErrInUse):
		say(slog.LevelWarn, "node routes are left to another daemon", "reason", err)
	case errors.Is(err, errWaiting):
		say(slog.LevelWarn, "node routes stay as they are, if there are any", "reason", err)
	case err != nil:
		say(slog.LevelError, "node routes are not as they should be", "error", err)
	}
	if plan == nil {
		a.said = now
		return
	}
	for i, out := range plan.LeftOut {
		if i == mostLeftOut {
			say(slog.LevelWarn, "more is left out of node routes", "count", len(plan.LeftOut)-mostLeftOut)
			break
		}
		say(slog.LevelWarn, "left out of node routes", "node", out.Node, "what", out.What, "reason", out.Why)
	}
	for _, w := range warnings(plan) {
		say(slog.LevelWarn, w.what, "remedy", w.remedy)
	}
	if shape := plan.shape(); err == nil && shape != a.shape {
		a.shape = shape
		direct, tunnelled := plan.count()
		a.log.Info("node routes lead to other nodes' pods", "routed", direct, "tunnelled", tunnelled)
	}
	a.said = now
}

// count is how many ranges are reached directly, and through a tunnel.
func (p *Plan) count() (direct, tunnelled int) {
	for _, r := range p.Routes {
		if r.Link == "" {
			direct++
		} else {
			tunnelled++
		}
	}
	return direct, tunnelled
}

func (p *Plan) shape() string { return fmt.Sprint(p.Routes) }

// remember keeps which links changes of matter.
func (a *Agent) remember(plan *Plan) {
	var used []int
	for _, r := range plan.Routes {
		if r.Link == "" && !slices.Contains(used, r.LinkIndex) {
			used = append(used, r.LinkIndex)
		}
	}
	for _, t := range plan.Tunnels {
		if link, err := netlink.LinkByName(t.Name); err == nil {
			used = append(used, link.Attrs().Index)
		}
	}
	a.used.Store(&used)
}

// watchKernel tells of changes by others that matter.
func (a *Agent) watchKernel(ctx context.Context, changed chan<- struct{}) {
	for ctx.Err() == nil {
		err := a.watchKernelOnce(ctx, changed)
		if ctx.Err() != nil {
			return
		}
		a.log.Debug("changes of links and routes were missed", "error", err)
		poke(changed)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

func (a *Agent) watchKernelOnce(ctx context.Context, changed chan<- struct{}) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	failures := make(chan error, 1)
	failed := func(err error) {
		select {
		case failures <- err:
		default:
		}
	}
	links, addrs, routes := make(chan netlink.LinkUpdate), make(chan netlink.AddrUpdate), make(chan netlink.RouteUpdate)
	if err := netlink.LinkSubscribeWithOptions(links, ctx.Done(), netlink.LinkSubscribeOptions{ErrorCallback: failed}); err != nil {
		return err // and nobody closes links
	}
	defer leave(stop, links)
	if err := netlink.AddrSubscribeWithOptions(addrs, ctx.Done(), netlink.AddrSubscribeOptions{ErrorCallback: failed}); err != nil {
		return err
	}
	defer leave(stop, addrs)
	if err := netlink.RouteSubscribeWithOptions(routes, ctx.Done(), netlink.RouteSubscribeOptions{ErrorCallback: failed}); err != nil {
		return err
	}
	defer leave(stop, routes)
	var tables <-chan struct{}
	if told, err := nftables.WatchTransactions(); err != nil {
		a.log.Debug("changes of nf_tables are not told, and looked for every thirty seconds", "error", err)
	} else {
		defer told.Close()
		tables = told.C
	}
	var last time.Time
	var due <-chan time.Time
	for {
		select {
		case <-tables:
			if due == nil {
				due = time.After(time.Until(last.Add(tableEvery)))
			}
		case last = <-due:
			due = nil
			poke(changed)
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failures:
			return err
		case u, ok := <-links:
			if !ok {
				return errors.New("links: end of news")
			}
			if used := a.used.Load(); used != nil && slices.Contains(*used, int(u.Index)) {
				poke(changed)
			}
		case u, ok := <-addrs:
			if !ok {
				return errors.New("addresses: end of news")
			}
			if !u.LinkAddress.IP.IsLinkLocalUnicast() { // each pod's link has one of these
				poke(changed)
			}
		case u, ok := <-routes:
			if !ok {
				return errors.New("routes: end of news")
			}
			if u.Protocol == Protocol {
				poke(changed)
			}
		}
	}
}

// leave has whoever sends stop, and not wait.
func leave[T any](stop func(), ch <-chan T) {
	stop()
	go func() {
		for range ch { // until it is closed
		}
	}()
}

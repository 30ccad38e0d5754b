package network

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"

	"github.com/berth-run/berth/network/cni"
	"github.com/berth-run/berth/network/hostports"
)

// DefaultCacheDir is where the results of plugins are kept. It is not CNI's own /var/lib/cni: whatever is in there and
// belongs to no pod of ours is torn down by [Manager.GC].
const DefaultCacheDir = "/var/lib/berth/cni"

const (
	// pollEvery finds what inotify cannot tell: directories that were made anew, and networks without inotify.
	pollEvery = 2 * time.Second
	// settle is how long a burst of changes (an installation) may take to be seen as one.
	settle = 50 * time.Millisecond
)

// ExecAll in the list of types whose programs are run stands for all.
const ExecAll = "all"

// Options of a [Manager].
type Options struct {
	// ConfDir has the network configuration; it need not exist yet.
	ConfDir string
	// BinDirs have the plugins; they need not exist yet.
	BinDirs []string
	// CacheDir keeps the results of plugins for their DEL, for this manager alone. Empty means DefaultCacheDir.
	CacheDir string
	// RunDir has what is of no use after a reboot, for this manager alone. Empty means CacheDir.
	RunDir string
	// PodCIDRs are the ranges of the default network, one of a family. None: those that SetPodCIDRs is told.
	PodCIDRs []netip.Prefix
	// PodCIDRFile keeps what SetPodCIDRs is told; "" keeps it in memory only.
	PodCIDRFile string
	// NoDefault leaves pods without a network where ConfDir has no configuration.
	NoDefault bool
	// Tunnelled says that what pods send to other nodes may go through a tunnel, which the default network's MTU has to
	// leave room for.
	Tunnelled bool
	// NodeLinks are links that may have an address of PodCIDRs: those of the node's routes.
	NodeLinks []string
	// Exec are types of plugins whose programs are run in any case; with ExecAll no plugin is answered in process. Else those
	// that [cni] has are, unless the node's program of that name is not the reference plugin.
	Exec []string
	// NamespaceDir is where the namespaces of pods are pinned whose teardown is owed. Empty: they are not kept.
	NamespaceDir string
	// ExclusiveNetworks says that nobody else on this node uses the networks of ConfDir, so that GC may also tell the
	// plugins (CNI 1.1) to release what belongs to none of our pods.
	ExclusiveNetworks bool
	// Log may be nil.
	Log *slog.Logger

	statusTime time.Duration // for tests; 0 is statusTime
}

// Manager runs the CNI plugins of a node.
type Manager struct {
	opts    Options
	log     *slog.Logger
	cni     *libcni.CNIConfig
	plugins *plugins
	cidrs   *podCIDRs
	linger  time.Duration
	owed    debts
	// owedFirst is how long a teardown that is owed waits at first.
	owedFirst time.Duration
	boot      string // boot id of the kernel
	changed   chan struct{}
	claims    hostports.Claims
	table     *hostports.Table
	probe     sync.Once
	noTable   error // why the kernel does not take the table
	stop      chan struct{}
	closed    sync.Once
	stopped   sync.WaitGroup

	mu       sync.Mutex
	conflist *conflist // the current one, nil if none can be read
	notReady error
	last     *conflist // the last one that was ready
	status   pluginStatus
	shut     string       // why the node's firewall drops what is for pods, as it was logged
	adopted  atomic.Bool  // the node's pods are known, and what others take away of theirs is made again
	seen     atomic.Int64 // the index of the bridge of which netfilter sees the packets
	bare     string       // why what pods send is not masqueraded, as it was logged
	others   []podAddress // of pods on other networks than that of the configuration
}

// Open starts to watch the configuration. It succeeds without one.
func Open(o Options) (*Manager, error) {
	if o.ConfDir == "" || len(o.BinDirs) == 0 {
		return nil, fmt.Errorf("network: no configuration or no plugin directory given: %w", errdefs.ErrInvalidArgument)
	}
	if o.CacheDir == "" {
		o.CacheDir = DefaultCacheDir
	}
	if o.RunDir == "" {
		o.RunDir = o.CacheDir
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &plugins{log: o.Log, inProcess: cni.New(o.Log), exec: o.Exec}
	m := &Manager{
		opts:      o,
		log:       o.Log,
		cni:       libcni.NewCNIConfigWithCacheDir(o.BinDirs, o.CacheDir, checked{p}),
		plugins:   p,
		cidrs:     openPodCIDRs(o.PodCIDRFile, o.PodCIDRs, o.Log),
		linger:    lingerTime,
		owed:      debts{all: map[string]*debt{}},
		owedFirst: owedFirst,
		changed:   make(chan struct{}, 1),
		stop:      make(chan struct{}),
		notReady:  errors.New("network configuration not read yet"),
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	m.boot = strings.TrimSpace(string(boot))
	m.table = hostports.New(tableName(o.CacheDir), o.Log)
	m.refresh()
	m.recallIntents()
	m.takeUpOwed()
	m.stopped.Go(m.watch)
	return m, nil
}

// Close ends the watch, and waits for what the kernel still has to do for calls that did not. Calls under way are not affected. It
// may be called again.
func (m *Manager) Close() error {
	m.closed.Do(func() { close(m.stop) })
	m.endStatus()
	m.stopped.Wait()
	m.plugins.inProcess.Close()
	m.table.Close()
	return nil
}

// Ready returns nil when pods can be set up, and otherwise the reason why not, for people: what is wrong with the configuration,
// or what its plugins say (STATUS of CNI 1.1). It waits for nobody.
func (m *Manager) Ready() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Or(m.notReady, m.status.err)
}

// SetPodCIDRs takes the address ranges of the node's pods as a kubelet hands them over, joined by commas. They are those of
// the default network at once, unless Options.PodCIDRs has others. What is empty or no range is passed over.
func (m *Manager) SetPodCIDRs(joined string) {
	m.cidrs.set(joined)
	m.refresh()
}

// PodCIDRs are the ranges in force, whether or not pods get their addresses from them.
func (m *Manager) PodCIDRs() []netip.Prefix { return m.cidrs.get() }

// Conflist returns the bytes of the configuration that a Setup would use now. Keep them with the pod's record before
// Setup and pass them to it, and Teardown can do its work whatever happens in between.
func (m *Manager) Conflist() ([]byte, error) {
	c, err := m.current()
	if err != nil {
		return nil, err
	}
	return slices.Clone(c.Bytes), nil
}

// Current says which network pods get, for people.
type Current struct {
	// Name is the network's, "" where there is none.
	Name string `json:"name"`
	// From is the file of its configuration, or what the default network is made of.
	From string `json:"from"`
	// PodsElsewhere counts the pods that are on other networks, by their names: they were made when that was the node's,
	// and stay there until they are removed.
	PodsElsewhere map[string]int `json:"podsElsewhere,omitempty"`
}

// Current says which network a Setup would use now.
func (m *Manager) Current() Current {
	m.mu.Lock()
	c := m.conflist
	m.mu.Unlock()
	var now Current
	if c != nil {
		now.Name, now.From = c.Name, c.from()
	}
	now.PodsElsewhere = m.podsElsewhere(now.Name)
	return now
}

// current is the configuration to use, if the network is ready. Whoever asks when it is not may know more than we do yet.
func (m *Manager) current() (*conflist, error) {
	m.mu.Lock()
	known := m.notReady == nil
	m.mu.Unlock()
	if !known {
		m.refresh()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.notReady != nil {
		return nil, fmt.Errorf("network is not ready: %w: %w", m.notReady, errdefs.ErrUnavailable)
	}
	return m.conflist, nil
}

// refresh reads the configuration and looks for its plugins.
func (m *Manager) refresh() {
	c, reason := m.choose()
	if reason == nil {
		reason = m.missing(c)
	}
	var others []podAddress
	if reason == nil && !c.byDefault() { // which looks itself where its range is
		others = m.addressesElsewhere(c.Name)
		reason = m.overlaps(c, others)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.others = others
	m.report(c, reason)
	if !c.same(m.conflist) {
		select {
		case m.changed <- struct{}{}:
		default: // nobody has looked since the last one
		}
	}
	m.conflist, m.notReady = c, reason
	if reason == nil {
		m.last = c
	}
	m.status.renew(c)
}

// choose is the configuration of the node, or else the default network.
func (m *Manager) choose() (*conflist, error) {
	c, err := loadDir(m.opts.ConfDir)
	if errors.Is(err, errNoConfiguration) {
		return m.defaultNetwork(err)
	}
	if err == nil {
		m.noteConfigured(c.file)
	}
	return c, err
}

// report logs what has changed. The caller holds mu.
func (m *Manager) report(c *conflist, reason error) {
	was := m.notReady
	switch {
	case reason != nil && (was == nil || was.Error() != reason.Error()):
		m.log.Warn("network is not ready", "reason", reason)
	case reason != nil:
	case m.last != nil && m.last.byDefault() != c.byDefault():
		m.log.Info("network changed from "+m.last.from()+" to "+c.from()+"; pods that were made before keep theirs", "network", c.Name, "before", m.last.Name)
	case was != nil:
		m.log.Info("network is ready", "network", c.Name, "from", c.from())
	case m.conflist != nil && string(m.conflist.Bytes) != string(c.Bytes):
		m.log.Info("network configuration changed", "network", c.Name, "from", c.from())
	}
}

// prepare has the plugins of the current network find out what the first pod would have to wait for.
func (m *Manager) prepare() {
	m.mu.Lock()
	c := m.conflist
	m.mu.Unlock()
	if c == nil {
		return
	}
	for _, typ := range types(c.NetworkConfigList) {
		if who, err := m.plugins.FindInPath(typ, m.opts.BinDirs); err == nil && who == answered+typ {
			m.plugins.inProcess.Prepare(typ)
		}
	}
}

// missing says which plugins of a network are not installed.
func (m *Manager) missing(c *conflist) error {
	var missing []string
	for _, typ := range types(c.NetworkConfigList) {
		if _, err := m.plugins.FindInPath(typ, m.opts.BinDirs); err != nil && !slices.Contains(missing, typ) {
			missing = append(missing, typ)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return fmt.Errorf("network %s (%s): no plugin %s in %s", c.Name, c.from(), strings.Join(missing, ", "), strings.Join(m.opts.BinDirs, ":"))
}

// watch refreshes when a directory changes, and now and then.
func (m *Manager) watch() {
	var events <-chan fsnotify.Event
	var failures <-chan error
	add := func() {}
	if w, err := fsnotify.NewWatcher(); err != nil {
		m.log.Warn("no inotify; network configuration is polled", "error", err)
	} else {
		defer w.Close() //nolint:errcheck // nothing to lose
		events, failures = w.Events, w.Errors
		add = func() {
			for _, dir := range append([]string{m.opts.ConfDir}, m.opts.BinDirs...) {
				_ = w.Add(filepath.Clean(dir)) // it may not be there yet; the next round sees
			}
		}
	}
	var looked time.Time
	refresh := func() {
		m.refresh()
		m.askStatus()
		m.prepare()
		legacy := time.Since(looked) >= legacyAgain
		if legacy {
			looked = time.Now()
		}
		m.letThrough(legacy)
		if m.adopted.Load() {
			m.keepMasqueraded()
		}
	}
	add()
	refresh() // what changed between Open and the watch
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	var settled <-chan time.Time
	for {
		select {
		case <-m.stop:
			return
		case <-events:
			if settled == nil {
				settled = time.After(settle)
			}
		case err := <-failures:
			m.log.Debug("inotify", "error", err) // an overflow, at worst: the poll follows
		case <-settled:
			settled = nil
			refresh()
		case <-poll.C:
			add()
			refresh()
			m.forgetIntents()
		}
	}
}

package pods

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-run/berth/cgroups"
	"github.com/berth-run/berth/cri/cdi"
	"github.com/berth-run/berth/cri/nri"
	"github.com/berth-run/berth/cri/shim"
	"github.com/berth-run/berth/cri/spec"
	"github.com/berth-run/berth/images"
	"github.com/berth-run/berth/internal/step"
	"github.com/berth-run/berth/network"
)

// Options say where things are and who does what.
type Options struct {
	Root     string // persistent: records
	Run      string // gone after a reboot: bundles, namespaces, sockets
	ShimPath string // the berth-shim program
	Images   *images.Store
	Network  *network.Manager
	CDI      cdi.Registry        // what is known of CDI devices
	Cgroups  cgroups.Driver      // of new pods; cgroupfs if empty
	Rlimits  []specs.POSIXRlimit // of containers; those that are not named are the daemon's
	// NoSELinux labels nothing, as where SELinux is off.
	NoSELinux bool
	// RelabelOnce takes a volume whose root has the container's SELinux label to have it throughout.
	RelabelOnce bool
	NRI         nri.Options // plugins that see and change pods; its Log is the one below
	Log         *slog.Logger
	Observe     func(step.Event) // told the end of every step, if not nil
}

// Manager is all pods and containers of this node.
type Manager struct {
	opts      Options
	log       *slog.Logger
	host      spec.Host
	boot      string
	launcher  *launcher
	lean      *leanMounts // nil: shims are among the node's mounts
	execs     execServers
	execRoom  pool
	podFiles  *records
	ctrFiles  *records
	nri       *nri.Runtime // nil: none
	closing   chan struct{}
	watchers  sync.WaitGroup
	events    *events
	health    health
	clampOnce sync.Once
	userns    usernsRanges
	levels    levels
	noUserns  error // why pods cannot have user namespaces of their own

	mu         sync.RWMutex
	pods       map[string]*pod
	containers map[string]*container
	making     map[string]*container // being created: in no list yet, but they may exit
	makingPods map[string]*pod       // the same for sandboxes
	names      map[string]*claim
}

// Open reads the records, finds out what has become of everything that they name, and finishes or undoes what was under
// way when the daemon ended.
func Open(ctx context.Context, o Options) (_ *Manager, err error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	m := &Manager{
		opts: o, log: o.Log, closing: make(chan struct{}), events: newEvents(time.Now),
		pods: map[string]*pod{}, makingPods: map[string]*pod{},
		containers: map[string]*container{}, making: map[string]*container{}, names: map[string]*claim{},
	}
	for _, dir := range []string{o.Root, o.Run, m.runDir("pods"), m.runDir("containers"), m.stateRoot(), m.seccompRecords()} {
		mode := os.FileMode(0o700)
		if dir == o.Run || dir == m.runDir("containers") {
			mode = 0o711 // the way to the root file systems of containers whose root is not the host's
		}
		if err := os.MkdirAll(dir, mode); err != nil {
			return nil, err
		}
		if err := os.Chmod(dir, mode); err != nil { // whatever the umask or a packager did (CVE-2021-41103)
			return nil, err
		}
	}
	if m.podFiles, err = openRecords(filepath.Join(o.Root, "pods")); err != nil {
		return nil, err
	}
	if m.ctrFiles, err = openRecords(filepath.Join(o.Root, "containers")); err != nil {
		return nil, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	m.boot = strings.TrimSpace(string(boot))
	if m.host, err = hostFacts(); err != nil {
		return nil, fmt.Errorf("facts of the host: %w", err)
	}
	m.host.Rlimits = o.Rlimits
	if o.NoSELinux {
		m.host.SELinux = spec.SELinux{}
	}
	if m.host.AppArmorEnabled {
		if err := loadAppArmor(); err != nil {
			m.log.Error("the default AppArmor profile cannot be loaded: containers that do not name another are refused", "profile", spec.DefaultAppArmorProfile, "error", err)
		}
	}
	if m.launcher, err = newLauncher(o.ShimPath); err != nil {
		return nil, fmt.Errorf("shim %s: %w", o.ShimPath, err)
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.lean, err = newLeanMounts(o.Run); err != nil {
		m.log.Warn("containers are created among all mounts of the node, which is slower the more pods there are", "error", err)
	}
	m.execs.launcher, m.execs.ended = m.launcher, m.endExecs
	m.health = health{look: m.look, wait: healthWithin}
	if m.noUserns = m.probeUserns(); m.noUserns != nil {
		m.log.Warn("pods cannot have user namespaces of their own", "error", m.noUserns)
	}
	o.NRI.Log, o.NRI.InjectCDI = o.Log, m.injectCDI
	if m.nri, err = nri.Open(o.NRI); err != nil {
		return nil, err
	}
	if err := m.recover(ctx); err != nil {
		return nil, err
	}
	if err := m.nri.Start(nriState{m}); err != nil {
		m.log.Error("no plugin of NRI can come: pods run without", "error", err)
	}
	go func() { // ready before the first probe asks; a failure is told to who asks
		_, _ = m.execs.get()
	}()
	return m, nil
}

// Close ends what the daemon runs for itself. Pods go on.
func (m *Manager) Close() {
	if err := m.nri.Close(); err != nil {
		m.log.Warn("the socket for plugins of NRI stays behind", "error", err)
	}
	close(m.closing)
	m.mu.RLock()
	for _, p := range m.pods {
		p.unwatch()
	}
	m.mu.RUnlock()
	m.watchers.Wait()
	m.execs.close()
	m.launcher.close()
	m.lean.close()
}

func (m *Manager) runDir(parts ...string) string {
	return filepath.Join(append([]string{m.opts.Run}, parts...)...)
}

// stateRoot is libcontainer's directory.
func (m *Manager) stateRoot() string { return m.runDir("state") }

// seccompRecords is a directory of the shims' helpers.
func (m *Manager) seccompRecords() string { return m.runDir("seccomp") }

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return hex.EncodeToString(b[:])
}

func (m *Manager) stack(call, owner string, save func([]string) error) *step.Stack {
	return &step.Stack{Call: call, Owner: owner, Save: save, Observe: m.opts.Observe}
}

// claim is a name that a call is about to use, or that something has.
type claim struct {
	id   string        // of what has the name, once it exists
	done chan struct{} // closed when the call that claimed it has ended
	err  error         // of that call
}

// claim takes a name for a new id. Where a call for the same name is still under way (the kubelet retries after its
// timeout), it is waited for: if it succeeds, its id is the answer, for both calls ask for the same thing.
func (m *Manager) claim(ctx context.Context, name string) (c *claim, id string, err error) {
	for {
		m.mu.Lock()
		held := m.names[name]
		if held == nil {
			c = &claim{done: make(chan struct{})}
			m.names[name] = c
			m.mu.Unlock()
			return c, "", nil
		}
		m.mu.Unlock()
		select {
		case <-held.done:
			if held.err == nil {
				return nil, "", fmt.Errorf("name %q is taken by %s: %w", name, held.id, errdefs.ErrAlreadyExists)
			}
			continue // it failed, and the name is free again
		default:
		}
		select {
		case <-held.done:
			if held.err == nil {
				return nil, held.id, nil
			}
		case <-ctx.Done():
			return nil, "", fmt.Errorf("an earlier call for %q is still under way: %w", name, context.Cause(ctx))
		}
	}
}

// settle ends a claim: the name belongs to id now, or is free again.
func (m *Manager) settle(name string, c *claim, id string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c.id, c.err = id, err
	if err != nil {
		delete(m.names, name)
	}
	close(c.done)
}

// own notes that a name belongs to what a record names.
func (m *Manager) own(name, id string) {
	c := &claim{id: id, done: make(chan struct{})}
	close(c.done)
	m.names[name] = c
}

// freeName gives up a name, if it still is id's.
func (m *Manager) freeName(name, id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if c := m.names[name]; c != nil && c.id == id {
		delete(m.names, name)
	}
}

// find looks up an id or a prefix that only one has, as crictl sends it.
func find[T any](all map[string]T, what, id string) (T, error) {
	var found T
	if v, ok := all[id]; ok {
		return v, nil
	}
	n := 0
	if id != "" && len(id) < 64 {
		for k, v := range all {
			if strings.HasPrefix(k, id) {
				found = v
				n++
			}
		}
	}
	var none T
	switch n {
	case 1:
		return found, nil
	case 0:
		return none, fmt.Errorf("%s %q: %w", what, id, errdefs.ErrNotFound)
	}
	return none, fmt.Errorf("%s %q: %d of them begin so: %w", what, id, n, errdefs.ErrInvalidArgument)
}

func (m *Manager) pod(id string) (*pod, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return find(m.pods, "pod sandbox", id)
}

func (m *Manager) container(id string) (*container, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return find(m.containers, "container", id)
}

// Sandbox returns the pod sandbox with that id or unique prefix.
func (m *Manager) Sandbox(id string) (*Sandbox, error) {
	p, err := m.pod(id)
	if err != nil {
		return nil, err
	}
	return p.view.Load(), nil
}

// Sandboxes returns all pod sandboxes, newest first.
func (m *Manager) Sandboxes() []*Sandbox {
	m.mu.RLock()
	list := make([]*Sandbox, 0, len(m.pods))
	for _, p := range m.pods {
		list = append(list, p.view.Load())
	}
	m.mu.RUnlock()
	sort.Slice(list, func(i, j int) bool { return list[i].CreatedAt.After(list[j].CreatedAt) })
	return list
}

// Container returns the container with that id or unique prefix.
func (m *Manager) Container(id string) (*Container, error) {
	c, err := m.container(id)
	if err != nil {
		return nil, err
	}
	return c.view.Load(), nil
}

// Containers returns all containers, newest first.
func (m *Manager) Containers() []*Container {
	return m.containerViews(func(*container) bool { return true })
}

// viewsOf returns the containers of a pod, newest first.
func (m *Manager) viewsOf(podID string) []*Container {
	return m.containerViews(func(c *container) bool { return c.rec.SandboxID == podID })
}

func (m *Manager) containerViews(pick func(*container) bool) []*Container {
	m.mu.RLock()
	list := []*Container{}
	for _, c := range m.containers {
		if pick(c) {
			list = append(list, c.view.Load())
		}
	}
	m.mu.RUnlock()
	sort.Slice(list, func(i, j int) bool { return list[i].CreatedAt.After(list[j].CreatedAt) })
	return list
}

// lock is a mutex that a call can give up waiting for.
type lock chan struct{}

func newLock() lock { return make(lock, 1) }

func (l lock) Lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another call on this pod is still under way: %w", context.Cause(ctx))
	}
}

func (l lock) Unlock() { <-l }

// failedPrecondition is an error about a state that does not allow what was asked.
func failedPrecondition(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrFailedPrecondition)...)
}

// ofShim gives an error of a shim or of the exec server the class that a caller can act upon.
func ofShim(err error) error {
	var answer *shim.Error
	switch {
	case errors.As(err, &answer) && answer.Code == shim.CodeDeadline:
		return fmt.Errorf("%w: %w", err, context.DeadlineExceeded)
	case errors.As(err, &answer) && (answer.Code == shim.CodeState || answer.Code == shim.CodeNotFound):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case errors.Is(err, shim.ErrGone), errors.Is(err, shim.ErrExecServerGone):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

func isNotFound(err error) bool { return errors.Is(err, errdefs.ErrNotFound) }

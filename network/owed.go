package network

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/berth-run/berth/internal/file"
)

// A teardown that fails must not keep a pod on the node for ever: the plugin may have been uninstalled with its add-on. It
// is taken over from the pod then, with the pod's namespace, and tried again until it succeeds, over restarts.

const (
	owedFirst = 5 * time.Second // after which it is tried again; twice as long each time
	owedLast  = 5 * time.Minute
	owedTime  = 90 * time.Second // for the plugins together
)

// Owed is a teardown of a pod that has been let go.
type Owed struct {
	Pod   string    `json:"pod"`
	Since time.Time `json:"since"`
	Tries int       `json:"tries"`
	Error string    `json:"error"`
}

// debts are all teardowns that are owed.
type debts struct {
	mu  sync.Mutex
	all map[string]*debt // by the pods' ids
}

// debt is a file in the directory of what is owed.
type debt struct {
	Pod   Pod
	Since time.Time
	Error string
	// PortsBoot is the boot id of the kernel whose rules still lead host ports to the pod; "" if none do.
	PortsBoot string `json:",omitempty"`

	tries int
}

func (m *Manager) owedDir() string           { return filepath.Join(m.opts.CacheDir, "owed") }
func (m *Manager) owedFile(id string) string { return filepath.Join(m.owedDir(), id+".json") }

// Owe takes over the teardown of a pod, of which cause says why it failed. It may be forgotten then, and its namespace be
// unpinned.
func (m *Manager) Owe(p Pod, cause error) error {
	if _, err := cniArgs(p); err != nil {
		return err
	}
	d := &debt{Pod: p, Since: time.Now().Round(time.Second), Error: cause.Error()}
	if m.claims.Has(p.ID) {
		d.PortsBoot = m.boot
	}
	if err := m.keepNamespace(&d.Pod); err != nil {
		return fmt.Errorf("%s: keep its namespace: %w", p, err)
	}
	data, err := json.Marshal(d)
	if err == nil {
		err = os.MkdirAll(m.owedDir(), 0o700)
	}
	if err == nil {
		err = file.Replace(m.owedFile(p.ID), data)
	}
	if err != nil {
		return fmt.Errorf("%s: note that its network is to be released: %w", p, err)
	}
	m.log.Warn("the network of a pod could not be released; the pod is let go, and it is tried again in the background", "pod", p.String(), "error", cause)
	m.repay(d, m.owedFirst)
	return nil
}

// keepNamespace pins the namespace of a pod at a place that does not go with the pod: plugins find there what they have to
// remove outside.
func (m *Manager) keepNamespace(p *Pod) error {
	if m.opts.NamespaceDir == "" || !Pinned(p.NetNS) {
		return nil
	}
	kept := namespace{path: filepath.Join(m.opts.NamespaceDir, p.ID)}
	if err := kept.pin(p.NetNS); err != nil && !errors.Is(err, errdefs.ErrAlreadyExists) {
		return err
	}
	p.NetNS = kept.path
	return nil
}

// Owed lists the teardowns that are still to be done, oldest first.
func (m *Manager) Owed() []Owed {
	m.owed.mu.Lock()
	defer m.owed.mu.Unlock()
	var all []Owed
	for _, d := range m.owed.all {
		all = append(all, Owed{d.Pod.String(), d.Since, d.tries, d.Error})
	}
	slices.SortFunc(all, func(a, b Owed) int { return cmp.Or(a.Since.Compare(b.Since), strings.Compare(a.Pod, b.Pod)) })
	return all
}

// owes tells whether a pod's teardown is on the list.
func (m *Manager) owes(id string) bool {
	m.owed.mu.Lock()
	defer m.owed.mu.Unlock()
	return m.owed.all[id] != nil
}

// takeUpOwed goes on with what an earlier daemon owed.
func (m *Manager) takeUpOwed() {
	entries, err := os.ReadDir(m.owedDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("networks of pods that an earlier daemon could not release are not released", "error", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		data, err := readBounded(m.owedFile(id))
		var d debt
		if err == nil {
			err = json.Unmarshal(data, &d)
		}
		if err != nil || d.Pod.ID != id {
			// A power cut. The name says whose it is, and that is what plugins go by.
			m.log.Warn("what is owed to a pod is torn", "file", m.owedFile(id), "error", err)
			d = debt{Pod: Pod{ID: id}, Since: time.Now()}
		}
		if d.PortsBoot == m.boot {
			m.keepPorts(d.Pod)
		}
		m.repay(&d, 0)
	}
	m.unpinStrays()
}

// unpinStrays releases namespaces that nothing is owed for: a daemon was killed before it could note it.
func (m *Manager) unpinStrays() {
	if m.opts.NamespaceDir == "" {
		return
	}
	err := os.MkdirAll(m.opts.NamespaceDir, 0o700)
	entries, lerr := os.ReadDir(m.opts.NamespaceDir)
	if err := errors.Join(err, lerr); err != nil {
		m.log.Warn("namespaces of pods that cannot be released cannot be kept", "error", err)
	}
	for _, e := range entries {
		if m.owes(e.Name()) {
			continue
		}
		if err := Unpin(filepath.Join(m.opts.NamespaceDir, e.Name())); err != nil {
			m.log.Warn("the namespace of a pod that is gone stays", "error", err)
		}
	}
}

// repay tries after a while, and again until it succeeds or the manager is closed. A plugin that runs then is not killed for
// it: the next daemon waits for it.
func (m *Manager) repay(d *debt, wait time.Duration) {
	m.owed.mu.Lock()
	defer m.owed.mu.Unlock()
	if m.owed.all[d.Pod.ID] != nil {
		return
	}
	m.owed.all[d.Pod.ID] = d
	go func() {
		for done := false; !done; wait = min(max(2*wait, m.owedFirst), owedLast) {
			select {
			case <-m.stop:
				return
			case <-time.After(wait):
				done = m.tryOwed(d)
			}
		}
	}()
}

// tryOwed tells whether the teardown is done, and nothing is left of it.
func (m *Manager) tryOwed(d *debt) bool {
	ctx, cancel := context.WithTimeout(context.Background(), owedTime)
	defer cancel()
	err := m.Teardown(ctx, d.Pod)
	if err == nil && m.opts.NamespaceDir != "" {
		err = Unpin(filepath.Join(m.opts.NamespaceDir, d.Pod.ID))
	}
	if err == nil {
		if err = os.Remove(m.owedFile(d.Pod.ID)); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
	}
	m.owed.mu.Lock()
	defer m.owed.mu.Unlock()
	d.tries++
	if err != nil {
		d.Error = err.Error()
		m.log.Warn("the network of a pod that is gone cannot be released yet", "pod", d.Pod.String(), "since", d.Since, "tries", d.tries, "error", err)
		return false
	}
	delete(m.owed.all, d.Pod.ID)
	m.log.Info("the network of a pod that is gone is released", "pod", d.Pod.String(), "since", d.Since, "tries", d.tries)
	return true
}

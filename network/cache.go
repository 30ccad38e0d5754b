package network

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
)

// attachment is a file of libcni's cache: one network that one pod was added to.
type attachment struct {
	file     string
	id       string
	conflist *conflist // nil if the file is torn, or has no configuration that can be used
	netns    string
	args     [][2]string
	caps     map[string]any
}

// attachments reads the cache. A power cut leaves files of no bytes, or of some (containernetworking/cni#1055): these
// still have the pod's id in their names.
func (m *Manager) attachments() ([]attachment, error) {
	return m.attachmentsOf(func(string) bool { return true })
}

// attachmentsOf reads those of some pods. Of others it reads no more than the names.
func (m *Manager) attachmentsOf(pick func(id string) bool) ([]attachment, error) {
	names, err := namesIn(m.resultsDir())
	if err != nil {
		return nil, fmt.Errorf("results of plugins: %w", err)
	}
	var all []attachment
	for _, name := range names {
		_, id, ok := splitCacheName(name)
		if !ok || !pick(id) {
			continue
		}
		a := attachment{file: filepath.Join(m.resultsDir(), name), id: id}
		if st, err := os.Lstat(a.file); err == nil && !st.Mode().IsRegular() {
			continue
		}
		err := a.read()
		if errors.Is(err, os.ErrNotExist) {
			continue // its pod has just been torn down
		}
		if err != nil {
			m.log.Warn("cached result of a plugin cannot be used", "file", a.file, "error", err)
		}
		all = append(all, a)
	}
	return all, nil
}

// namesIn lists a directory, in no order; there are none in one that does not exist.
func namesIn(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close() //nolint:errcheck // opened for reading
	return d.Readdirnames(-1)
}

// splitCacheName reads the name of a file of the cache: NETWORK-ID-IFNAME, where only the network may have dashes in berth's
// use.
func splitCacheName(name string) (network, id string, ok bool) {
	parts := strings.Split(name, "-")
	if len(parts) < 3 {
		return "", "", false
	}
	return strings.Join(parts[:len(parts)-2], "-"), parts[len(parts)-2], true
}

// podsElsewhere counts the pods of other networks than this one, by the networks' names.
func (m *Manager) podsElsewhere(name string) map[string]int {
	entries, _ := os.ReadDir(m.resultsDir()) // not there: no pod yet
	count := map[string]int{}
	for _, e := range entries {
		if network, _, ok := splitCacheName(e.Name()); ok && network != name {
			count[network]++
		}
	}
	return count
}

func (m *Manager) resultsDir() string { return filepath.Join(m.opts.CacheDir, "results") }

func (a *attachment) read() error {
	data, err := readBounded(a.file)
	if err != nil {
		return err
	}
	var c struct {
		Kind           string         `json:"kind"`
		ContainerID    string         `json:"containerId"`
		Config         []byte         `json:"config"`
		NetNS          string         `json:"netns"`
		CNIArgs        [][2]string    `json:"cniArgs"`
		CapabilityArgs map[string]any `json:"capabilityArgs"`
	}
	if err := json.Unmarshal(data, &c); err != nil {
		return err
	}
	if c.Kind != libcni.CNICacheV1 || c.ContainerID != a.id {
		return fmt.Errorf("kind %q, container %q", c.Kind, c.ContainerID)
	}
	list, err := parseConflist(c.Config, nil)
	if err != nil {
		return err
	}
	list.file = a.file
	a.conflist, a.netns, a.args, a.caps = list, c.NetNS, c.CNIArgs, c.CapabilityArgs
	return nil
}

// cached are the configurations that a pod was added with, as far as the cache can be read.
func (m *Manager) cached(id string) ([]*conflist, error) {
	all, err := m.attachmentsOf(func(of string) bool { return of == id })
	if err != nil {
		return nil, err
	}
	var lists []*conflist
	for _, a := range all {
		if a.conflist != nil {
			lists = append(lists, a.conflist)
		}
	}
	return lists, nil
}

// dropTornCache removes a cached result that cannot be read, so that DEL runs without one rather than not at all.
func (m *Manager) dropTornCache(c *conflist, rt *libcni.RuntimeConf) {
	if _, err := m.cni.GetNetworkListCachedResult(c.NetworkConfigList, rt); err == nil {
		return
	}
	file := filepath.Join(m.resultsDir(), c.Name+"-"+rt.ContainerID+"-"+rt.IfName)
	m.log.Warn("cached result of a plugin is torn and dropped", "file", file)
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		m.log.Warn("cached result of a plugin stays", "error", err)
	}
}

// GC tears down what was set up for pods that are not in live, as far as their intents and cached results tell, and gives back
// addresses of default networks that are none of theirs; and, where the networks are exclusive, has the plugins release what belongs to no
// pod in live (the verb GC of CNI 1.1). No Setup of a pod that is not in live may be under way.
func (m *Manager) GC(ctx context.Context, live []string) error {
	all, err := m.attachments()
	if err != nil {
		return err
	}
	keep := func(id string) bool { return slices.Contains(live, id) || m.owes(id) }
	errs := []error{m.collectIntents(ctx, keep)}
	for _, a := range all {
		if _, err := os.Lstat(a.file); keep(a.id) || errors.Is(err, os.ErrNotExist) {
			continue // torn down by what was intended, perhaps
		}
		if err := m.collect(ctx, a); err != nil {
			errs = append(errs, fmt.Errorf("network of lost pod %s: %w", a.id, withContext(ctx, err)))
			live = append(slices.Clone(live), a.id) // its addresses are not free yet
		}
	}
	return errors.Join(append(errs, m.collectLeases(keep), m.collectByPlugins(ctx, live))...)
}

func (m *Manager) collect(ctx context.Context, a attachment) error {
	if a.conflist == nil {
		// The file says no more than the id; what else there is to know is on the node, if not now then later.
		if _, err := m.current(); err != nil {
			return nil //nolint:nilerr // the reason is shown by Ready
		}
		if err := m.Teardown(ctx, Pod{ID: a.id}); err != nil {
			return err
		}
		if err := os.Remove(a.file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	rt := &libcni.RuntimeConf{ContainerID: a.id, IfName: IfName, Args: a.args, CapabilityArgs: a.caps}
	if Pinned(a.netns) {
		rt.NetNS = a.netns
	}
	m.dropTornCache(a.conflist, rt)
	if err := m.cni.DelNetworkList(ctx, a.conflist.NetworkConfigList, rt); err != nil {
		return fmt.Errorf("network %s: %w", a.conflist.Name, err)
	}
	return nil
}

func (m *Manager) collectByPlugins(ctx context.Context, live []string) error {
	if !m.opts.ExclusiveNetworks {
		return nil
	}
	c, err := m.current()
	if err != nil {
		return nil //nolint:nilerr // the reason is shown by Ready; there is nothing to run
	}
	args := &libcni.GCArgs{ValidAttachments: []cnitypes.GCAttachment{}}
	for _, id := range live {
		args.ValidAttachments = append(args.ValidAttachments, cnitypes.GCAttachment{ContainerID: id, IfName: IfName})
	}
	if err := m.cni.GCNetworkList(ctx, c.NetworkConfigList, args); err != nil {
		return fmt.Errorf("network %s: %w", c.Name, withContext(ctx, err))
	}
	return nil
}
